"""A grid puts its voxels where its affine says, and voxels must fit their grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from salsa_node.volume import CtVolume, Grid, LabelVolume

SHAPE = (4, 5, 6)


def grid(shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0), frame: str | None = None) -> Grid:
    """Oblique, 2.5 x 0.7 x 0.9 mm."""
    turn = np.linalg.qr(np.random.default_rng(4).standard_normal((3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = turn * (2.5, 0.7, 0.9)
    affine[:3, 3] = np.array((-100.25, 20.125, 900.5)) + shift_mm
    return Grid(SHAPE, affine, frame)


def test_an_index_becomes_a_position_and_comes_back():
    where = grid()
    assert where.to_lps_mm((0, 0, 0)) == pytest.approx((-100.25, 20.125, 900.5))
    steps = where.affine_lps_mm[:3, :3]
    expected = where.affine_lps_mm[:3, 3] + 1.5 * steps[:, 0] + 2 * steps[:, 1] - 3 * steps[:, 2]
    assert where.to_lps_mm((1.5, 2, -3)) == pytest.approx(expected)
    assert where.to_index(tuple(expected)) == pytest.approx((1.5, 2, -3))


def test_spacing_and_volume_come_from_the_affine_whatever_its_directions():
    assert grid().spacing_mm == pytest.approx((2.5, 0.7, 0.9))
    assert grid().voxel_volume_mm3 == pytest.approx(2.5 * 0.7 * 0.9)


def test_grids_match_to_the_tolerance_and_no_further():
    assert grid().matches(grid((0.009, 0, 0)))
    assert not grid().matches(grid((0.011, 0, 0)))
    assert grid().matches(grid((0.4, 0, 0)), tolerance_mm=0.5)
    assert not grid().matches(replace(grid(), shape=(4, 5, 7)))


def test_grids_that_drift_apart_towards_the_far_corner_do_not_match():
    affine = grid().affine_lps_mm.copy()
    affine[:3, 0] *= 1 + 0.02 / (3 * 2.5)  # 0.02 mm over the three steps to the last slice
    assert not grid().matches(Grid(SHAPE, affine))
    assert grid().matches(Grid(SHAPE, affine), tolerance_mm=0.021)


def test_two_frames_of_reference_that_are_named_must_be_one():
    assert grid(frame="2.25.1").matches(grid(frame="2.25.1"))
    assert not grid(frame="2.25.1").matches(grid(frame="2.25.2"))
    assert grid(frame="2.25.1").matches(grid())
    assert grid().matches(grid(frame="2.25.1"))


@pytest.mark.parametrize(
    ("shape", "affine", "words"),
    [
        ((4, 5), np.eye(4), "three positive counts"),
        ((4, 0, 6), np.eye(4), "three positive counts"),
        (SHAPE, np.eye(3), r"finite \(4, 4\) matrix"),
        (SHAPE, np.diag([1, np.nan, 1, 1]), "finite"),
        (SHAPE, np.diag([1.0, 0.0, 1.0, 1.0]), "singular"),
    ],
)
def test_what_spans_no_space_is_no_grid(shape, affine, words):
    with pytest.raises(ValueError, match=words):
        Grid(shape, affine)


def test_a_grid_cannot_be_changed_through_the_array_it_was_made_of():
    affine = np.eye(4)
    where = Grid(SHAPE, affine)
    affine[0, 3] = 99.0
    assert where.to_lps_mm((0, 0, 0)) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="read-only"):
        where.affine_lps_mm[0, 3] = 99.0


def test_voxels_must_fit_their_grid():
    with pytest.raises(ValueError, match=r"shape \(4, 5, 7\) do not fit the grid \(4, 5, 6\)"):
        CtVolume(np.zeros((4, 5, 7), np.int16), grid())
    with pytest.raises(ValueError, match=r"do not fit the grid"):
        LabelVolume(np.zeros((5, 4, 6), np.uint8), grid())
    with pytest.raises(ValueError, match="3 slice UIDs for 4 slices"):
        CtVolume(np.zeros(SHAPE, np.int16), grid(), ("1", "2", "3"))
    with pytest.raises(ValueError, match="unsigned integers, found int16"):
        LabelVolume(np.zeros(SHAPE, np.int16), grid())


def test_voxels_are_read_only():
    ct, labels = CtVolume(np.zeros(SHAPE, np.int16), grid()), LabelVolume(np.zeros(SHAPE, np.uint8), grid())
    for voxels in (ct.voxels_hu, labels.labels):
        with pytest.raises(ValueError, match="read-only"):
            voxels[0, 0, 0] = 1


def test_the_source_digest_tells_volumes_apart():
    voxels = np.arange(120, dtype=np.int16).reshape(SHAPE)
    plain = CtVolume(voxels, grid()).source_digest
    assert plain == CtVolume(voxels.copy(order="F"), grid()).source_digest
    assert plain != CtVolume(voxels + np.int16(1), grid()).source_digest
    assert plain != CtVolume(voxels, grid((1, 0, 0))).source_digest
    named = CtVolume(voxels, grid(), ("1", "2", "3", "4")).source_digest
    assert named == CtVolume(voxels * np.int16(2), grid(), ("1", "2", "3", "4")).source_digest  # the UIDs alone count
    assert named != CtVolume(voxels, grid(), ("1", "2", "4", "3")).source_digest
