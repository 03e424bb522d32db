"""The proof of the whole node, in short: kill -9 of node and worker, Orthanc as the PACS, one result each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_what_is_killed_on_the_way_ends_as_one_result_in_the_pacs(tmp_path: Path, tool: Callable[[str, str], str]):
    tool("Orthanc", "orthanc")
    command = [sys.executable, "scripts/chaos_node", "--kills", "3", "--studies", "2", "--longest-s", "5", "--json"]
    told = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=1700
    )
    assert told.returncode == 0, told.stderr[-3000:]
    figures = json.loads(told.stdout)
    assert figures["kills"] == 3
    assert figures["studies"] >= 2
    assert figures["images"] == 16 * figures["studies"]
