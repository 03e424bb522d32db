"""The pipeline of TotalSegmentator's open lesion model: where its labels lie, what it refuses, what it says besides."""

from __future__ import annotations

import gc
import io
import logging
import pickle
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_totalseg import make_weights

from salsa_node import models, pipelines, preflight
from salsa_node.config import Config, NodeSettings
from salsa_node.contrast_phase import Phase
from salsa_node.criteria import Criteria
from salsa_node.errors import ConfigError, OrganNotFound, PipelineError, SeriesRejected, WeightsMissing
from salsa_node.findings import measure
from salsa_node.models import TOTALSEGMENTATOR, ModelFolder
from salsa_node.phantom import Recipe, make
from salsa_node.pipelines import Flag, PipelineSettings, phase, scan, totalseg
from salsa_node.pipelines.totalsegmentator import NAME, LiverLesionsPipeline, field_of_view
from salsa_node.settings import PipelineChoice
from salsa_node.volume import CtVolume, Grid, LabelVolume

ALL_ON = {"couinaud": True, "contrast_phase": True, "body_region": True}
OUTSIDE_HU, LIVER_HU, LESION_HU = 300, 100, -100  # between liver and outside nothing looks like a lesion


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_weights(folder)
    return folder


class Threshold:
    """A network that knows its task by its folder and sees by Hounsfield units: its right answer is geometry."""

    precision = "float32"
    flags: tuple[Flag, ...] = ()
    ran_on = "cpu"

    def __init__(
        self, folder: ModelFolder, device: torch.device, *, tile_step: float, precision: str, engine: str
    ) -> None:
        self.dataset = folder.path.parent.name

    def forget(self) -> None:
        """There is nothing to forget."""

    def predict(self, ct: CtVolume) -> LabelVolume:
        inside = ct.voxels_hu < (LIVER_HU + OUTSIDE_HU) / 2
        lesion = ct.voxels_hu < (LIVER_HU + LESION_HU) / 2
        labels = {"Dataset297": inside * 5, "Dataset591": lesion, "Dataset570": inside * np.where(upper(ct.grid), 7, 6)}
        return LabelVolume(labels[self.dataset.split("_")[0]].astype(np.uint8), ct.grid)


def upper(grid: Grid) -> np.ndarray:
    """The upper half, in a network's own order: slices run to the head."""
    return np.broadcast_to((np.arange(grid.shape[0]) >= grid.shape[0] / 2)[:, None, None], grid.shape)


@pytest.fixture
def thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totalseg, "Network", Threshold)


def balls(recipe: Recipe, radius_mm: float, lesion_at: float = 0.0) -> tuple[CtVolume, np.ndarray, np.ndarray]:
    """A ball of liver in the middle of the scan, a lesion of a fourth of its radius in it, and where both are.

    lesion_at: of the way from the middle of the scan to the middle of its last slice.
    """
    grid = recipe.grid
    points = np.indices(grid.shape).reshape(3, -1).T @ grid.affine_lps_mm[:3, :3].T + grid.affine_lps_mm[:3, 3]
    last = np.array(grid.to_lps_mm((grid.shape[0] - 1, (grid.shape[1] - 1) / 2, (grid.shape[2] - 1) / 2)))
    liver = np.linalg.norm(points, axis=1).reshape(grid.shape) <= radius_mm
    lesion = np.linalg.norm(points - lesion_at * last, axis=1).reshape(grid.shape) <= radius_mm / 4
    hu = np.full(grid.shape, OUTSIDE_HU, dtype=np.int16)
    hu[liver] = LIVER_HU
    hu[lesion] = LESION_HU
    return CtVolume(hu, grid), liver | lesion, lesion


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))


@pytest.mark.parametrize(
    ("recipe", "radius_mm", "lesion_at"),
    [
        (Recipe(1, (24, 48, 48), (4.0, 2.0, 2.0)), 36.0, 0.3),
        (Recipe(1, (24, 48, 48), (4.0, 2.0, 2.0), orientation="IPL"), 36.0, 0.3),
        (Recipe(1, (24, 48, 48), (4.0, 2.0, 2.0), orientation="LSP"), 36.0, 0.3),
        (Recipe(1, (24, 48, 48), (4.0, 2.0, 2.0), orientation="AIR"), 36.0, 0.3),
        (Recipe(1, (24, 48, 48), (4.0, 2.0, 2.0), rotation_deg=(25.0, -10.0, 15.0)), 36.0, 0.3),
        (Recipe(1, (12, 48, 48), (10.0, 2.0, 2.0)), 36.0, 0.3),
        (Recipe(1, (20, 240, 240), (3.0, 0.3, 0.3)), 24.0, 0.3),
        (Recipe(1, (240, 40, 40), (0.3, 1.5, 1.5)), 24.0, 0.3),
        (Recipe(1, (18, 48, 48), (4.0, 2.0, 2.0)), 36.0, 1.0),
        (Recipe(1, (3, 48, 48), (5.0, 2.0, 2.0)), 36.0, 0.0),
        (Recipe(1, (24, 48, 48), (4.0, 2.0, 2.0), center_lps_mm=(0.0, 30.0, 30.0)), 36.0, 0.0),
    ],
    ids=["SPL", "IPL", "LSP", "AIR", "oblique", "10 mm", "0.3 mm", "0.3 mm slices", "last slice", "3 slices", "cut"],
)
@pytest.mark.usefixtures("thresholds")
def test_labels_lie_where_the_liver_and_its_lesion_lie(
    models_dir: Path, recipe: Recipe, radius_mm: float, lesion_at: float
) -> None:
    ct, liver, lesion = balls(recipe, radius_mm, lesion_at)
    masks = LiverLesionsPipeline(PipelineSettings("cpu", models_dir)).segment(ct)
    assert masks.organ is not None
    assert masks.lesions.grid is ct.grid
    assert dice(masks.organ.labels == 1, liver) >= 0.94  # seen at 3 mm
    assert dice(masks.lesions.labels == 1, lesion) >= 0.95  # seen at 0.75 x 0.75 x 1 mm
    assert masks.flags == ()


@pytest.mark.usefixtures("thresholds")
def test_what_befell_a_network_is_told(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = LiverLesionsPipeline(PipelineSettings("cpu", models_dir))
    flags = [Flag("device_exhausted", "of the liver's"), Flag("device_exhausted", "of the lesions'")]
    for network, flag, place in zip(pipeline._networks, flags, ("cuda:0", "cpu"), strict=True):
        monkeypatch.setattr(network._network, "flags", (flag,))
        monkeypatch.setattr(network._network, "ran_on", place)
    masks = pipeline.segment(balls(Recipe(1, (24, 48, 48), (4.0, 2.0, 2.0)), 36.0)[0])
    assert masks.flags == tuple(flags)
    assert masks.provenance.device == "cuda:0; cpu"
    assert masks.provenance.digest == pipeline.provenance.digest


@pytest.mark.usefixtures("thresholds")
def test_a_scan_without_liver_is_a_verdict(models_dir: Path) -> None:
    empty = CtVolume(np.full((20, 40, 40), OUTSIDE_HU, dtype=np.int16), Recipe(1, (20, 40, 40), (5.0, 4.0, 4.0)).grid)
    with pytest.raises(OrganNotFound, match="no voxel was marked as liver"):
        LiverLesionsPipeline(PipelineSettings("cpu", models_dir)).segment(empty)


@pytest.mark.usefixtures("thresholds")
def test_what_no_network_can_look_at_is_refused_in_words(models_dir: Path) -> None:
    pipeline = LiverLesionsPipeline(PipelineSettings("cpu", models_dir))
    ct, *_ = balls(Recipe(1, (20, 40, 40), (5.0, 4.0, 4.0)), 40.0)
    broken = ct.voxels_hu.astype(np.float32)
    broken[3, 4, 5] = np.nan
    with pytest.raises(SeriesRejected, match="not finite numbers"):
        pipeline.segment(CtVolume(broken, ct.grid))
    thin, *_ = balls(Recipe(1, (1, 40, 40), (1.0, 4.0, 4.0)), 40.0)
    with pytest.raises(SeriesRejected, match="1 voxels of 1 mm in one direction: less than half of one voxel of 3 mm"):
        pipeline.segment(thin)


@pytest.mark.usefixtures("thresholds")
def test_float_voxels_are_seen_as_integers_are(models_dir: Path) -> None:
    pipeline = LiverLesionsPipeline(PipelineSettings("cpu", models_dir))
    ct, *_ = balls(Recipe(1, (20, 40, 40), (5.0, 4.0, 4.0)), 40.0)
    as_float = CtVolume(ct.voxels_hu.astype(np.float32), ct.grid)
    assert np.array_equal(pipeline.segment(ct).lesions.labels, pipeline.segment(as_float).lesions.labels)


@pytest.mark.usefixtures("thresholds")
def test_every_extra_is_off_until_it_is_asked_for_and_then_a_line_of_the_findings(models_dir: Path) -> None:
    ct, *_ = balls(Recipe(1, (24, 48, 48), (4.0, 2.0, 2.0)), 36.0, 0.3)
    plain = measure(ct, LiverLesionsPipeline(PipelineSettings("cpu", models_dir)).segment(ct), Criteria())
    assert plain.flags == ()
    assert [lesion.segments for lesion in plain.lesions] == [()]

    asked = LiverLesionsPipeline(PipelineSettings("cpu", models_dir, options=ALL_ON))
    masks = asked.segment(ct)
    assert masks.pixel_phase is not None
    assert masks.pixel_phase.phase is Phase.ARTERIAL
    findings = measure(ct, masks, Criteria())
    told = {flag.name: flag.text for flag in findings.flags}
    assert told["body_region"] == "Body region: the liver lies wholly in the field of view."
    seconds = masks.pixel_phase.after_injection_s
    assert f"arterial, {seconds:.0f} s after injection" in told["contrast_phase"]
    assert told["contrast_phase"].endswith("Expected is portal venous: lesions may be missed, and attenuation differs.")
    assert [lesion.segments for lesion in findings.lesions] == [(7,)]
    assert asked.provenance.parameters["couinaud"] is True
    assert "contrast_phase_classifiers" in asked.provenance.weights_sha256
    assert asked.provenance.libraries["xgboost"]
    assert findings.run_digest != plain.run_digest


@pytest.mark.parametrize(
    ("orientation", "first", "sides"),
    [("SPL", True, "feet"), ("IPL", True, "head"), ("LSP", True, "right"), ("PIR", False, "back")],
)
def test_the_body_region_names_the_sides_where_the_liver_is_cut_off(orientation: str, first: bool, sides: str) -> None:
    grid = Recipe(1, (10, 12, 14), (4.0, 2.0, 2.0), orientation=orientation).grid
    labels = np.zeros(grid.shape, dtype=np.uint8)
    labels[2:8, 2:8, 2:8] = 1
    assert "wholly in the field of view" in field_of_view(LabelVolume(labels.copy(), grid))
    labels[: 8 if first else 10][0 if first else -1] = 0
    labels[slice(0, 8) if first else slice(2, 10), 2:8, 2:8] = 1
    assert field_of_view(LabelVolume(labels, grid)).endswith(f"it is cut off towards the {sides}.")


# ---- the contrast phase ------------------------------------------------------------------------------------

MEDIANS = {
    "native": [55.0, 40, 10, 10, 40, 40, 40, 40, 40, 40, 40, 40, 40, 0, 30, 35],
    "portal venous": [110.0, 90, 10, 15, 150, 150, 140, 150, 140, 140, 150, 150, 150, 0, 60, 80],
}


@pytest.mark.filterwarnings("ignore:(?s).*If you are loading a serialized model", "ignore:unclosed file")
@pytest.mark.parametrize("name", MEDIANS)
def test_the_phase_is_that_of_totalsegmentators_own_program(name: str) -> None:
    from totalsegmentator.bin.totalseg_get_phase import get_ct_contrast_phase
    from totalsegmentator.map_to_binary import class_map

    classes = class_map["total"]
    label_of = {anatomy: label for label, anatomy in classes.items()}
    labels = np.zeros((len(phase.ORGANS), 3, 7), dtype=np.uint8)
    hu = np.zeros(labels.shape, dtype=np.float32)
    for n, (organ, median) in enumerate(zip(phase.ORGANS, MEDIANS[name], strict=True)):
        if organ != "brain":
            labels[n] = label_of[organ]
            hu[n] = median + np.arange(-10, 11).reshape(3, 7)
    medians = zip(phase.ORGANS, MEDIANS[name], strict=True)
    stats = {organ: {"intensity": median, "volume": 0.0} for organ, median in medians}
    image = scan.image_of(CtVolume(hu, Grid(hu.shape, np.eye(4))))
    *_, last = get_ct_contrast_phase(image, quiet=True, existing_stats=stats)
    theirs = last["result"]

    ours = phase.PhaseEstimator().estimate(hu, labels, classes, voxel_mm3=27.0)
    assert ours is not None
    assert (ours.name, ours.after_injection_s, ours.spread_s) == (name, theirs["pi_time"], theirs["stddev"])
    assert ours.certainty == theirs["probability"]


def test_every_time_after_injection_has_the_phase_that_totalsegmentator_gives_it() -> None:
    from totalsegmentator.bin.totalseg_get_phase import pi_time_to_phase

    for seconds in np.arange(-1, 120, 0.5):
        ours, (name, certainty) = phase.phase_at(float(seconds)), pi_time_to_phase(float(seconds))
        assert ours.certainty == certainty
        words = {"arterial_early": "early arterial", "arterial_late": "late arterial", "portal_venous": "portal venous"}
        assert ours.name.startswith(words.get(name, name))
        liver_words = {"native": Phase.NATIVE, "arterial_early": Phase.ARTERIAL, "arterial_late": Phase.ARTERIAL}
        expected = liver_words.get(name, Phase.PORTAL_VENOUS if seconds < 100 else Phase.UNKNOWN)
        assert (ours.seen.phase, ours.seen.certainty) == (expected, certainty)


def test_no_phase_is_told_where_the_head_is_in_the_scan() -> None:
    from totalsegmentator.map_to_binary import class_map

    brain = next(label for label, name in class_map["total"].items() if name == "brain")
    labels = np.full((2, 2, 2), brain, dtype=np.uint8)
    hu = np.zeros(labels.shape, dtype=np.float32)
    assert phase.PhaseEstimator().estimate(hu, labels, class_map["total"], voxel_mm3=27.0) is None


def test_the_regressors_are_read_and_nothing_else_is_run() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("boom",)

    with pytest.raises(PipelineError, match=r"ask for builtins\.print"):
        phase._Reader(io.BytesIO(pickle.dumps(Bomb()))).load()


# ---- what must be there --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options", "pipeline"),
    [(297, {}, NAME), (591, {}, NAME), (570, {"couinaud": True}, NAME)],
)
def test_a_missing_model_is_refused_with_the_command_that_gets_it(
    models_dir: Path, tmp_path: Path, task: int, options: Mapping[str, object], pipeline: str
) -> None:
    (tmp_path / TOTALSEGMENTATOR).mkdir()
    for folder in (models_dir / TOTALSEGMENTATOR).iterdir():
        if not folder.name.startswith(f"Dataset{task}_"):
            (tmp_path / TOTALSEGMENTATOR / folder.name).symlink_to(folder)
    with pytest.raises(WeightsMissing, match=f"salsa-node models fetch {task}"):
        pipelines.load(pipeline, PipelineSettings("cpu", tmp_path, options=options))
    config = configured(tmp_path, PipelineChoice(pipeline, models_dir=str(tmp_path), options=options))
    (check,) = [check for check in preflight.checks(config) if check.name.startswith("pipeline")]
    assert not check.ok
    assert f"salsa-node models fetch {task}" in check.detail


def configured(folder: Path, choice: PipelineChoice) -> Config:
    return replace(Config(), node=NodeSettings(data_dir=folder / "data"), pipeline=choice)


def test_the_contrast_phase_without_xgboost_is_refused_before_the_start(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = PipelineChoice(NAME, models_dir=str(models_dir), options={"contrast_phase": True})
    assert all(check.ok for check in preflight.checks(configured(tmp_path, choice)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = [check.detail for check in preflight.checks(configured(tmp_path, choice)) if not check.ok]
    assert len(told) == 1
    assert "needs the package xgboost" in told[0]
    assert "pip install 'salsa_node[phase]'" in told[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"couinaud": "yes"}, "options.couinaud: .* takes true or false"),
        ({"precision": 16}, "options.precision: .* takes one of auto"),
        ({"precision": "half"}, "options.precision: .* found .half."),
        ({"mirroring": True}, "options.mirroring"),
        ({"engine": "fast"}, "options.engine: .* takes one of own, compiled, reference"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(models_dir: Path, options: Mapping[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pipelines.load(NAME, PipelineSettings("cpu", models_dir, options=options))


@pytest.mark.parametrize(("options", "engine"), [({}, "own"), ({"engine": "reference"}, "reference")])
def test_the_engine_is_that_of_every_network(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch, options: Mapping[str, object], engine: str
) -> None:
    told: list[str] = []

    class Told(Threshold):
        def __init__(
            self, folder: ModelFolder, device: torch.device, *, tile_step: float, precision: str, engine: str
        ) -> None:
            told.append(engine)
            super().__init__(folder, device, tile_step=tile_step, precision=precision, engine=engine)

    monkeypatch.setattr(totalseg, "Network", Told)
    pipeline = LiverLesionsPipeline(PipelineSettings("cpu", models_dir, options=options))
    assert told == [engine] * 2
    assert pipeline.provenance.parameters["engine"] == engine
    totalseg.TotalSegmentatorLiver(models_dir, "cpu", fast=True, engine=engine)
    assert told == [engine] * 4


def test_auto_is_the_best_pipeline_whose_models_somebody_installed(models_dir: Path, tmp_path: Path) -> None:
    def chosen(folder: Path) -> str:
        return preflight.settled(configured(tmp_path, PipelineChoice(models_dir=str(folder)))).pipeline.name

    assert PipelineChoice().name == "auto"
    assert chosen(tmp_path) == "demo"
    assert chosen(models_dir) == NAME
    (tmp_path / "salsa").mkdir()
    (tmp_path / TOTALSEGMENTATOR).symlink_to(models_dir / TOTALSEGMENTATOR)
    assert chosen(tmp_path) == models.SALSA  # empty as it is: what it lacks is said, no other pipeline steps in
    named = configured(tmp_path, PipelineChoice("demo", models_dir=str(models_dir)))
    assert preflight.settled(named) == named


# ---- resident ------------------------------------------------------------------------------------------------


def test_the_second_case_loads_no_weights_and_unload_lets_go_of_them(
    models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def events() -> list[str]:
        return [getattr(record, "event", "") for record in caplog.records]

    pipeline = LiverLesionsPipeline(PipelineSettings("cpu", models_dir))
    assert events().count("network.loaded") == 2
    phantom = make(Recipe(11, (8, 64, 64), (6.0, 5.0, 5.0)))
    first, second = (pipeline.segment(phantom.ct) for _ in range(2))
    assert events().count("network.loaded") == 2
    assert np.array_equal(first.lesions.labels, second.lesions.labels)
    assert first.provenance == second.provenance
    held = [weakref.ref(network._network.module) for network in pipeline._networks]
    assert all(ref() is not None for ref in held)
    pipeline.unload()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    with pytest.raises(PipelineError, match="unloaded"):
        pipeline.segment(phantom.ct)
