"""Our sliding window against nnU-Net's predictor: the architectures that are asked for, both precisions, mirrored too.

The bounds that are promised: on a CPU, float32 and bfloat16, the logits of one pass at a time are equal bit for bit
(mean absolute difference 0) and with them the labels; batches differ by rounding alone. Each bound is also held
against windows that were broken on purpose.
"""

from __future__ import annotations

import contextlib
import io
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from salsa_node.errors import ConfigError, PipelineError
from salsa_node.models import ModelFolder
from salsa_node.pipelines import sliding_window
from salsa_node.pipelines.device import Placement
from salsa_node.pipelines.nnunet import Network

BENCH = Path(__file__).parents[1] / "scripts" / "bench_network"
CPU = torch.device("cpu")
NETWORKS = ("PlainConvUNet", "ResEnc-L")  # of three stages and few features: the same layers, joined the same way
DICE = 0.999  # least, of each structure
BATCHED = 1e-3  # mean absolute difference of logits that were computed in batches, as a share of their mean size


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    build = runpy.run_path(str(BENCH))["build"]
    place = tmp_path_factory.mktemp("networks")
    for name in NETWORKS:
        build(name, place / name, small=True)
    return {name: ModelFolder(place / name) for name in NETWORKS}


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """Two patches along each of two axes, an odd number of voxels less than one along the third."""
    coarse = np.random.default_rng(5).normal(size=(1, 1, 6, 10, 10)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), (23, 40, 40), mode="trilinear")
    return smooth[0]


def slid(folder: ModelFolder, image: torch.Tensor, *, precision: str, mirroring: bool, engine: str) -> torch.Tensor:
    network = Network(folder, CPU, mirroring=mirroring, precision=precision, engine=engine)
    with contextlib.redirect_stdout(io.StringIO()):
        return network.logits(image).float()


def dice(one: torch.Tensor, other: torch.Tensor) -> list[float]:
    """Of each class, background too."""
    a, b = one.argmax(0), other.argmax(0)
    return [float(2 * ((a == n) & (b == n)).sum() / ((a == n).sum() + (b == n).sum())) for n in range(len(one))]


@pytest.mark.parametrize(
    ("name", "precision", "mirroring"),
    [
        ("PlainConvUNet", "float32", True),
        ("PlainConvUNet", "bfloat16", False),
        ("ResEnc-L", "float32", False),
        ("ResEnc-L", "bfloat16", True),
    ],
)
def test_the_logits_are_nnunets_bit_for_bit(
    folders: dict[str, ModelFolder], image: torch.Tensor, name: str, precision: str, mirroring: bool
) -> None:
    expected = slid(folders[name], image, precision=precision, mirroring=mirroring, engine="reference")
    found = slid(folders[name], image, precision=precision, mirroring=mirroring, engine="own")
    assert expected.std() > 0.01
    assert min(int((expected.argmax(0) == n).sum()) for n in range(len(expected))) > 500
    assert torch.equal(found, expected)
    assert min(dice(found, expected)) >= DICE


def test_bfloat16_is_another_way_to_multiply(folders: dict[str, ModelFolder], image: torch.Tensor) -> None:
    """Else the equality under it would say nothing."""
    full, half = (
        slid(folders["PlainConvUNet"], image, precision=precision, mirroring=False, engine="own")
        for precision in ("float32", "bfloat16")
    )
    assert not torch.equal(full, half)
    assert (full - half).abs().mean() < 0.05 * full.abs().mean()


@pytest.mark.parametrize(("name", "bfloat16"), [("PlainConvUNet", True), ("ResEnc-L", False)])
def test_batches_stay_within_their_bound(
    folders: dict[str, ModelFolder], image: torch.Tensor, name: str, bfloat16: bool
) -> None:
    network = Network(folders[name], CPU, mirroring=True, precision="bfloat16" if bfloat16 else "float32")
    alone, batched = (
        sliding_window.logits(
            network.module, image, network.patch_size, 2, Placement(CPU, CPU),
            mirror_axes=(2,), bfloat16=bfloat16, together=together,
        ).float()
        for together in (1, 3)
    )  # fmt: skip
    assert (alone - batched).abs().mean() <= BATCHED * alone.abs().mean()
    assert min(dice(alone, batched)) >= DICE


def flat(size: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """As if every voxel of a patch weighed the same."""
    return torch.full(size, 10.0, dtype=torch.half, device=device)


def one_patch_more(steps: Callable[..., list[list[int]]]) -> Callable[..., list[list[int]]]:
    """Patches that lie closer than they were asked to."""

    def broken(*arguments: object) -> list[list[int]]:
        return [sorted({*axis, axis[-1] // 2}) for axis in steps(*arguments)]

    return broken


def test_a_broken_window_is_noticed(
    folders: dict[str, ModelFolder], image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = slid(folders["PlainConvUNet"], image, precision="float32", mirroring=True, engine="reference")
    flips = sliding_window.mirrorings
    breakages = {
        "centre_weights": flat,
        "compute_steps_for_sliding_window": one_patch_more(sliding_window.compute_steps_for_sliding_window),
        "mirrorings": lambda axes: [flip for flip in flips(axes) if 2 not in flip],
    }
    for name, broken in breakages.items():
        with monkeypatch.context() as patch:
            patch.setattr(sliding_window, name, broken)
            found = slid(folders["PlainConvUNet"], image, precision="float32", mirroring=True, engine="own")
        assert not torch.equal(found, expected), name
        assert (found - expected).abs().mean() > BATCHED * expected.abs().mean(), name
        assert min(dice(found, expected)) < DICE, name


def test_patches_lie_as_far_apart_as_they_are_told_to(folders: dict[str, ModelFolder]) -> None:
    """At nnU-Net's own half of a patch there would be three."""
    image = torch.randn((1, 32, 32, 56), generator=torch.Generator().manual_seed(2))
    ours, theirs = (
        Network(folders["PlainConvUNet"], CPU, tile_step=1.0, precision="float32", engine=engine)
        for engine in ("own", "reference")
    )
    seen: list[int] = []
    ours.module.register_forward_pre_hook(lambda _, patches: seen.append(len(patches[0])))
    found = ours.logits(image)
    assert seen == [1, 1]
    assert torch.equal(found, theirs.logits(image))


def test_what_the_network_answers_comes_back_where_it_was_seen() -> None:
    """By a network that answers with what it sees; patches that are empty in one channel are not so in the other."""
    image = torch.zeros((2, 13, 21, 60))
    image[1, ..., 20:40], image[1, ..., 40:] = 1, -2
    image[1, 6, 10, :] = torch.linspace(-1, 1, 60)
    asked: list[int] = []

    def same(patches: torch.Tensor) -> torch.Tensor:
        asked.append(len(patches))
        return patches.clone()

    found = sliding_window.logits(same, image, (8, 8, 8), 2, Placement(CPU, CPU), mirror_axes=(0, 2))  # type: ignore[arg-type]
    torch.testing.assert_close(found.float(), image, atol=2e-3, rtol=2e-3)
    assert sum(asked) < 4 * len(list(sliding_window.tiles((13, 21, 60), (8, 8, 8), 0.5))), "the empty ones are one"


def test_the_weights_of_a_patch_are_made_once_for_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain of more networks than nnU-Net keeps the weights of."""
    made: list[tuple[int, ...]] = []
    gaussian = sliding_window.compute_gaussian

    def counted(size: tuple[int, int, int], **settings: object) -> torch.Tensor:
        made.append(size)
        return gaussian(size, **settings)

    sliding_window.centre_weights.cache_clear()
    monkeypatch.setattr(sliding_window, "compute_gaussian", counted)
    sizes = [(4, 4, side) for side in (4, 6, 8, 10)]
    for size in sizes * 2:
        image = torch.arange(4.0 * 4 * 12).reshape(1, 4, 4, 12)
        sliding_window.logits(torch.nn.Identity(), image, size, 1, Placement(CPU, CPU))
    assert made == sizes


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own compiler imports it
def test_a_compiled_network_answers_as_it_did(
    folders: dict[str, ModelFolder], image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    asked: list[int] = []
    compile_network = torch.compile

    def noted(network: torch.nn.Module, **settings: object) -> object:
        compiled.append(network)
        fast = compile_network(network, **settings)
        return lambda patches: asked.append(len(patches)) or fast(patches)

    monkeypatch.setattr(torch, "compile", noted)
    network = Network(folders["PlainConvUNet"], CPU, precision="float32", engine="compiled")
    found, again = network.logits(image).float(), network.logits(image).float()
    expected = slid(folders["PlainConvUNet"], image, precision="float32", mirroring=False, engine="own")
    assert compiled == [network.module], "once, for both cases"
    assert len(asked) >= 8, "and each patch goes through it"
    assert torch.equal(found, again)
    assert (found - expected).abs().mean() <= BATCHED * expected.abs().mean()
    assert min(dice(found, expected)) >= DICE


def test_a_network_that_cannot_be_compiled_says_what_to_do(
    folders: dict[str, ModelFolder], image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such instruction")

    compile_network = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: compile_network(network, backend=broken))
    network = Network(folders["PlainConvUNet"], CPU, precision="float32", engine="compiled")
    with pytest.raises(PipelineError, match=r'could not compile the network .*set engine = "own"'):
        network.logits(image)


def test_without_a_compiler_nothing_is_loaded(
    folders: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler; install g\+\+"):
        Network(folders["PlainConvUNet"], CPU, engine="compiled")
