"""The bench of the door runs, and every image that it sends is answered with Success (the sender asserts it)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "scripts" / "bench_receive"


def test_every_receiver_is_measured_beside_textbook(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "--small", "--rounds", "1", "--json", "--places", "disk", "--folder",
               str(tmp_path), "--receivers", "textbook,plain,fast"]  # fmt: skip
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert told.returncode == 0, told.stderr
    rows = json.loads(told.stdout)["rows"]
    assert [(row["receiver"], row["associations"]) for row in rows] == [
        (receiver, at_once) for receiver in ("textbook", "plain", "fast") for at_once in (1, 4, 10)
    ]
    for row in rows:
        assert row["images_per_s"] > 0
        assert (row["of_textbook"] == 1.0) or row["receiver"] != "textbook"
