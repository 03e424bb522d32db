"""The phantom: truth against geometry, the same patient on any grid, and a study that other software accepts."""

from __future__ import annotations

import json
import shutil
import subprocess
from math import pi
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from salsa_node.nifti import LABEL_MAP, read_description
from salsa_node.phantom import ORGANS, LesionSpec, Phantom, Recipe, make, write_study

SMALL = (48, 72, 72)
SPHERE = LesionSpec((-50.0, 0.0, 20.0), (15.0, 15.0, 15.0))
ELLIPSOID = LesionSpec((-55.0, -10.0, 5.0), (16.0, 11.0, 13.0), hu=30.0)


def coarse(seed: int = 2, **changes: object) -> Recipe:
    return Recipe(**({"seed": seed, "shape": SMALL, "spacing_mm": (4.0, 4.0, 4.0)} | changes))  # type: ignore[arg-type]


def lesion_points_lps_mm(phantom: Phantom, number: int) -> np.ndarray:
    indices = np.argwhere(phantom.lesion_labels.labels == number)
    affine = phantom.ct.grid.affine_lps_mm
    return indices @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("orientation", ["SPL", "IPL", "SAR", "LSP", "AIR", "PLS"])
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (5.0, 1.5, 1.5), (1.5, 2.5, 3.0)])
def test_a_lesion_has_the_centre_extent_and_volume_it_says(
    orientation: str, spacing: tuple[float, float, float]
) -> None:
    shape = tuple(round(110 / step) for step in spacing)
    recipe = Recipe(1, shape, spacing, orientation, center_lps_mm=(-50.0, 0.0, 10.0), lesions=(ELLIPSOID,))  # type: ignore[arg-type]
    phantom = make(recipe)
    (truth,) = phantom.lesions
    points = lesion_points_lps_mm(phantom, 1)
    voxel_mm3 = phantom.ct.grid.voxel_volume_mm3
    assert truth.volume_mm3 == pytest.approx(4 / 3 * pi * 16 * 11 * 13)
    assert truth.diameter_mm == 32.0
    assert len(points) * voxel_mm3 == pytest.approx(truth.volume_mm3, rel=0.05)
    assert np.abs(points.mean(axis=0) - truth.center_lps_mm).max() < 0.5
    assert np.abs((points.max(axis=0) - points.min(axis=0)) / 2 - truth.semi_axes_mm).max() <= max(spacing)


def test_an_oblique_grid_shows_the_same_lesion() -> None:
    phantom = make(
        Recipe(
            1,
            (60, 60, 60),
            (2.0, 2.0, 2.0),
            rotation_deg=(20, -15, 30),
            center_lps_mm=(-50, 0, 10),
            lesions=(ELLIPSOID,),
        )
    )
    points = lesion_points_lps_mm(phantom, 1)
    assert len(points) * 8 == pytest.approx(phantom.lesions[0].volume_mm3, rel=0.05)
    assert np.abs(points.mean(axis=0) - ELLIPSOID.center_lps_mm).max() < 0.5


def test_the_same_patient_lies_on_different_grids() -> None:
    axial = make(coarse(noise_sd_hu=0.0))
    sagittal = make(coarse(noise_sd_hu=0.0, orientation="LSP", shape=(72, 48, 72)))
    turned = sagittal.organs.labels.transpose(1, 2, 0)
    assert np.array_equal(axial.organs.labels, turned)
    assert axial.lesions == sagittal.lesions
    hu = sagittal.ct.voxels_hu.transpose(1, 2, 0).astype(float)
    assert np.abs(axial.ct.voxels_hu[2:-2, 2:-2, 2:-2] - hu[2:-2, 2:-2, 2:-2]).mean() < 10


def test_organs_lie_where_they_lie_in_a_patient() -> None:
    phantom = make(coarse())
    affine = phantom.ct.grid.affine_lps_mm

    def center(name: str) -> np.ndarray:
        mean: np.ndarray = (
            affine[:3, :3] @ np.argwhere(phantom.organs.labels == ORGANS[name]).mean(axis=0) + affine[:3, 3]
        )
        return mean

    assert center("liver")[0] < -20  # the patient's right
    assert center("spleen")[0] > 50
    assert center("spine")[1] > 40  # behind
    assert center("stomach")[1] < 0
    assert center("lungs")[2] > center("liver")[2] > center("kidneys")[2]


def test_ct_numbers_are_those_of_a_portal_venous_abdomen() -> None:
    phantom = make(coarse(lesions=(SPHERE,)))
    hu, organs = phantom.ct.voxels_hu, phantom.organs.labels
    lesion = phantom.lesion_labels.labels == 1
    assert 90 < hu[(organs == ORGANS["liver"]) & ~lesion].mean() < 140
    assert 50 < hu[lesion].mean() < 75
    assert hu[organs == ORGANS["lungs"]].mean() < -700
    assert hu[organs == ORGANS["stomach"]].min() < -800  # gas
    assert hu[organs == ORGANS["aorta"]].mean() > 120


def test_noise_has_the_strength_asked_for_and_is_correlated() -> None:
    phantom = make(coarse(noise_sd_hu=20.0))
    quiet = make(coarse(noise_sd_hu=0.0))
    noise = (phantom.ct.voxels_hu.astype(float) - quiet.ct.voxels_hu)[quiet.ct.voxels_hu > -900]
    plane = phantom.ct.voxels_hu[24].astype(float) - quiet.ct.voxels_hu[24]
    inside = quiet.ct.voxels_hu[24, :, 1:] > -900
    assert noise.std() == pytest.approx(20.0, rel=0.05)
    assert np.corrcoef(plane[:, 1:][inside], plane[:, :-1][inside])[0, 1] > 0.3


def test_a_recipe_gives_the_same_voxels_every_time_and_another_seed_others() -> None:
    first, again, other = make(coarse(3)), make(coarse(3)), make(coarse(4))
    assert np.array_equal(first.ct.voxels_hu, again.ct.voxels_hu)
    assert first.ct.slice_sop_uids == again.ct.slice_sop_uids
    assert not np.array_equal(first.ct.voxels_hu, other.ct.voxels_hu)
    assert not set(first.ct.slice_sop_uids) & set(other.ct.slice_sop_uids)


def test_seeds_draw_large_small_and_capsule_lesions_inside_the_liver() -> None:
    patients = [make(coarse(seed, shape=(8, 8, 8))) for seed in range(30)]
    lesions = [lesion for patient in patients for lesion in patient.lesions]
    assert any(lesion.diameter_mm < 10 for lesion in lesions)
    assert sum(lesion.diameter_mm >= 10 for lesion in lesions) > 30
    assert sum(lesion.touches_capsule for lesion in lesions) >= 5
    assert any(not patient.lesions for patient in patients)
    for one in lesions:
        assert one.diameter_mm == 2 * max(one.semi_axes_mm[:2])


def test_no_lesions_can_be_asked_for() -> None:
    phantom = make(coarse(lesions=()))
    assert phantom.lesions == ()
    assert phantom.lesion_labels.labels.max() == 0


@pytest.mark.parametrize("orientation", ["SPP", "SP", "xyz", "SIL"])
def test_an_orientation_that_names_no_three_axes_is_refused(orientation: str) -> None:
    with pytest.raises(ValueError, match="orientation must name one of"):
        coarse(orientation=orientation)


def test_a_study_holds_the_axial_series_a_localizer_and_the_truth(tmp_path: Path) -> None:
    phantom = make(coarse())
    study = write_study(phantom, tmp_path)
    images = [pydicom.dcmread(path) for path in study.axial]
    scouts = [pydicom.dcmread(path) for path in study.localizer]
    assert len(images) == SMALL[0]
    assert {ds.StudyInstanceUID for ds in images + scouts} == {study.study_uid}
    assert {ds.SeriesInstanceUID for ds in images} == {study.series_uid}
    assert {ds.FrameOfReferenceUID for ds in images + scouts} == {phantom.ct.grid.frame_of_reference_uid}
    assert {tuple(ds.ImageType) for ds in scouts} == {("ORIGINAL", "PRIMARY", "LOCALIZER")}
    assert len({ds.SOPInstanceUID for ds in images + scouts}) == len(images) + len(scouts)
    assert np.array_equal(np.stack([ds.pixel_array for ds in images]), phantom.ct.voxels_hu)
    assert str(images[0].PatientName) == "Phantom^Seed2"
    numbers = json.loads(study.truth_numbers.read_text())
    assert [lesion["number"] for lesion in numbers["lesions"]] == [lesion.number for lesion in phantom.lesions]
    truth = nib.nifti1.load(study.truth_labels)  # type: ignore[no-untyped-call]
    labels = np.asarray(truth.dataobj).transpose(2, 1, 0)
    assert np.array_equal(labels > 0, phantom.liver.labels > 0)
    assert read_description(study.truth_labels) == LABEL_MAP
    ras = truth.affine @ np.array([10, 20, 30, 1.0])
    assert np.allclose(ras[:3] * (-1, -1, 1), phantom.ct.grid.to_lps_mm((30, 20, 10)), atol=1e-3)


def test_another_study_word_gives_the_same_patient_another_study(tmp_path: Path) -> None:
    phantom = make(coarse(shape=(3, 16, 16)))
    first, second = write_study(phantom, tmp_path / "a"), write_study(phantom, tmp_path / "b", study="2")
    again = write_study(phantom, tmp_path / "c")
    assert first.study_uid != second.study_uid
    uids = [{pydicom.dcmread(path).SOPInstanceUID for path in study.axial} for study in (first, second, again)]
    assert not uids[0] & uids[1]
    assert [path.read_bytes() for path in first.axial] == [path.read_bytes() for path in again.axial]


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian package dicom3tools) is not installed")
@pytest.mark.parametrize(("orientation", "rotation"), [("SPL", (0, 0, 0)), ("LSP", (0, 0, 0)), ("SPL", (12, 4, -7))])
def test_the_validator_finds_no_error(tmp_path: Path, orientation: str, rotation: tuple[float, float, float]) -> None:
    study = write_study(make(coarse(orientation=orientation, rotation_deg=rotation, shape=(3, 40, 40))), tmp_path)
    for path in (study.axial[1], *study.localizer):
        verdict = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        assert "CTImage" in verdict.stderr
        assert "Error" not in verdict.stderr
