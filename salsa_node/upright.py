"""Tilted or unevenly spaced slices on an upright, regular grid, as networks need it, and masks back on the slices.

Each new slice is a straight mix of its two neighbours, each shifted within its plane to where it lies. Masks go back
by the nearest voxel, and everything is measured on the slices as the scanner made them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import ceil, floor

import numpy as np
import numpy.typing as npt

from salsa_node.native_image import PADDING_HU
from salsa_node.pipelines import Flag, Masks, Observer, Pipeline, unobserved
from salsa_node.volume import CtVolume, Grid, LabelVolume

Floats = npt.NDArray[np.float64]

RESAMPLED = "resampled"  #: the flag, and the key in the provenance


def upright(ct: CtVolume) -> CtVolume:
    """The CT on an upright, regular grid that holds all of its slices, with air around them.

    The pixels keep size and direction; the slices lie at the median distance of the old ones.
    """
    grid, to = ct.grid, _upright_grid(ct.grid)
    step_mm, shifts = _lie(grid)
    places_mm = grid.along * grid.step_mm
    low, _ = _margins(shifts)

    @lru_cache(maxsize=2)  # the next new slice often lies between the same two
    def shifted(k: int) -> Floats:
        return _shifted(ct.voxels_hu[k], shifts[k] - low, to.shape[1:])

    voxels = np.empty(to.shape, dtype=ct.voxels_hu.dtype)
    for j in range(to.shape[0]):
        at = np.interp(j * step_mm, places_mm, np.arange(grid.shape[0]))
        first = int(at)
        share = at - first
        plane = (1 - share) * shifted(first) + share * shifted(first + 1) if share > 0 else shifted(first)
        voxels[j] = np.rint(plane) if voxels.dtype == np.int16 else plane
    return CtVolume(voxels, to)


def segment(pipeline: Pipeline, ct: CtVolume, observer: Observer = unobserved) -> Masks:
    """The pipeline's masks on `ct.grid`; where its slices are tilted or uneven, by way of an upright grid.

    observer, and what is raised: as of `Pipeline.segment`.
    """
    if ct.grid.is_upright:
        return pipeline.segment(ct, observer)
    return put_back(pipeline.segment(upright(ct), observer), ct.grid)


def upright_labels(part: LabelVolume) -> LabelVolume:
    """Labels on the grid that `upright` makes of theirs, by the nearest voxel; upright ones as they are."""
    grid = part.grid
    if grid.is_upright:
        return part
    to = _upright_grid(grid)
    _, shifts = _lie(grid)
    low, _ = _margins(shifts)
    places_mm = grid.along * grid.step_mm
    labels = np.zeros(to.shape, dtype=part.labels.dtype)
    for j in range(to.shape[0]):
        k = int(np.abs(places_mm - j * to.step_mm).argmin())
        row, column = (int(n) for n in np.rint(shifts[k] - low))
        labels[j, row : row + grid.shape[1], column : column + grid.shape[2]] = part.labels[k]
    return LabelVolume(labels, to)


def put_back(masks: Masks, grid: Grid) -> Masks:
    """Masks from the grid that `upright` made of `grid`, on `grid`; flags and provenance say what was done."""
    words = _words(grid)
    organ, segments = (None if part is None else _on_slices(part, grid) for part in (masks.organ, masks.segments))
    return replace(
        masks,
        organ=organ,
        lesions=_on_slices(masks.lesions, grid),
        segments=segments,
        provenance=replace(masks.provenance, parameters={**masks.provenance.parameters, RESAMPLED: words}),
        flags=(
            *masks.flags,
            Flag(
                RESAMPLED,
                f"The images were resampled before the analysis, because of {words}; "
                "the results lie on the images as they were acquired.",
            ),
        ),
    )


def _on_slices(part: LabelVolume, grid: Grid) -> LabelVolume:
    step_mm, shifts = _lie(grid)
    low, _ = _margins(shifts)
    labels = np.empty(grid.shape, dtype=part.labels.dtype)
    for k, place_mm in enumerate(grid.along * grid.step_mm):
        row, column = (int(n) for n in np.rint(shifts[k] - low))
        plane = part.labels[min(round(place_mm / step_mm), part.grid.shape[0] - 1)]
        labels[k] = plane[row : row + grid.shape[1], column : column + grid.shape[2]]
    return LabelVolume(labels, grid)


def _upright_grid(grid: Grid) -> Grid:
    step_mm, shifts = _lie(grid)
    low, high = _margins(shifts)
    slices = ceil(grid.along[-1] * grid.step_mm / step_mm - 1e-6) + 1
    shape = (slices, grid.shape[1] + int(high[0] - low[0]), grid.shape[2] + int(high[1] - low[1]))
    affine = np.array(grid.affine_lps_mm)
    affine[:3, 0] = _normal(grid) * step_mm
    affine[:3, 3] = grid.affine_lps_mm[:3, 3] + grid.affine_lps_mm[:3, 1:3] @ low
    return Grid(shape, affine, grid.frame_of_reference_uid)


def _lie(grid: Grid) -> tuple[float, Floats]:
    """The distance of the upright slices in mm, and by how many (rows, columns) each old slice lies aside."""
    step_mm = float(np.median(np.diff(grid.along))) * grid.step_mm
    sideways = grid.affine_lps_mm[:3, 0] - _normal(grid) * grid.step_mm
    per_step = np.linalg.lstsq(grid.affine_lps_mm[:3, 1:3], sideways, rcond=None)[0]
    return step_mm, np.outer(grid.along, per_step)


def _normal(grid: Grid) -> Floats:
    """Unit vector across the slices, the way they are counted."""
    across = np.cross(grid.affine_lps_mm[:3, 1], grid.affine_lps_mm[:3, 2])
    normal: Floats = across / np.linalg.norm(across) * np.sign(across @ grid.affine_lps_mm[:3, 0])
    return normal


def _margins(shifts: Floats) -> tuple[Floats, Floats]:
    """Whole (rows, columns) from the first slice's corner to the least and the most shifted one."""
    low = np.array([floor(n + 1e-6) for n in shifts.min(axis=0)], dtype=np.float64)
    high = np.array([ceil(n - 1e-6) for n in shifts.max(axis=0)], dtype=np.float64)
    return low, high


def _shifted(plane: npt.NDArray[np.int16] | npt.NDArray[np.float32], by: Floats, shape: tuple[int, int]) -> Floats:
    """The plane `by` so many (rows, columns), with fractions, inside a larger one of air."""
    whole = np.floor(by + 1e-6).astype(int)
    rest = np.clip(by - whole, 0, None)
    held = np.full(shape, PADDING_HU, dtype=np.float64)
    there = held[whole[0] : whole[0] + plane.shape[0], whole[1] : whole[1] + plane.shape[1]]
    there[...] = plane[: there.shape[0], : there.shape[1]]
    for axis, share in enumerate(rest):
        if share > 1e-6:
            lines = np.moveaxis(held, axis, 0)
            from_before = share * lines[:-1]
            lines *= 1 - share
            lines[1:] += from_before
            lines[0] = PADDING_HU  # a part of it lies outside
    return held


def _words(grid: Grid) -> str:
    """Why, with the numbers."""
    found = []
    _, shifts = _lie(grid)
    aside_mm = float(np.linalg.norm(shifts[-1] * np.array(grid.spacing_mm[1:])))
    length_mm = float(grid.along[-1] * grid.step_mm)
    if aside_mm > 1e-6 * length_mm:
        found.append(f"slices sheared by {np.degrees(np.arctan2(aside_mm, length_mm)):.1f} degrees (gantry tilt)")
    if grid.slice_offsets is not None:
        steps_mm = np.diff(grid.along) * grid.step_mm
        found.append(f"steps from {steps_mm.min():.2f} to {steps_mm.max():.2f} mm between slices")
    return " and ".join(found)
