"""The bench of one case says what its networks take and what is around them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench_case"


def test_a_case_is_told_by_stage_and_larger_networks_leave_its_lesions() -> None:
    command = [sys.executable, str(BENCH), "--small", "--full-size", "--rounds", "1", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for seconds in (told["wall_s"], told["cpu_s"]):
        stages = {stage: value for stage, value in seconds.items() if stage != "case"}
        assert set(stages) == {"reading", "networks", "around them", "measuring", "writing", "encoding"}
        assert seconds["case"] == pytest.approx(sum(stages.values()), abs=0.01)
        assert min(stages.values()) >= 0
    assert (told["device"], told["full_size"]) == ("the CPU", True)
    assert told["tflop"] > 0
    assert 0 < told["share_of_rate"] < 1
    assert told["lesions"] > 0, "those of the demo's networks; random ones find noise"


def test_a_device_that_is_not_there_is_refused() -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--device", "tpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "found 'tpu'" in done.stderr
