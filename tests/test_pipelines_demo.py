"""The demo pipeline on phantoms it has not learned from, on a real CT, and without its weights."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from salsa_node.errors import ConfigError, OrganNotFound, WeightsMissing
from salsa_node.models import DEMO_STAGES, demo_models_dir
from salsa_node.nifti import read_ct
from salsa_node.phantom import LesionSpec, Recipe, make
from salsa_node.pipelines import DEMO_NOTICE, Masks, Pipeline, PipelineSettings, load
from salsa_node.pipelines.demo import DemoPipeline, liver_only, plausible
from salsa_node.volume import CtVolume, Grid

FIGURES = demo_models_dir() / "figures.json"
CARD = demo_models_dir() / "README.md"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("demo", PipelineSettings(device="cpu"))


@pytest.fixture(scope="module")
def evaluation() -> ModuleType:
    """scripts/evaluate_demo_models, which is a program without a module name."""
    path = Path(__file__).parents[1] / "scripts" / "evaluate_demo_models"
    module = ModuleType("evaluate_demo_models")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    loader = SourceFileLoader(module.__name__, str(path))
    loader.exec_module(module)
    return module


def test_held_out_phantoms_give_the_figures_of_the_card_again(pipeline: Pipeline, evaluation: ModuleType) -> None:
    recorded = {case["seed"]: case for case in json.loads(FIGURES.read_text())["cases"]}
    for seed in (5000, 5006):
        case = evaluation.evaluate(pipeline, seed)
        assert case.liver_dice > 0.9
        assert case.large_found == case.large >= 3
        assert case.liver_dice == pytest.approx(recorded[seed]["liver_dice"], abs=0.01)
        assert case.lesion_dice == pytest.approx(recorded[seed]["lesion_dice"], abs=0.05)


def test_the_card_says_what_was_measured_on_these_very_weights(pipeline: Pipeline) -> None:
    figures = json.loads(FIGURES.read_text())
    assert figures["set"] == "held-out"
    assert figures["weights_sha256"] == pipeline.provenance.weights_sha256
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([0-9.]+) \|$", CARD.read_text(), flags=re.MULTILINE))
    assert {name: float(value) for name, value in rows.items()} == figures["summary"]
    assert figures["date"] in CARD.read_text()
    assert "not for clinical use" in CARD.read_text().lower()


def test_the_figures_reach_the_bar() -> None:
    summary = json.loads(FIGURES.read_text())["summary"]
    assert summary["phantoms"] == 20
    assert summary["liver_dice_mean"] >= 0.95
    assert summary["large_lesions_found"] >= 0.9 * summary["large_lesions"]
    assert summary["lesion_dice_mean"] >= 0.75
    assert summary["false_findings_per_case"] <= 0.5


def check_masks(masks: Masks, ct: CtVolume) -> None:
    assert masks.organ is not None
    assert masks.organ.grid.matches(ct.grid)
    assert masks.lesions.grid.matches(ct.grid)
    assert masks.organ.labels.max() == 1
    assert not (masks.lesions.labels[masks.organ.labels == 0]).any()


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "orientation"),
    [
        ((28, 96, 96), (7.0, 3.0, 3.0), "IPL"),
        ((48, 48, 200), (6.0, 6.0, 1.0), "LPS"),
        ((80, 96, 64), (3.0, 3.0, 3.0), "ALS"),
    ],
)
def test_a_large_lesion_is_found_whatever_the_grid(
    pipeline: Pipeline, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], orientation: str
) -> None:
    lesion = LesionSpec((-55.0, -5.0, 15.0), (18.0, 18.0, 18.0), hu=50.0)
    phantom = make(Recipe(4100, shape, spacing_mm, orientation, lesions=(lesion,)))
    masks = pipeline.segment(phantom.ct)
    check_masks(masks, phantom.ct)
    found, truth = masks.lesions.labels > 0, phantom.lesion_labels.labels > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.6


def test_the_same_volume_gives_the_same_masks(pipeline: Pipeline) -> None:
    ct = make(Recipe(4101, (32, 72, 72), (6.0, 4.0, 4.0))).ct
    first, second = pipeline.segment(ct), pipeline.segment(ct)
    assert np.array_equal(first.lesions.labels, second.lesions.labels)
    assert first.organ is not None
    assert second.organ is not None
    assert np.array_equal(first.organ.labels, second.organ.labels)


def test_provenance_names_every_file_and_says_demo(pipeline: Pipeline) -> None:
    provenance = pipeline.provenance
    assert provenance.notice == DEMO_NOTICE
    assert set(provenance.weights_sha256) == {
        f"{stage}/{name}"
        for stage in DEMO_STAGES
        for name in ("dataset.json", "plans.json", "fold_0/checkpoint_final.pth")
    }
    assert len(provenance.digest) == 64
    json.dumps(dict(provenance.parameters))


def test_a_scan_without_a_liver_is_a_verdict(pipeline: Pipeline) -> None:
    air = CtVolume(np.full((20, 40, 40), -1000, np.int16), Recipe(1, (20, 40, 40), (5.0, 5.0, 5.0)).grid)
    with pytest.raises(OrganNotFound, match="ml of liver; at least 50 ml"):
        pipeline.segment(air)


def test_a_real_ct_gives_masks_or_a_verdict(pipeline: Pipeline, testdata: Path) -> None:
    ct = read_ct(testdata / "01_abdomen_ct_siemens_j2k" / "example_ct_sm.nii.gz")
    try:
        masks = pipeline.segment(ct)
    except OrganNotFound:
        return  # the models never saw a patient
    check_masks(masks, ct)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    for stage in DEMO_STAGES.values():
        shutil.copytree(demo_models_dir() / stage, tmp_path / "demo" / stage)
    (tmp_path / "demo" / DEMO_STAGES["lowres"] / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(WeightsMissing, match=r"3d_lowres lacks fold_0/checkpoint_final\.pth"):
        DemoPipeline(PipelineSettings(device="cpu", models_dir=tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mirror": True}, "no option 'mirror'"),
        ({"mirroring": 1}, "true or false"),
        ({"engine": "fast"}, "own or compiled or reference"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DemoPipeline(PipelineSettings(device="cpu", options=options))


@pytest.mark.parametrize("engine", ["own", "compiled", "reference"])
def test_the_engine_is_that_of_every_network(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    told: list[str] = []

    class Told:
        precision = "float32"

        def __init__(self, *_: object, engine: str, **__: object) -> None:
            told.append(engine)

    monkeypatch.setattr("salsa_node.pipelines.demo.Network", Told)
    pipeline = DemoPipeline(PipelineSettings(device="cpu", options={"engine": engine}))
    assert told == [engine] * 3
    assert pipeline.provenance.parameters["engine"] == engine


def test_the_box_holds_the_liver_and_a_rim_and_nothing_else_of_the_patient() -> None:
    grid = Grid((40, 60, 60), Recipe(1, (40, 60, 60), (3.0, 2.0, 2.0)).grid.affine_lps_mm)
    ct = CtVolume(np.full(grid.shape, 50, np.int16), grid)
    liver = np.zeros(grid.shape, np.bool_)
    liver[10:20, 20:40, 30:50] = True
    liver[14:16, 20:22, 38:40] = False  # a lesion at the rim that the liver model left out
    crop, box = liver_only(ct, liver)
    seen = crop.voxels_hu > -1024
    kept = np.zeros(grid.shape, np.bool_)
    kept[box] = seen
    assert kept[10:20, 20:40, 30:50].all()
    assert kept[9, 30, 40]  # one slice and two pixels further: 3 and 4 mm
    assert kept[15, 18, 40]
    assert not kept[8, 30, 40]
    assert not kept[15, 17, 40]
    assert crop.grid.to_lps_mm((0, 0, 0)) == pytest.approx(grid.to_lps_mm(tuple(part.start for part in box)))  # type: ignore[arg-type]


def test_a_liver_at_the_edge_of_the_scan_keeps_its_edge() -> None:
    grid = Recipe(1, (10, 20, 20), (3.0, 3.0, 3.0)).grid
    liver = np.zeros(grid.shape, np.bool_)
    liver[5:, 5:, :8] = True
    crop, box = liver_only(CtVolume(np.full(grid.shape, 60, np.int16), grid), liver)
    kept = np.zeros(grid.shape, np.bool_)
    kept[box] = crop.voxels_hu > -1024
    assert kept[liver].all()


def test_specks_and_pieces_beside_the_liver_go_and_lesions_stay() -> None:
    grid = Recipe(1, (10, 20, 20), (3.0, 2.0, 2.0)).grid  # 12 mm3 a voxel
    liver = np.zeros(grid.shape, np.bool_)
    liver[:, :, :10] = True
    mask = np.zeros(grid.shape, np.bool_)
    mask[2, 2, 2:4] = True  # 24 mm3
    mask[5, 5, 5] = mask[6, 6, 6] = mask[7, 7, 7] = True  # 36 mm3, joined by corners
    mask[5, 15, 8:12] = True  # one half in the liver
    mask[8, 15, 9:14] = True  # less than that
    expected = mask.copy()
    expected[2] = expected[8] = False
    assert np.array_equal(plausible(mask, liver, grid), expected)
