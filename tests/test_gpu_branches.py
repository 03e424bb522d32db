"""The ways that only a GPU takes, on a pretended one: what lies where, in what numbers, and how much at once."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pretended_gpu import DEVICE, PretendedGpu, lies_there, pretended_gpu

from salsa_node.models import ModelFolder
from salsa_node.phantom import Recipe, make
from salsa_node.pipelines import PipelineSettings, load, sliding_window
from salsa_node.pipelines.device import Placement
from salsa_node.pipelines.nnunet import Network

CPU = torch.device("cpu")
BENCH = Path(__file__).parents[1] / "scripts" / "bench_network"
PASSES = 3  # that the pretended memory has room for


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    forget_weights()
    with pretended_gpu(PASSES) as pretended:
        yield pretended
    forget_weights()


def forget_weights() -> None:
    """Those that were made before, or lie there."""
    sliding_window.centre_weights.cache_clear()
    sliding_window.compute_gaussian.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    place: Path = tmp_path_factory.mktemp("networks") / "plain"
    runpy.run_path(str(BENCH))["build"]("PlainConvUNet", place, small=True)
    return ModelFolder(place)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).normal(size=(1, 20, 40, 60)).astype(np.float32))


def test_the_pretended_gpu_refuses_what_a_real_one_does(gpu: PretendedGpu) -> None:
    here = torch.arange(6.0)
    there = here.to(DEVICE)
    assert (here.device, there.device, there[2:].half().device) == (CPU, DEVICE, DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="pinned"):
        there.pin_memory()
    assert there.cpu().numpy().tolist() == here.numpy().tolist()
    assert (there * 2).cpu().device == CPU
    assert torch.zeros(3, device=DEVICE).device == DEVICE
    network = torch.nn.Linear(6, 2).to(DEVICE)
    assert network(there).device == DEVICE
    with pytest.raises(RuntimeError, match="same device"):
        network(here)
    assert network.to(CPU)(here).device == CPU


@pytest.mark.parametrize("results", [DEVICE, CPU])
def test_the_window_is_slid_there_in_half_precision_and_in_batches(
    gpu: PretendedGpu, folder: ModelFolder, image: torch.Tensor, results: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(folder, DEVICE, mirroring=True)
    network._predictor.allowed_mirroring_axes = (0, 2)
    seen: list[tuple[int, bool]] = []
    network.module.register_forward_pre_hook(lambda _, given: seen.append((len(given[0]), lies_there(given[0]))))
    places = {DEVICE: (Placement(DEVICE, results),) * 2, CPU: (Placement(CPU, CPU),)}
    monkeypatch.setattr("salsa_node.pipelines.nnunet.placements", places.get)
    found = network.logits(image)
    assert found.device == results
    assert network.ran_on == str(Placement(DEVICE, results))
    assert gpu.precisions == ["cuda"]
    batches, there = zip(*seen, strict=True)
    assert sum(batches) % 4 == 0, "each patch is seen in four ways"
    assert batches[0] == 1, "the first is measured"
    assert set(batches[1:-1]) == {PASSES}
    assert all(there)
    assert gpu.page_locked == (1 if results == DEVICE else len(batches)), "the image once, or each batch of it"
    full = Network(folder, CPU, mirroring=True, precision="float32")
    full._predictor.allowed_mirroring_axes = (0, 2)
    expected = full.logits(image)
    assert not torch.equal(found.cpu(), expected), "else it was not half precision"
    apart = (found.cpu().float() - expected.float()).abs().mean()
    assert apart < 0.01 * expected.float().abs().mean()


def test_a_case_goes_there_and_comes_back(gpu: PretendedGpu) -> None:
    """All networks of the demo, the step from one to the next and the labels on the scan's own voxels."""
    ct = make(Recipe(50, (24, 48, 48), (8.0, 6.5, 6.5))).ct
    there, here = (load("demo", PipelineSettings(device)).segment(ct) for device in ("auto", "cpu"))
    assert (there.provenance.device, here.provenance.device) == ("cuda:0", "cpu")
    assert set(gpu.precisions) == {"cuda"}
    assert there.organ is not None
    assert here.organ is not None
    for one, other in ((there.organ, here.organ), (there.lesions, here.lesions)):
        a, b = one.labels > 0, other.labels > 0
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.99
