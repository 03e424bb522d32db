"""The bench of resampling runs, and both ways come to the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench_resampling"


def test_both_ways_come_to_the_same() -> None:
    command = [sys.executable, str(BENCH), "--small", "--rounds", "1", "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    rows = json.loads(told.stdout)["rows"]
    assert [row["way"] for row in rows] == ["nnU-Net", "ours"] * 2
    assert [row["task"] for row in rows] == ["CT, order 3"] * 2 + ["scores, order 1"] * 2
    for theirs, ours in (rows[:2], rows[2:]):
        assert ours["sum"] == pytest.approx(theirs["sum"], rel=1e-6)
        assert theirs["ratio"] == 1.0


def test_no_round_is_refused() -> None:
    told = subprocess.run([sys.executable, str(BENCH), "--rounds", "0"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "--rounds is at least 1; found 0" in told.stderr
