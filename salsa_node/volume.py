"""Voxels and where they lie.

One space: DICOM's patient coordinates (LPS: +x left, +y posterior, +z head), in millimetres.
One axis order: (slice, row, column). Another convention, such as NIfTI's RAS or nnU-Net's
channel first, is converted inside the adapter that needs it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from salsa_node.uids import digest

Affine = npt.NDArray[np.float64]
Index = tuple[float, float, float]
PointMm = tuple[float, float, float]

SHEAR_TOLERANCE = 1e-3  #: of a cosine between two axes of a grid; less moves no voxel of 500 slices by one


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """A grid of voxels in the patient.

    shape: (slices, rows, columns).
    affine_lps_mm: (4, 4); maps (slice, row, column, 1) of a voxel centre to its LPS position in mm.
    frame_of_reference_uid: None where the source names none (a NIfTI file).
    slice_offsets: None for a regular grid; where slices lie at unequal distances, the place of each along the slice
        axis in steps of that axis, which is what the affine takes for a slice index. Rises from 0.
    """

    shape: tuple[int, int, int]
    affine_lps_mm: Affine
    frame_of_reference_uid: str | None = None
    slice_offsets: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        affine = np.array(self.affine_lps_mm, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(f"affine_lps_mm must be a finite (4, 4) matrix, found shape {affine.shape}")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape must be three positive counts (slices, rows, columns), found {self.shape}")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise ValueError("affine_lps_mm is singular: the axes do not span space")
        offsets = self.slice_offsets
        if offsets is not None and (
            len(offsets) != self.shape[0] or len(offsets) < 2 or offsets[0] != 0 or not (np.diff(offsets) > 0).all()
        ):
            raise ValueError(f"slice_offsets must rise from 0, one for each of {self.shape[0]} slices")
        affine.setflags(write=False)
        object.__setattr__(self, "affine_lps_mm", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    def __str__(self) -> str:
        """Size, spacing and first voxel in words, for messages."""
        size = " x ".join(map(str, self.shape))
        spacing = " x ".join(f"{mm:.4g}" for mm in self.spacing_mm)
        origin = ", ".join(f"{mm:.2f}" for mm in self.to_lps_mm((0, 0, 0)))
        return f"a grid of {size} (slices, rows, columns) at {spacing} mm from ({origin})"

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along (slice, row, column)."""
        lengths = np.linalg.norm(self.affine_lps_mm[:3, :3], axis=0)
        return float(lengths[0]), float(lengths[1]), float(lengths[2])

    @property
    def is_upright(self) -> bool:
        """Whether the axes are perpendicular and the slices at one distance: what a network can look at."""
        return self.slice_offsets is None and self._is_perpendicular

    @property
    def _is_perpendicular(self) -> bool:
        axes = self.affine_lps_mm[:3, :3] / np.array(self.spacing_mm)
        return bool(np.abs(axes.T @ axes - np.eye(3)).max() < SHEAR_TOLERANCE)

    @property
    def along(self) -> npt.NDArray[np.float64]:
        """Of each slice, its place along the slice axis in steps of that axis: 0, 1, 2 ... in a regular grid."""
        return np.array(range(self.shape[0]) if self.slice_offsets is None else self.slice_offsets, dtype=np.float64)

    @property
    def step_mm(self) -> float:
        """Distance between the planes of two slices; the mean, where they lie at unequal ones."""
        if self._is_perpendicular:
            return self.spacing_mm[0]
        return self.voxel_volume_mm3 / float(np.linalg.norm(np.cross(*self.affine_lps_mm[:3, 1:3].T)))

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel; the mean, where slices lie at unequal distances."""
        return float(abs(np.linalg.det(self.affine_lps_mm[:3, :3])))

    def volume_mm3(self, voxels: npt.NDArray[np.integer], first_slice: int = 0) -> float:
        """Volume of so many voxels in each slice from `first_slice` on; a voxel reaches halfway to its neighbours."""
        if self.slice_offsets is None:
            return int(voxels.sum()) * self.voxel_volume_mm3
        steps = np.diff(self.slice_offsets)
        thickness = (np.concatenate([steps[:1], steps]) + np.concatenate([steps, steps[-1:]])) / 2
        return float(voxels @ thickness[first_slice : first_slice + len(voxels)]) * self.voxel_volume_mm3

    def to_lps_mm(self, index: Index) -> PointMm:
        """Position of a (slice, row, column) index; fractions lie between voxel centres."""
        first = index[0] if self.slice_offsets is None else _piecewise(index[0], np.arange(self.shape[0]), self.along)
        point = self.affine_lps_mm @ np.array([first, index[1], index[2], 1.0])
        return float(point[0]), float(point[1]), float(point[2])

    def to_index(self, point_lps_mm: PointMm) -> Index:
        """The (slice, row, column) index, with fractions, of a position."""
        index = np.linalg.solve(self.affine_lps_mm, np.array([*point_lps_mm, 1.0]))
        first = index[0] if self.slice_offsets is None else _piecewise(index[0], self.along, np.arange(self.shape[0]))
        return float(first), float(index[1]), float(index[2])

    def matches(self, other: Grid, tolerance_mm: float = 0.01) -> bool:
        """Whether both grids put every voxel in the same place, to `tolerance_mm` at the corners.

        Two frames of reference that are both named must be the same one.
        """
        if self.shape != other.shape:
            return False
        named = (self.frame_of_reference_uid, other.frame_of_reference_uid)
        if None not in named and named[0] != named[1]:
            return False
        if not np.allclose(self.along, other.along, atol=tolerance_mm / max(self.step_mm, tolerance_mm)):
            return False
        last = np.array(self.shape) - 1
        corners = np.array([[*(last * bits), 1] for bits in np.ndindex(2, 2, 2)], dtype=np.float64).T
        apart = (self.affine_lps_mm - other.affine_lps_mm) @ corners
        return bool(np.linalg.norm(apart[:3], axis=0).max() <= tolerance_mm)


@dataclass(frozen=True, slots=True, eq=False)
class CtVolume:
    """CT numbers on a grid.

    voxels_hu: (slices, rows, columns) int16 or float32, Hounsfield units, made read-only.
    grid: where those voxels lie; `voxels_hu.shape == grid.shape` always holds.
    slice_sop_uids: the SOP Instance UID of each slice, in slice order; empty where no DICOM image stands behind.
    """

    voxels_hu: npt.NDArray[np.int16] | npt.NDArray[np.float32]
    grid: Grid
    slice_sop_uids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_shape(self.voxels_hu.shape, self.grid)
        if self.slice_sop_uids and len(self.slice_sop_uids) != self.grid.shape[0]:
            raise ValueError(f"{len(self.slice_sop_uids)} slice UIDs for {self.grid.shape[0]} slices")
        self.voxels_hu.setflags(write=False)

    @property
    def source_digest(self) -> str:
        """SHA-256 of what this volume was made of: its SOP Instance UIDs, or the voxels where there are none."""
        if self.slice_sop_uids:
            return digest(*self.slice_sop_uids)
        voxels = hashlib.sha256(np.ascontiguousarray(self.voxels_hu).data).hexdigest()
        return digest(voxels, repr(self.grid.shape), repr(self.grid.affine_lps_mm.tolist()))


@dataclass(frozen=True, slots=True, eq=False)
class LabelVolume:
    """Integer labels on a grid; 0 is background.

    labels: (slices, rows, columns) of an unsigned integer type, made read-only.
    """

    labels: npt.NDArray[np.unsignedinteger]
    grid: Grid

    def __post_init__(self) -> None:
        _check_shape(self.labels.shape, self.grid)
        if not np.issubdtype(self.labels.dtype, np.unsignedinteger):
            raise ValueError(f"labels must be unsigned integers, found {self.labels.dtype}")
        self.labels.setflags(write=False)


def _piecewise(x: float, xs: npt.NDArray[np.number], ys: npt.NDArray[np.number]) -> float:
    """`x` through the line that joins the points (xs, ys), its first and last parts prolonged."""
    n = int(np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2))
    return float(ys[n] + (x - xs[n]) * (ys[n + 1] - ys[n]) / (xs[n + 1] - xs[n]))


def _check_shape(found: tuple[int, ...], grid: Grid) -> None:
    if tuple(found) != grid.shape:
        raise ValueError(f"voxels of shape {tuple(found)} do not fit the grid {grid.shape}")
