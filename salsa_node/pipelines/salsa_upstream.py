"""To 1 mm and back by MONAI itself, as SALSA goes: for the preset whose every voxel is upstream's.

Between voxels that lie equally near, MONAI's rounding errors choose; where a grid is turned against the patient's axes
its `compute_shape_offset` may lay the 1 mm grid up to half the difference of the two extents aside, which the way back
does not undo. Our own preset (`salsa_steps`) does neither, in a fraction of the time and the memory (MONAI makes the
place of every voxel as three float64 numbers). One thing is not followed: upstream takes the spacings of a file whose
axes are not in the order left-right, front-back, feet-head in the wrong order, and its lesions land elsewhere.
"""

from __future__ import annotations

import warnings
from typing import Any, Final

import nibabel
import numpy as np
import numpy.typing as npt
import torch
from nibabel.processing import resample_from_to

from salsa_node.volume import CtVolume, Grid, LabelVolume

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of decoders that nothing here needs
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import Orientation, Spacing

_LPS_TO_RAS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
_STORED: Final = [2, 1, 0, 3]  # columns of an affine: a file holds (column, row, slice)
_LETTERS: Final = (("L", "R"), ("P", "A"), ("I", "S"))


def resample_ct(ct: CtVolume) -> CtVolume:
    """The CT at 1 mm, turned to RAS, float32, linear between voxel centres."""
    voxels, grid = _at_1_mm(ct.voxels_hu, ct.grid, "bilinear")
    return CtVolume(voxels, grid)


def resample_labels(labels: LabelVolume) -> LabelVolume:
    """The labels at 1 mm, turned to RAS: each voxel takes the nearest one."""
    voxels, grid = _at_1_mm(labels.labels, labels.grid, "nearest")
    return LabelVolume(voxels.astype(np.uint8), grid)


def restore_labels(labels: LabelVolume, grid: Grid) -> LabelVolume:
    """Labels that `resample_labels` or `resample_ct` laid at 1 mm back on `grid`: each voxel takes the nearest one."""
    there = _ras(grid)
    turned = _turned(np.zeros(grid.shape, dtype=np.uint8), there)
    order = nibabel.orientations.io_orientation(there)[:, 0].argsort()  # type: ignore[no-untyped-call]
    spacing_mm = np.array(grid.spacing_mm)[::-1][order].astype(np.float32)  # as a header holds them
    between = _ras(labels.grid).astype(np.float32).astype(np.float64)  # upstream's goes through a file here
    coarse: Any = Spacing(spacing_mm, mode="nearest")(_turned(labels.labels, between))
    image = nibabel.Nifti1Image(_array(coarse).astype(np.uint8), turned.affine.numpy())  # type: ignore[no-untyped-call]
    # upstream asks for splines of order 3; the centres coincide, so that the nearest voxel is what they give
    back = resample_from_to(image, (grid.shape[::-1], there), order=0)  # type: ignore[no-untyped-call]
    return LabelVolume(np.ascontiguousarray(np.asarray(back.dataobj).T), grid)


def _at_1_mm(voxels: npt.NDArray[Any], grid: Grid, mode: str) -> tuple[npt.NDArray[np.float32], Grid]:
    fine: Any = Spacing((1.0, 1.0, 1.0), mode=mode)(_turned(voxels, _ras(grid)))
    found = np.ascontiguousarray(_array(fine).T)
    affine = _LPS_TO_RAS @ fine.affine.numpy()[:, _STORED]
    return found, Grid((found.shape[0], found.shape[1], found.shape[2]), affine, grid.frame_of_reference_uid)


def _turned(voxels: npt.NDArray[Any], ras: npt.NDArray[np.float64]) -> Any:  # MONAI's types promise a plain Tensor
    """(1, column, row, slice) float32, its axes growing to the right, the front and the head."""
    stored = torch.from_numpy(np.ascontiguousarray(voxels.T)).to(torch.float32)
    return Orientation("RAS", labels=_LETTERS)(MetaTensor(stored[None], affine=torch.from_numpy(ras)))


def _ras(grid: Grid) -> npt.NDArray[np.float64]:
    """The affine as a file of (column, row, slice) has it."""
    return _LPS_TO_RAS @ grid.affine_lps_mm[:, _STORED]


def _array(image: Any) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = image.as_tensor()[0].numpy()
    return found
