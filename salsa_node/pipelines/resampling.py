"""nnU-Net's resampling of images and class scores as products with one matrix for each axis, slab by slab.

What nnU-Net asks of scikit-image, spline by spline and in double precision, is linear along each axis. So the matrix of
an axis is what scipy itself makes of each unit vector, and the products are the same numbers but for rounding, on
whatever device the voxels lie, in time that grows with the voxels and with memory for a few slices of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from salsa_node.pipelines.device import is_exhaustion, release

_OURS = "resample_data_or_seg_to_shape"  # nnU-Net's default; plans may name others, which run as they are
_NOTHING = 1e-13  # of a weight: what a spline this far away adds, of a value of 1
_SLAB_BYTES = 1 << 28
Size = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Interpolation:
    """Splines of that order along each axis, their ends held.

    nearest: (slice, row, column) arrays are interpolated within each slice alone, and the nearest slice is taken.
    """

    order: int
    nearest: bool

    @classmethod
    def of(
        cls,
        configuration: Mapping[str, Any],
        kind: str,
        spacing_mm: Sequence[float],
        new_spacing_mm: Sequence[float],
    ) -> Interpolation | None:
        """What a configuration of nnU-Net's plans asks for between these spacings, both (slice, row, column).

        kind: "data" or "probabilities". None where it is none of ours: another function, splines between slices that
        are kept apart, or slices that are kept apart along another axis.
        """
        from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

        if configuration.get(f"resampling_fn_{kind}") != _OURS:
            return None
        asked = configuration[f"resampling_fn_{kind}_kwargs"]
        known = {"is_seg", "order", "order_z", "force_separate_z"}
        if asked.get("is_seg") or not asked.keys() <= known:
            return None
        apart, axis = determine_do_sep_z_and_axis(asked.get("force_separate_z", False), spacing_mm, new_spacing_mm)
        if apart and (axis != 0 or asked.get("order_z", 0) != 0):
            return None
        return cls(int(asked.get("order", 3)), bool(apart))


def slabs(
    volume: torch.Tensor, shape: Size, interpolation: Interpolation, slices: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Which slices of the result, and their float64 values on the volume's device: `slices` at a time, the last fewer.

    volume: (slice, row, column), any numbers. shape: of the whole result.
    """
    rows, columns = (
        _matrix(count, wanted, interpolation.order).to(volume.device)
        for count, wanted in zip(volume.shape[1:], shape[1:], strict=True)
    )
    within = None if interpolation.nearest else (volume.amin().double(), volume.amax().double())
    across = _matrix(volume.shape[0], shape[0], interpolation.order)
    places = _nearest(volume.shape[0], shape[0])
    for first in range(0, shape[0], slices):
        at = slice(first, min(first + slices, shape[0]))
        if interpolation.nearest:
            seen, again = torch.unique(places[at], return_inverse=True)
            some = volume[seen.to(volume.device)].double()
            ends = some.amin(dim=(1, 2), keepdim=True), some.amax(dim=(1, 2), keepdim=True)
            made = torch.minimum(torch.maximum(rows @ some @ columns.T, ends[0]), ends[1])
            yield at, made[again.to(volume.device)]
            continue
        assert within is not None
        weights = across[at]
        near = torch.nonzero((weights.abs() > _NOTHING).any(dim=0)).flatten()
        needed = slice(int(near[0]), int(near[-1]) + 1)
        mixed = torch.tensordot(weights[:, needed].to(volume.device), volume[needed].double(), dims=1)
        yield at, (rows @ mixed @ columns.T).clamp(*within)


def resampled(
    data: npt.NDArray[np.floating[Any]], shape: Sequence[int], interpolation: Interpolation, device: torch.device
) -> npt.NDArray[np.floating[Any]]:
    """(channels, slice, row, column) on that shape, computed on `device`, of the same kind of numbers."""
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    if data.shape[1:] == size:
        return data
    made = np.empty((len(data), *size), dtype=data.dtype)
    for channel, into in zip(data, made, strict=True):
        volume = torch.from_numpy(np.ascontiguousarray(channel)).to(device)
        for at, values in slabs(volume, size, interpolation, at_once(size, 1)):
            into[at] = values.cpu().numpy()
    return made


def fill(labels: npt.NDArray[np.unsignedinteger[Any]], scores: torch.Tensor, interpolation: Interpolation) -> None:
    """Write into (slice, row, column) `labels` the class that scores highest in each voxel, the first of several.

    scores: (classes, slice, row, column), on the device that is to compute; the CPU does where that has no room.
    """
    size = labels.shape[0], labels.shape[1], labels.shape[2]
    slices = at_once(size, len(scores))
    try:
        for same in zip(*(slabs(one, size, interpolation, slices) for one in scores), strict=True):
            found = torch.stack([values.float() for _, values in same]).max(0).indices  # argmax takes ten times as long
            labels[same[0][0]] = found.to(torch.int32).cpu().numpy()
    except (MemoryError, RuntimeError) as exc:
        if scores.device.type == "cpu" or not is_exhaustion(exc):
            raise
    else:
        return
    release(scores.device)
    fill(labels, scores.cpu(), interpolation)


class OnDevice:
    """A configuration of nnU-Net's plans whose images are resampled here, where `Interpolation.of` knows how.

    Everything else is the configuration's own. Where the device's memory runs out the CPU resamples.
    """

    def __init__(self, configuration: Any, device: torch.device) -> None:
        self._configuration = configuration
        self._device = device

    def __getattr__(self, name: str) -> Any:
        """As the configuration has it."""
        return getattr(self._configuration, name)

    def resampling_fn_data(
        self,
        data: npt.NDArray[np.floating[Any]],
        shape: Sequence[int],
        spacing_mm: Sequence[float],
        new_spacing_mm: Sequence[float],
    ) -> npt.NDArray[np.floating[Any]]:
        """Channels (channel, slice, row, column) at that spacing; nnU-Net calls it by this name."""
        how = Interpolation.of(self._configuration.configuration, "data", spacing_mm, new_spacing_mm)
        if how is None:
            own: npt.NDArray[np.floating[Any]]
            own = self._configuration.resampling_fn_data(data, shape, spacing_mm, new_spacing_mm)
            return own
        try:
            return resampled(data, shape, how, self._device)
        except (MemoryError, RuntimeError) as exc:
            if self._device.type == "cpu" or not is_exhaustion(exc):
                raise
        release(self._device)
        return resampled(data, shape, how, torch.device("cpu"))


def at_once(shape: Size, classes: int) -> int:
    """How many slices of the result of so many classes fit into what a slab may take."""
    return max(1, _SLAB_BYTES // (8 * shape[1] * shape[2] * classes))


@lru_cache(maxsize=32)
def _matrix(count: int, wanted: int, order: int) -> torch.Tensor:
    """(wanted, count): what stands at each wanted place of each unit vector; not to be written into."""
    if count == wanted:
        return torch.eye(count, dtype=torch.float64)
    columns = [
        ndimage.zoom(unit, wanted / count, np.empty(wanted), order=order, mode="nearest", grid_mode=True)
        for unit in np.eye(count)
    ]
    return torch.from_numpy(np.stack(columns, axis=1))


def _nearest(count: int, wanted: int) -> torch.Tensor:
    """The slice that each wanted one is taken from, as scipy rounds it."""
    at = np.floor((np.arange(wanted) + 0.5) * (count / wanted) - 0.5 + 0.5).astype(np.int64)
    return torch.from_numpy(np.clip(at, 0, count - 1))
