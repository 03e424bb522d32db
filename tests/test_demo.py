"""The README's first command, after installing: the main job runs for real and is judged by the truth."""

from __future__ import annotations

import json
import subprocess
import sys

import pydicom

from salsa_node.pipelines import DEMO_NOTICE


def test_the_demonstration_finds_what_it_must_and_says_where_everything_lies(tmp_path):
    command = [sys.executable, "-m", "salsa_node", "demo", "--output", str(tmp_path / "out"), "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert told.returncode == 0, told.stdout + told.stderr
    outcome = json.loads(told.stdout)
    large = [row for row in outcome["lesions"] if (row["diameter_mm"] or 0) >= 10]
    assert large
    assert all(row["finding"] for row in large)
    kinds = sorted(path.rsplit("/", 1)[-1].split("-")[0] for path in outcome["files"])
    assert {"SEG", "SR", "OT", "DOC", "KO", "overlay.png"} == set(kinds)
    for path in outcome["files"]:
        if path.endswith(".dcm"):
            ds = pydicom.dcmread(path)
            assert DEMO_NOTICE.replace("–", "-") in ds.SeriesDescription
    assert (tmp_path / "out" / "study" / "truth.json").is_file()
    # the same folder again: a new study, the node goes on with its record
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert again.returncode == 0, again.stdout + again.stderr
