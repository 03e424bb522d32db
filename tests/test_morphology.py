"""Packed morphology against scipy's, voxel by voxel."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from salsa_node.pipelines.morphology import Neighbours, closed, widened

#: rows of less than a word, of whole words, and of a voxel more or less
SHAPES = [(7, 5, 3), (9, 11, 63), (6, 9, 64), (5, 8, 65), (4, 6, 128), (13, 3, 131), (1, 9, 70), (8, 1, 70), (8, 9, 1)]


def structure(neighbours: Neighbours) -> np.ndarray:
    return ndimage.generate_binary_structure(3, {6: 1, 18: 2}[neighbours])


def masks(shape: tuple[int, int, int]) -> list[np.ndarray]:
    """Specks, a sponge, all of it, none of it, and each of the six sides alone."""
    rng = np.random.default_rng(sum(shape))
    found = [
        rng.random(shape) < 3 / np.prod(shape),
        rng.random(shape) < 0.4,
        np.ones(shape, bool),
        np.zeros(shape, bool),
    ]
    for axis in range(3):
        for at in (0, -1):
            side = np.zeros(shape, dtype=bool)
            np.moveaxis(side, axis, 0)[at] = rng.random(np.delete(shape, axis)) < 0.5
            found.append(side)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("neighbours", [6, 18])
@pytest.mark.parametrize("iterations", [1, 2, 5, 10])
def test_each_voxel_is_scipys(shape: tuple[int, int, int], neighbours: Neighbours, iterations: int) -> None:
    for mask in masks(shape):
        kept = mask.copy()
        wide = ndimage.binary_dilation(mask, structure(neighbours), iterations=iterations)
        np.testing.assert_array_equal(widened(mask, neighbours, iterations), wide)
        whole = ndimage.binary_closing(mask, structure(neighbours), iterations=iterations)
        np.testing.assert_array_equal(closed(mask, neighbours, iterations), whole)
        np.testing.assert_array_equal(mask, kept)


def test_a_mask_need_not_lie_in_one_piece_of_memory() -> None:
    mask = np.random.default_rng(4).random((70, 9, 8)) < 0.1
    turned = mask.transpose(2, 1, 0)[::-1]
    expected = ndimage.binary_dilation(turned, structure(18), iterations=3)
    np.testing.assert_array_equal(widened(turned, 18, 3), expected)


@pytest.mark.parametrize(("neighbours", "reached"), [(6, 7), (18, 19)])
def test_a_voxel_widens_to_its_neighbours(neighbours: Neighbours, reached: int) -> None:
    mask = np.zeros((5, 5, 140), dtype=bool)
    for column in (2, 63, 127):  # two at the end of a word
        mask[2, 2, column] = True
    assert widened(mask, neighbours, 1).sum() == 3 * reached
