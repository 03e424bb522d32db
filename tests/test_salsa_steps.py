"""SALSA's steps against SALSA's own files, and against MONAI's way of counting, on any orientation."""

from __future__ import annotations

from pathlib import Path

import made_findings as made
import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from salsa_node.criteria import Criteria, Rule
from salsa_node.errors import OrganNotFound
from salsa_node.findings import Disease, measure
from salsa_node.nifti import read_labels
from salsa_node.phantom import Recipe
from salsa_node.pipelines import Masks, Provenance
from salsa_node.pipelines.salsa_steps import (
    OUTSIDE_HU,
    PRESETS,
    clean_liver,
    crop,
    fine_grid,
    largest,
    resample_crop,
    resample_ct,
    resample_labels,
    restore_labels,
)
from salsa_node.regrid import onto
from salsa_node.volume import CtVolume, Grid, LabelVolume

UPSTREAM = PRESETS["salsa-2025"]


@pytest.fixture(scope="module")
def demo(testdata) -> Path:
    return testdata / "12_salsa_demo_scan1"


def stage(demo: Path, name: str) -> LabelVolume:
    (path,) = demo.rglob(f"{name}.nii.gz")
    return read_labels(path)


def mismatches(ours: LabelVolume, theirs: LabelVolume) -> int:
    """Voxels that differ, each looked up by its place in the patient."""
    assert ours.grid.shape == onto(theirs, ours.grid).labels.shape
    return int(np.count_nonzero(ours.labels != onto(theirs, ours.grid).labels))


def test_the_liver_at_1_mm_equals_salsas(demo):
    ours, theirs = resample_labels(stage(demo, "liver")), stage(demo, "liver_resampled")
    assert ours.grid.shape == (206, 399, 399)
    assert theirs.labels.any()
    assert mismatches(ours, theirs) == 0


def test_the_cleaned_liver_equals_salsas(demo):
    ours = clean_liver(resample_labels(stage(demo, "liver")), UPSTREAM)
    assert mismatches(ours, stage(demo, "liver_postprocessed")) == 0


def test_the_crop_lies_where_salsa_crops(demo):
    cleaned = clean_liver(resample_labels(stage(demo, "liver")), UPSTREAM)
    flat = CtVolume(np.zeros(cleaned.grid.shape, dtype=np.int16), cleaned.grid)
    cropped = crop(flat, cleaned, UPSTREAM)
    assert cropped.grid.shape == (192, 192, 192)
    start = np.rint(cleaned.grid.to_index(cropped.grid.to_lps_mm((0, 0, 0)))).astype(int)
    assert start.tolist() == [16, 161, 140]
    assert np.count_nonzero(cropped.voxels_hu == 0) == np.count_nonzero(cleaned.labels)
    assert set(np.unique(cropped.voxels_hu)) == {OUTSIDE_HU, 0}
    # the networks' answer, in the crop, pasted back: upstream's file carries the uncropped affine
    answer = stage(demo, "mask_0000")
    (path,) = demo.rglob("mask_0000.nii.gz")
    as_seen = np.asarray(nibabel.load(path).dataobj).transpose(2, 1, 0)
    assert as_seen.shape == answer.grid.shape == cropped.grid.shape
    pasted = onto(LabelVolume(as_seen.astype(np.uint8), cropped.grid), cleaned.grid)
    assert mismatches(pasted, stage(demo, "mask_resampled")) == 0


def test_the_way_back_equals_salsas_result(demo):
    (path,) = demo.glob("scan1_SALSA.nii.gz")
    result = read_labels(path)
    fine = stage(demo, "mask_resampled")
    on_fine = onto(fine, fine_grid(result.grid))
    back = restore_labels(on_fine, result.grid)
    assert np.count_nonzero((back.labels > 0) != (result.labels > 0)) == 0


def test_the_volume_rule_names_salsas_lesions_and_those_of_the_truth(demo):
    def diseases(name: str) -> list[tuple[float, Disease]]:
        (path,) = demo.glob(f"{name}.nii.gz")
        labels = read_labels(path)
        lesions = LabelVolume((labels.labels > 0).astype(np.uint8), labels.grid)
        ct = CtVolume(np.zeros(labels.grid.shape, dtype=np.int16), labels.grid)
        masks = Masks(None, lesions, Provenance("salsa", "2025"))
        found = measure(ct, masks, Criteria(rule=Rule.VOLUME)).lesions
        return [(round(lesion.volume_mm3, 1), lesion.disease) for lesion in found]

    yes, no = Disease.MEASURABLE, Disease.NON_MEASURABLE
    assert diseases("scan1_SALSA") == [(27404.6, yes), (19081.5, yes)]
    assert diseases("scan1_GT") == [(23466.2, yes), (16142.1, yes), (403.9, no)]


# ---- any orientation ---------------------------------------------------------------------------------


def ball(grid: Grid, center: tuple[float, float, float], radius_mm: float) -> LabelVolume:
    index = np.indices(grid.shape).reshape(3, -1)
    points = grid.affine_lps_mm[:3, :3] @ index + grid.affine_lps_mm[:3, 3:]
    inside = np.linalg.norm(points - np.array(center)[:, None], axis=0) <= radius_mm
    return LabelVolume(inside.reshape(grid.shape).astype(np.uint8), grid)


@pytest.mark.parametrize("orientation", made.ORIENTATIONS)
def test_there_and_back_keeps_every_voxel_that_is_coarser_than_1_mm(orientation):
    grid = made.grid(orientation, (2.5, 1.2, 1.1))
    labels = ball(grid, grid.to_lps_mm((10, 24, 20)), 15.0)
    fine = resample_labels(labels)
    assert fine.grid.spacing_mm == pytest.approx((1, 1, 1))
    restored = restore_labels(fine, grid)
    np.testing.assert_array_equal(restored.labels, labels.labels)
    # the fine voxels lie where the coarse ones lie
    middle = np.mean(np.argwhere(fine.labels), axis=0)
    truth = np.mean(np.argwhere(labels.labels), axis=0)
    apart = np.array(fine.grid.to_lps_mm(tuple(middle))) - np.array(grid.to_lps_mm(tuple(truth)))
    assert np.linalg.norm(apart) < 0.6


@pytest.mark.parametrize("orientation", ["axial", "axial from head to feet", "coronal", "oblique"])
def test_linear_resampling_keeps_a_linear_image(orientation):
    grid = made.grid(orientation, (2.5, 0.9, 1.1))
    index = np.indices(grid.shape).reshape(3, -1)
    points = grid.affine_lps_mm[:3, :3] @ index + grid.affine_lps_mm[:3, 3:]
    slope = np.array([2.0, -1.0, 0.5])
    ct = CtVolume((slope @ points).reshape(grid.shape).astype(np.float32), grid)
    fine = resample_ct(ct)
    nearly_last = tuple(n - 2 for n in fine.grid.shape)  # the last centre may lie beyond the image's
    for at in ((0, 0, 0), (3, 7, 5), nearly_last):
        assert fine.voxels_hu[at] == pytest.approx(slope @ np.array(fine.grid.to_lps_mm(at)), abs=0.02)


# ---- where upstream is wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ["SPL", "IRA", "LSP"])
@pytest.mark.parametrize("preset", ["salsa", "salsa-2024"])
def test_the_crop_is_resampled_alone_to_the_same_bits(orientation: str, preset: str) -> None:
    grid = Recipe(1, (14, 20, 24), (5.3, 1.7, 2.9), orientation, rotation_deg=(4.0, -3.0, 6.0)).grid
    ct = CtVolume(np.random.default_rng(2).integers(-1000, 1000, grid.shape).astype(np.int16), grid)
    liver = np.zeros(grid.shape, dtype=np.uint8)
    liver[5:9, 4:12, 9:15] = 1
    cleaned = resample_labels(LabelVolume(liver, grid))
    whole = crop(resample_ct(ct), cleaned, PRESETS[preset])
    alone = resample_crop(ct, cleaned, PRESETS[preset])
    assert alone.voxels_hu.dtype == np.float32
    assert alone.voxels_hu.tobytes() == whole.voxels_hu.tobytes()
    assert alone.grid.matches(whole.grid)
    assert alone.voxels_hu.std() > 100


def test_a_liver_at_the_edge_of_the_scan_is_eaten_by_upstream_and_not_by_us():
    grid = fine_grid(Grid((60, 60, 60), np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]))
    labels = np.zeros(grid.shape, dtype=np.uint8)
    labels[:30, 15:45, 15:45] = 1
    theirs = clean_liver(LabelVolume(labels, grid), UPSTREAM).labels
    ours = clean_liver(LabelVolume(labels, grid), PRESETS["salsa"]).labels
    assert not theirs[:8].any()
    assert ours[0].any()
    assert ((labels == 1) <= (ours == 1)).all()
    middle = slice(12, 50)
    np.testing.assert_array_equal(theirs[middle], ours[middle])


def test_the_2024_preset_widens_fills_and_leaves_a_margin():
    grid = fine_grid(Grid((90, 90, 90), np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]))
    labels = np.zeros(grid.shape, dtype=np.uint8)
    labels[30:60, 30:60, 30:60] = 1
    labels[40:50, 40:50, 40:50] = 0
    cleaned = clean_liver(LabelVolume(labels, grid), PRESETS["salsa-2024"])
    inside = np.argwhere(cleaned.labels)
    assert inside.min() == 15
    assert inside.max() == 74
    assert cleaned.labels[45, 45, 45] == 1
    cropped = crop(CtVolume(np.zeros(grid.shape, dtype=np.int16), grid), cleaned, PRESETS["salsa-2024"])
    assert cropped.grid.shape == (128, 128, 128)  # 60 + 2 x 10, padded
    assert np.rint(grid.to_index(cropped.grid.to_lps_mm((0, 0, 0)))).tolist() == [5, 5, 5]


def test_the_2024_preset_counts_corners_as_touching_and_fills_nothing_where_all_is_liver():
    grid = fine_grid(Grid((90, 90, 90), np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]))
    apart = np.zeros(grid.shape, dtype=bool)
    apart[10:20, 10:20, 10:20] = True
    apart[20:31, 20:31, 20:31] = True
    assert np.count_nonzero(largest(apart)) == 11**3
    assert np.count_nonzero(largest(apart, 26)) == 10**3 + 11**3
    full = LabelVolume(np.ones(grid.shape, dtype=np.uint8), grid)
    assert clean_liver(full, PRESETS["salsa-2024"]).labels.all()


def test_no_liver_is_a_verdict():
    grid = fine_grid(made.grid())
    with pytest.raises(OrganNotFound, match="no voxel"):
        clean_liver(LabelVolume(np.zeros(grid.shape, dtype=np.uint8), grid), UPSTREAM)


# ---- between centres and beyond them -------------------------------------------------------------


def test_beyond_the_outer_centres_their_values_hold():
    grid = Grid((3, 2, 2), np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [1.4, 0, 0, 0], [0, 0, 0, 1]]))
    ramp = np.broadcast_to(np.array([0, 140, 280], dtype=np.int16)[:, None, None], grid.shape)
    fine = resample_ct(CtVolume(ramp.copy(), grid))
    assert fine.grid.shape == (4, 2, 2)  # the last centre, at 3.0 mm, lies beyond 2.8 mm
    np.testing.assert_allclose(fine.voxels_hu[:, 0, 0], [0, 100, 200, 280], rtol=1e-5)


def test_a_tie_falls_to_the_same_side_however_the_scan_lies():
    """Voxels of 2 mm: every other one at 1 mm lies half-way; an inexact origin must not decide."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, size=(6, 5, 4)).astype(np.uint8)
    upright = np.array([[0, 0, -2.0, 0], [0, -2.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    expected = resample_labels(LabelVolume(labels, Grid(labels.shape, upright))).labels
    compared = 0
    for turn, origin_mm in zip(Rotation.random(200, rng=3), rng.uniform(-900, 900, size=(200, 3)), strict=True):
        affine = upright.copy()
        affine[:3, :3] = Rotation.from_rotvec(turn.as_rotvec() / 20).as_matrix() @ upright[:3, :3]
        affine[:3, 3] = origin_mm
        grid = Grid(labels.shape, affine)
        if grid.spacing_mm == (2.0, 2.0, 2.0):  # to the last digit, else there is no tie
            compared += 1
            np.testing.assert_array_equal(resample_labels(LabelVolume(labels, grid)).labels, expected)
    assert compared > 5
