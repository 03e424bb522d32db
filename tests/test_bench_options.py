"""What no bench measures: no times of something, and names that it does not know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize(
    ("bench", "asked", "words"),
    [
        ("bench_receive", ["--receivers", "fast,slow"], "textbook, plain, fast, storescp, orthanc are known"),
        ("bench_receive", ["--places", "moon"], "disk, memory are known; found 'moon'"),
        ("bench_send", ["--images", "0"], "a whole number above 0 is expected; found '0'"),
        ("bench_volume", ["--rounds", "0"], "a whole number above 0"),
        ("bench_results", ["--rounds", "-1"], "a whole number above 0"),
        ("bench_queue", ["--studies", "0"], "a whole number above 0"),
        ("bench_scale", ["--limit-mib", "-5"], "a whole number above 0"),
        ("bench_node", ["--ways", "ours,theirs"], "upstream, ours are known; found 'theirs'"),
        ("bench_node", ["--studies", "1.5"], "found '1.5'"),
        ("bench_network", ["--device", "tpu"], "device must be auto, cpu or cuda:N; found 'tpu'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(bench: str, asked: list[str], words: str) -> None:
    command = [sys.executable, str(SCRIPTS / bench), *asked]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert told.returncode == 2
    assert words in " ".join(told.stderr.split())
    assert "Traceback" not in told.stderr
