"""SALSA's own steps around its networks: to 1 mm, the liver cleaned, the crop its networks were trained on, and back.

After radiomicsgroup/liver-SALSA (Balaguer-Montero et al., Cell Reports Medicine 2025, 102032). Every volume here lies
on a grid whose (slice, row, column) grow to the patient's superior, anterior and right - nibabel's RAS, read from
the last axis to the first - so that arrays are what upstream's networks see. Where a voxel centre lies exactly
half-way between two others (with slices of 2 or 2.5 mm, say), upstream's nearest one is left to rounding errors; here
it is the one with the even index. `salsa_upstream` has the steps for the preset that leaves nothing as it is here.

Each step to 1 mm, on the liver and back is there twice: for whole volumes, all of which upstream keeps as files, and
for a `Part`, where only the liver's surroundings are ever made. Both give the same voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import cc3d
import numpy as np
import numpy.typing as npt

from salsa_node.errors import OrganNotFound
from salsa_node.pipelines.morphology import Neighbours, closed, widened
from salsa_node.pipelines.part import Box, Mask, Part, box_of, part_of
from salsa_node.volume import CtVolume, Grid, LabelVolume

_Voxel = TypeVar("_Voxel", bound=np.generic)
_Places = list[npt.NDArray[np.float64]]

LIVER: Final = 1  #: the label
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
    neighbours: Neighbours
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


def _linear(voxels: npt.NDArray[_Voxel], places: _Places) -> npt.NDArray[np.float32]:
    """float32 values at those places along each axis; nothing is looked at that none of them needs."""
    needed, lows, highs, shares = [], [], [], []
    for count, at in zip(voxels.shape, places, strict=True):
        held = np.clip(at, 0, count - 1)
        low = np.minimum(np.floor(held).astype(np.intp), max(count - 2, 0))
        high = np.minimum(low + 1, count - 1)
        needed.append(slice(int(low.min()), int(high.max()) + 1))
        lows.append(low - needed[-1].start)
        highs.append(high - needed[-1].start)
        shares.append((held - low).astype(np.float32))
    near = np.ascontiguousarray(voxels[tuple(needed)])
    found = np.empty([len(at) for at in places], dtype=np.float32)
    for n in range(len(found)):  # slice by slice, as one fits into a processor's cache
        below, above = (near[at[0][n]].astype(np.float32) for at in (lows, highs))
        plane = _mixed(below, above, shares[0][n : n + 1])
        plane = _mixed(plane[lows[1]], plane[highs[1]], shares[1][:, np.newaxis])
        # no index needs clipping, but that mode takes from rows at twice the speed
        below, above = (plane.take(at[2], axis=1, mode="clip") for at in (lows, highs))
        found[n] = _mixed(below, above, shares[2])
    return found


def _mixed(
    low: npt.NDArray[np.float32], high: npt.NDArray[np.float32], share: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Between two, in their own memory. share: of `high`."""
    high *= share
    low *= 1 - share
    low += high
    return low


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


def resample_part(part: Part) -> Part:
    """`resample_labels` of a part."""
    fine, turned = fine_grid(part.grid), _turned(part.grid)
    axes, flips = _way(part.grid)
    box = _flipped((part.box[axes[0]], part.box[axes[1]], part.box[axes[2]]), flips, turned.shape)
    return Part(*_nearest_within(_oriented(part.mask, part.grid), box, _places(turned, fine), turned.shape), fine)


def restore_part(part: Part, grid: Grid) -> Part:
    """`restore_labels` of a part."""
    turned = _turned(grid)
    mask, box = _nearest_within(part.mask, part.box, _places(part.grid, turned), part.grid.shape)
    axes, flips = _way(grid)
    back = np.argsort(axes)
    mask = np.flip(mask, tuple(n for n in range(3) if flips[n])).transpose(back)
    box = _flipped(box, flips, turned.shape)
    return Part(mask, (box[back[0]], box[back[1]], box[back[2]]), grid)


def _flipped(box: Box, flips: tuple[bool, bool, bool], shape: tuple[int, int, int]) -> Box:
    sides = [
        slice(n - side.stop, n - side.start) if flip else side for side, flip, n in zip(box, flips, shape, strict=True)
    ]
    return sides[0], sides[1], sides[2]


def _places(source: Grid, target: Grid) -> _Places:
    """Where the target's voxels lie along each axis of the source, as indices of it; both have the same axes."""
    first = source.to_index(target.to_lps_mm((0, 0, 0)))
    steps = np.array(target.spacing_mm) / np.array(source.spacing_mm)
    # whole numbers that a matrix made inexact are whole again: a tie must fall to the same side everywhere
    return [
        np.arange(count) * step + np.round(start, 6)
        for count, step, start in zip(target.shape, steps, first, strict=True)
    ]


def _nearest(voxels: npt.NDArray[_Voxel], places: _Places) -> npt.NDArray[_Voxel]:
    for axis, at in enumerate(places):
        voxels = np.take(voxels, np.clip(np.rint(at).astype(np.intp), 0, voxels.shape[axis] - 1), axis)
    return voxels


def _nearest_within(mask: Mask, box: Box, places: _Places, shape: tuple[int, int, int]) -> tuple[Mask, Box]:
    """What takes its nearest voxel from the box, and the box in which all of that lies.

    shape: of the grid that `box` is of.
    """
    sides = []
    for axis, (at, side) in enumerate(zip(places, box, strict=True)):
        nearest = np.clip(np.rint(at).astype(np.intp), 0, shape[axis] - 1)  # rises
        first, stop = (int(n) for n in np.searchsorted(nearest, (side.start, side.stop)))
        mask = np.take(mask, nearest[first:stop] - side.start, axis)
        sides.append(slice(first, stop))
    return mask, (sides[0], sides[1], sides[2])


def clean_liver(liver: LabelVolume, preset: Preset) -> LabelVolume:
    """The liver closed and widened, its largest part alone. Raises OrganNotFound where there is none."""
    return clean_part(part_of(liver, LIVER), preset).whole()


def clean_part(liver: Part, preset: Preset) -> Part:
    """`clean_liver` of a part."""
    liver = liver.tight()
    if not liver.mask.any():
        raise OrganNotFound("no voxel was marked as liver; an abdominal CT that shows the liver is expected")
    reach = preset.closing + preset.dilation + 1  # nothing can change beyond it
    shape = liver.grid.shape
    wide = liver.tight(reach).box
    box = liver.box
    if preset.open_edge:
        room = [(reach, reach)] * 3
    else:
        room = [(one.start - all_.start, all_.stop - one.stop) for one, all_ in zip(box, wide, strict=True)]
    mask = np.pad(liver.mask, room)
    if preset.closing:
        mask = closed(mask, preset.neighbours, preset.closing)
    if preset.dilation:
        mask = widened(mask, preset.neighbours, preset.dilation)
    corner = [side.start - before for side, (before, _) in zip(box, room, strict=True)]
    within = tuple(slice(all_.start - at, all_.stop - at) for all_, at in zip(wide, corner, strict=True))
    cleaned = Part(largest(mask[within], preset.touching), wide, liver.grid)
    if preset.fill_holes and _parts(~cleaned.mask, preset.touching)[1] > 1:  # else all that is not liver is one part
        everything = slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])
        outside = largest(cleaned.whole().labels == 0, preset.touching)
        cleaned = Part(~outside, everything, liver.grid)
    return cleaned


def largest(mask: Mask, touching: Literal[6, 26] = 6) -> Mask:
    """The largest connected part. Raises OrganNotFound where there is none."""
    box = box_of(mask)
    parts, count = _parts(mask[box], touching)
    if not count:
        raise OrganNotFound("nothing was left of the liver after closing and widening it")
    if count == 1:
        return mask
    kept: Mask = np.zeros_like(mask)
    kept[box] = parts == np.argmax(np.bincount(parts[mask[box]]))
    return kept


def _parts(mask: Mask, touching: Literal[6, 26]) -> tuple[npt.NDArray[np.integer], int]:
    """The number of each voxel's connected part, 0 = none, and how many parts there are."""
    numbers, count = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=touching, return_N=True)
    return numbers, int(count)


def crop(ct: CtVolume, liver: LabelVolume, preset: Preset) -> CtVolume:
    """What the networks see: the liver's box, all else at -1024 HU, the far sides padded to multiples of 64.

    ct, liver: at 1 mm, on one grid. The crop's grid says where it lies; upstream writes the uncropped affine.
    """
    near = part_of(liver, LIVER).tight(preset.margin)
    return _seen(ct.voxels_hu[near.box], near)


def resample_crop(ct: CtVolume, liver: LabelVolume | Part, preset: Preset) -> CtVolume:
    """`crop(resample_ct(ct), liver, preset)`, bit for bit, where only the liver's box is resampled."""
    near = (liver if isinstance(liver, Part) else part_of(liver, LIVER)).tight(preset.margin)
    places = _places(_turned(ct.grid), near.grid)
    needed = [at[side] for at, side in zip(places, near.box, strict=True)]
    return _seen(_linear(_oriented(ct.voxels_hu, ct.grid), needed), near)


def _seen(voxels_hu: npt.NDArray[_Voxel], near: Part) -> CtVolume:
    """voxels_hu: those of the part's box."""
    padded = np.full([n + -n % MULTIPLE for n in near.mask.shape], OUTSIDE_HU, dtype=voxels_hu.dtype)
    np.copyto(padded[tuple(slice(0, n) for n in near.mask.shape)], voxels_hu, where=near.mask)
    affine = near.grid.affine_lps_mm.copy()
    affine[:3, 3] = near.grid.to_lps_mm((near.box[0].start, near.box[1].start, near.box[2].start))
    shape = (padded.shape[0], padded.shape[1], padded.shape[2])
    return CtVolume(padded, Grid(shape, affine, near.grid.frame_of_reference_uid))


def found_part(labels: LabelVolume, liver: Part, preset: Preset) -> Part:
    """Where the labels are any but 0, on the liver's grid; they lie on the crop that `resample_crop` made of it."""
    corner = (side.start for side in liver.tight(preset.margin).box)
    sides = [
        slice(at, min(at + n, whole)) for at, n, whole in zip(corner, labels.grid.shape, liver.grid.shape, strict=True)
    ]
    held = tuple(slice(0, side.stop - side.start) for side in sides)
    return Part(labels.labels[held] > 0, (sides[0], sides[1], sides[2]), liver.grid).tight()


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
