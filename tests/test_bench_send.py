"""The bench of the way out runs, and every image that either sender sends is answered with Success."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

BENCH = Path(__file__).parents[1] / "scripts" / "bench_send"


def test_ours_is_measured_beside_stock(tool: Callable[[str], str]) -> None:
    tool("storescp")
    command = [sys.executable, str(BENCH), "--images", "5", "--pixels", "64", "--rounds", "1", "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert told.returncode == 0, told.stderr
    stock, ours = json.loads(told.stdout)["rows"]
    assert (stock["sender"], stock["of_stock"], ours["sender"]) == ("stock", 1.0, "ours")
    assert min(stock["images_per_s"], ours["images_per_s"], ours["cpu_ms_per_image"]) > 0
