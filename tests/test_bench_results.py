"""The bench of the result objects runs, and both sides show the same voxels (each child asserts it)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "scripts" / "bench_results"


def test_every_way_is_measured_beside_its_peer():
    command = [sys.executable, str(BENCH), "--small", "--rounds", "1", "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert told.returncode == 0, told.stderr
    rows = json.loads(told.stdout)["rows"]
    assert [(row["lesions"], row["way"]) for row in rows] == [
        (lesions, way) for lesions in (8, 60) for way in ("ours", "stock", "ours each", "stock each")
    ]
    for ours, stock in zip(rows[::2], rows[1::2], strict=True):
        assert ours["frames"] == stock["frames"] > 0
        assert 0 < ours["build_s"] < ours["seconds"]
        assert stock["seconds_ratio"] == stock["bytes_ratio"] == 1.0
        assert ours["seconds_ratio"] == round(ours["seconds"] / stock["seconds"], 2)
