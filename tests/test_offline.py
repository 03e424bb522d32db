"""Files in, results out: every study below a folder is answered, and nothing of another case stays behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from salsa_node import offline, phantom
from salsa_node.config import Config
from salsa_node.errors import ConfigError, PipelineError
from salsa_node.nifti import read_labels, write_labels
from salsa_node.uids import derive
from salsa_node.volume import LabelVolume


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> phantom.Study:
    recipe = phantom.Recipe(11, shape=(24, 64, 64), spacing_mm=(8.0, 4.5, 4.5))
    return phantom.write_study(phantom.make(recipe), tmp_path_factory.mktemp("study"))


def wanted(output: Path, masks: Path, **more: object) -> offline.Wanted:
    return offline.Wanted(output, "given_masks", {}, masks, **more)


def copied(paths: tuple[Path, ...], folder: Path, name: str, skip: int | None = None, thin: int = 1) -> Path:
    """The series again under another study's UIDs, without slice `skip`, or only every `thin`-th slice."""
    folder.mkdir(parents=True)
    for n, path in enumerate(paths):
        if n == skip or n % thin:
            continue
        ds = pydicom.dcmread(path)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = derive(name, "study"), derive(name, folder.name)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = derive(name, folder.name, ds.SOPInstanceUID)
        ds.save_as(folder / path.name)
    return folder


def test_a_second_case_leaves_nothing_of_the_first(study, tmp_path):
    out = tmp_path / "out"
    (first,) = offline.run([study.axial[0].parent], wanted(out, study.truth_labels), Config())
    assert first.analysed
    assert (out / "seg.dcm").exists()
    named = {str(ds.SOPInstanceUID): ds.InstanceNumber for ds in map(pydicom.dcmread, study.axial)}
    assert [lesion["image_number"] for lesion in first.lesions] == [
        named[lesion["slice_sop_uid"]] for lesion in first.lesions
    ]
    labels = read_labels(study.truth_labels)
    empty = tmp_path / "empty.nii.gz"
    write_labels(LabelVolume(np.zeros_like(labels.labels), labels.grid), empty)
    (second,) = offline.run([study.axial[0].parent], wanted(out, empty), Config())
    assert (second.analysed, second.told, second.lesions) == (True, "0 lesions marked by a person", [])
    assert not (out / "seg.dcm").exists()
    holed = copied(study.axial, tmp_path / "holed", "holed", skip=9)
    (third,) = offline.run([holed], wanted(out, study.truth_labels), Config())
    assert not third.analysed
    assert {path.name for path in out.iterdir()} == {"sr.dcm", "sc_1.dcm", "pdf.dcm", "findings.json"}
    assert "gap of 16.0 mm" in json.loads((out / "findings.json").read_text())["reason"]


def test_studies_that_share_a_series_have_a_report_each(study, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    for n, path in enumerate(study.axial[:4]):
        ds = pydicom.dcmread(path)
        ds.StudyInstanceUID = f"1.2.{n // 2}"
        ds.save_as(shared / path.name)
    results = offline.run([shared], wanted(tmp_path / "out", study.truth_labels), Config())
    assert [result.folder.name for result in results] == ["study-1", "study-2"]
    told = {pydicom.dcmread(result.folder / "sr.dcm").StudyInstanceUID for result in results}
    assert told == {"1.2.0", "1.2.1"}


@pytest.mark.parametrize("folder", [False, True])
def test_a_mask_file_that_is_none_is_a_wrong_option(study, tmp_path, folder):
    masks = tmp_path / "masks.nii.gz"
    if folder:
        masks.mkdir()
    with pytest.raises(ConfigError, match=r"^--masks: .*masks\.nii\.gz"):
        offline.run([study.axial[0].parent], wanted(tmp_path / "out", masks), Config())
    assert not (tmp_path / "out").exists()


def test_a_label_map_with_every_candidate_erased_says_that_there_is_none(study, tmp_path):
    folder = study.axial[0].parent
    offline.run([folder], wanted(tmp_path / "a", study.truth_labels), Config())
    made = nib.load(tmp_path / "a" / "labels.nii.gz")
    erased = np.minimum(np.asanyarray(made.dataobj), 1)
    nib.save(nib.Nifti1Image(erased, made.affine, made.header), tmp_path / "erased.nii.gz")
    (result,) = offline.run([folder], wanted(tmp_path / "b", tmp_path / "erased.nii.gz"), Config())
    assert (result.analysed, result.told) == (True, "0 lesions marked by a person")
    assert b"The person's mask marks no lesion" in (tmp_path / "b" / "sr.dcm").read_bytes()


def test_a_result_that_the_guards_would_keep_says_so_and_is_not_fit(study, tmp_path, monkeypatch):
    folder = study.axial[0].parent
    labels = read_labels(study.truth_labels)
    mirrored = tmp_path / "mirrored.nii.gz"
    write_labels(LabelVolume(labels.labels[:, :, ::-1].copy(), labels.grid), mirrored)
    (result,) = offline.run([folder], wanted(tmp_path / "a", mirrored), Config())
    assert (result.analysed, result.fit, result.written) == (True, False, True)
    assert "probably mirrored" in result.as_json()["blocked"]
    assert result.told.startswith("BLOCKED, do not hand this on: ")
    (good,) = offline.run([folder], wanted(tmp_path / "b", study.truth_labels), Config())
    assert (good.fit, good.blocked) == (True, "")
    assert not any("mirrored" in flag for flag in good.flags)
    assert any("mirrored" in flag for flag in result.flags)
    assert result.as_json()["flags"] == list(result.flags)

    def of_another_patient(self: pydicom.Dataset, *arguments: object, **more: object) -> None:
        self.PatientID = "another"
        pydicom.dcmwrite(arguments[0], self, enforce_file_format=True)

    monkeypatch.setattr(pydicom.Dataset, "save_as", of_another_patient)
    (bad,) = offline.run([folder], wanted(tmp_path / "c", study.truth_labels), Config())
    assert not bad.fit
    assert "PatientID" in bad.blocked


def test_the_same_files_give_the_same_bytes_dated_as_the_images_are(study, tmp_path):
    for name in "ab":
        offline.run([study.axial[0].parent], wanted(tmp_path / name, study.truth_labels), Config())
    objects = sorted((tmp_path / "a").glob("*.dcm"))
    assert len(objects) > 5
    for path in objects:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    source, result = (pydicom.dcmread(path, stop_before_pixels=True) for path in (study.axial[0], objects[0]))
    assert result.SeriesDate == source.AcquisitionDate


def test_every_study_below_a_folder_is_answered_in_a_folder_of_its_own(study, tmp_path):
    folder = tmp_path / "in"
    copied(study.axial, folder / "good", "a")
    shutil.copytree(study.localizer[0].parent, folder / "localizer alone")
    results = offline.run([folder], wanted(tmp_path / "out", study.truth_labels), Config())
    assert sorted(result.analysed for result in results) == [False, True]
    assert len({result.folder for result in results}) == 2
    for result in results:
        assert (result.folder / "sr.dcm").is_file()
        assert (result.folder / "seg.dcm").is_file() == result.analysed
    (refused,) = [result for result in results if not result.analysed]
    assert "LOCALIZER" in refused.told


def test_where_the_best_series_is_no_volume_the_next_one_is_analysed(study, tmp_path):
    folder = tmp_path / "in"
    copied(study.axial, folder / "holed", "b", skip=9)
    copied(study.axial, folder / "thinned", "b", thin=2)
    masks = tmp_path / "thinned.nii.gz"
    labels = read_labels(study.truth_labels)
    affine = labels.grid.affine_lps_mm.copy()
    affine[:, 0] *= 2
    grid = replace(labels.grid, shape=(12, 64, 64), affine_lps_mm=affine)
    write_labels(LabelVolume(np.ascontiguousarray(labels.labels[::2]), grid), masks)
    (result,) = offline.run([folder], wanted(tmp_path / "out", masks), Config())
    assert result.analysed, result.told


def test_a_nifti_of_fractions_is_rounded_into_its_series(study, tmp_path):
    from salsa_node.series import inspect, read_volume

    ct = read_volume(inspect(study.axial))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ct.grid.affine_lps_mm[:, [2, 1, 0, 3]]
    fractions = ct.voxels_hu.transpose(2, 1, 0).astype(np.float32) + 0.4
    nib.save(nib.Nifti1Image(fractions, affine), tmp_path / "scan.nii")
    (result,) = offline.run([tmp_path / "scan.nii"], wanted(tmp_path / "out", study.truth_labels), Config())
    assert result.analysed, result.told
    made = read_volume(inspect(sorted((tmp_path / "out" / "ct").iterdir())))
    assert np.array_equal(made.voxels_hu, ct.voxels_hu)


def test_what_nobody_foresaw_in_one_case_is_told_and_the_rest_go_on(study, tmp_path, monkeypatch):
    analyse = offline.analyse
    seen = []

    def once_broken(*arguments: object, **more: object) -> object:
        seen.append(1)
        if len(seen) == 1:
            raise RuntimeError("Doe^Jane")
        return analyse(*arguments, **more)

    monkeypatch.setattr(offline, "analyse", once_broken)
    paths = [study.axial[0].parent, study.axial[0].parent]
    first, second = offline.run(paths, wanted(tmp_path / "out", study.truth_labels), Config())
    assert "RuntimeError" in first.told
    assert "Doe" not in first.told
    assert second.analysed
    assert first.folder != second.folder


def test_a_study_that_fails_leaves_the_others_of_its_folder_their_answer(study, tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "_one", failing_once(offline._one))
    both = tmp_path / "both"
    for name in ("a", "b"):
        copied(study.axial, both / name, name)
    first, second = offline.run([both], wanted(tmp_path / "out", study.truth_labels), Config())
    assert (first.analysed, first.told, first.folder.name) == (False, "no such luck", "study-1")
    assert (second.analysed, second.folder.name) == (True, "study-2")


def failing_once(work):
    calls: list[int] = []

    def once(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise PipelineError("no such luck")
        return work(*arguments)

    return once


def test_a_rule_that_does_not_exist_is_refused_before_anything_is_read(study, tmp_path):
    with pytest.raises(ConfigError, match="diameter or volume"):
        offline.run([study.axial[0].parent], wanted(tmp_path, study.truth_labels, rule="size"), Config())
