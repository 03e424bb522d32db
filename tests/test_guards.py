from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import made_findings as made
import numpy as np
import pytest
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter

from salsa_node import guards, phantom
from salsa_node.criteria import Criteria
from salsa_node.dicom_result import Identity
from salsa_node.findings import Flag, measure
from salsa_node.limits import Limits
from salsa_node.nifti import read_ct, read_labels
from salsa_node.pipelines import Masks
from salsa_node.regrid import onto
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


@pytest.mark.parametrize(("seed", "first"), [(0, 18), (1, 17), (3, 17)])
def test_the_order_of_ten_slices_is_told_by_the_outlines(seed, first):
    """Fifty millimetres of liver change little: the whole mask fits about as well backwards."""
    patient = phantom.make(phantom.Recipe(seed, shape=(40, 128, 160), spacing_mm=(5.0, 2.0, 1.6)))
    part = slice(first, first + 10)
    slab = CtVolume(patient.ct.voxels_hu[part].copy(), Grid((10, 128, 160), patient.ct.grid.affine_lps_mm))
    liver, nothing = patient.liver.labels[part] == 1, np.zeros(slab.grid.shape)
    assert guards._fit(slab, guards._Liver.of(liver[::-1].view(np.uint8)))[1] == ""
    assert "order of their slices" in flagged(slab, liver[::-1], nothing)["mirrored"].text
    rough = gaussian_filter(liver.astype(np.float32), (1, 3, 3)) > 0.5
    beside, larger = np.roll(liver, (6, -6), (1, 2)), binary_dilation(liver, iterations=2)
    for mask in (liver, rough, larger, beside, liver & (slab.voxels_hu > 80)):
        assert "mirrored" not in flagged(slab, mask, nothing)


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
    end = {"S": "at the feet", "I": "at the head", "P": "in front"}[patient.recipe.orientation[0]]
    assert f"the first slice (the end {end}): part" in flags["liver_cut_off"].text
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
    assert [f.name for f in thick] == ["laterality_unchecked", "thick_slices"]
    assert "2.5 mm apart" in thick[1].text


def test_the_gravest_flag_comes_first():
    names = ("thick_slices", "liver_cut_off", "phase_wrong", "not_an_abdomen", "lesion_outside_liver")
    found = [Flag(name, name) for name in names] + [Flag("mirrored", "mirrored", blocks=True)]
    assert [flag.name for flag in guards.gravest_first(found)] == [
        "mirrored",
        "not_an_abdomen",
        "lesion_outside_liver",
        "liver_cut_off",
        "thick_slices",
        "phase_wrong",
    ]


# ---- made volumes: the answer known by how they were drawn ------------------------------------------

PLAIN = Grid((24, 40, 60), np.array([[0, 0, 4.0, -120], [0, 4.0, 0, -80], [5.0, 0, 0, 0], [0, 0, 0, 1]]))
HERE = (slice(6, 18), slice(12, 28), slice(6, 26))  # in the right half; its mirror image lies clear of it


def drawn(*parts: tuple[tuple[slice, ...], float], everywhere: float = -100.0) -> np.ndarray:
    hu = np.full(PLAIN.shape, everywhere, dtype=np.float32)
    for where, value in parts:
        hu[where] = value
    return hu


def of_made(hu: np.ndarray, organ: tuple[slice, ...] | np.ndarray, lesions: np.ndarray | None = None, **limits: object):
    mask = np.zeros(PLAIN.shape)
    mask[organ] = 1
    return flagged(CtVolume(hu, PLAIN), mask, np.zeros(PLAIN.shape) if lesions is None else lesions, **limits)


def mirror_of(where: tuple[slice, ...]) -> tuple[slice, ...]:
    return (*where[:2], slice(PLAIN.shape[2] - where[2].stop, PLAIN.shape[2] - where[2].start))


@pytest.mark.parametrize("value", [-1000.0, np.nan])
def test_a_body_of_air_is_no_liver_and_breaks_nothing(value):
    flags = of_made(drawn(everywhere=value), HERE)
    assert set(flags) == {"not_an_abdomen", "not_like_a_liver"}


def test_where_most_of_the_liver_lies_in_air_its_side_is_not_judged():
    hu = drawn((HERE, 100.0))
    hu[10] = -1000.0
    organ = np.zeros(PLAIN.shape, dtype=bool)
    organ[HERE] = True
    organ[10, 10:30, 4:28] = True
    assert set(of_made(hu, organ)) == {"not_an_abdomen"}


def test_a_liver_mask_without_a_voxel_is_flagged():
    flags = of_made(drawn((HERE, 100.0)), np.zeros(PLAIN.shape, dtype=bool))
    assert set(flags) == {"liver_volume"}
    assert "0 cm3" in flags["liver_volume"].text
    lesions = np.zeros(PLAIN.shape)
    lesions[HERE] = 1
    assert "laterality_unchecked" in of_made(drawn((HERE, 100.0)), np.zeros(PLAIN.shape, dtype=bool), lesions)


@pytest.mark.parametrize("edge", ["first", "last"])
def test_the_slice_that_cuts_the_liver_is_named(edge):
    where = (slice(0, 14) if edge == "first" else slice(12, 24), *HERE[1:])
    flags = of_made(drawn((where, 100.0)), where)
    assert f"reaches the {edge} " in flags["liver_cut_off"].text


def test_a_single_voxel_that_stands_out_in_a_mirrored_liver_changes_nothing():
    for odd in (HERE, mirror_of(HERE)):
        hu = drawn((mirror_of(HERE), 100.0))
        hu[odd][0, 0, 0] = np.nan
        assert "mirrored" in of_made(hu, HERE)


def test_some_voxels_of_liver_are_not_enough_to_call_them_mirrored():
    few = (slice(8, 14), slice(14, 20), slice(8, 14))
    assert guards.ENOUGH_VOXELS > 6**3
    lesions = np.zeros(PLAIN.shape)
    lesions[9, 15, 9] = 1
    flags = of_made(drawn((mirror_of(few), 100.0)), few, lesions)
    assert "mirrored" not in flags
    assert "laterality_unchecked" in flags
    assert "mirrored" in of_made(drawn((mirror_of(HERE), 100.0)), HERE)


def test_air_under_the_mask_is_not_its_own_kind_of_liver():
    """A homogeneous cavity stands out from what is around it as a liver does; its attenuation is none of a liver."""
    assert "mirrored" in of_made(drawn((HERE, -1000.0), (mirror_of(HERE), 100.0)), HERE)


@pytest.mark.parametrize(("share", "mirrored"), [(0.77, True), (0.73, False)])
def test_how_much_better_a_mirrored_mask_must_fit(share, mirrored):
    hu = drawn((HERE, 160.0), (mirror_of(HERE), 160.0))
    for where, like_liver in ((HERE, 0.6), (mirror_of(HERE), share)):
        there = hu[where]
        there[np.random.default_rng(1).permutation(there.size).reshape(there.shape) < like_liver * there.size] = 100
    assert ("mirrored" in of_made(hu, HERE)) == mirrored


@pytest.mark.parametrize("far", [3, 2])
def test_half_of_a_lesion_must_lie_near_the_liver(far):
    """Five voxels in a row: two are near the liver and three far, or the other way round."""
    lesions = np.zeros(PLAIN.shape)
    start = 26 + 2 - (5 - far)  # 4 mm a column: two columns lie within 10 mm
    lesions[10, 15, start : start + 5] = 1
    flags = of_made(drawn((HERE, 100.0), ((10, 15, slice(26, 40)), 100.0)), HERE, lesions)
    assert ("lesion_outside_liver" in flags) == (far == 3)
    if far == 3:
        assert "40 % of it" in flags["lesion_outside_liver"].text


def test_a_liver_that_lies_between_the_voxels_of_a_coarser_grid_is_seen():
    fine = Grid((40, 40, 40), np.array([[0, 0, 0.5, 0], [0, 0.5, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 1.0]]))
    organ, lesions = np.zeros(fine.shape), np.zeros(fine.shape)
    organ[19:22, 19, 17:20] = 1
    lesions[20:22, 19, 23:26] = 1  # 2 mm to the left
    ct = CtVolume(np.full(fine.shape, 50, dtype=np.int16), fine)
    assert "lesion_outside_liver" not in flagged(ct, organ, lesions)
    assert "lesion_outside_liver" in flagged(ct, organ, lesions, near_liver_mm=1.0)


@pytest.mark.parametrize("orientation", ["SPL", "SLP", "LPS", "RIA", "ASR"])
def test_the_side_of_the_liver_is_known_however_the_slices_lie(orientation):
    shape, spacing = [0, 0, 0], [0.0, 0.0, 0.0]
    for axis, letter in enumerate(orientation):
        shape[axis], spacing[axis] = (32, 6.0) if letter in "SI" else (96, 3.0)
    patient = phantom.make(phantom.Recipe(3, shape=tuple(shape), spacing_mm=tuple(spacing), orientation=orientation))
    nothing = np.zeros(patient.ct.grid.shape)
    assert "liver_on_the_left" not in flagged(patient.ct, patient.liver.labels, nothing)
    axis = left_right_axis(patient.ct.grid)
    ct = CtVolume(np.flip(patient.ct.voxels_hu, axis).copy(), patient.ct.grid)
    assert "liver_on_the_left" in flagged(ct, np.flip(patient.liver.labels, axis), nothing)


@pytest.mark.parametrize("axes", list(permutations(range(3))))
def test_the_side_is_judged_across_the_whole_body_at_the_level_of_the_liver(axes):
    """The body lies off the middle of the images, and is narrow where the liver lies in it."""
    liver = (slice(6, 18), slice(12, 22), slice(24, 34))
    hu = drawn(((slice(0, 24), slice(2, 12), slice(20, 58)), 0.0), (liver, 100.0), everywhere=-1000.0)
    organ = np.zeros(PLAIN.shape)
    organ[liver] = 1
    affine = PLAIN.affine_lps_mm[:, [*axes, 3]]
    grid = Grid(tuple(PLAIN.shape[axis] for axis in axes), affine)
    for turned, left in ((1, False), (-1, True)):  # of patients who lie the other way round, right is left
        placed = Grid(grid.shape, np.diag([turned, turned, 1, 1]) @ grid.affine_lps_mm)
        ct = CtVolume(np.ascontiguousarray(hu.transpose(axes)), placed)
        flags = flagged(ct, organ.transpose(axes), np.zeros(placed.shape))
        assert ("liver_on_the_left" in flags) == left


@pytest.mark.parametrize(("left_end", "judged"), [(58, True), (60, False)])
def test_the_side_is_not_judged_where_a_side_of_the_body_was_not_scanned(left_end: int, judged: bool) -> None:
    """The same liver in the left half of what is seen: of a body, or of what may be its right half alone."""
    liver = (slice(6, 18), slice(12, 28), slice(34, 54))
    hu = drawn(((slice(0, 24), slice(8, 32), slice(4, left_end)), 0.0), (liver, 100.0), everywhere=-1000.0)
    assert ("liver_on_the_left" in of_made(hu, liver)) == judged


def test_a_share_that_is_too_large_is_never_told_as_the_largest_plausible_one() -> None:
    hu = drawn((HERE, 100.0), everywhere=-1000.0)
    body = (slice(6, 18), slice(8, 29), slice(6, 29))  # 320 of 483 voxels are liver
    hu[body] = 0.0
    hu[HERE] = 100.0
    told = of_made(hu, HERE, max_share_of_body=0.66)["not_an_abdomen"].text
    assert "fills 67 %" in told
    assert "at most 66 %" in told


def test_on_a_real_liver_only_what_is_mirrored_across_or_front_to_back_is_caught(testdata):
    """In a slab of few slices the liver hardly changes from end to end: reversed slices go unseen, as README says."""
    folder = testdata / "01_abdomen_ct_siemens_j2k"
    ct = read_ct(folder / "example_ct_sm.nii.gz")
    liver = onto(read_labels(folder / "example_seg.nii.gz"), ct.grid).labels == 5
    assert np.count_nonzero(liver) * ct.grid.voxel_volume_mm3 > 500_000
    nothing = np.zeros(liver.shape)
    doubts = {"mirrored", "liver_on_the_left", "not_like_a_liver", "not_an_abdomen"}
    assert not doubts & set(flagged(ct, liver, nothing))
    axes = np.argmax(np.abs(ct.grid.affine_lps_mm[:3, :3]), axis=1)  # along x, y and z
    for axis in axes[:2]:
        assert flagged(ct, np.flip(liver, axis), nothing)["mirrored"].blocks


def scattered(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """A liver of odd shape: some voxels, a block, a thread that the sparse grid may miss; or other labels elsewhere."""
    chance = np.random.default_rng(seed)
    labels = np.where(chance.random(shape) < 0.003, 1, 0).astype(np.uint8)
    corner = [int(chance.integers(0, n // 2)) for n in shape]
    labels[tuple(slice(first, first + n // 3) for first, n in zip(corner, shape, strict=True))] = 1
    thread = np.zeros(shape, bool)
    thread[1::2, corner[1] | 1, corner[2] | 1] = True
    if seed % 2:
        labels[: shape[0] // 3] = 0
        labels[thread] = 1
    labels[-1, -1, -1] = 2 if seed % 3 == 0 else 0  # no liver
    return labels


@pytest.mark.parametrize("seed", range(8))
def test_near_is_what_the_distances_from_the_liver_on_the_whole_grid_say(seed):
    spacing_mm = [(1.0, 0.75, 0.75), (0.7, 0.9, 1.1), (5.0, 2.0, 1.6), (2.0, 1.0, 0.5)][seed % 4]
    shape = (17, 40, 46)
    labels = scattered(seed, shape)
    grid = Grid(shape, np.diag([*spacing_mm, 1.0]), "1.2.3")
    hu = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)  # tells every voxel from every other
    near = guards._Near.of(guards._Liver.of(labels), grid)

    stride = [max(1, int(2.0 / mm)) for mm in spacing_mm]
    every = tuple(slice(None, None, step) for step in stride)
    sparse = labels[every] == 1
    apart_mm = distance_transform_edt(~sparse, sampling=np.array(stride) * spacing_mm)
    expected = hu[every][sparse], hu[every][(apart_mm > 3) & (apart_mm <= 10)]
    seen = hu[near.places].ravel()
    assert len(expected[0])
    assert len(expected[1])
    assert np.array_equal(seen[near.inside], expected[0])
    assert np.array_equal(seen[near.around], expected[1])
    assert np.array_equal(guards._Sparse.of(guards._Liver.of(labels), grid).mask.sum(), sparse.sum())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("at_most_mm", [0.5, 3.0, 4.0, 10.0, 40.0])
def test_within_is_the_distance_transform_and_a_limit(seed, at_most_mm):
    shape = [(9, 22, 31), (1, 30, 28), (20, 3, 14)][seed % 3]
    step_mm = [(2.0, 1.5, 1.5), (1.0, 0.625, 0.8)][seed % 2]
    mask = np.random.default_rng(seed).random(shape) < 0.004
    mask[0, shape[1] // 2, -1] = True
    expected = distance_transform_edt(~mask, sampling=step_mm) <= at_most_mm
    assert np.array_equal(guards._within(mask, step_mm, at_most_mm), expected)
    assert not guards._within(np.zeros(shape, bool), step_mm, at_most_mm).any()


@pytest.mark.parametrize("seed", range(4))
def test_a_liver_in_its_box_counts_as_on_the_whole_grid(seed):
    labels = scattered(seed, (11, 23, 19))
    organ, liver = labels == 1, guards._Liver.of(labels)
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        assert np.array_equal(liver.counts(axis), np.count_nonzero(organ, axis=others))
    for k in np.flatnonzero(organ.any(axis=(1, 2))):
        assert np.array_equal(liver.plane(k), organ[k])
