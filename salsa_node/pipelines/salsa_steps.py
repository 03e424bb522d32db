"""SALSA's own steps around its networks: to 1 mm, the liver cleaned, the crop its networks were trained on, and back.

After radiomicsgroup/liver-SALSA (Balaguer-Montero et al., Cell Reports Medicine 2025, 102032). Every volume here lies
on a grid whose (slice, row, column) grow to the patient's superior, anterior and right - nibabel's RAS, read from
the last axis to the first - so that arrays are what upstream's networks see. Where a voxel centre lies exactly
half-way between two others (with slices of 2 or 2.5 mm, say), upstream's nearest one is left to rounding errors; here
it is the one with the even index. `salsa_upstream` has the steps for the preset that leaves nothing as it is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import cc3d
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from salsa_node.errors import OrganNotFound
from salsa_node.volume import CtVolume, Grid, LabelVolume

_Voxel = TypeVar("_Voxel", bound=np.generic)
Mask = npt.NDArray[np.bool_]
Box = tuple[slice, slice, slice]

OUTSIDE_HU: Final = -1024
MULTIPLE: Final = 64  #: of voxels that a crop's sides are padded to
SPACING_MM: Final = 1.0
#: where slice, row and column indices grow to, in LPS
_GROWS_TO: Final = np.array([[0, 0, 1], [0, -1, 0], [-1, 0, 0]], dtype=np.float64).T


@dataclass(frozen=True, slots=True)
class Preset:
    """How the liver is cleaned and cropped.

    closing, dilation: iterations at 1 mm. neighbours: 6 or 18, of the structure that both use.
    margin: voxels that the crop is larger than the liver on each side.
    fill_holes: what the liver encloses belongs to it.
    open_edge: the liver is not eaten where it reaches the edge of the scan. Upstream closes without room around the
        volume, and loses as many millimetres there as it closes.
    touching: 6 or 26, which voxels make one part of the liver, or of what is not liver.
    by_monai: to 1 mm and back as `salsa_upstream` goes, not as `resample_ct`, `resample_labels`, `restore_labels` do.
    """

    closing: int
    dilation: int
    neighbours: int
    margin: int
    fill_holes: bool
    open_edge: bool
    touching: Literal[6, 26]
    by_monai: bool


#: "salsa-2024" has the cleaning and the crop of that time, not its other ways: it went without turning the scan to
#: RAS, and looked for its 3 mm liver in the whole scan.
PRESETS: Final[Mapping[str, Preset]] = {
    "salsa": Preset(10, 2, 18, 0, fill_holes=False, open_edge=True, touching=6, by_monai=False),
    "salsa-2025": Preset(10, 2, 18, 0, fill_holes=False, open_edge=False, touching=6, by_monai=True),
    "salsa-2024": Preset(0, 15, 6, 10, fill_holes=True, open_edge=True, touching=26, by_monai=False),
}


def fine_grid(grid: Grid) -> Grid:
    """The 1 mm grid over `grid`: turned to RAS by whole axes, the first voxel centre kept.

    Sides of round((n - 1) * spacing + 1) voxels, ties to even, as MONAI's Spacing gives them.
    """
    turned = _turned(grid)
    shape = tuple(round((n - 1) * mm / SPACING_MM + 1) for n, mm in zip(turned.shape, turned.spacing_mm, strict=True))
    affine = turned.affine_lps_mm.copy()
    affine[:3, :3] *= SPACING_MM / np.array(turned.spacing_mm)
    return Grid((shape[0], shape[1], shape[2]), affine, grid.frame_of_reference_uid)


def resample_ct(ct: CtVolume) -> CtVolume:
    """The CT on its `fine_grid`, float32, linear between centres; beyond the outer centres their values hold."""
    fine = fine_grid(ct.grid)
    return CtVolume(_linear(_oriented(ct.voxels_hu, ct.grid), _places(_turned(ct.grid), fine)), fine)


def _linear(voxels: npt.NDArray[_Voxel], places: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float32]:
    """float32 values at those places along each axis; nothing is looked at that none of them needs."""
    along = []
    for axis, at in enumerate(places):
        last = voxels.shape[axis] - 1
        held = np.clip(at, 0, last)
        low = np.minimum(np.floor(held).astype(np.intp), max(last - 1, 0))
        high = np.minimum(low + 1, last)
        part = np.expand_dims((held - low).astype(np.float32), tuple(n for n in range(3) if n != axis))
        first = int(low.min())
        along.append((slice(first, int(high.max()) + 1), low - first, high - first, part))
    found = voxels[tuple(needed for needed, *_ in along)].astype(np.float32)
    for axis, (_, low, high, part) in enumerate(along):
        above = np.take(found, high, axis)
        above *= part
        found = np.take(found, low, axis)
        found *= 1 - part
        found += above
    return found


def resample_labels(labels: LabelVolume) -> LabelVolume:
    """The labels on their `fine_grid`: each voxel takes the nearest one."""
    fine = fine_grid(labels.grid)
    voxels = _oriented(labels.labels, labels.grid)
    return LabelVolume(_nearest(voxels, _places(_turned(labels.grid), fine)), fine)


def restore_labels(labels: LabelVolume, grid: Grid) -> LabelVolume:
    """Labels on the `fine_grid` of `grid` back on `grid`: each voxel takes the nearest one."""
    voxels = _nearest(labels.labels, _places(labels.grid, _turned(grid)))
    axes, flips = _way(grid)
    back = np.flip(voxels, tuple(n for n in range(3) if flips[n])).transpose(np.argsort(axes))
    return LabelVolume(np.ascontiguousarray(back), grid)


def _places(source: Grid, target: Grid) -> list[npt.NDArray[np.float64]]:
    """Where the target's voxels lie along each axis of the source, as indices of it; both have the same axes."""
    first = source.to_index(target.to_lps_mm((0, 0, 0)))
    steps = np.array(target.spacing_mm) / np.array(source.spacing_mm)
    # whole numbers that a matrix made inexact are whole again: a tie must fall to the same side everywhere
    return [
        np.arange(count) * step + np.round(start, 6)
        for count, step, start in zip(target.shape, steps, first, strict=True)
    ]


def _nearest(voxels: npt.NDArray[_Voxel], places: list[npt.NDArray[np.float64]]) -> npt.NDArray[_Voxel]:
    for axis, at in enumerate(places):
        voxels = np.take(voxels, np.clip(np.rint(at).astype(np.intp), 0, voxels.shape[axis] - 1), axis)
    return voxels


def clean_liver(liver: LabelVolume, preset: Preset) -> LabelVolume:
    """The liver closed and widened, its largest part alone. Raises OrganNotFound where there is none."""
    mask = liver.labels == 1
    if not mask.any():
        raise OrganNotFound("no voxel was marked as liver; an abdominal CT that shows the liver is expected")
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2}[preset.neighbours])
    reach = preset.closing + preset.dilation + 1
    room = reach if preset.open_edge else 0
    padded = np.pad(mask, room)
    box = _box(padded, reach)  # outside of it nothing can change
    part = padded[box]
    if preset.closing:
        part = ndimage.binary_closing(part, structure, iterations=preset.closing)
    if preset.dilation:
        part = ndimage.binary_dilation(part, structure, iterations=preset.dilation)
    padded = np.zeros_like(padded)
    padded[box] = part
    within = tuple(slice(room, n - room) for n in padded.shape)
    cleaned = largest(padded[within], preset.touching)
    if preset.fill_holes and not cleaned.all():
        cleaned = ~largest(~cleaned, preset.touching)
    return LabelVolume(cleaned.astype(np.uint8), liver.grid)


def largest(mask: Mask, touching: Literal[6, 26] = 6) -> Mask:
    """The largest connected part. Raises OrganNotFound where there is none."""
    if not mask.any():
        raise OrganNotFound("nothing was left of the liver after closing and widening it")
    box = _box(mask, 0)
    parts = cc3d.connected_components(np.ascontiguousarray(mask[box]), connectivity=touching)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept: Mask = np.zeros_like(mask)
    kept[box] = parts == np.argmax(sizes)
    return kept


def crop(ct: CtVolume, liver: LabelVolume, preset: Preset) -> CtVolume:
    """What the networks see: the liver's box, all else at -1024 HU, the far sides padded to multiples of 64.

    ct, liver: at 1 mm, on one grid. The crop's grid says where it lies; upstream writes the uncropped affine.
    """
    box = _box(liver.labels == 1, preset.margin)
    return _seen(ct.voxels_hu[box], liver, box)


def resample_crop(ct: CtVolume, liver: LabelVolume, preset: Preset) -> CtVolume:
    """`crop(resample_ct(ct), liver, preset)`, bit for bit, where only the liver's box is resampled."""
    box = _box(liver.labels == 1, preset.margin)
    places = _places(_turned(ct.grid), liver.grid)
    near = [at[side] for at, side in zip(places, box, strict=True)]
    return _seen(_linear(_oriented(ct.voxels_hu, ct.grid), near), liver, box)


def _seen(voxels_hu: npt.NDArray[_Voxel], liver: LabelVolume, box: Box) -> CtVolume:
    """voxels_hu: those of the box."""
    seen = np.where(liver.labels[box] == 1, voxels_hu, np.array(OUTSIDE_HU, dtype=voxels_hu.dtype))
    padded = np.pad(seen, [(0, -n % MULTIPLE) for n in seen.shape], constant_values=OUTSIDE_HU)
    affine = liver.grid.affine_lps_mm.copy()
    affine[:3, 3] = liver.grid.to_lps_mm((box[0].start, box[1].start, box[2].start))
    shape = (padded.shape[0], padded.shape[1], padded.shape[2])
    return CtVolume(padded, Grid(shape, affine, liver.grid.frame_of_reference_uid))


def _box(mask: Mask, margin: int) -> Box:
    bounds = []
    for axis, count in enumerate(mask.shape):
        inside = np.flatnonzero(mask.any(axis=tuple(n for n in range(3) if n != axis)))
        bounds.append(slice(max(0, int(inside[0]) - margin), min(count, int(inside[-1]) + 1 + margin)))
    return bounds[0], bounds[1], bounds[2]


def _way(grid: Grid) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """How `grid` is turned to RAS: its axes in the new order, and which of the new ones are reversed."""
    along = (grid.affine_lps_mm[:3, :3] / np.array(grid.spacing_mm)).T @ _GROWS_TO  # [old axis, new axis]
    axes = [-1, -1, -1]
    left = np.abs(along)
    for _ in range(3):  # the best fit first, as nibabel's io_orientation does
        old, new = np.unravel_index(np.argmax(left), left.shape)
        axes[int(new)] = int(old)
        left[old, :] = left[:, new] = -1
    flips = tuple(bool(along[old, new] < 0) for new, old in enumerate(axes))
    return (axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2])


def _turned(grid: Grid) -> Grid:
    axes, flips = _way(grid)
    shape = tuple(grid.shape[axis] for axis in axes)
    affine = np.eye(4)
    affine[:3, :3] = grid.affine_lps_mm[:3, list(axes)]
    start = [0.0, 0.0, 0.0]
    for new, (old, flipped) in enumerate(zip(axes, flips, strict=True)):
        if flipped:
            affine[:3, new] *= -1
            start[old] = grid.shape[old] - 1
    affine[:3, 3] = grid.to_lps_mm((start[0], start[1], start[2]))
    return Grid((shape[0], shape[1], shape[2]), affine, grid.frame_of_reference_uid)


def _oriented(voxels: npt.NDArray[_Voxel], grid: Grid) -> npt.NDArray[_Voxel]:
    axes, flips = _way(grid)
    return np.flip(voxels.transpose(axes), tuple(n for n in range(3) if flips[n]))
