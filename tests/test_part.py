"""SALSA's steps on a part of the scan against the same on all of it, voxel by voxel, however the scan lies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from salsa_node.errors import OrganNotFound
from salsa_node.phantom import Recipe
from salsa_node.pipelines.part import Part, box_of, part_of
from salsa_node.pipelines.salsa_steps import (
    PRESETS,
    Preset,
    clean_part,
    fine_grid,
    found_part,
    resample_crop,
    resample_labels,
    resample_part,
    restore_labels,
    restore_part,
)
from salsa_node.regrid import onto
from salsa_node.volume import CtVolume, Grid, LabelVolume

#: upright, turned, flipped and oblique; 2 and 2.5 mm lie half-way between voxels, 0.4 mm ones are skipped on the way
GRIDS = {
    "half-way": Recipe(1, (12, 15, 17), (2.0, 2.0, 2.5)),
    "flipped": Recipe(1, (9, 20, 21), (5.0, 1.7, 1.3), "IRA"),
    "sagittal": Recipe(1, (20, 14, 13), (0.4, 2.5, 2.0), "LSP"),
    "oblique": Recipe(1, (9, 16, 18), (3.3, 2.1, 0.9), "AIL", rotation_deg=(5.0, -7.0, 11.0)),
    "tall": Recipe(1, (46, 12, 11), (3.0, 2.0, 2.0)),  # the crop's padding ends within the scan
    "one slice": Recipe(1, (1, 20, 18), (5.0, 0.7, 0.7)),
}
PARAMETERS = pytest.mark.parametrize("name", GRIDS)


def drawn(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """A sponge in a random box; every sixth is empty, every fifth a single voxel."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, dtype=np.uint8)
    if seed % 6 == 0:
        return mask
    if seed % 5 == 0:
        mask[tuple(rng.integers(0, n) for n in shape)] = 1
        return mask
    box = tuple(slice(*sorted(rng.choice(n + 1, 2, replace=False))) for n in shape)
    mask[box] = rng.random(mask[box].shape) < 0.7
    return mask


@PARAMETERS
def test_a_part_goes_to_1_mm_as_the_whole_does(name: str) -> None:
    grid = GRIDS[name].grid
    sizes = []
    for seed in range(40):
        labels = LabelVolume(drawn(grid.shape, seed), grid)
        whole, part = resample_labels(labels), resample_part(part_of(labels))
        np.testing.assert_array_equal(part.whole().labels, whole.labels)
        assert part.grid.matches(whole.grid)
        sizes.append(part.mask.size)
    assert min(sizes) == 0
    assert np.median(sizes) < np.prod(fine_grid(grid).shape) / 2


@PARAMETERS
def test_a_part_comes_back_as_the_whole_does(name: str) -> None:
    grid = GRIDS[name].grid
    fine = fine_grid(grid)
    sizes = []
    for seed in range(40):
        labels = LabelVolume(drawn(fine.shape, seed), fine)
        whole, part = restore_labels(labels, grid), restore_part(part_of(labels), grid)
        np.testing.assert_array_equal(part.whole().labels, whole.labels)
        assert part.grid is grid
        sizes.append(part.mask.size)
    assert min(sizes) == 0
    assert np.median(sizes) < np.prod(grid.shape) / 2


# ---- the liver cleaned ---------------------------------------------------------------------------------


def cleaned_by_scipy(mask: np.ndarray, preset: Preset) -> np.ndarray:
    """On the whole volume, as upstream does, or with as much room around it as nothing can cross."""
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2}[preset.neighbours])
    room = preset.closing + preset.dilation + 1 if preset.open_edge else 0
    found = np.pad(mask == 1, room)
    if preset.closing:
        found = ndimage.binary_closing(found, structure, iterations=preset.closing)
    if preset.dilation:
        found = ndimage.binary_dilation(found, structure, iterations=preset.dilation)
    found = largest_by_scipy(found[tuple(slice(room, n - room) for n in found.shape)], preset)
    if preset.fill_holes and not found.all():
        found = ~largest_by_scipy(~found, preset)
    return found


def largest_by_scipy(mask: np.ndarray, preset: Preset) -> np.ndarray:
    parts, _ = ndimage.label(mask, ndimage.generate_binary_structure(3, {6: 1, 26: 3}[preset.touching]))
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


BOXES = {
    "in the middle": (slice(25, 40), slice(28, 44), slice(30, 42)),
    "two, near the sides": (slice(5, 12), slice(30, 60), slice(8, 60)),
    "at the low sides": (slice(0, 20), slice(0, 30), slice(0, 12)),
    "at the high sides": (slice(40, 60), slice(30, 66), slice(50, 70)),
    "through all slices": (slice(0, 60), slice(20, 30), slice(1, 68)),
    "a shell": (slice(8, 52), slice(8, 58), slice(10, 60)),
    "a shell that leaves less outside than inside": (slice(0, 60), slice(0, 66), slice(0, 50)),
    "all of it": (slice(0, 60), slice(0, 66), slice(0, 70)),
}


@pytest.mark.parametrize("where", BOXES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_liver_is_cleaned_as_scipy_would(preset: str, where: str) -> None:
    rng = np.random.default_rng(len(where))
    grid = Grid((60, 66, 70), np.eye(4))
    labels = np.zeros(grid.shape, dtype=np.uint8)
    labels[BOXES[where]] = rng.random(labels[BOXES[where]].shape) < 0.02
    if where.startswith("two"):
        labels[:, :, 20:50] = 0  # more than any preset closes
    if where.startswith("a shell"):
        labels[BOXES[where]] = 1
        labels[tuple(slice(side.start + 1, side.stop - 1) for side in BOXES[where])] = 0
    assert labels.any()
    part = clean_part(part_of(LabelVolume(labels, grid)), PRESETS[preset])
    np.testing.assert_array_equal(part.whole().labels == 1, cleaned_by_scipy(labels, PRESETS[preset]))


def test_a_liver_that_upstream_eats_whole_is_told() -> None:
    labels = np.zeros((30, 30, 30), dtype=np.uint8)
    labels[0, 10:20, 10:20] = 1
    eaten = Preset(5, 0, 18, 0, fill_holes=False, open_edge=False, touching=6, by_monai=True)
    with pytest.raises(OrganNotFound, match="nothing was left"):
        clean_part(part_of(LabelVolume(labels, Grid(labels.shape, np.eye(4)))), eaten)


# ---- from the crop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["salsa", "salsa-2024"])
@PARAMETERS
def test_what_the_networks_mark_lands_as_if_it_were_pasted(name: str, preset: str) -> None:
    """Also where they mark what the crop's padding covers, in the scan and beyond it."""
    grid = GRIDS[name].grid
    ct = CtVolume(np.zeros(grid.shape, dtype=np.int16), grid)
    liver = np.zeros(grid.shape, dtype=np.uint8)
    liver[tuple(slice(n // 3, 2 * n // 3 + 1) for n in grid.shape)] = 1
    part = resample_part(part_of(LabelVolume(liver, grid)))
    seen = resample_crop(ct, part, PRESETS[preset])
    rng = np.random.default_rng(5)
    for share in (0.0, 0.1, 1.0):
        marked = LabelVolume((rng.random(seen.grid.shape) < share).astype(np.uint8) * np.uint8(2), seen.grid)
        found = found_part(marked, part, PRESETS[preset])
        np.testing.assert_array_equal(found.whole().labels > 0, onto(marked, part.grid).labels > 0)


# ---- boxes ---------------------------------------------------------------------------------------------


def test_a_box_is_the_smallest() -> None:
    mask = np.zeros((4, 5, 6), dtype=bool)
    assert box_of(mask) == (slice(0, 0),) * 3
    mask[1, 2, 3] = mask[2, 2, 5] = True
    assert box_of(mask) == (slice(1, 3), slice(2, 3), slice(3, 6))
    part = part_of(LabelVolume(mask.astype(np.uint8) * np.uint8(7), Grid(mask.shape, np.eye(4))))
    assert part.mask.sum() == 2
    wide = part.tight(2)
    assert wide.box == (slice(0, 4), slice(0, 5), slice(1, 6))  # no further than the grid
    np.testing.assert_array_equal(wide.whole().labels == 1, mask)
    assert wide.tight().box == part.box


def test_a_label_is_told_from_the_others() -> None:
    labels = LabelVolume(np.array([[[0, 1, 2, 0]]], dtype=np.uint8), Grid((1, 1, 4), np.eye(4)))
    assert part_of(labels, 2).mask.tolist() == [[[False, True]]]
    assert part_of(labels, 2).tight().box[2] == slice(2, 3)


def test_a_mask_that_is_not_the_boxs_is_refused() -> None:
    grid = Grid((3, 3, 3), np.eye(4))
    side = slice(1, 3)
    with pytest.raises(ValueError, match="does not fit"):
        Part(np.ones((2, 2, 1), dtype=bool), (side, side, side), grid)
    with pytest.raises(ValueError, match="beyond the grid"):
        Part(np.ones((2, 2, 3), dtype=bool), (side, side, slice(1, 4)), grid)
