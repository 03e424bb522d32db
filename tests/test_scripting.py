"""The README's Python, as it stands there, and the edges of the few functions it uses."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from salsa_node import nifti, phantom, scripting
from salsa_node.errors import ConfigError, EncodingError, WeightsMissing
from salsa_node.limits import Limits

README = Path(__file__).parents[1] / "README.md"
RECIPE = phantom.Recipe(11, shape=(24, 64, 64), spacing_mm=(8.0, 4.5, 4.5))


@pytest.fixture(scope="module")
def made() -> phantom.Phantom:
    return phantom.make(RECIPE)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_readmes_example_runs(
    made: phantom.Phantom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = phantom.write_study(made, tmp_path)
    monkeypatch.delenv("SALSA_NODE_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "axial").rename(tmp_path / "ct-folder")
    (example,) = blocks()
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    findings = names["findings"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(findings.lesions) > 0  # type: ignore[attr-defined]
    assert lines[0].startswith("1 ")
    assert nifti.read_description(tmp_path / "lesions.nii.gz").endswith("; DEMO, NOT FOR CLINICAL USE")
    labels = nifti.read_labels(tmp_path / "lesions.nii.gz")
    assert labels.grid.matches(made.ct.grid)
    largest = made.lesion_labels.labels == 1 + int(np.argmax([lesion.volume_mm3 for lesion in made.lesions]))
    assert (labels.labels[largest] > 0).mean() > 0.5  # it lies on the truth
    seg = pydicom.dcmread(tmp_path / "lesions.dcm")
    assert seg.Modality == "SEG"
    assert seg.StudyInstanceUID == study.study_uid
    assert "DEMO MODEL" in str(seg)


def test_a_nifti_is_answered_on_its_own_grid_and_has_no_seg(made: phantom.Phantom, tmp_path: Path) -> None:
    nifti.write_ct(made.ct, tmp_path / "scan.nii.gz")
    scan = scripting.read(tmp_path / "scan.nii.gz")
    findings = scripting.find(scan, scripting.load("demo", device="cpu"))
    scripting.write_labels(findings, scan, str(tmp_path / "lesions.nii"), instances=True)
    written = nib.load(tmp_path / "lesions.nii")
    assert written.shape == nib.load(tmp_path / "scan.nii.gz").shape
    assert set(np.unique(np.asarray(written.dataobj))) == {0, *(lesion.number for lesion in findings.lesions)}
    with pytest.raises(EncodingError, match="use write_labels"):
        scripting.write_seg(findings, scan, tmp_path / "lesions.dcm")


def test_the_guards_are_asked(made: phantom.Phantom, tmp_path: Path) -> None:
    nifti.write_ct(made.ct, tmp_path / "scan.nii.gz")
    scan = scripting.read(tmp_path / "scan.nii.gz")
    pipeline = scripting.load("demo", device="cpu")
    names = [flag.name for flag in scripting.find(scan, pipeline, limits=Limits(min_liver_ml=9000.0)).flags]
    assert "liver_volume" in names
    assert "liver_volume" not in [flag.name for flag in scripting.find(scan, pipeline).flags]


def test_what_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SALSA_NODE_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="no pipeline is called 'salsa7'"):
        scripting.load("salsa7")
    with pytest.raises(ConfigError, match="there is no folder"):
        scripting.load("demo", models_dir=tmp_path / "absent")
    (tmp_path / "demo").mkdir()
    with pytest.raises(WeightsMissing, match=r"lacks dataset\.json"):
        scripting.load("demo", models_dir=tmp_path)
