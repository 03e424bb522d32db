"""Lesions of known shape get their known volume, diameters and class."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_series import AXIAL, ORIENTATIONS, TURNED

from salsa_node.criteria import Criteria, Rule
from salsa_node.errors import PipelineError
from salsa_node.findings import Disease, Findings, box_around, measure, table
from salsa_node.pipelines import Masks, Provenance
from salsa_node.series import inspect, read_volume
from salsa_node.uids import digest
from salsa_node.volume import CtVolume, Grid, LabelVolume

PROVENANCE = Provenance("drawn", "1")
SPACINGS_MM = [(1.0, 1.0, 1.0), (2.5, 0.7, 0.7), (5.0, 0.6, 0.9)]


def grid(shape, axes=AXIAL, spacing_mm=(1.0, 1.0, 1.0), origin=(-31.5, 12.25, -400.75)) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = axes * np.array(spacing_mm)
    affine[:3, 3] = origin
    return Grid(shape, affine)


def found(labels, where=None, criteria=None, hu=None, per_value=False, provenance=PROVENANCE, organ=None) -> Findings:
    labels = np.asarray(labels, dtype=np.uint8)
    where = where or grid(labels.shape)
    voxels = np.zeros(labels.shape, np.int16) if hu is None else np.asarray(hu, np.int16)
    ct = CtVolume(voxels, where, tuple(f"2.25.{n}" for n in range(labels.shape[0])))
    organ = None if organ is None else LabelVolume(np.asarray(organ, np.uint8), where)
    masks = Masks(organ, LabelVolume(labels, where), provenance, lesion_per_value=per_value)
    return measure(ct, masks, criteria or Criteria())


def block(shape, *boxes):
    labels = np.zeros(shape, np.uint8)
    for value, *sides in boxes:
        labels[tuple(slice(*side) for side in sides)] = value
    return labels


# Shapes with known answers -------------------------------------------------------------------------------------------

TILT = np.linalg.qr(np.random.default_rng(11).standard_normal((3, 3)))[0]
SHAPES = {
    "sphere": np.eye(3) / 11.3**2,
    "ellipsoid": TILT @ np.diag([1 / 17.0**2, 1 / 11.0**2, 1 / 8.0**2]) @ TILT.T,
}


@pytest.mark.parametrize(("shape", "orientation", "spacing_mm"), list(product(SHAPES, ORIENTATIONS, SPACINGS_MM)))
def test_an_ellipsoid_has_its_volume_and_diameters(shape, orientation, spacing_mm):
    form, axes = SHAPES[shape], ORIENTATIONS[orientation]
    size = tuple(int(np.ceil(40 / mm)) + 3 for mm in spacing_mm)
    where = grid(size, axes, spacing_mm)
    centre = np.array(where.to_lps_mm(tuple((n - 1) / 2 + 0.13 for n in size)))
    index = np.indices(size).reshape(3, -1)
    points = where.affine_lps_mm[:3, :3] @ index + where.affine_lps_mm[:3, 3:] - centre[:, None]
    inside = (np.einsum("in,ij,jn->n", points, form, points) <= 1).reshape(size)
    [lesion] = found(inside, where).lesions

    volume_mm3 = 4 / 3 * np.pi / np.sqrt(np.linalg.det(form))
    shell = inside.sum() ** (2 / 3) * 5  # voxels at the surface, each of which may go either way
    assert lesion.volume_mm3 == pytest.approx(volume_mm3, abs=2 * np.sqrt(shell) * where.voxel_volume_mm3)
    assert lesion.centroid_lps_mm == pytest.approx(tuple(centre), abs=0.15 * max(spacing_mm))

    # Slices cut similar ellipses; the one nearest to the centre cuts the largest.
    normal, plane = axes[:, 0], axes[:, 1:]
    height = np.sqrt(normal @ np.linalg.inv(form) @ normal)
    off_mm = np.abs((np.arange(size[0]) - (size[0] - 1) / 2 - 0.13) * spacing_mm[0])
    shrink = np.sqrt(1 - (off_mm.min() / height) ** 2)
    short, long = 2 * shrink / np.sqrt(np.linalg.eigvalsh(plane.T @ form @ plane))[::-1]
    diagonal = np.hypot(*spacing_mm[1:])
    assert abs(lesion.slice_index - int(off_mm.argmin())) <= 1  # neighbours may draw level by a pixel
    assert lesion.long_axis.length_mm == pytest.approx(long, abs=diagonal)
    assert lesion.short_axis.length_mm == pytest.approx(short, abs=diagonal)


def test_a_rectangle_is_measured_between_its_outer_corners():
    [lesion] = found(block((3, 9, 9), (1, (1, 2), (2, 5), (3, 7)))).lesions
    assert lesion.long_axis.length_mm == pytest.approx(5.0)
    assert lesion.short_axis.length_mm == pytest.approx(3.75)  # the widest line across a 3 x 4 diagonal
    where = grid((3, 9, 9))
    ends = sorted(where.to_index(end) for end in (lesion.long_axis.start_lps_mm, lesion.long_axis.end_lps_mm))
    assert np.array(ends) == pytest.approx(np.array([(1, 1.5, 2.5), (1, 4.5, 6.5)]))
    assert (lesion.slice_index, lesion.slice_sop_uid) == (1, "2.25.1")
    assert lesion.volume_mm3 == pytest.approx(12.0)


def test_non_square_pixels_count_in_millimetres():
    where = grid((3, 20, 20), spacing_mm=(4.0, 0.5, 2.0))
    [lesion] = found(block((3, 20, 20), (1, (1, 2), (2, 18), (4, 6))), where).lesions  # 8 mm x 4 mm
    assert lesion.long_axis.length_mm == pytest.approx(np.hypot(8, 4))


def test_a_single_voxel_measures_its_own_diagonal():
    hu = np.zeros((3, 3, 3))
    hu[1, 1, 1] = 77
    [lesion] = found(block((3, 3, 3), (1, (1, 2), (1, 2), (1, 2))), hu=hu).lesions
    assert lesion.long_axis.length_mm == pytest.approx(np.sqrt(2))
    assert lesion.short_axis.length_mm == pytest.approx(np.sqrt(2))
    assert (lesion.mean_hu, lesion.sd_hu, lesion.min_hu, lesion.max_hu) == (77.0, 0.0, 77.0, 77.0)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_axes_end_on_the_lesion_in_one_slice_at_right_angles(orientation):
    where = grid((6, 30, 30), ORIENTATIONS[orientation], (3.0, 0.7, 0.9))
    row, column = np.indices((30, 30))
    disc = ((row - 14) / 6) ** 2 + ((column - 13) / 11) ** 2 <= 1
    labels = np.zeros((6, 30, 30), np.uint8)
    labels[2:5] = disc
    labels[3, 2:28, 13] = 1
    [lesion] = found(labels, where).lesions
    long, short = (np.array([a.start_lps_mm, a.end_lps_mm]) for a in (lesion.long_axis, lesion.short_axis))
    assert lesion.slice_index == 3
    for axis, ends in ((lesion.long_axis, long), (lesion.short_axis, short)):
        assert np.linalg.norm(ends[1] - ends[0]) == pytest.approx(axis.length_mm)
        indices = np.array([where.to_index(tuple(end)) for end in ends])
        assert indices[:, 0] == pytest.approx(3, abs=1e-6)
        for _, r, c in indices:
            near = labels[
                3,
                max(int(np.ceil(r - 0.51)) - 1, 0) : int(r + 1.51),
                max(int(np.ceil(c - 0.51)) - 1, 0) : int(c + 1.51),
            ]
            assert near.any() or axis is lesion.short_axis  # a long axis ends at a voxel's corner
    assert (long[1] - long[0]) @ (short[1] - short[0]) == pytest.approx(0, abs=1e-6)


def test_of_equal_diameters_the_largest_slice_is_shown():
    labels = block((5, 12, 12), (1, (1, 4), (2, 10), (2, 10)))
    labels[[1, 3], 5, 2] = 0  # the corners that decide the diameter stay
    assert found(labels).lesions[0].slice_index == 2


# Which voxels are one lesion -----------------------------------------------------------------------------------------


def test_voxels_that_touch_at_a_corner_are_one_lesion():
    findings = found(
        block((4, 4, 4), (1, (0, 1), (0, 1), (0, 1)), (1, (1, 2), (1, 2), (1, 2)), (1, (3, 4), (3, 4), (3, 4)))
    )
    assert [lesion.voxels for lesion in findings.lesions] == [2, 1]


def test_touching_labels_are_different_lesions():
    findings = found(block((3, 3, 9), (1, (0, 3), (0, 3), (0, 3)), (2, (0, 3), (0, 3), (3, 9))))
    assert [lesion.voxels for lesion in findings.lesions] == [54, 27]
    assert np.array_equal(np.unique(findings.lesion_labels.labels), [1, 2])
    assert (findings.lesion_labels.labels == 1).sum() == 54


def test_a_persons_numbers_hold_lesions_together():
    labels = block((3, 3, 9), (7, (0, 3), (0, 3), (0, 2)), (7, (0, 3), (0, 3), (5, 6)), (3, (0, 3), (0, 3), (8, 9)))
    assert [lesion.voxels for lesion in found(labels).lesions] == [18, 9, 9]
    findings = found(labels, per_value=True)
    assert [lesion.voxels for lesion in findings.lesions] == [27, 9]
    assert findings.lesions[0].long_axis.length_mm == pytest.approx(np.hypot(3, 6))
    assert [lesion.voxels for lesion in found(np.full((3, 3, 3), 5), per_value=True).lesions] == [27]
    assert found(np.zeros((3, 3, 3)), per_value=True).lesions == ()


def test_lesions_are_numbered_by_falling_volume_then_by_place():
    labels = block((9, 5, 5), (1, (0, 1), (0, 1), (0, 2)), (1, (3, 4), (0, 1), (0, 3)), (1, (6, 7), (0, 1), (0, 2)))
    findings = found(labels)
    assert [(lesion.number, lesion.voxels, lesion.slice_index) for lesion in findings.lesions] == [
        (1, 3, 3),
        (2, 2, 0),
        (3, 2, 6),
    ]
    for lesion in findings.lesions:
        assert (findings.lesion_labels.labels[lesion.slice_index] == lesion.number).sum() == lesion.voxels


def test_specks_are_counted_but_not_reported():
    labels = block((5, 5, 5), (1, (0, 1), (0, 1), (0, 1)), (1, (3, 5), (3, 5), (3, 5)))
    findings = found(labels, criteria=Criteria(min_lesion_mm3=8.0))
    assert (len(findings.lesions), findings.dropped_specks) == (1, 1)
    assert findings.lesion_labels.labels.sum() == 8


def test_more_lesions_than_a_byte_can_count_keep_their_numbers():
    labels = np.zeros((2, 40, 40), np.uint8)
    labels[0, ::2, ::2] = 1
    findings = found(labels)
    assert len(findings.lesions) == 400
    assert findings.lesion_labels.labels.max() == 400


def test_nothing_drawn_is_nothing_found():
    findings = found(np.zeros((4, 5, 6)), organ=np.ones((4, 5, 6)))
    assert findings.lesions == ()
    assert findings.dropped_specks == 0
    assert findings.organ_volume_mm3 == pytest.approx(120.0)
    assert not findings.lesion_labels.labels.any()
    assert table(findings) == []
    assert found(np.zeros((4, 5, 6))).organ_volume_mm3 is None


# Measurable or not ---------------------------------------------------------------------------------------------------


def row_of(pixels: int, spacing_mm: tuple[float, float, float], slices: int = 1):
    return block((3, 3, 60), (1, (1, 1 + slices), (1, 2), (5, 5 + pixels))), grid((3, 3, 60), spacing_mm=spacing_mm)


@pytest.mark.parametrize(
    ("pixels", "slice_mm", "disease"),
    [
        (16, 5.0, Disease.MEASURABLE),  # a 6 x 8 mm rectangle: 10.0 mm
        (15, 5.0, Disease.NON_MEASURABLE),
        (16, 6.0, Disease.NON_MEASURABLE),  # thick slices ask for 12 mm
        (21, 6.0, Disease.MEASURABLE),
    ],
)
def test_the_diameter_rule(pixels, slice_mm, disease):
    labels, where = row_of(pixels, (slice_mm, 6.0, 0.5))
    assert found(labels, where).lesions[0].disease is disease


def test_the_volume_rule_asks_for_the_10_mm_sphere_and_nothing_else():
    criteria = Criteria(rule=Rule.VOLUME)
    labels, where = row_of(23, (23.0, 1.0, 1.0))
    assert found(labels, where, criteria).lesions[0].disease is Disease.MEASURABLE  # 529 mm3
    labels, where = row_of(22, (23.0, 1.0, 1.0))
    assert found(labels, where, criteria).lesions[0].disease is Disease.NON_MEASURABLE  # 506 mm3, 22 mm long
    assert found(labels, where).lesions[0].disease is Disease.NON_MEASURABLE  # 22 mm in slices of 23 mm
    assert found(labels, where, Criteria(thick_slice_factor=0.5)).lesions[0].disease is Disease.MEASURABLE


# Attenuation, place, identity ----------------------------------------------------------------------------------------


def test_attenuation_is_over_the_lesions_own_voxels():
    hu = np.full((3, 4, 4), -1000)
    hu[1, 1, 1:4] = (10, 20, 60)
    [lesion] = found(block((3, 4, 4), (1, (1, 2), (1, 2), (1, 4))), hu=hu).lesions
    assert lesion.mean_hu == pytest.approx(30.0)
    assert lesion.sd_hu == pytest.approx(np.sqrt((400 + 100 + 900) / 2))
    assert (lesion.min_hu, lesion.max_hu) == (10.0, 60.0)


@pytest.mark.parametrize(
    ("at", "touches"), [((1, 1, 1), False), ((0, 1, 1), True), ((3, 1, 1), True), ((1, 4, 1), True), ((1, 1, 5), True)]
)
def test_a_lesion_at_the_border_says_so(at, touches):
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[at] = 1
    assert found(labels).lesions[0].touches_volume_edge is touches


def test_the_same_run_gives_the_same_uids_and_another_run_others():
    labels = block((3, 3, 9), (1, (0, 3), (0, 3), (0, 3)), (1, (0, 3), (0, 3), (5, 7)))
    first, again = found(labels), found(labels)
    assert first.run_digest == again.run_digest
    assert first.lesions == again.lesions
    uids = {lesion.tracking_uid for lesion in first.lesions}
    for other in (
        found(labels, criteria=Criteria(rule=Rule.VOLUME)),
        found(labels, provenance=replace(PROVENANCE, version="2")),
        found(np.concatenate([labels, labels[:1] * 0])),
    ):
        assert not uids & {lesion.tracking_uid for lesion in other.lesions}
    assert len(uids) == 2
    assert found(labels, provenance=replace(PROVENANCE, device="cuda:0")).run_digest == first.run_digest


def test_masks_that_differ_in_one_voxel_have_results_of_their_own():
    """One pipeline need not see every voxel alike on two devices."""
    labels = block((3, 3, 9), (1, (0, 3), (0, 3), (0, 3)), (1, (0, 3), (0, 3), (5, 7)))
    fewer, moved = labels.copy(), np.roll(labels, 1, axis=2)
    fewer[0, 0, 0] = 0
    ct = CtVolume(np.full(labels.shape, 100, dtype=np.int16), grid(labels.shape))

    def seen(lesions: np.ndarray, organ: np.ndarray | None) -> Findings:
        liver = None if organ is None else LabelVolume(organ.astype(np.uint8), ct.grid)
        return measure(ct, Masks(liver, LabelVolume(lesions.astype(np.uint8), ct.grid), PROVENANCE), Criteria())

    several = [seen(labels, None), seen(fewer, None), seen(moved, None), seen(labels, labels), seen(labels, fewer)]
    assert len({one.run_digest for one in several}) == len(several)
    tracked = [lesion.tracking_uid for one in several for lesion in one.lesions]
    assert len(set(tracked)) == len(tracked)
    assert seen(labels.astype(np.uint8), labels).run_digest == several[3].run_digest


def where_it_lies(labels: np.ndarray) -> str:
    """A mask's part of the digest, by way of the whole volume."""
    filled = [np.flatnonzero(labels.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    box = tuple(slice(int(f[0]), int(f[-1]) + 1) if f.size else slice(0, 1) for f in filled)
    inside = np.ascontiguousarray(labels[box]).astype(np.uint8)
    return digest(repr(labels.shape), repr(box), hashlib.sha256(inside.data).hexdigest())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kept", [True, False])
def test_the_digest_holds_where_the_masks_lie_on_the_whole_grid(kept: bool, order: str) -> None:
    """Specks that are left out reach farther than what is kept, in every direction; so do labels beside the liver."""
    lesions, organ = np.zeros((2, 12, 14, 16), np.uint8, order=order)
    lesions[1, 2, 3] = lesions[10, 12, 14] = 1
    if kept:
        lesions[4:7, 5:8, 6:9] = 1
    organ[3:9, 4:11, 5:12] = 1
    organ[10, 12, 2] = 2
    criteria = Criteria(min_lesion_mm3=5.0)
    made = found(lesions, criteria=criteria, organ=organ)
    assert len(made.lesions) == kept
    assert made.dropped_specks == 2
    assert made.organ_volume_mm3 == 6 * 7 * 7
    shown = where_it_lies(made.lesion_labels.labels), where_it_lies(organ)
    images = digest(*(f"2.25.{n}" for n in range(12)))
    rules = json.dumps(asdict(criteria) | {"rule": criteria.rule.value}, sort_keys=True)
    assert made.run_digest == digest(images, PROVENANCE.digest, rules, *shown)


@pytest.mark.parametrize("turned", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_box_around_labels_holds_them_all_and_nothing_else(turned: tuple[int, ...]) -> None:
    labels = np.zeros((7, 9, 11), np.uint16)
    assert box_around(labels.transpose(turned)) == (slice(0, 1),) * 3
    labels[2, 3, 4] = 1
    labels[5, 1, 9] = 300
    expected = [slice(2, 6), slice(1, 4), slice(4, 10)]
    assert list(box_around(labels.transpose(turned))) == [expected[axis] for axis in turned]


def test_masks_of_another_grid_are_refused_naming_both():
    where = grid((3, 3, 3))
    moved = grid((3, 3, 3), origin=(0, 0, 7))
    ct = CtVolume(np.zeros((3, 3, 3), np.int16), where)
    with pytest.raises(
        PipelineError, match=r"from \(0.00, 0.00, 7.00\), the CT on a grid of 3 x 3 x 3 .* from \(-31.50"
    ):
        measure(ct, Masks(None, LabelVolume(np.ones((3, 3, 3), np.uint8), moved), PROVENANCE), Criteria())


def test_the_table_has_a_row_for_each_lesion():
    rows = table(found(block((3, 9, 12), (1, (1, 2), (2, 5), (3, 7)), (1, (1, 2), (7, 8), (10, 11)))))
    assert [row["lesion"] for row in rows] == [1, 2]
    assert rows[0].keys() == rows[1].keys()
    assert (rows[0]["volume_ml"], rows[0]["long_axis_mm"], rows[0]["short_axis_mm"]) == (0.012, 5.0, 3.75)
    assert (rows[0]["centroid_x_mm"], rows[0]["centroid_y_mm"], rows[0]["centroid_z_mm"]) == (-27.0, 15.25, -399.75)


# The public sets -----------------------------------------------------------------------------------------------------


def test_the_liver_of_set_02_measures_as_the_report_of_set_03_says(testdata):
    folder = testdata / "02_liver_ct_seg_dcmqi" / "segmentations"
    ct = read_volume(inspect(sorted((folder / "ct-3slice").iterdir())))
    liver = pydicom.dcmread(folder / "liver.dcm").pixel_array.astype(np.uint8)  # its frames run from feet to head too
    masks = Masks(None, LabelVolume(liver, ct.grid), PROVENANCE, lesion_per_value=True)
    [lesion] = measure(ct, masks, Criteria()).lesions
    report = pydicom.dcmread(testdata / "03_tid1500_liver_sr" / "rsna2018_dataset1" / "sr-tid1500-ct-liver-example.dcm")
    measured = dict(numbers(report))
    assert (lesion.min_hu, lesion.max_hu) == (measured["Minimum"], measured["Maximum"]) == (-778, 221)
    assert lesion.mean_hu == pytest.approx(measured["Mean"], abs=1e-3) == pytest.approx(37.3289, abs=1e-3)
    assert lesion.sd_hu == pytest.approx(measured["Standard Deviation"], abs=1e-3) == pytest.approx(59.1691, abs=1e-3)
    assert lesion.volume_mm3 == pytest.approx(70_361.9, rel=1e-4)
    assert lesion.voxels == 107_098
    parts = measure(ct, Masks(None, masks.lesions, PROVENANCE), Criteria())
    assert [part.voxels for part in parts.lesions] == [107_094, 2, 1, 1]


def numbers(item):
    """(derivation or concept, value) of each NUM item of a report."""
    for content in item.get("ContentSequence", ()):
        if content.ValueType == "NUM":
            inner = content.get("ContentSequence", ())
            names = [c.ConceptCodeSequence[0].CodeMeaning for c in inner if "ConceptCodeSequence" in c]
            yield (
                (names or [content.ConceptNameCodeSequence[0].CodeMeaning])[0],
                float(content.MeasuredValueSequence[0].NumericValue),
            )
        yield from numbers(content)


def test_the_lesions_of_set_12_are_those_of_its_authors(testdata):
    from salsa_node.nifti import read_labels

    labels = read_labels(testdata / "12_salsa_demo_scan1" / "scan1_GT.nii.gz")
    ct = CtVolume(np.zeros(labels.grid.shape, np.int16), labels.grid)
    findings = measure(ct, Masks(None, labels, PROVENANCE), Criteria(rule=Rule.VOLUME))
    assert [lesion.volume_mm3 for lesion in findings.lesions] == pytest.approx([23_466.2, 16_142.1, 403.9], abs=0.1)
    assert [lesion.disease for lesion in findings.lesions] == [
        Disease.MEASURABLE,
        Disease.MEASURABLE,
        Disease.NON_MEASURABLE,
    ]


# Properties ----------------------------------------------------------------------------------------------------------

masks_2d = (
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=5, max_size=5).map(np.array).filter(np.any)
)


def brute_force_diameter_mm(mask, row_mm, column_mm):
    rows, columns = np.nonzero(mask)
    corners = np.array(
        [
            ((r + a) * row_mm, (c + b) * column_mm)
            for r, c in zip(rows, columns, strict=True)
            for a in (0, 1)
            for b in (0, 1)
        ]
    )
    return np.linalg.norm(corners[:, None] - corners[None], axis=2).max()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mask=masks_2d, row_mm=st.sampled_from([0.5, 0.7, 2.0]), turned=st.booleans())
def test_any_mask_measures_as_by_brute_force(mask, row_mm, turned):
    labels = np.zeros((3, 9, 9), np.uint8)
    labels[1, 1:6, 2:7] = mask
    axes = TURNED if turned else AXIAL
    [lesion] = found(labels, grid((3, 9, 9), axes, (2.0, row_mm, 0.9)), per_value=True).lesions
    assert lesion.long_axis.length_mm == pytest.approx(brute_force_diameter_mm(mask, row_mm, 0.9))
    assert 0 < lesion.short_axis.length_mm <= lesion.long_axis.length_mm + 1e-9


@settings(max_examples=40, deadline=None, derandomize=True)
@given(mask=masks_2d, by=st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 4)))
def test_where_a_lesion_lies_does_not_change_its_size(mask, by):
    sizes = []
    for k, r, c in ((0, 0, 0), by):
        labels = np.zeros((3, 9, 9), np.uint8)
        labels[k, r : r + 5, c : c + 5] = mask
        [lesion] = found(labels, grid((3, 9, 9), TURNED, (2.0, 0.7, 0.9)), per_value=True).lesions
        sizes.append((lesion.volume_mm3, lesion.long_axis.length_mm, lesion.short_axis.length_mm))
    assert sizes[0] == pytest.approx(sizes[1])
