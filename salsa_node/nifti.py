"""NIfTI files <-> volumes: RAS becomes LPS, and (x, y, z) storage becomes (slice, row, column).

The slice axis is the stored axis that lies closest to the patient's z; of the other two, the later
stored one is the row axis. For the usual file (third axis towards the head) that is plain reversal:
k -> slice, j -> row, i -> column. No axis is flipped; the affine says where each voxel lies.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Image, Nifti1Pair
from nibabel.spatialimages import HeaderDataError

from salsa_node.damage import DAMAGED
from salsa_node.errors import SeriesRejected
from salsa_node.volume import Affine, CtVolume, Grid, LabelVolume

#: Begins the description of a label map that this package wrote: one without lesions is known for what it is.
LABEL_MAP = "salsa_node: 1 liver, n + 1 lesion n"
_DESCRIPTION_CHARS = 79  # the header's field holds 80 bytes
_MAX_SKEW_DEGREES = 0.5  # rounding in a header stays far below it; a tilted gantry is beyond

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNREADABLE = (*DAMAGED, HeaderDataError, ImageFileError)

Numbers = npt.NDArray[np.generic]


def read_ct(path: Path) -> CtVolume:
    """A CT in Hounsfield units: int16 where every value is a whole number that fits, float32 otherwise.

    Raises SeriesRejected where the file is no 3-D volume of finite numbers, does not say where it
    lies, lies on axes that are not perpendicular, or cannot be Hounsfield units: fat and air lie below
    zero, so that a scan without such a value has lost its intercept.
    """
    voxels, grid, stored = _read(path)
    skew = _skew_degrees(grid)
    if skew > _MAX_SKEW_DEGREES:
        raise SeriesRejected(
            f"axes {skew:.1f} degrees off the perpendicular; resample the scan to a regular grid first"
        )
    if voxels.min() >= 0:
        sign = "unsigned values" if np.issubdtype(stored, np.unsignedinteger) else "values"
        raise SeriesRejected(
            f"{sign} from {voxels.min():g} to {voxels.max():g}: no Hounsfield units, which reach below zero; "
            "write the scan again with its intercept (usually -1024) in scl_inter, or taken off its values"
        )
    limits = np.iinfo(np.int16)
    whole = voxels.min() >= limits.min and voxels.max() <= limits.max and _all_whole(voxels)
    if whole:
        return CtVolume(np.array(voxels, dtype=np.int16, order="C"), grid)
    return CtVolume(np.array(voxels, dtype=np.float32, order="C"), grid)


def read_labels(path: Path) -> LabelVolume:
    """A label map; labels written as floating-point whole numbers are taken as the integers they are.

    Raises SeriesRejected where the file is no 3-D volume, does not say where it lies, or holds
    anything but whole numbers from 0 to 65535.
    """
    voxels, grid, _ = _read(path)
    if not _all_whole(voxels) or voxels.min() < 0 or voxels.max() > np.iinfo(np.uint16).max:
        raise SeriesRejected(
            f"values from {voxels.min():g} to {voxels.max():g} are no label map; expected whole numbers from 0 to 65535"
        )
    dtype = np.uint8 if voxels.max() <= np.iinfo(np.uint8).max else np.uint16
    return LabelVolume(np.array(voxels, dtype=dtype, order="C"), grid)


def holds_bytes(path: Path) -> bool:
    """Whether voxels are single bytes as they are stored: labels, for no CT fits in. False for what is no NIfTI."""
    try:
        header = _load(path).header
        return np.dtype(header.get_data_dtype()).itemsize == 1  # type: ignore[no-untyped-call]
    except (*_UNREADABLE, SeriesRejected):
        return False


def read_description(path: Path) -> str:
    """What the header says of the file, such as LABEL_MAP; editors that keep it say so of a corrected copy too.

    Raises SeriesRejected where the file is no NIfTI.
    """
    try:
        image = _load(path)
        return bytes(image.header["descrip"]).rstrip(b"\0 ").decode("ascii", "replace")
    except _UNREADABLE as exc:
        raise _damaged(exc) from exc


def write_labels(labels: LabelVolume, path: Path, description: str = "", like: Path | None = None) -> None:
    """Writes a label map to `path` (.nii or .nii.gz), stored as (column, row, slice) with its affine in RAS.

    description: goes into the header. Raises ValueError where it is longer than 79 characters or not ASCII, and
        where the labels lie on tilted or unevenly spaced slices, which NIfTI cannot hold: see `upright`.
    like: the NIfTI that `labels.grid` was read from; the map is then stored in its order of axes, so that the
        two arrays lie voxel on voxel, and takes over what its header says of space. Raises SeriesRejected where
        that file lies on another grid.
    """
    if len(description) > _DESCRIPTION_CHARS or not description.isascii():
        raise ValueError(f"a description takes at most {_DESCRIPTION_CHARS} ASCII characters, found {description!r}")
    image = _image(labels.labels, labels.grid) if like is None else _image_like(labels, like)
    image.header["descrip"] = description.encode("ascii")
    nib.save(image, path)


def write_ct(ct: CtVolume, path: Path) -> None:
    """Writes CT numbers to `path` (.nii or .nii.gz), stored as (column, row, slice) with the affine in RAS.

    Raises ValueError where they lie on tilted or unevenly spaced slices, which NIfTI cannot hold: see `upright`.
    """
    nib.save(_image(ct.voxels_hu, ct.grid), path)


def _image(voxels: Numbers, grid: Grid) -> Nifti1Image:
    if grid.slice_offsets is not None or _skew_degrees(grid) > _MAX_SKEW_DEGREES:
        raise ValueError("NIfTI holds no tilted or unevenly spaced slices; put the volume on an upright grid first")
    affine = _RAS_TO_LPS @ grid.affine_lps_mm[:, [2, 1, 0, 3]]
    # nibabel types its modules but not these functions.
    image = Nifti1Image(voxels.transpose(2, 1, 0), affine)  # type: ignore[no-untyped-call]
    image.set_sform(affine, code=1)  # type: ignore[no-untyped-call]  # 1: scanner coordinates
    image.set_qform(affine, code=1)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    return image


def _skew_degrees(grid: Grid) -> float:
    """How far off the perpendicular the axes are."""
    directions = grid.affine_lps_mm[:3, :3] / np.array(grid.spacing_mm)
    return float(np.degrees(np.arcsin(min(1.0, np.abs(directions.T @ directions - np.eye(3)).max()))))


def _image_like(labels: LabelVolume, like: Path) -> Nifti1Image:
    source = _load(like)
    affine = np.asarray(source.affine, dtype=np.float64)
    stored = labels.labels.transpose(np.argsort(_slice_row_column(affine)))
    shape = tuple(source.shape[:3])
    if stored.shape != shape or not _grid_of(affine, shape).matches(labels.grid):
        raise SeriesRejected(f"the labels do not lie on the grid of the scan, which has {shape} voxels")
    image = Nifti1Image(stored, affine)  # type: ignore[no-untyped-call]
    for of in ("qform", "sform"):
        form, code = getattr(source, f"get_{of}")(coded=True)
        if code:
            getattr(image, f"set_{of}")(form, code=int(code))
        else:
            getattr(image, f"set_{of}")(None, code=0)
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    return image


def _read(path: Path) -> tuple[Numbers, Grid, np.dtype[np.generic]]:
    """Scaled voxels as (slice, row, column), their grid, and the number type they were stored in."""
    try:
        image = _load(path)
        header = image.header
        stored = np.dtype(header.get_data_dtype())  # type: ignore[no-untyped-call]
        if stored.kind not in "iuf":
            raise SeriesRejected(f"voxels of type {stored}; expected one real number each")
        if header["qform_code"] == 0 and header["sform_code"] == 0:
            raise SeriesRejected("the file does not say where it lies: neither qform nor sform is set")
        unit = header.get_xyzt_units()[0]  # type: ignore[no-untyped-call]
        if unit not in {"mm", "unknown"}:
            raise SeriesRejected(f"lengths in {unit}; expected mm")
        affine = np.asarray(image.affine, dtype=np.float64)
        voxels: Numbers = np.asanyarray(image.dataobj)
    except _UNREADABLE as exc:
        raise _damaged(exc) from exc
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or 0 in voxels.shape:
        raise SeriesRejected(f"an image of shape {voxels.shape}; expected three dimensions")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise SeriesRejected("the affine is not finite or does not span space")
    odd = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
    if odd:
        raise SeriesRejected(
            f"{odd} of {voxels.size} voxels are not finite numbers; give them a value, such as -1024 HU for what was "
            "not scanned"
        )
    return voxels.transpose(_slice_row_column(affine)), _grid_of(affine, voxels.shape), stored


def _grid_of(affine: Affine, shape: Sequence[int]) -> Grid:
    """Where (slice, row, column) lie of an array of `shape` as it is stored; affine: the file's own, in RAS."""
    order = _slice_row_column(affine)
    return Grid((shape[order[0]], shape[order[1]], shape[order[2]]), _RAS_TO_LPS @ affine[:, [*order, 3]])


def _load(path: Path) -> Nifti1Pair:
    if path.exists() and not os.access(path, os.R_OK):
        raise SeriesRejected("this user may not read the file")
    image = nib.load(path)
    if not isinstance(image, Nifti1Pair):
        raise SeriesRejected(f"a {type(image).__name__} file; expected NIfTI (.nii or .nii.gz)")
    return image


def _damaged(found: Exception) -> SeriesRejected:
    if isinstance(found, FileNotFoundError):
        return SeriesRejected("there is no such file; expected a NIfTI file (.nii or .nii.gz)")
    return SeriesRejected(f"the file cannot be read as NIfTI ({type(found).__name__}): truncated or damaged")


def _slice_row_column(affine: Affine) -> tuple[int, int, int]:
    """The stored axes that become slice, row and column."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    slice_axis = int(np.argmax(np.abs(directions[2])))
    column, row = (axis for axis in range(3) if axis != slice_axis)
    return slice_axis, row, column


def _all_whole(voxels: Numbers) -> bool:
    return not np.issubdtype(voxels.dtype, np.floating) or bool((voxels == np.rint(voxels)).all())
