"""The bench of commands calls each of them and compares it with its peer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "scripts" / "bench_commands"


def test_every_command_is_called_and_compared() -> None:
    command = [sys.executable, str(BENCH), "--studies", "3", "--rounds", "1", "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    rows = json.loads(told.stdout)["rows"]
    assert [row["command"] for row in rows[1:]] == [
        "--version", "studies (a table of 50)", "studies --json", "show", "stats", "logs"
    ]  # fmt: skip
    assert rows[0]["ratio"] == 1.0
    assert all(0 < row["best_s"] <= row["median_s"] for row in rows)
