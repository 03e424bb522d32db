"""TotalSegmentator in memory: the labels of its own `python_api`, and nothing of what that does to a process."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from made_totalseg import SEGMENT, make_weights

from salsa_node import pipelines
from salsa_node.models import DEMO_STAGES, SALSA, TOTALSEGMENTATOR, demo_models_dir
from salsa_node.phantom import Phantom, Recipe, make
from salsa_node.pipelines import PipelineSettings, totalseg
from salsa_node.pipelines.scan import image_of
from salsa_node.pipelines.totalseg import TotalSegmentatorLiver
from salsa_node.pipelines.totalsegmentator import LiverLesionsPipeline
from salsa_node.volume import CtVolume, Grid

HERE = Path(__file__).parent
RECIPE = Recipe(11, (16, 64, 64), (6.0, 5.0, 5.0), orientation="IPL")


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_weights(folder)
    return folder


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make(RECIPE)


@pytest.fixture(scope="module")
def by_python_api(
    models_dir: Path, phantom: Phantom, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], np.ndarray]:
    """Task -> what TotalSegmentator itself finds in the phantom, on the CT's (slice, row, column)."""
    folder = tmp_path_factory.mktemp("python_api")
    nib.save(image_of(phantom.ct), folder / "ct.nii.gz")
    tasks = ("liver", "liver_fast", "liver_lesions", "liver_segments")
    command = [
        sys.executable,
        HERE / "totalseg_reference.py",
        models_dir / TOTALSEGMENTATOR,
        folder,
        folder / "ct.nii.gz",
        folder,
        *tasks,
    ]
    environment = os.environ | {"nnUNet_def_n_proc": "1", "PYTHONPATH": f"{HERE.parent}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def find(task: str) -> np.ndarray:
        return np.asarray(nib.load(folder / f"{task}.nii.gz").dataobj).transpose(2, 1, 0)

    return find


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))


@pytest.mark.parametrize("fast", [False, True])
def test_the_liver_is_that_of_totalsegmentators_python_api(
    models_dir: Path, phantom: Phantom, by_python_api: Callable[[str], np.ndarray], fast: bool
) -> None:
    ours = TotalSegmentatorLiver(models_dir, "cpu", fast=fast).liver(phantom.ct).labels
    theirs = by_python_api("liver_fast" if fast else "liver") == 5
    assert np.count_nonzero(theirs) > 1000
    assert dice(ours == 1, theirs) >= 0.999


def test_lesions_and_segments_are_those_of_totalsegmentators_python_api(
    models_dir: Path, phantom: Phantom, by_python_api: Callable[[str], np.ndarray]
) -> None:
    pipeline = LiverLesionsPipeline(PipelineSettings("cpu", models_dir, options={"couinaud": True}))
    masks = pipeline.segment(phantom.ct)
    theirs = by_python_api("liver_lesions")
    assert np.count_nonzero(theirs) > 100
    assert dice(masks.lesions.labels == 1, theirs == 1) >= 0.999
    assert masks.segments is not None
    theirs = by_python_api("liver_segments")
    assert np.unique(theirs).tolist() == [0, SEGMENT]
    assert dice(masks.segments.labels == SEGMENT, theirs == SEGMENT) >= 0.999


def test_salsa_takes_its_liver_from_these_networks(models_dir: Path, phantom: Phantom, tmp_path: Path) -> None:
    (tmp_path / TOTALSEGMENTATOR).symlink_to(models_dir / TOTALSEGMENTATOR)
    for stage in ("lowres", "cascade"):
        shutil.copytree(demo_models_dir() / DEMO_STAGES[stage], tmp_path / SALSA / Path(DEMO_STAGES[stage]).name)
    quick = {"mirroring": False, "tile_step": 1.0, "fast_liver": True}
    salsa = pipelines.load(SALSA, PipelineSettings("cpu", tmp_path, options=quick))
    masks = salsa.segment(phantom.ct)
    assert masks.organ is not None
    liver = TotalSegmentatorLiver(models_dir, "cpu", fast=True).liver(phantom.ct)
    assert dice(masks.organ.labels == 1, liver.labels == 1) > 0.95
    tasks = {name.split("_")[0] for name in salsa.provenance.weights_sha256 if name.startswith("Dataset2")}
    assert tasks == {"Dataset297", "Dataset298"}


def test_nothing_of_the_process_is_changed(
    models_dir: Path,
    phantom: Phantom,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from nnunetv2.inference import export_prediction, predict_from_raw_data

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def settings() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.upper().startswith(("NNUNET", "TOTALSEG"))}

    before = settings(), torch.get_num_threads()
    TotalSegmentatorLiver(models_dir, "cpu", fast=True).liver(phantom.ct)
    assert (settings(), torch.get_num_threads()) == before
    assert "totalsegmentator.nnunet" not in sys.modules
    for module in (export_prediction, predict_from_raw_data, predict_from_raw_data.nnUNetPredictor):
        functions = [one for one in vars(module).values() if inspect.isfunction(one)]
        assert functions
        assert [one for one in functions if one.__module__.startswith("totalsegmentator")] == []
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_each_task_slides_its_window_as_totalsegmentator_does() -> None:
    assert totalseg.task_of("total").tile_step == 0.8
    assert totalseg.task_of("total", "fast").tile_step == 0.8
    assert totalseg.task_of("liver_lesions").tile_step == 0.5


@pytest.mark.parametrize("bare", [True, False])
def test_a_case_without_a_place_to_look_at_tells_nothing_of_the_one_before(models_dir: Path, bare: bool) -> None:
    network = totalseg.TaskNetwork(totalseg.task_of("liver_lesions"), models_dir, "cpu")
    network._network.flags = (pipelines.Flag("device_exhausted", "of the case before"),)
    network._network.ran_on = "cpu, of the case before"
    scan = network.scan(CtVolume(np.zeros((4, 4, 4), np.int16), Grid((4, 4, 4), np.eye(4))))
    seen = network.look_near(scan, None if bare else (slice(0, 4),) * 3)
    assert (network.flags, network.ran_on) == ((), "cpu")
    assert not seen.labels.labels.any() or not bare
    assert seen.labels.labels.shape == (4, 4, 4)
