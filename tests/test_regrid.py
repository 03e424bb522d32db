"""Labels land on another grid exactly where they lay in the patient."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from salsa_node.regrid import SAME_VOXEL_MM, onto, reordering
from salsa_node.volume import Grid, LabelVolume

TURNED = np.linalg.qr(np.random.default_rng(5).standard_normal((3, 3)))[0]


def grid(shape, spacing_mm=(2.5, 0.7, 0.9), origin=(10.0, -20.0, 30.0), axes=TURNED, uid=None) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = axes * np.array(spacing_mm)
    affine[:3, 3] = origin
    return Grid(shape, affine, uid)


def labels(where: Grid, seed=0) -> LabelVolume:
    return LabelVolume(np.random.default_rng(seed).integers(0, 9, where.shape).astype(np.uint8), where)


def stored_otherwise(volume: LabelVolume, axes, signs) -> LabelVolume:
    """The same labels with the axes in another order and direction, and the affine to match."""
    array = volume.labels.transpose(axes)[tuple(slice(None, None, s) for s in signs)]
    affine = volume.grid.affine_lps_mm[:, [*axes, 3]].copy()
    for axis, (sign, n) in enumerate(zip(signs, array.shape, strict=True)):
        if sign < 0:
            affine[:, 3] += affine[:, axis] * (n - 1)
            affine[:, axis] *= -1
    return LabelVolume(array, Grid(array.shape, affine))


@pytest.mark.parametrize("axes", list(permutations(range(3))))
def test_all_48_storages_of_a_grid_are_put_back_exactly(axes):
    original = labels(grid((4, 5, 6)))
    for signs in product((1, -1), repeat=3):
        stored = stored_otherwise(original, axes, signs)
        assert reordering(stored.grid, original.grid) is not None
        back = onto(stored, original.grid)
        assert np.array_equal(back.labels, original.labels)
        assert back.grid is original.grid


def test_a_crop_lands_in_its_place_and_what_lies_outside_is_lost():
    where = grid((4, 5, 6))
    origin = where.to_lps_mm((-1, 2, 3))
    part = labels(grid((3, 2, 5), origin=origin))
    landed = onto(part, where).labels
    assert np.array_equal(landed[0:2, 2:4, 3:6], part.labels[1:, :, :3])
    assert np.count_nonzero(landed) == np.count_nonzero(part.labels[1:, :, :3])
    into, shown = reordering(part.grid, where).land(part.labels, where.shape)
    assert into == (slice(0, 2), slice(2, 4), slice(3, 6))
    assert shown.shape == (2, 2, 3)


@pytest.mark.parametrize("away", [(-9, 0, 0), (9, 0, 0), (0, 40, 0), (0, 0, -40)])
def test_labels_that_lie_elsewhere_leave_nothing(away):
    where = grid((4, 5, 6))
    assert not onto(labels(grid((4, 5, 6), origin=where.to_lps_mm(away))), where).labels.any()


def test_the_nearest_voxel_gives_its_label():
    coarse = grid((3, 4, 5), (3.0, 2.0, 2.0))
    fine = grid((9, 8, 10), (1.0, 1.0, 1.0), origin=coarse.to_lps_mm((-0.3, 0.1, 0.2)))
    source = labels(coarse)
    resampled = onto(source, fine).labels
    for index in np.ndindex(fine.shape):
        nearest = np.floor(np.array(coarse.to_index(fine.to_lps_mm(index))) + 0.5).astype(int)
        inside = all(0 <= i < n for i, n in zip(nearest, coarse.shape, strict=True))
        assert resampled[index] == (source.labels[tuple(nearest)] if inside else 0)


def test_the_outer_half_of_a_border_voxel_belongs_to_it():
    coarse = LabelVolume(np.full((2, 2, 2), 7, np.uint8), grid((2, 2, 2), (4.0, 4.0, 4.0)))
    fine = grid((8, 8, 8), (1.0, 1.0, 1.0), origin=coarse.grid.to_lps_mm((-0.375, -0.375, -0.375)))
    assert (onto(coarse, fine).labels == 7).all()


def test_half_a_voxel_off_or_another_spacing_is_no_reordering():
    where = grid((4, 5, 6))
    assert reordering(where, where) is not None
    assert reordering(grid((4, 5, 6), origin=where.to_lps_mm((0.5, 0, 0))), where) is None
    assert reordering(grid((4, 5, 6), (2.5, 0.7, 0.95)), where) is None
    assert reordering(grid((4, 5, 6), axes=np.eye(3)), where) is None
    assert reordering(grid((4, 5, 6), (2.5, 0.7 + 0.9 * SAME_VOXEL_MM / 4, 0.9)), where) is not None
    assert reordering(grid((4, 5, 6), (2.5, 0.7 + 1.1 * SAME_VOXEL_MM / 4, 0.9)), where) is None


def test_two_frames_of_reference_are_two_patients_spaces():
    with pytest.raises(ValueError, match="different frames of reference"):
        onto(labels(grid((4, 5, 6), uid="2.25.1")), grid((4, 5, 6), uid="2.25.2"))
