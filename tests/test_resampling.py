"""nnU-Net's own resampling as matrix products: the same numbers, slab by slab, on whatever device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from pretended_gpu import DEVICE, pretended_gpu

from salsa_node.models import DEMO_STAGES as STAGES
from salsa_node.models import ModelFolder, demo_models_dir
from salsa_node.phantom import Recipe, make
from salsa_node.pipelines import resampling
from salsa_node.pipelines.nnunet import Network
from salsa_node.pipelines.resampling import Interpolation, OnDevice, fill, resampled, slabs

CPU = torch.device("cpu")
#: shapes and spacings before and after
WAYS = {
    "finer and coarser": ((20, 31, 40), (33, 25, 57), (2.0, 1.0, 1.0), (1.2, 1.24, 0.7)),
    "as many slices": ((11, 30, 30), (11, 44, 20), (5.0, 0.8, 0.8), (5.0, 0.55, 1.2)),
    "thick slices made thin": ((9, 30, 33), (40, 20, 20), (8.0, 1.0, 1.0), (1.8, 1.5, 1.65)),
    "thin slices made thick": ((40, 20, 20), (9, 30, 30), (1.8, 1.5, 1.65), (8.0, 1.0, 1.0)),
    "one slice": ((1, 30, 30), (3, 10, 60), (2.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
}


def asked(order: int, apart: bool | None, **more: object) -> dict[str, Any]:
    told = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": apart} | more
    return {"resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": told}


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "_SLAB_BYTES", 8 * 7 * 40 * 50)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("apart", [False, None, True])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_numbers_are_nnunets(order: int, apart: bool | None, way: str) -> None:
    before, after, spacing_mm, new_spacing_mm = WAYS[way]
    data = np.random.default_rng(2).normal(size=(2, *before)).astype(np.float32)
    data[0, :, :4] = 30.0  # an edge, beyond which a spline would shoot
    how = Interpolation.of(asked(order, apart), "data", spacing_mm, new_spacing_mm)
    assert how is not None
    expected = resample_data_or_seg_to_shape(
        data, after, spacing_mm, new_spacing_mm, order=order, order_z=0, force_separate_z=apart
    )
    found = resampled(data, after, how, CPU)
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6)


def test_the_highest_class_is_that_of_nnunets_scores() -> None:
    before, after, spacing_mm, new_spacing_mm = WAYS["finer and coarser"]
    scores = torch.from_numpy(np.random.default_rng(3).normal(size=(3, *before)).astype(np.float16))
    how = Interpolation.of(asked(1, None), "data", spacing_mm, new_spacing_mm)
    assert how is not None
    fine = resample_data_or_seg_to_shape(scores.float(), after, spacing_mm, new_spacing_mm, order=1)
    labels = np.full(after, 9, dtype=np.uint8)
    fill(labels, scores, how)
    np.testing.assert_array_equal(labels, fine.argmax(0))


def test_of_classes_that_score_alike_the_first_counts() -> None:
    scores = torch.from_numpy(np.random.default_rng(5).integers(0, 2, (4, 9, 30, 30))).half()
    labels = np.full((9, 30, 30), 9, dtype=np.uint8)
    fill(labels, scores, Interpolation(1, nearest=False))
    np.testing.assert_array_equal(labels, scores.numpy().argmax(0))


def test_slabs_follow_one_another_and_the_last_holds_what_is_left() -> None:
    volume = torch.arange(20.0 * 4 * 4).reshape(20, 4, 4)
    seen = [(at.start, at.stop, len(values)) for at, values in slabs(volume, (31, 4, 4), Interpolation(3, False), 8)]
    assert seen == [(0, 8, 8), (8, 16, 8), (16, 24, 8), (24, 31, 7)]


def test_what_lies_far_from_a_slab_is_not_looked_at() -> None:
    """So the cost of a slice does not grow with their number."""
    volume = torch.from_numpy(np.random.default_rng(4).normal(size=(200, 6, 6)))
    far = volume.clone()
    far[150:] = 1e15
    how = Interpolation(3, nearest=False)
    (_, expected), (_, found) = (next(slabs(one, (100, 6, 6), how, 10)) for one in (volume, far))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "other",
    [
        {"resampling_fn_data": "resample_torch_fornnunet"},
        {"resampling_fn_data_kwargs": {"is_seg": True, "order": 1}},
        {"resampling_fn_data_kwargs": {"order": 3, "order_z": 1, "force_separate_z": True}},
        {"resampling_fn_data_kwargs": {"order": 3, "memory": "little"}},
    ],
)
def test_what_is_asked_otherwise_is_nnunets_own_matter(other: dict[str, Any]) -> None:
    spacing_mm, new_spacing_mm = (5.0, 1.0, 1.0), (2.0, 1.5, 1.5)
    assert Interpolation.of(asked(3, None), "data", spacing_mm, new_spacing_mm) == Interpolation(3, nearest=True)
    assert Interpolation.of(asked(3, None) | other, "data", spacing_mm, new_spacing_mm) is None


def test_slices_kept_apart_along_another_axis_are_nnunets_own_matter() -> None:
    assert Interpolation.of(asked(3, None), "data", (1.0, 1.0, 5.0), (1.0, 1.0, 1.0)) is None


class Plans:
    """A configuration with a function of its own."""

    spacing = (1.0, 2.0, 3.0)

    def __init__(self, **told: Any) -> None:
        self.configuration = told

    def resampling_fn_data(self, data: Any, *_: object) -> str:
        return f"its own, of {data}"


def test_a_configuration_keeps_all_but_the_resampling_that_is_known_here() -> None:
    own = OnDevice(Plans(resampling_fn_data="resample_torch_fornnunet"), CPU)
    assert own.spacing == (1.0, 2.0, 3.0)
    assert own.resampling_fn_data("x", (2, 2, 2), (1, 1, 1), (2, 2, 2)) == "its own, of x"  # type: ignore[arg-type,comparison-overlap]


def test_where_the_device_has_no_room_the_cpu_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, spacing_mm, new_spacing_mm = WAYS["finer and coarser"]
    data = np.random.default_rng(2).normal(size=(1, *before)).astype(np.float32)
    asked_of: list[torch.device] = []

    def full(data: Any, shape: Sequence[int], how: Interpolation, device: torch.device) -> Any:
        asked_of.append(device)
        if device.type == "cuda":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return resampled(data, shape, how, device)

    monkeypatch.setattr(resampling, "resampled", full)
    with pretended_gpu(1):
        found = OnDevice(Plans(**asked(3, False)), DEVICE).resampling_fn_data(data, after, spacing_mm, new_spacing_mm)
    assert asked_of == [DEVICE, CPU]
    assert found.shape == (1, *after)


def test_where_the_device_has_no_room_the_cpu_looks_for_the_highest_class(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.from_numpy(np.random.default_rng(6).normal(size=(2, 9, 20, 20)))
    labels = np.full((12, 20, 20), 9, dtype=np.uint8)
    plain = resampling.slabs

    def full(volume: torch.Tensor, *more: Any) -> Any:
        for number, one in enumerate(plain(volume, *more)):
            if number and volume.device.type == "cuda":
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            yield one

    monkeypatch.setattr(resampling, "slabs", full)
    monkeypatch.setattr(resampling, "_SLAB_BYTES", 8 * 2 * 20 * 20 * 5)
    expected = labels.copy()
    fill(expected, scores, Interpolation(1, nearest=False))
    with pretended_gpu(1):
        fill(labels, scores.to(DEVICE), Interpolation(1, nearest=False))
    np.testing.assert_array_equal(labels, expected)
    assert set(np.unique(labels)) == {0, 1}


@pytest.fixture
def planned(tmp_path: Path) -> ModelFolder:
    """The demo's liver, with plans that resample as nnU-Net does by default."""
    folder = shutil.copytree(demo_models_dir() / STAGES["liver"], tmp_path / "liver")
    plans = json.loads((folder / "plans.json").read_text())
    for configuration in plans["configurations"].values():
        for kind, order in (("data", 3), ("probabilities", 1)):
            told = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
            configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
            configuration[f"resampling_fn_{kind}_kwargs"] = told
    (folder / "plans.json").write_text(json.dumps(plans))
    return ModelFolder(folder)


@pytest.mark.parametrize("device", [CPU, DEVICE])
def test_a_network_finds_what_it_finds_by_nnunets_resampling(
    planned: ModelFolder, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ct = make(Recipe(50, (24, 48, 48), (8.0, 6.5, 6.5))).ct
    computed: list[torch.device] = []
    plain = resampling.slabs

    def noted(volume: torch.Tensor, *more: Any) -> Any:
        computed.append(volume.device)
        return plain(volume, *more)

    monkeypatch.setattr(resampling, "slabs", noted)
    expected = Network(planned, CPU, precision="float32", engine="reference").predict(ct).labels
    assert computed == [], "the reference is nnU-Net's own, both ways"
    if device == CPU:
        found = Network(planned, CPU, precision="float32").predict(ct).labels
    else:
        with pretended_gpu(3):
            found = Network(planned, DEVICE).predict(ct).labels
    assert computed == [device] * 3, "the image, and the scores of two classes"
    assert expected.sum() > 100
    a, b = found > 0, expected > 0
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= (0.999 if device == CPU else 0.99)
