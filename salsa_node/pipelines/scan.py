"""A CT as TotalSegmentator's image, on the device that computes: sent there once, turned and resampled there.

What was found in it is brought back.

Images are (x, y, z) in RAS, as nibabel has them. "Turned" is nibabel's closest canonical orientation: axes that grow
to the right, the front and the head, nothing interpolated.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from nibabel.nifti1 import Nifti1Image
from nibabel.orientations import io_orientation

from salsa_node.errors import SeriesRejected
from salsa_node.pipelines.device import is_exhaustion, release, sent
from salsa_node.volume import CtVolume, LabelVolume

CROP_MARGIN_MM: Final = 20  # what TotalSegmentator's python_api takes wherever its own liver network finds the crop
_RAS_TO_LPS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
_AT_ONCE: Final = 1 << 20  # voxels of the result
Labels = npt.NDArray[np.uint8]
Box = tuple[slice, slice, slice]


class Scan:
    """A CT on `device`, or on the CPU where the device has no room for it.

    Raises SeriesRejected where a voxel is no number.
    """

    def __init__(self, ct: CtVolume, device: torch.device) -> None:
        if ct.voxels_hu.dtype.kind == "f" and not np.isfinite(ct.voxels_hu).all():
            raise SeriesRejected("some voxels are not finite numbers; Hounsfield units were expected")
        self._image = image_of(ct)
        self._grid = ct.grid
        axes = io_orientation(self._image.affine)  # type: ignore[no-untyped-call]
        self._order: tuple[int, ...] = tuple(int(axis) for axis in np.argsort(axes[:, 0]))
        self._flipped: tuple[bool, ...] = tuple(bool(axes[axis, 1] < 0) for axis in self._order)
        backwards = min(ct.voxels_hu.strides) < 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written into here
            self._voxels = torch.from_numpy(ct.voxels_hu.copy() if backwards else ct.voxels_hu)
        with _room_on(device):
            self._voxels = sent(self._voxels, device)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (x, y, z) of the image."""
        x, y, z = self._image.shape
        return int(x), int(y), int(z)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Along (x, y, z) of the image, in the single precision of a NIfTI header."""
        x, y, z = self._image.header.get_zooms()  # type: ignore[no-untyped-call]
        return float(x), float(y), float(z)

    def turned(self, values: tuple[Any, Any, Any]) -> tuple[Any, ...]:
        """What belongs to (x, y, z) of the image, in the turned image's order."""
        return tuple(values[axis] for axis in self._order)

    def at_spacing(
        self, spacing_mm: tuple[float, float, float], box: Box | None
    ) -> tuple[npt.NDArray[np.float32], tuple[float, float, float]]:
        """The turned image at about that spacing, (x, y, z) in whole Hounsfield units, and its spacing exactly.

        As `totalsegmentator.resampling.change_spacing` makes it of order 1: shares of half-way values are cut off,
        and an image that has the spacing stays what it is. box: of the image, which `crop_to_mask` cuts out and
        leaves in whole units; None takes all of it.
        """
        sides = (slice(None), slice(None), slice(None)) if box is None else box
        zooms = np.array(self.turned(self.spacing_mm))
        zoom = zooms / np.array(spacing_mm)
        voxels = self._voxels.permute(2, 1, 0)[sides].permute(*self._order)
        with _room_on(self._voxels.device):
            if np.array_equal(zooms, np.array(spacing_mm)):
                return self._as_it_is(voxels, whole=box is not None), spacing_mm
            shape = [round(count * float(share)) for count, share in zip(voxels.shape, zoom, strict=True)]
            return self._linear(voxels, shape, whole=box is not None), self._spacing_of(zoom)
        self._voxels = self._voxels.cpu()
        return self.at_spacing(spacing_mm, box)

    def _spacing_of(self, zoom: npt.NDArray[np.float64]) -> tuple[float, float, float]:
        """Of the turned image once it is so many times finer, in the single precision of a NIfTI header."""
        affine = self._image.affine[:, [*self._order, 3]].copy()
        affine[:3, :3] /= zoom
        empty = np.zeros((1, 1, 1), dtype=np.uint8)
        x_mm, y_mm, z_mm = Nifti1Image(empty, affine).header.get_zooms()  # type: ignore[no-untyped-call]
        return float(x_mm), float(y_mm), float(z_mm)

    def _as_it_is(self, voxels: torch.Tensor, *, whole: bool) -> npt.NDArray[np.float32]:
        """(x, y, z) voxels whose flips are still to come. whole: they are cut to whole units."""
        values = torch.flip(voxels, [axis for axis, flipped in enumerate(self._flipped) if flipped])
        found: npt.NDArray[np.float32] = (values.to(torch.int32) if whole else values).float().cpu().numpy()
        return found

    def _linear(self, voxels: torch.Tensor, shape: list[int], *, whole: bool) -> npt.NDArray[np.float32]:
        """What `scipy.ndimage.zoom(order=1, mode="nearest")` gives, bit for bit: eight products in its order.

        voxels: (x, y, z), flips still to come. whole: they are cut to whole units first.
        """
        axes = [
            _Axis.of(count, wanted, flipped=flipped, axis=axis).to(voxels.device)
            for axis, (count, wanted, flipped) in enumerate(zip(voxels.shape, shape, self._flipped, strict=True))
        ]
        made = torch.empty(shape[::-1], dtype=torch.float32, device=voxels.device)
        source = voxels.permute(2, 1, 0)
        x, y, z = axes
        slices = max(1, _AT_ONCE // (shape[0] * shape[1]))
        for first in range(0, shape[2], slices):
            at = slice(first, min(first + slices, shape[2]))
            rows = [[source[side[at]][:, across] for across in y.sides] for side in z.sides]
            total: torch.Tensor | None = None
            for i, column in enumerate(x.sides):
                for j in range(2):
                    for k in range(2):
                        found = rows[k][j][:, :, column]
                        value = (found.to(torch.int32) if whole else found).double()
                        value *= x.weights[i]
                        value *= y.weights[j]
                        value *= z.weights[k][at]
                        total = value if total is None else total.add_(value)
            assert total is not None
            made[at] = total.to(torch.int32)
        return made.cpu().numpy().T

    def brought_back(self, labels: Labels, box: Box | None) -> Labels:
        """(x, y, z) labels of the turned image or of its box, at any spacing, on the image's voxels; 0 beside the box.

        Each voxel takes the nearest one, the first and last centres falling together.
        """
        sides = (slice(None), slice(None), slice(None)) if box is None else box
        made = np.zeros(self.shape, dtype=np.uint8, order="F")  # slices lie together, as in a CT of ours
        into = made[sides].transpose(self._order)
        fine = nearest(labels, into.shape)
        into[...] = np.flip(fine, tuple(axis for axis, flipped in enumerate(self._flipped) if flipped))
        return made

    def box_around(self, mask: npt.NDArray[np.bool_], margin_mm: float = CROP_MARGIN_MM) -> Box | None:
        """The box of the image around what is True of a (x, y, z) mask of the turned image, at any spacing.

        As `crop_to_mask` finds it in what `brought_back` gives: `margin_mm` wider on each side, in whole voxels
        rounded down. None where nothing is True.
        """
        places = [_nearest_places(n, count) for n, count in zip(mask.shape, self.turned(self.shape), strict=True)]
        taken = mask[np.ix_(*map(np.unique, places))]  # where the image is the coarser one some are nobody's nearest
        bounds = [slice(0)] * 3
        for axis, (of, flipped) in enumerate(zip(self._order, self._flipped, strict=True)):
            count = self.shape[of]
            along = np.asarray(taken.any(axis=tuple(n for n in range(3) if n != axis)))
            there = along[np.unique(places[axis], return_inverse=True)[1]]
            inside = np.flatnonzero(there[::-1] if flipped else there)
            if not inside.size:
                return None
            margin = int(margin_mm / self.spacing_mm[of])  # in float64, as it divides: 0.8 mm gives 24 voxels, not 25
            bounds[of] = slice(max(0, int(inside[0]) - margin), min(count, int(inside[-1]) + 1 + margin))
        return bounds[0], bounds[1], bounds[2]

    def labelled(self, labels: Labels) -> LabelVolume:
        """Labels of the image on the grid of its CT."""
        return LabelVolume(np.ascontiguousarray(labels.transpose(2, 1, 0)), self._grid)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Between which voxels along one axis each wanted one lies, and what each of the two weighs."""

    sides: tuple[torch.Tensor, torch.Tensor]
    weights: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, count: int, wanted: int, *, flipped: bool, axis: int) -> _Axis:
        """scipy's numbers, to the last bit: the second weight is what is left of 1. flipped: counted from the end.

        The weights lie along `axis` of (x, y, z) where the arrays are (z, y, x).
        """
        step = (count - 1) / (wanted - 1) if wanted > 1 else 1.0
        at = np.arange(wanted) * step
        low = np.floor(at).astype(np.int64)
        first = 1 - (at - low)
        sides = [np.minimum(side, count - 1) for side in (low, low + 1)]
        sides = [count - 1 - side for side in sides] if flipped else sides
        shape = [wanted if n == 2 - axis else 1 for n in range(3)]
        below, above = (torch.from_numpy(side) for side in sides)
        return cls((below, above), (torch.from_numpy(first).reshape(shape), torch.from_numpy(1 - first).reshape(shape)))

    def to(self, device: torch.device) -> _Axis:
        below, above = (side.to(device) for side in self.sides)
        first, second = (weight.to(device) for weight in self.weights)
        return _Axis((below, above), (first, second))


def nearest(labels: Labels, shape: tuple[int, ...]) -> Labels:
    """Labels on as many voxels as `shape` has, each the nearest one: the first and last centres fall together.

    What `scipy.ndimage.zoom(order=0)` gives, axis by axis instead of voxel by voxel.
    """
    turned = labels.T  # whole slices are copied at a time
    for axis, (count, wanted) in enumerate(zip(turned.shape, shape[::-1], strict=True)):
        turned = np.take(turned, _nearest_places(count, wanted), axis)
    return turned.T


def _nearest_places(count: int, wanted: int) -> npt.NDArray[np.intp]:
    step = (count - 1) / (wanted - 1) if wanted > 1 else 1.0
    at: npt.NDArray[np.intp] = np.floor(np.arange(wanted) * step + 0.5).astype(np.intp)
    return np.minimum(at, count - 1)


@contextlib.contextmanager
def _room_on(device: torch.device) -> Iterator[None]:
    """Goes on behind the block where the memory of a device that is no CPU ran out in it."""
    exhausted = False
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if device.type == "cpu" or not is_exhaustion(exc):
            raise
        exhausted = True
    if exhausted:
        release(device)


def image_of(ct: CtVolume) -> Nifti1Image:
    """The CT as the NIfTI image that TotalSegmentator would read."""
    affine = _RAS_TO_LPS @ ct.grid.affine_lps_mm[:, [2, 1, 0, 3]]
    return Nifti1Image(ct.voxels_hu.transpose(2, 1, 0), affine)  # type: ignore[no-untyped-call]
