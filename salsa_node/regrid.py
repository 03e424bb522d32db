"""Labels from one grid to another: reordered exactly where the voxels are the same, nearest voxel otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from salsa_node.volume import Grid, LabelVolume

SAME_VOXEL_MM = 0.05  #: centres nearer than this are one voxel; other people's affines are rounded to 0.01 mm

Labels = npt.NDArray[np.unsignedinteger]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True)
class Reordering:
    """How the voxels of one grid are voxels of another: axes swapped, flipped and shifted by whole voxels.

    axes: for each source axis, the target axis that it runs along.
    signs: for each source axis, 1 or -1: the way it runs along that axis.
    start: (slice, row, column) in the target of the source's voxel (0, 0, 0); may lie outside.
    """

    axes: tuple[int, int, int]
    signs: tuple[int, int, int]
    start: tuple[int, int, int]

    def land(self, source: Labels, target_shape: tuple[int, int, int]) -> tuple[Box, Labels]:
        """Where in the target these voxels come to lie, and those of them that lie within it, in its axis order."""
        turned = source[tuple(slice(None, None, sign) for sign in self.signs)].transpose(np.argsort(self.axes))
        into, taken = [slice(0, 0)] * 3, [slice(0, 0)] * 3
        for axis, sign, n in zip(self.axes, self.signs, source.shape, strict=True):
            first = self.start[axis] if sign > 0 else self.start[axis] - n + 1
            low = min(max(first, 0), target_shape[axis])
            high = max(min(first + n, target_shape[axis]), low)
            into[axis], taken[axis] = slice(low, high), slice(low - first, high - first)
        return (into[0], into[1], into[2]), turned[tuple(taken)]


def reordering(source: Grid, target: Grid) -> Reordering | None:
    """How `source`'s voxels are voxels of `target`'s lattice, inside or outside its bounds; None where they are not."""
    to_target = np.linalg.solve(target.affine_lps_mm, source.affine_lps_mm)
    exact = np.rint(to_target)
    turn = exact[:3, :3]
    if not (np.abs(turn).sum(axis=0) == 1).all() or not (np.abs(turn).sum(axis=1) == 1).all():
        return None
    last = np.array(source.shape) - 1
    corners = np.array([[*(last * bits), 1] for bits in np.ndindex(2, 2, 2)], dtype=np.float64).T
    apart_mm = target.affine_lps_mm @ (to_target - exact) @ corners
    if np.linalg.norm(apart_mm[:3], axis=0).max() > SAME_VOXEL_MM:
        return None
    axes = np.abs(turn).argmax(axis=0)
    signs = turn.sum(axis=0)
    return Reordering(
        axes=(int(axes[0]), int(axes[1]), int(axes[2])),
        signs=(int(signs[0]), int(signs[1]), int(signs[2])),
        start=(int(exact[0, 3]), int(exact[1, 3]), int(exact[2, 3])),
    )


def onto(labels: LabelVolume, grid: Grid) -> LabelVolume:
    """The same labels on another grid: every voxel takes the label whose voxel its centre lies in, 0 outside.

    Exact where both grids share their voxels (any order, flip or crop). Both must be in one patient
    space: raises ValueError where two different frames of reference are named, or slices lie unevenly.
    """
    if labels.grid.slice_offsets is not None or grid.slice_offsets is not None:
        raise ValueError("slices lie at unequal distances; expected two regular grids")
    named = {labels.grid.frame_of_reference_uid, grid.frame_of_reference_uid} - {None}
    if len(named) > 1:
        raise ValueError("the labels and the grid name different frames of reference")
    turned = np.zeros(grid.shape, dtype=labels.labels.dtype)
    same = reordering(labels.grid, grid)
    if same is not None:
        into, part = same.land(labels.labels, grid.shape)
        turned[into] = part
    else:
        to_source = np.linalg.solve(labels.grid.affine_lps_mm, grid.affine_lps_mm)
        # "grid-constant" keeps the outer half of the border voxels, which "constant" would blank.
        ndimage.affine_transform(labels.labels, to_source, output=turned, order=0, mode="grid-constant", cval=0)
    return LabelVolume(turned, grid)
