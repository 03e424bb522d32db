"""A mask that is empty outside a box of its grid: an organ at 1 mm, without the millimetres of the whole scan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from salsa_node.volume import Grid, LabelVolume

Mask = npt.NDArray[np.bool_]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A mask within a box of a grid, and nothing outside of it.

    mask: of the box's shape.
    box: first index and the one behind the last, along (slice, row, column) of `grid`; may be empty.
    grid: the whole one.
    """

    mask: Mask
    box: Box
    grid: Grid

    def __post_init__(self) -> None:
        expected = tuple(side.stop - side.start for side in self.box)
        if self.mask.shape != expected:
            raise ValueError(f"a mask of shape {self.mask.shape} does not fit a box of {expected}")
        if any(side.start < 0 or side.stop > n for side, n in zip(self.box, self.grid.shape, strict=True)):
            raise ValueError(f"the box {self.box} reaches beyond the grid {self.grid.shape}")

    def tight(self, margin: int = 0) -> Part:
        """The same in the smallest box, which then grows by a margin of so many voxels, as far as the grid goes.

        The box is empty where the mask is.
        """
        near = box_of(self.mask)
        mask = self.mask[near]
        if not mask.size:
            return Part(mask, near, self.grid)
        room, sides = [], []
        for inner, outer, count in zip(near, self.box, self.grid.shape, strict=True):
            first, stop = outer.start + inner.start, outer.start + inner.stop
            room.append((min(margin, first), min(margin, count - stop)))
            sides.append(slice(first - room[-1][0], stop + room[-1][1]))
        return Part(np.pad(mask, room) if margin else mask, (sides[0], sides[1], sides[2]), self.grid)

    def whole(self) -> LabelVolume:
        """1 in the mask and 0 elsewhere, on the whole grid."""
        labels = np.zeros(self.grid.shape, dtype=np.uint8)
        labels[self.box] = self.mask
        return LabelVolume(labels, self.grid)


def part_of(labels: LabelVolume, label: int | None = None) -> Part:
    """Where the labels are that one, or any but 0; in the box of all labels but 0."""
    box = box_of(labels.labels)
    inside = labels.labels[box]
    return Part(inside > 0 if label is None else inside == label, box, labels.grid)


def box_of(voxels: npt.NDArray[np.bool_] | npt.NDArray[np.unsignedinteger]) -> Box:
    """The smallest box that holds all that is not 0; an empty one where all is."""
    found = [slice(0, 0)] * 3
    for axis in range(3):  # slices first: the rest need not be looked at again
        inside = np.flatnonzero(voxels.any(axis=tuple(n for n in range(3) if n != axis)))
        if not inside.size:
            return slice(0, 0), slice(0, 0), slice(0, 0)
        found[axis] = slice(int(inside[0]), int(inside[-1]) + 1)
        voxels = voxels[(slice(None),) * axis + (found[axis],)]
    return found[0], found[1], found[2]
