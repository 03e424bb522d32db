from __future__ import annotations

from dataclasses import replace

import made_findings as made
import numpy as np
import pytest

from salsa_node import guards, phantom
from salsa_node.criteria import Criteria
from salsa_node.dicom_result import Identity
from salsa_node.findings import Flag, measure
from salsa_node.limits import Limits
from salsa_node.pipelines import Masks
from salsa_node.volume import CtVolume, Grid, LabelVolume

IDENTITY = Identity()


@pytest.fixture(scope="module", params=["SPL", "IPL", "SAR", "PSL"])
def patient(request) -> phantom.Phantom:
    shape, spacing = ((32, 96, 96), (6.0, 3.0, 3.0))
    if request.param == "PSL":
        shape, spacing = ((96, 32, 96), (3.0, 6.0, 3.0))
    return phantom.make(phantom.Recipe(3, shape=shape, spacing_mm=spacing, orientation=request.param))


def flagged(ct: CtVolume, organ: np.ndarray, lesions: np.ndarray, **limits: object) -> dict[str, Flag]:
    masks = Masks(
        LabelVolume(organ.astype(np.uint8), ct.grid), LabelVolume(lesions.astype(np.uint16), ct.grid), made.PROVENANCE
    )
    return {f.name: f for f in guards.flags(ct, measure(ct, masks, Criteria(thick_slice_mm=7)), Limits(**limits))}


def test_the_truth_is_not_flagged(patient):
    assert flagged(patient.ct, patient.liver.labels, patient.lesion_labels.labels) == {}


def left_right_axis(grid: Grid) -> int:
    return int(np.argmax(np.abs(grid.affine_lps_mm[0, :3])))


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_a_mirrored_mask_is_caught_and_blocks(patient, axes):
    flags = flagged(patient.ct, np.flip(patient.liver.labels, axes), np.flip(patient.lesion_labels.labels, axes))
    assert flags["mirrored"].blocks
    assert not flagged(
        patient.ct,
        np.flip(patient.liver.labels, axes),
        np.flip(patient.lesion_labels.labels, axes),
        mirrored="flag",
    )["mirrored"].blocks


@pytest.mark.parametrize("middle", [(16, 60, 48), (16, 36, 64)])
def test_a_bad_segmentation_is_not_taken_for_a_mirrored_one(middle):
    """A ball on the spine, or half in the stomach: turned over, it fits a little better, yet nowhere well."""
    patient = phantom.make(phantom.Recipe(3, shape=(32, 96, 96), spacing_mm=(6.0, 3.0, 3.0)))
    away_mm = (np.indices(patient.ct.grid.shape) - np.reshape(middle, (3, 1, 1, 1))) * np.reshape(
        (6, 3, 3), (3, 1, 1, 1)
    )
    flags = flagged(patient.ct, np.linalg.norm(away_mm, axis=0) < 35, np.zeros(patient.ct.grid.shape))
    assert "mirrored" not in flags
    assert flags["not_like_a_liver"].text.startswith("Implausible liver: by its attenuation")
    assert not flags["not_like_a_liver"].blocks


def test_images_and_masks_that_are_both_mirrored_put_the_liver_on_the_left(patient):
    axis = left_right_axis(patient.ct.grid)
    ct = CtVolume(np.flip(patient.ct.voxels_hu, axis).copy(), patient.ct.grid)
    flags = flagged(ct, np.flip(patient.liver.labels, axis), np.zeros(ct.grid.shape))
    assert set(flags) == {"liver_on_the_left"}
    assert not flags["liver_on_the_left"].blocks


def test_a_lesion_far_from_the_liver_is_flagged_and_one_beside_it_is_not(patient):
    liver, grid = patient.liver.labels == 1, patient.ct.grid
    lesions = np.zeros(grid.shape)
    far = np.array(np.unravel_index(np.argmin(patient.organs.labels == 1), grid.shape))
    lesions[tuple(slice(n, n + 2) for n in far)] = 1
    edge = np.argwhere(liver)[0]
    lesions[tuple(edge)] = 2
    flags = flagged(patient.ct, liver, lesions)
    assert set(flags) == {"lesion_outside_liver", "not_soft_tissue"}  # the far one lies in the air
    assert "0 % of it" in flags["lesion_outside_liver"].text


def of_lesions_alone(patient: phantom.Phantom, lesions: np.ndarray, **limits: object) -> dict[str, Flag]:
    masks = Masks(None, LabelVolume(lesions.astype(np.uint16), patient.ct.grid), made.PROVENANCE)
    found = measure(patient.ct, masks, Criteria(thick_slice_mm=7))
    return {f.name: f for f in guards.flags(patient.ct, found, Limits(**limits))}


def test_without_a_liver_the_laterality_is_said_to_be_unchecked(patient):
    lesions = np.zeros(patient.ct.grid.shape)
    lesions[tuple(np.argwhere((patient.liver.labels == 1) & (patient.ct.voxels_hu > 50))[0])] = 1
    flags = of_lesions_alone(patient, lesions)
    assert set(flags) == {"laterality_unchecked"}
    assert not flags["laterality_unchecked"].blocks
    assert of_lesions_alone(patient, np.zeros_like(lesions)) == {}


def test_lesions_in_fat_or_air_are_kept_here_where_most_are_such(patient):
    lesions = np.zeros(patient.ct.grid.shape)
    air = np.argwhere(patient.ct.voxels_hu < -900)
    liver = np.argwhere((patient.liver.labels == 1) & (patient.ct.voxels_hu > 50))
    lesions[tuple(air[0])], lesions[tuple(liver[0])] = 1, 2
    flags = of_lesions_alone(patient, lesions)
    assert "Lesion 1 (-" in flags["not_soft_tissue"].text
    assert "Lesion 2" not in flags["not_soft_tissue"].text
    assert not flags["not_soft_tissue"].blocks  # half of them is not most of them
    lesions[tuple(liver[0])] = 0
    assert of_lesions_alone(patient, lesions)["not_soft_tissue"].blocks
    assert not of_lesions_alone(patient, lesions, mirrored="flag")["not_soft_tissue"].blocks


def test_livers_too_small_too_large_or_cut_off_are_flagged(patient):
    liver, nothing = patient.liver.labels == 1, np.zeros(patient.ct.grid.shape)
    assert "expected 300 to 500" in flagged(patient.ct, liver, nothing, max_liver_ml=500)["liver_volume"].text
    assert "expected 2000 to" in flagged(patient.ct, liver, nothing, min_liver_ml=2000)["liver_volume"].text
    middle = int(np.argwhere(liver)[:, 0].mean())
    cut = CtVolume(patient.ct.voxels_hu[middle:].copy(), shifted(patient.ct.grid, middle))
    flags = flagged(cut, liver[middle:], nothing[middle:], min_liver_ml=2000)
    assert "the first slice" in flags["liver_cut_off"].text
    assert "liver_volume" not in flags  # a part of a liver may be small


def shifted(grid: Grid, slices: int) -> Grid:
    affine = grid.affine_lps_mm.copy()
    affine[:3, 3] = grid.to_lps_mm((slices, 0, 0))
    return Grid((grid.shape[0] - slices, *grid.shape[1:]), affine, grid.frame_of_reference_uid)


def test_a_head_taken_for_a_liver_is_flagged():
    """A brain fills most of its cross-section; an ellipse of soft tissue in a skull stands for it."""
    grid = Grid((20, 80, 80), np.diag([5.0, 2.5, 2.5, 1.0]))
    _, r, c = np.indices(grid.shape)
    radius = np.hypot((r - 40) / 36, (c - 40) / 30)
    hu = np.select([radius < 0.9, radius < 1], [35, 900], -1000).astype(np.int16)
    flags = flagged(
        CtVolume(hu, Grid(grid.shape, grid.affine_lps_mm[:, [2, 1, 0, 3]])), radius < 0.88, np.zeros(grid.shape)
    )
    assert "fills 7" in flags["not_an_abdomen"].text


def test_thick_slices_are_flagged():
    findings, _ = made.case()
    voxels = np.zeros(findings.lesion_labels.grid.shape, dtype=np.int16)
    ct = CtVolume(voxels, findings.lesion_labels.grid)
    thin = guards.flags(ct, replace(findings, organ=None), Limits())
    thick = guards.flags(ct, replace(findings, organ=None, criteria=Criteria(thick_slice_mm=2)), Limits())
    assert [f.name for f in thin] == ["laterality_unchecked"]
    assert [f.name for f in thick] == ["thick_slices", "laterality_unchecked"]
    assert "2.5 mm apart" in thick[0].text
