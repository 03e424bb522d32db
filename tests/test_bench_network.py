"""The bench of the networks runs, and our sliding window answers with nnU-Net's labels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "scripts" / "bench_network"


def test_both_networks_are_measured_beside_nnunets_predictor():
    command = [sys.executable, str(BENCH), "--small", "--device", "cpu", "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert told.returncode == 0, told.stderr
    result = json.loads(told.stdout)
    assert [row["network"] for row in result["networks"]] == ["PlainConvUNet", "ResEnc-L"]
    for row in result["networks"]:
        assert list(row["ways"]) == ["nnU-Net", "ours"]
        assert row["labels_equal"] > 0.999
        assert row["logit_difference"] < 0.001 * row["logit_size"]
        for one in row["ways"].values():
            assert one["patches"] == 2
            assert not one["whole"]
            assert one["volume_s"] > one["patch_s"] > 0
    assert result["bfloat16"]["liver_dice"] > 0.98
