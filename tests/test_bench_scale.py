"""The bench of growth runs, and 1,200 slices stay within the memory that is promised for them."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench_scale"


def told_by(*arguments: str) -> dict:
    command = [sys.executable, str(BENCH), *arguments]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


def test_every_axis_is_measured():
    result = told_by("--small", "--json")
    assert [(row["axis"], row["size"]) for row in result["rows"]] == [
        ("slices", 25), ("slices", 50), ("matrix", 64), ("lesions", 0), ("lesions", 3), ("queued", 5), ("queued", 20),
    ]  # fmt: skip
    assert {axis: len(between) for axis, between in result["growth"].items()} == {
        "slices": 1, "matrix": 0, "lesions": 1, "queued": 1,
    }  # fmt: skip
    assert [row["lesions"] for row in result["rows"] if row["axis"] == "lesions"] == [0, 3]


def test_growth_is_an_exponent():
    growth = runpy.run_path(str(BENCH))["growth"]
    rows = [{"size": size, "cpu_s": 3 * size**2, "peak_mib": 7.0} for size in (10, 100)]
    assert growth(rows) == [{"cpu_s": pytest.approx(2.0), "peak_mib": 0.0}]
    assert growth([{"size": 0, "cpu_s": 1.0}, {"size": 8, "cpu_s": 2.0}]) == [{}]


def test_1200_slices_fit_into_memory(tmp_path: Path):
    """A quarter of 512 x 512 in each slice, so a quarter of 8 GiB less the 1.5 of libraries and networks, and those.

    The system grants no more. Logits of two classes for every voxel, as nnU-Net brings them back, would be beyond it.
    """
    shape = (1200, 256, 256)
    granted_mib = str((8192 - 1536) // 4 + 1536)
    runpy.run_path(str(BENCH))["write"](tmp_path, shape, small=True)
    found = told_by("--folder", str(tmp_path), "--limit-mib", granted_mib, "--child", *map(str, shape), "found")
    assert found["lesions"] > 0


def test_the_limit_is_one(tmp_path: Path):
    """A process that may take less than its libraries and one study need ends, and says of what."""
    shape = (100, 256, 256)
    runpy.run_path(str(BENCH))["write"](tmp_path, shape, small=True)
    command = [sys.executable, str(BENCH), "--folder", str(tmp_path), "--limit-mib", "320"]
    told = subprocess.run([*command, "--child", *map(str, shape), "0"], capture_output=True, text=True, check=False)
    assert told.returncode != 0
    assert "memory" in told.stderr.lower()
