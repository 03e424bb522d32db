"""A CT series on disk: put the slices in order, check the geometry, read the voxels.

What is not one regular grid is rejected with the numbers found, unless the rules let it pass, and never repaired.
Plain headers and uncompressed pixels are read by `native_image`, losslessly compressed ones by `pixel_decoding`, all
others by pydicom; all give the same voxels, and every verdict is pydicom's.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
)

from salsa_node import native_image, slice_geometry
from salsa_node.damage import DAMAGED
from salsa_node.errors import SeriesRejected
from salsa_node.native_image import PADDING_HU, NativePixels
from salsa_node.pixel_decoding import stored_values
from salsa_node.processors import cores
from salsa_node.series_rules import SeriesRules
from salsa_node.slice_geometry import Stack
from salsa_node.uids import digest
from salsa_node.volume import CtVolume, Grid

# pydicom would quote odd values, patient names among them, in warnings on standard error.
pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE

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
    "InstanceNumber",
    "AcquisitionNumber",
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
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_MULTI_FRAME: Mapping[str, str] = {
    EnhancedCTImageStorage: "Enhanced CT, multi-frame",
    LegacyConvertedEnhancedCTImageStorage: "Legacy Converted Enhanced CT, multi-frame",
}
_UPPER_HALF = 0.1  # of the pixels: metal fills less, air in two's complement more
_READERS = 2  # threads; copying from the page cache keeps two busy, and hardly more
_DECODERS = 8  # threads at most; more would wait for the one that puts the slices together
_PADDING = {"PixelPaddingValue": "Pixel Padding Value", "PixelPaddingRangeLimit": "Pixel Padding Range Limit"}
_COUNTS = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated")
_SHORT = (np.int16, np.uint16)
_Plane = npt.NDArray[np.int16] | npt.NDArray[np.float32]
UNREADABLE = (*DAMAGED, BytesLengthException, InvalidDicomError)  #: what pydicom raises over damaged headers
UNDECODABLE = (*UNREADABLE, RuntimeError)  #: and its decoders over damaged pixels


@dataclass(frozen=True, slots=True)
class Instance:
    """One image of a series: its UID, where its file lies, and where in it the pixels are, if they are uncompressed."""

    sop_instance_uid: str
    path: Path
    native: NativePixels | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One CT series that is one volume.

    instances: in slice order, along the grid's slice axis.
    grid: as the slices lie, see `slice_geometry.Stack`: not upright only where the rules let such a series pass.
        frame_of_reference_uid is None where the images name none.
    """

    study_uid: str
    series_uid: str
    instances: tuple[Instance, ...]
    grid: Grid

    @property
    def source_digest(self) -> str:
        """SHA-256 of the SOP Instance UIDs in slice order."""
        return digest(*(instance.sop_instance_uid for instance in self.instances))


def inspect(paths: Iterable[Path], rules: SeriesRules = slice_geometry.STRICT) -> Series:
    """The series that these files make; headers only are read.

    Raises SeriesRejected with what was found and expected.
    """
    files = tuple(paths)
    return _native_series(files, rules) or _series(files, rules)


def read_volume(series: Series) -> CtVolume:
    """The voxels of a series in Hounsfield units: stored value x slope + intercept, slice by slice.

    int16 where every value is a whole number, float32 otherwise. Pixels that hold the Pixel Padding Value
    (or lie in the padding range) become PADDING_HU. MONOCHROME1 only tells a screen to invert and changes
    nothing here. Raises SeriesRejected where an image cannot be decoded, or holds what is no CT number.
    """
    whole = np.empty(series.grid.shape, dtype=np.int16)
    voxels: npt.NDArray[np.int16] | npt.NDArray[np.float32] = whole
    for n, hu in _decoded(series, _left_by_native(series, whole)):
        if hu.dtype == np.float32 and voxels is whole:
            voxels = whole.astype(np.float32)
        voxels[n] = hu
    return CtVolume(voxels, series.grid, tuple(instance.sop_instance_uid for instance in series.instances))


def _left_by_native(series: Series, voxels: npt.NDArray[np.int16]) -> list[int]:
    """Fill in what is plainly uncompressed; which slices remain."""

    def share(first: int) -> list[int]:
        mine = range(first, len(series.instances), _READERS)
        return [n for n in mine if not _filled(series.instances[n], voxels[n])]

    with ThreadPoolExecutor(_READERS) as pool:
        return sorted(n for left in pool.map(share, range(_READERS)) for n in left)


def _decoded(series: Series, slices: Sequence[int]) -> Iterator[tuple[int, _Plane]]:
    """Each of these slices, in that order, while a few behind it are decoded; the first bad one raises."""
    threads = min(_DECODERS, cores(), max(1, len(slices)))
    coming: deque[tuple[int, Future[_Plane]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for n in slices:
                place = f"slice {n + 1} of {len(series.instances)}"
                coming.append((n, pool.submit(_read_slice, series.instances[n], place, series.grid.shape[1:])))
                if len(coming) > threads + 1:
                    ready, plane = coming.popleft()
                    yield ready, plane.result()
            while coming:
                ready, plane = coming.popleft()
                yield ready, plane.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _filled(instance: Instance, plane_hu: npt.NDArray[np.int16]) -> bool:
    try:
        return instance.native is not None and instance.native.read_into(instance.path, plane_hu)
    except OSError:
        return False


def headers(series: Series) -> list[pydicom.Dataset]:
    """The whole headers of a series without pixel data, in slice order."""
    return [pydicom.dcmread(instance.path, stop_before_pixels=True) for instance in series.instances]


def image_numbers(images: Sequence[pydicom.Dataset]) -> tuple[int, ...]:
    """The Instance Number of each, by which a PACS shows it; empty where they do not tell all images apart.

    They say nothing about the order of slices.
    """
    found = [str(image.get("InstanceNumber") or "").strip() for image in images]
    numbers = tuple(int(text) for text in found if re.fullmatch(r"[+-]?[0-9]{1,12}", text))
    return numbers if len(set(numbers)) == len(images) else ()


def _native_series(files: Sequence[Path], rules: SeriesRules) -> Series | None:
    """The series where every file is plainly in order; None where pydicom has to look, whose verdict is final."""
    images = [image for path in files if (image := native_image.read_header(path)) is not None]
    one = len(images) == len(files) and len({(image.alike, image.shape) for image in images}) == 1
    if not one or len({image.sop_instance_uid for image in images}) < len(images):
        return None
    try:
        first = _read_header(files[0], "")
        positions, cosines, spacings = (
            np.array([getattr(i, k) for i in images]) for k in ("position_lps_mm", "cosines", "spacing_mm")
        )
        stack = slice_geometry.stack(positions, cosines, spacings, rules=rules)
    except SeriesRejected:
        return None
    instances = [Instance(images[n].sop_instance_uid, files[n], images[n].pixels) for n in stack.order]
    return _made(first, instances, stack)


def _series(files: Sequence[Path], rules: SeriesRules) -> Series:
    images = [_read_header(path, named(path, n, len(files))) for n, path in enumerate(files, start=1)]
    _check_one_series(images)
    _check_kind(images)
    slice_geometry.check_count(len(images))
    _check_present(images)
    _check_same(images, _ONE_VOLUME)
    positions, cosines, spacings = (
        _numbers(images, k) for k in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    )
    acquired = tuple(_whole_number(ds, "AcquisitionNumber") for ds in images)
    stack = slice_geometry.stack(positions, cosines, spacings, image_numbers(images), rules, acquired)
    return _made(images[0], [Instance(str(images[n].SOPInstanceUID), files[n]) for n in stack.order], stack)


def named(path: Path, n: int, of: int) -> str:
    """How a verdict calls a file that cannot be read: as this node names it, else by its place among those given."""
    uid = path.stem if _UID.fullmatch(path.stem) else ""
    return f"the file of SOP Instance UID {uid} (one of {of})" if uid else f"file {n} of {of}"


def _numbered(ds: pydicom.Dataset) -> str:
    number = _whole_number(ds, "InstanceNumber")
    return f"the image with Instance Number {number}" if number else ""


def _whole_number(ds: pydicom.Dataset, keyword: str) -> str:
    """As it is written; "" where it is no number that a verdict may repeat."""
    text = str(ds.get(keyword) or "").strip()
    return text if re.fullmatch(r"[0-9]{1,12}", text) else ""


def multi_frame(ds: pydicom.Dataset) -> str:
    """What is wrong with an image of several frames, or of a class for such, and what to do; "" for any other."""
    frames = int(ds.get("NumberOfFrames") or 1)
    kind = _MULTI_FRAME.get(str(ds.get("SOPClassUID") or ""), "")
    if frames <= 1 and not kind:
        return ""
    return (
        f"of {frames} frame(s) ({kind or 'multi-frame'}), which are not analysed; expected one image a slice, of "
        "CT Image Storage: have the scanner or the PACS send the series as single-frame CT"
    )


def _made(first: pydicom.Dataset, instances: Sequence[Instance], stack: Stack) -> Series:
    shape = (len(instances), int(first.Rows), int(first.Columns))
    return Series(
        study_uid=str(first.StudyInstanceUID),
        series_uid=str(first.SeriesInstanceUID),
        instances=tuple(instances),
        grid=Grid(shape, stack.affine_lps_mm, first.get("FrameOfReferenceUID") or None, stack.slice_offsets),
    )


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
    which = _numbered(ds) or which
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
    if several := multi_frame(ds):
        return several
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


def _read_slice(instance: Instance, place: str, shape: tuple[int, ...]) -> _Plane:
    """(rows, columns) in Hounsfield units; place: which slice it is."""
    which = f"the image of SOP Instance UID {instance.sop_instance_uid} ({place})"
    try:
        ds = pydicom.dcmread(instance.path)
        which = f"{_numbered(ds)} ({place})" if _numbered(ds) else which
        if "PixelData" not in ds:
            raise SeriesRejected(f"{which} has no pixel data")
        stored = stored_values(ds)
    except UNDECODABLE as exc:
        raise SeriesRejected(f"{which} cannot be decoded ({_syntax(instance.path)}, {type(exc).__name__})") from exc
    if stored.shape != shape:
        raise SeriesRejected(f"{which} decodes to {stored.shape} pixels, expected {shape}")
    slope, intercept = float(ds.RescaleSlope), float(ds.RescaleIntercept)
    if slope == 0:
        raise SeriesRejected(f"{which} has a Rescale Slope of 0; expected another number")
    whole = slope == 1 and intercept.is_integer() and abs(intercept) <= 1 << 20 and stored.dtype in _SHORT
    hu = stored.astype(np.int32) + np.int32(intercept) if whole else stored * slope + intercept
    padding = [
        _signed_like(ds, ds[k].value, f"{which} has a malformed {name}") for k, name in _PADDING.items() if k in ds
    ]
    if padding and None not in padding:
        numbers = [value for value in padding if value is not None]
        hu[(stored >= min(numbers)) & (stored <= max(numbers))] = PADDING_HU
    limits = np.iinfo(np.int16)
    if hu.min() < limits.min or hu.max() > limits.max:
        beyond = int(((hu < limits.min) | (hu > limits.max)).sum())
        kind = "signed" if ds.PixelRepresentation else "unsigned"
        raise SeriesRejected(
            f"{which} holds {beyond} pixels beyond 16 bits, from {hu.min():.0f} to {hu.max():.0f} HU, which is no CT; "
            f"its pixels are declared {kind} (Pixel Representation {ds.PixelRepresentation}): declared wrongly?"
        )
    if ds.PixelRepresentation == 0 and intercept >= 0:
        share = float((hu >= slope * (1 << (ds.BitsStored - 1)) + intercept).mean())
        if share > _UPPER_HALF:
            raise SeriesRejected(
                f"{which} has {share:.0%} of its pixels in the upper half of {ds.BitsStored} bits and can have none "
                "below 0 HU: its pixels are declared unsigned (Pixel Representation 0), and seem to be signed"
            )
    return hu.astype(np.int16) if whole or np.array_equal(hu, np.rint(hu)) else hu.astype(np.float32)


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
