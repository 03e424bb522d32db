"""The bench of the networks runs, and our sliding window answers with nnU-Net's labels."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench_network"
WANTED = Namespace(device="cpu", small=True, whole=False, mirroring=False)


@pytest.fixture
def bench() -> ModuleType:
    loader = SourceFileLoader("bench_network", str(BENCH))
    spec = importlib.util.spec_from_loader("bench_network", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def in_this_process(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The bench without processes of its own: torch is imported once."""
    monkeypatch.setattr(bench, "matrix_rate_tflops", lambda _: 0.05)
    monkeypatch.setattr(bench, "in_a_process", lambda way, folder, wanted: bench.slid(way, folder, wanted))
    monkeypatch.setattr("salsa_node.pipelines.device.cpu_has_bfloat16", lambda: False)
    return bench


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # nnU-Net's own, of its loader
def test_both_networks_are_measured_beside_nnunets_predictor(
    in_this_process: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_network", "--small", "--device", "cpu", "--json"])
    in_this_process.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])  # nnU-Net prints before it
    assert [row["network"] for row in result["networks"]] == ["PlainConvUNet", "ResEnc-L"]
    for row in result["networks"]:
        assert list(row["ways"]) == ["nnU-Net", "ours"]
        assert row["labels_equal"] > 0.999
        assert row["logit_size"] > 0.01
        assert row["logit_difference"] < 0.001 * row["logit_size"]
        for one in row["ways"].values():
            assert one["patches"] == 2
            assert not one["whole"]
            assert one["volume_s"] > one["patch_s"] > 0
    assert result["bfloat16"] is None
    told = in_this_process.as_table(result)
    assert "bfloat16 is left out" in told
    assert [line.split()[0] for line in told.splitlines()[2::3]] == ["PlainConvUNet", "ResEnc-L", "bfloat16"]


def test_two_ways_that_differ_are_told_apart(bench: ModuleType, tmp_path: Path) -> None:
    import torch

    logits = torch.randn((2, 4, 5, 6), generator=torch.Generator().manual_seed(3))
    torch.save(logits, tmp_path / "nnU-Net.logits")
    torch.save(logits.flip(0), tmp_path / "ours.logits")
    found = bench.agreement(tmp_path)
    assert found["labels_equal"] == 0
    assert found["logit_difference"] > found["logit_size"]


def test_a_measurement_is_a_process_of_its_own(bench: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "PlainConvUNet"
    bench.build("PlainConvUNet", folder, small=True)
    told = bench.in_a_process("ours", folder, WANTED)
    assert told["patches"] == 2
    assert told["rate_tflops"] > 0
    assert told["peak_mib"] > 100


def test_bfloat16_is_measured_where_it_is_asked_for(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small liver whole, so that the networks have something to agree on."""
    monkeypatch.setattr(bench, "SMALL_PHANTOM", ((24, 48, 48), (8.0, 6.5, 6.5)))
    costs = bench.bfloat16(small=True)
    assert costs["voxels"] > 0
    assert costs["liver_dice"] > 0.98
    assert costs["float32_s"] > 0 < costs["bfloat16_s"]


def test_it_runs_from_the_command_line() -> None:
    told = subprocess.run([sys.executable, str(BENCH), "--help"], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "--bfloat16" in told.stdout
