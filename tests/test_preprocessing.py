"""What a network sees is what nnU-Net's own preprocessing makes of the image, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from salsa_node.models import DEMO_STAGES, ModelFolder, demo_models_dir
from salsa_node.pipelines.nnunet import Network
from salsa_node.pipelines.preprocessing import bounds_of_what_is_not_zero, prepared

SPLINES = {
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
}


def network(stage: str) -> Network:
    return Network(ModelFolder(demo_models_dir() / DEMO_STAGES[stage]), torch.device("cpu"))


def image_of(seed: int, shape: tuple[int, int, int], *, bordered: bool) -> np.ndarray:
    dice = np.random.default_rng(seed)
    image = dice.integers(-300, 300, (1, *shape)).astype(np.int16)
    image[dice.random(image.shape) < 0.02] = 0  # water is there too
    if bordered:
        image[:, :2], image[:, :, -3:], image[..., :1] = 0, 0, 0
        image[:, 3:5, 2:4, 2:4] = 0
    return image


def both(
    of: Network, image: np.ndarray, stage: np.ndarray | None, spacing_mm: list[float]
) -> tuple[tuple[Any, Any, dict[str, Any]], tuple[Any, Any, dict[str, Any]]]:
    theirs = of.preprocess(image.copy(), None if stage is None else stage.copy(), spacing_mm)
    return prepared(image, stage, spacing_mm, of._predictor), theirs


@pytest.mark.parametrize("bordered", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("finer", [(1.0, 1.0, 1.0), (0.7, 0.8, 0.75), (0.5, 0.6, 4.0)])
@pytest.mark.parametrize("splines", [True, False])
@pytest.mark.parametrize("stage", ["lowres", "cascade"])
def test_channels_and_stage_are_nnunets(
    stage: str, splines: bool, finer: tuple[float, float, float], turned: bool, bordered: bool
) -> None:
    of = network(stage)
    if turned:
        of._predictor.plans_manager.plans |= {"transpose_forward": [1, 2, 0], "transpose_backward": [2, 0, 1]}
    if splines:
        of._predictor.configuration_manager.configuration |= SPLINES
    spacing_mm = [mm * share for mm, share in zip(of.spacing_mm, finer, strict=True)]
    image = image_of(1, (11, 13, 15), bordered=bordered)
    before = None
    if stage == "cascade":
        before = (np.random.default_rng(2).random(image.shape) < 0.4).astype(np.int16)
    given = image.copy(), None if before is None else before.copy()
    (channels, labels, properties), (their_channels, their_labels, theirs) = both(of, image, before, spacing_mm)
    assert channels.dtype == np.float32
    assert np.array_equal(channels, their_channels)
    for key in ("spacing", "shape_before_cropping", "shape_after_cropping_and_before_resampling"):
        assert list(properties[key]) == list(theirs[key]), key
    assert [list(map(int, side)) for side in theirs["bbox_used_for_cropping"]] == properties["bbox_used_for_cropping"]
    assert np.array_equal(image, given[0])
    if before is None:
        assert labels is None
        return
    assert np.array_equal(before, given[1])
    classes = of._predictor.label_manager.foreground_labels
    for label in classes:
        assert np.array_equal(labels == label, their_labels == label)


def test_a_stage_beside_what_is_outside_is_nnunets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the outside, inside and a label meet, the label loses nothing to what nobody asks for."""
    of = network("cascade")
    image = image_of(4, (20, 20, 20), bordered=True)
    image[:, 2:9, :9, 1:9] = 0
    before = np.zeros(image.shape, dtype=np.int16)
    before[:, 6:14, 6:14, 6:14] = 1
    spacing_mm = [mm * 0.63 for mm in of.spacing_mm]
    ours, theirs = both(of, image, before, spacing_mm)
    assert np.array_equal(ours[1] == 1, theirs[1] == 1)
    assert (theirs[1] == -1).any()


@pytest.mark.parametrize("case", ["all zero", "mask for normalization", "another preprocessor"])
def test_what_is_not_plain_is_left_to_nnunet(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = network("lowres")
    image = image_of(3, (8, 9, 10), bordered=True)
    if case == "all zero":
        image[:] = 0
    if case == "mask for normalization":
        of._predictor.configuration_manager.configuration |= {
            "use_mask_for_norm": [True],
            "normalization_schemes": ["ZScoreNormalization"],
        }
    if case == "another preprocessor":
        of._predictor.configuration_manager.configuration |= {"preprocessor_name": "RGBTo01Normalization"}
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

        class Louder(DefaultPreprocessor):
            def run_case_npy(self, data: Any, *more: Any) -> Any:
                return super().run_case_npy(data * 2, *more)

        manager = type(of._predictor.configuration_manager._configuration)
        monkeypatch.setattr(manager, "preprocessor_class", property(lambda _: Louder))
    ours, theirs = both(of, image, None, [2.0, 1.5, 1.5])
    assert np.array_equal(ours[0], theirs[0])
    assert ours[1] is None


def test_the_bounds_of_what_is_not_zero() -> None:
    image = np.zeros((2, 5, 6, 7), dtype=np.int16)
    assert bounds_of_what_is_not_zero(image) == []
    image[0, 1, 2, 3] = -1
    image[1, 3, 2, 6] = 5
    assert bounds_of_what_is_not_zero(image) == [[1, 4], [2, 3], [3, 7]]


def test_no_holes_are_filled_where_nothing_is_cut_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling takes as long as a small network; it is for a cascade that resamples, and for nobody else."""
    from nnunetv2.preprocessing.cropping import cropping

    def never(_: object) -> np.ndarray:
        raise AssertionError("no hole needs filling")

    monkeypatch.setattr(cropping, "create_nonzero_mask", never)
    image = image_of(1, (9, 10, 11), bordered=True)
    prepared(image, None, [2.0, 2.0, 2.0], network("lowres")._predictor)
    cascade = network("cascade")
    prepared(image, np.zeros(image.shape, np.int16), list(cascade.spacing_mm), cascade._predictor)
    with pytest.raises(AssertionError, match="no hole"):
        prepared(image, np.zeros(image.shape, np.int16), [0.5, 0.5, 0.5], cascade._predictor)
