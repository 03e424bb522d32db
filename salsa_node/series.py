"""A CT series on disk: put the slices in order, check the geometry, read the voxels.

Slices are sorted by their position along the normal of Image Orientation (Patient), never by
Instance Number, and spaced by their positions, never by Slice Thickness (PS3.3 C.7.6.2.1.1).
What is not one regular grid is rejected with the numbers found, never repaired.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import config as pydicom_config
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from salsa_node.errors import SeriesRejected
from salsa_node.uids import digest
from salsa_node.volume import CtVolume, Grid

# pydicom would quote odd values, patient names among them, in warnings on standard error.
pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE

MIN_SLICES = 3  #: two slices have a distance but no evidence that it is regular
PADDING_HU = -1024  #: what Pixel Padding Value becomes: air, as scanners write outside the circle they reconstruct
SAME_POSITION_MM = 0.01  #: slices nearer than this are one position twice; the thinnest CT steps are above 0.1 mm
SPACING_TOLERANCE_MM = 0.1  #: positions written with one decimal are off by 0.05 mm at either end of a step
SPACING_TOLERANCE = 0.02  #: or this share of the spacing; no volume changes by more
TILT_TOLERANCE_PIXELS = 0.1  #: sideways drift of any slice; a tenth of a pixel changes no voxel's place
DIRECTION_TOLERANCE = 1e-3  #: cosines written with four decimals
PIXEL_SPACING_TOLERANCE_MM = 1e-4  #: 0.05 mm over 512 pixels

#: What says whose an image is, and how a verdict calls several of it. An absent value and an empty one are the same.
WHOSE = {
    "PatientID": "patients",
    "StudyInstanceUID": "studies",
    "PatientName": "values of Patient's Name",
    "PatientBirthDate": "values of Patient's Birth Date",
    "AccessionNumber": "values of Accession Number",
    "SpecificCharacterSet": "values of Specific Character Set",
}

_TAGS = [
    *WHOSE,
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "ImageType",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "BitsAllocated",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
]
_ONE_SERIES = {**WHOSE, "SeriesInstanceUID": "series"}
_ONE_VOLUME = {"FrameOfReferenceUID": "frames of reference", "Rows": "row counts", "Columns": "column counts"}
_NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_PADDING = {"PixelPaddingValue": "Pixel Padding Value", "PixelPaddingRangeLimit": "Pixel Padding Range Limit"}
_COUNTS = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated")
UNREADABLE = (  #: what pydicom raises over damaged headers, as fuzzing found
    AttributeError,
    BytesLengthException,
    EOFError,
    InvalidDicomError,
    KeyError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    struct.error,
)
UNDECODABLE = (*UNREADABLE, IndexError, RuntimeError)  #: and its decoders over damaged pixels


@dataclass(frozen=True, slots=True)
class Instance:
    """One image of a series: its UID and where its file lies."""

    sop_instance_uid: str
    path: Path


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One CT series that is one regular volume.

    instances: in slice order, along the grid's slice axis.
    grid: its slice axis is the normal (row direction x column direction), so that an axial series of
        a supine patient runs from the feet to the head; frame_of_reference_uid is None where the
        images name none.
    """

    study_uid: str
    series_uid: str
    instances: tuple[Instance, ...]
    grid: Grid

    @property
    def source_digest(self) -> str:
        """SHA-256 of the SOP Instance UIDs in slice order."""
        return digest(*(instance.sop_instance_uid for instance in self.instances))


def inspect(paths: Iterable[Path]) -> Series:
    """The series that these files make; headers only are read.

    Raises SeriesRejected with what was found and expected.
    """
    files = tuple(paths)
    images = [_read_header(path, f"file {n} of {len(files)}") for n, path in enumerate(files, start=1)]
    _check_one_series(images)
    _check_kind(images)
    if len(images) < MIN_SLICES:
        raise SeriesRejected(f"{len(images)} slice(s); a volume needs at least {MIN_SLICES}")
    _check_present(images)
    _check_same(images, _ONE_VOLUME)
    row, column = _directions(images)
    spacing_mm = _pixel_spacing(images)
    normal = np.cross(row, column)
    positions = _numbers(images, "ImagePositionPatient")
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    step_mm = _check_regular(positions, normal, min(spacing_mm))

    affine = np.eye(4)
    affine[:3, 0] = normal * step_mm
    affine[:3, 1] = column * spacing_mm[0]
    affine[:3, 2] = row * spacing_mm[1]
    affine[:3, 3] = positions[0]
    first = images[0]
    return Series(
        study_uid=str(first.StudyInstanceUID),
        series_uid=str(first.SeriesInstanceUID),
        instances=tuple(Instance(str(images[n].SOPInstanceUID), files[n]) for n in order),
        grid=Grid((len(images), int(first.Rows), int(first.Columns)), affine, first.get("FrameOfReferenceUID") or None),
    )


def read_volume(series: Series) -> CtVolume:
    """The voxels of a series in Hounsfield units: stored value x slope + intercept, slice by slice.

    int16 where every value is a whole number that fits, float32 otherwise. Pixels that hold the
    Pixel Padding Value (or lie in the padding range) become PADDING_HU. MONOCHROME1 only tells a
    screen to invert and changes nothing here. Raises SeriesRejected where an image cannot be decoded.
    """
    total = len(series.instances)
    slices = [
        _read_slice(instance, f"image {n} of {total}", series.grid.shape[1:])
        for n, instance in enumerate(series.instances, start=1)
    ]
    whole = all(hu.dtype == np.int16 for hu in slices)
    return CtVolume(
        voxels_hu=np.stack(slices, dtype=np.int16) if whole else np.stack(slices, dtype=np.float32),
        grid=series.grid,
        slice_sop_uids=tuple(instance.sop_instance_uid for instance in series.instances),
    )


def headers(series: Series) -> list[pydicom.Dataset]:
    """The whole headers of a series without pixel data, in slice order."""
    return [pydicom.dcmread(instance.path, stop_before_pixels=True) for instance in series.instances]


def convert(ds: pydicom.Dataset) -> None:
    """Has pydicom convert every value read: it would do so when asked, and raise one of UNREADABLE only then."""
    for element in (*ds.file_meta, *ds):
        if element.keyword in _COUNTS:
            int(element.value or 0)
        elif element.VR == "PN":
            str(element.value)


def _read_header(path: Path, which: str) -> pydicom.Dataset:
    """The facts that `inspect` needs, after a look at whether pixel data follow and are all there."""
    try:
        with path.open("rb") as file:
            ds = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
            convert(ds)
            syntax = ds.file_meta.get("TransferSyntaxUID")
            missing = None if syntax == DeflatedExplicitVRLittleEndian else _what_is_missing(file, path, ds)
    except InvalidDicomError as exc:
        raise SeriesRejected(f"{which} is not a DICOM file") from exc
    except UNREADABLE as exc:
        raise SeriesRejected(
            f"{which} cannot be read as DICOM ({type(exc).__name__}): it is truncated or damaged"
        ) from exc
    for keyword, name in (("SOPInstanceUID", "SOP"), ("SeriesInstanceUID", "Series"), ("StudyInstanceUID", "Study")):
        if not ds.get(keyword):
            raise SeriesRejected(f"{which} has no {name} Instance UID")
    if missing:
        raise SeriesRejected(f"{which} {missing}")
    return ds


def _what_is_missing(file: BinaryIO, path: Path, ds: pydicom.Dataset) -> str | None:
    """`file` stands where the header ended: before Pixel Data (7FE0,0010), or at the end."""
    rest = path.stat().st_size - file.tell()
    if rest < 8:
        return "has no pixel data" if ds.get("Modality") == "CT" else None
    syntax = ds.file_meta.get("TransferSyntaxUID")
    if syntax not in _NATIVE or "Rows" not in ds:
        return None
    found = rest - (8 if syntax == ImplicitVRLittleEndian else 12)  # less the element's own tag, VR and length
    expected = int(ds.Rows) * int(ds.Columns) * int(ds.get("BitsAllocated", 16)) // 8
    return f"is truncated: {found} bytes of pixel data, expected {expected}" if found < expected else None


def _check_one_series(images: Sequence[pydicom.Dataset]) -> None:
    _check_same(images, _ONE_SERIES)
    unique = len({ds.SOPInstanceUID for ds in images})
    if unique < len(images):
        raise SeriesRejected(f"{len(images)} files carry {unique} SOP Instance UIDs; expected each image once")


def _check_same(images: Sequence[pydicom.Dataset], keywords: Mapping[str, str]) -> None:
    for keyword, plural in keywords.items():
        count = len({str(ds.get(keyword) or "") for ds in images})
        if count > 1:
            raise SeriesRejected(f"images of {count} {plural} in one series; expected one")


def _check_kind(images: Sequence[pydicom.Dataset]) -> None:
    """Every image is a single-frame CT image with one sample per pixel, and no localizer."""
    for ds in images:
        fault = _not_a_ct_slice(ds)
        if fault:
            count = sum(_not_a_ct_slice(other) == fault for other in images)
            raise SeriesRejected(f"{count} of {len(images)} image(s) {fault}")


def _not_a_ct_slice(ds: pydicom.Dataset) -> str | None:
    if ds.get("Modality") != "CT":
        return f"of modality {ds.get('Modality') or 'unknown'!s:.16}; expected CT"
    if int(ds.get("NumberOfFrames") or 1) > 1:
        return "with several frames (multi-frame), which is not supported; expected one image a slice"
    if ds.get("SOPClassUID") != CTImageStorage:
        return f"of SOP class {ds.get('SOPClassUID') or 'unknown'}, such as a screenshot; expected CT Image Storage"
    if "LOCALIZER" in (ds.get("ImageType") or ()):
        return "of Image Type LOCALIZER; expected slices of a volume"
    if int(ds.get("SamplesPerPixel") or 1) != 1:
        return "in colour; expected one sample per pixel"
    if str(ds.get("RescaleType") or "HU").strip().upper() not in {"HU", "US"}:
        return "whose Rescale Type is not HU: the values are no Hounsfield units"
    return None


def _check_present(images: Sequence[pydicom.Dataset]) -> None:
    needed = {
        "Rows": ("Rows", 1),
        "Columns": ("Columns", 1),
        "ImagePositionPatient": ("Image Position (Patient)", 3),
        "ImageOrientationPatient": ("Image Orientation (Patient)", 6),
        "PixelSpacing": ("Pixel Spacing", 2),
        "RescaleSlope": ("Rescale Slope", 1),
        "RescaleIntercept": ("Rescale Intercept", 1),
    }
    for keyword, (name, values) in needed.items():
        without = sum(keyword not in ds or values != ds[keyword].VM for ds in images)
        if without:
            raise SeriesRejected(f"{without} of {len(images)} images have no {name} of {values} value(s)")
    if images[0].Rows < 1 or images[0].Columns < 1:
        raise SeriesRejected(f"images of {images[0].Rows} rows and {images[0].Columns} columns; expected some of each")
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        _numbers(images, keyword)
    for keyword, name in _PADDING.items():
        several = sum(keyword in ds and ds[keyword].VM > 1 for ds in images)
        if several:
            raise SeriesRejected(f"{several} of {len(images)} images have a malformed {name}; expected one number")


def _numbers(images: Sequence[pydicom.Dataset], keyword: str) -> npt.NDArray[np.float64]:
    """(images, values) of an attribute that holds numbers."""
    try:
        values = [ds[keyword].value for ds in images]
        numbers = np.array(
            [[float(x) for x in (value if isinstance(value, MultiValue) else [value])] for value in values]
        )
    except (TypeError, ValueError):
        numbers = np.array([[np.nan]])
    if not np.isfinite(numbers).all():
        raise SeriesRejected(f"{keyword} holds a value that is not a finite number")
    return numbers


def _directions(images: Sequence[pydicom.Dataset]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Unit vectors along a row and down a column, of all images alike."""
    cosines = _numbers(images, "ImageOrientationPatient")
    apart = np.abs(cosines - cosines[0]).max()
    if not apart <= DIRECTION_TOLERANCE:
        raise SeriesRejected(
            f"images of different orientations in one series (direction cosines differ by {apart:.4f})"
        )
    row, column = cosines[0, :3], cosines[0, 3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not (np.abs(np.array(lengths) - 1) <= DIRECTION_TOLERANCE).all() or not abs(row @ column) <= DIRECTION_TOLERANCE:
        raise SeriesRejected("Image Orientation (Patient) is not two perpendicular unit vectors")
    row = row / lengths[0]
    column = column - (column @ row) * row
    return row, column / np.linalg.norm(column)


def _pixel_spacing(images: Sequence[pydicom.Dataset]) -> tuple[float, float]:
    """Distance between rows and between columns in mm, of all images alike."""
    spacings = _numbers(images, "PixelSpacing")
    apart = np.ptp(spacings, axis=0).max()
    if not apart <= PIXEL_SPACING_TOLERANCE_MM:
        raise SeriesRejected(f"images of different pixel spacings in one series (they differ by {apart:.4f} mm)")
    between_rows, between_columns = (float(x) for x in spacings[0])
    if between_rows <= 0 or between_columns <= 0:
        raise SeriesRejected(
            f"Pixel Spacing of {between_rows:g} and {between_columns:g} mm; expected two positive numbers"
        )
    return between_rows, between_columns


def _check_regular(positions: npt.NDArray[np.float64], normal: npt.NDArray[np.float64], pixel_mm: float) -> float:
    """The distance between slices, once they prove to stand behind each other at one distance."""
    along = positions @ normal
    steps = np.diff(along)
    doubled = int((steps < SAME_POSITION_MM).sum())
    if doubled == len(steps):
        raise SeriesRejected(f"all {len(positions)} slices lie at one position; expected one slice at each position")
    faults = []
    if doubled:
        faults.append(
            f"{doubled} of {len(positions)} slices lie where another one lies; expected one slice at each position"
        )
    sideways = (positions - positions[0]) - np.outer(along - along[0], normal)
    drift_mm = float(np.linalg.norm(sideways, axis=1).max())
    if drift_mm > TILT_TOLERANCE_PIXELS * pixel_mm:
        degrees = np.degrees(np.arctan2(np.linalg.norm(sideways[-1]), along[-1] - along[0]))
        faults.append(
            f"slices are sheared by {degrees:.1f} degrees (gantry tilt), {drift_mm:.1f} mm at most; expected none"
        )
    step_mm = float((along[-1] - along[0]) / len(steps))
    off_mm = np.abs(along - (along[0] + step_mm * np.arange(len(along)))).max()
    if off_mm > max(SPACING_TOLERANCE_MM, SPACING_TOLERANCE * step_mm) and not doubled:
        faults.append(_describe_steps(steps))
    if faults:
        raise SeriesRejected("; ".join(faults))
    return step_mm


def _describe_steps(steps: npt.NDArray[np.float64]) -> str:
    """What is wrong with these distances between slices: slices missing, or no regular spacing at all."""
    usual = float(np.median(steps))
    odd = np.flatnonzero(np.abs(steps - usual) > max(SPACING_TOLERANCE_MM, SPACING_TOLERANCE * usual))
    times = steps[odd] / usual
    if len(odd) and (times > 1.5).all() and (np.abs(times - np.rint(times)) < SPACING_TOLERANCE * times + 0.02).all():
        missing = int((np.rint(times) - 1).sum())
        widest = odd[np.argmax(times)]
        return (
            f"{missing} of {len(steps) + 1 + missing} slices missing: gap of {steps[widest]:.1f} mm "
            f"after slice {widest + 1}, spacing is {usual:.1f} mm"
        )
    return (
        f"irregular slice spacing: steps from {steps.min():.2f} to {steps.max():.2f} mm, median {usual:.2f} mm; "
        "expected one spacing"
    )


def _read_slice(
    instance: Instance, which: str, shape: tuple[int, ...]
) -> npt.NDArray[np.int16] | npt.NDArray[np.float32]:
    """(rows, columns) in Hounsfield units."""
    try:
        ds = pydicom.dcmread(instance.path)
        if "PixelData" not in ds:
            raise SeriesRejected(f"{which} has no pixel data")
        stored = ds.pixel_array
    except UNDECODABLE as exc:
        raise SeriesRejected(f"{which} cannot be decoded ({_syntax(instance.path)}, {type(exc).__name__})") from exc
    if stored.shape != shape:
        raise SeriesRejected(f"{which} decodes to {stored.shape} pixels, expected {shape}")
    slope, intercept = float(ds.RescaleSlope), float(ds.RescaleIntercept)
    if slope == 0:
        raise SeriesRejected(f"{which} has a Rescale Slope of 0; expected another number")
    hu = stored * slope + intercept
    padding = [
        _signed_like(ds, ds[k].value, f"{which} has a malformed {name}") for k, name in _PADDING.items() if k in ds
    ]
    if padding and None not in padding:
        numbers = [value for value in padding if value is not None]
        hu[(stored >= min(numbers)) & (stored <= max(numbers))] = PADDING_HU
    limits = np.iinfo(np.int16)
    whole = np.array_equal(hu, np.rint(hu)) and hu.min() >= limits.min and hu.max() <= limits.max
    return hu.astype(np.int16) if whole else hu.astype(np.float32)


def _signed_like(ds: pydicom.Dataset, value: object, malformed: str) -> int | None:
    """A padding value as the pixels hold it: some writers put the two's complement of a signed one in VR US."""
    if value is None:
        return None
    if not isinstance(value, int):
        raise SeriesRejected(f"{malformed}; expected one number")
    bits = int(ds.BitsAllocated)
    if ds.PixelRepresentation == 1 and value >= 1 << (bits - 1):
        return value - (1 << bits)
    return value


def _syntax(path: Path) -> str:
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
    except UNREADABLE:
        return "transfer syntax unknown"
    return f"transfer syntax {meta.get('TransferSyntaxUID', 'unknown')}"
