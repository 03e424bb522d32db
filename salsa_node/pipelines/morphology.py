"""Masks widened and closed by many voxels, on 64 voxels of a row at once.

The same voxels as scipy.ndimage's binary_dilation and binary_closing, which do one after another: what lies outside of
the mask's array is background, so that a closing eats what it reaches at the array's sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Neighbours = Literal[6, 18]  #: that share a face with a voxel, or a face or an edge
Combine = Callable[..., npt.NDArray[Any]]

#: (words, slices, rows): a row's voxels, the first in the first word's lowest bit; words first, as steps are then long
_Words = npt.NDArray[np.uint64]
_WORD: Final = 64
_ONE, _LAST = np.uint64(1), np.uint64(_WORD - 1)


def widened(mask: Mask, neighbours: Neighbours, iterations: int) -> Mask:
    """The mask and its neighbours, so many times over. mask: (slices, rows, columns)."""
    return _unpacked(_stepped(_packed(mask), neighbours, iterations, np.bitwise_or), mask.shape[2])


def closed(mask: Mask, neighbours: Neighbours, iterations: int) -> Mask:
    """The mask widened and then narrowed, so many times over. mask: (slices, rows, columns)."""
    columns = mask.shape[2]
    wide = _stepped(_packed(mask), neighbours, iterations, np.bitwise_or)
    # a row that widened beyond its last voxel lies in the bits behind it; there is background
    wide = _packed(_unpacked(wide, columns))
    return _unpacked(_stepped(wide, neighbours, iterations, np.bitwise_and), columns)


def _packed(mask: Mask) -> _Words:
    few = np.packbits(mask, axis=2, bitorder="little")
    words = np.zeros((*mask.shape[:2], -(-mask.shape[2] // _WORD) * _WORD // 8), dtype=np.uint8)
    words[..., : few.shape[2]] = few
    return np.ascontiguousarray(np.moveaxis(words.view("<u8"), 2, 0), dtype=np.uint64)


def _unpacked(words: _Words, columns: int) -> Mask:
    few = np.ascontiguousarray(np.moveaxis(words, 0, 2), dtype="<u8").view(np.uint8)
    return np.unpackbits(few, axis=2, count=columns, bitorder="little").view(np.bool_)


def _stepped(words: _Words, neighbours: Neighbours, iterations: int, combine: Combine) -> _Words:
    """combine: bitwise_or to widen, bitwise_and to narrow."""
    for _ in range(iterations):
        along_row, along_column = _along_row(words, combine), _along(words, 2, combine)
        if neighbours == 6:
            combine(along_column, along_row, out=along_column)
            words = combine(along_column, _along(words, 1, combine), out=along_column)
        else:  # three squares of 3 x 3, one across each axis; the two that cross the slices share their last step
            crossing = _along(combine(along_row, along_column, out=along_column), 1, combine)
            words = combine(crossing, _along(along_row, 2, combine), out=crossing)
    return words


def _along(words: _Words, axis: Literal[1, 2], combine: Combine) -> _Words:
    """Each voxel with the two beside it, across slices or rows."""
    found = words.copy()
    there, here = np.moveaxis(words, axis, 0), np.moveaxis(found, axis, 0)
    combine(here[1:], there[:-1], out=here[1:])
    combine(here[:-1], there[1:], out=here[:-1])
    if combine is np.bitwise_and:
        here[0] = here[-1] = 0
    return found


def _along_row(words: _Words, combine: Combine) -> _Words:
    """Each voxel with the two beside it in its row."""
    found = words << _ONE
    found[1:] |= words[:-1] >> _LAST
    combine(found, words, out=found)
    other = words >> _ONE
    other[:-1] |= words[1:] << _LAST
    return combine(found, other, out=found)
