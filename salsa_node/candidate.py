"""What the headers of one series say about it, before anyone looks at its voxels.

Nothing here is trusted for geometry: `series.inspect` has the last word. Nothing of what a data set says in free
text comes out of here but what is recognised in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from itertools import pairwise
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Final

import pydicom
from pydicom.multival import MultiValue
from pydicom.uid import CTImageStorage, MediaStorageDirectoryStorage

from salsa_node import native_image
from salsa_node.contrast_phase import UNKNOWN_PHASE, ContrastPhase, PixelPhase
from salsa_node.contrast_phase import read as read_phase
from salsa_node.series import UNREADABLE, convert, multi_frame, named
from salsa_node.slice_geometry import MIN_SLICES, SAME_POSITION_MM


class Kernel(Enum):
    """What a reconstruction kernel is made for."""

    SOFT = "soft tissue"
    SHARP = "lung or bone"
    UNKNOWN = "unknown"


class BodyPart(Enum):
    """What Body Part Examined names."""

    ABDOMEN = "abdomen"
    NEAR = "chest or pelvis"
    ELSEWHERE = "another part of the body"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the headers of one series say about it.

    paths: its files, in the order given. image_types: every value of Image Type in the headers read.
    normal_lps: unit vector across the slices; None where an image has no orientation.
    slice_thickness_mm: as declared, for ties only; step_mm: the median distance between the slices' positions, and
        extent_mm: from the first to the last; None where the positions do not say.
    acquisition: equal for two series that are made of one acquisition, empty where the headers do not tell.
    gaps: how many steps between positions are wide enough for a missing slice.
    image_numbers: the Instance Numbers in rising order, where the headers have any.
    faults: header facts that rule the series out, in words.
    part: which stack it is of a series that holds several, as "1 of 2"; "" for a whole series.
    mixed: the images looked at lie in several directions, or are of several kinds.
    pixel_phase: what its pixels said when it was analysed; None where they have not been asked.
    """

    study_uid: str
    series_uid: str
    series_number: int | None
    paths: tuple[Path, ...]
    image_types: frozenset[str]
    normal_lps: tuple[float, float, float] | None
    slice_thickness_mm: float | None
    faults: tuple[str, ...]
    step_mm: float | None = None
    extent_mm: float | None = None
    kernel: Kernel = Kernel.UNKNOWN
    phase: ContrastPhase = UNKNOWN_PHASE
    body_part: BodyPart = BodyPart.UNKNOWN
    lossy: bool = False
    acquisition: tuple[str, ...] = ()
    gaps: int = 0
    image_numbers: tuple[int, ...] = ()
    part: str = ""
    mixed: bool = False
    pixel_phase: PixelPhase | None = None

    @property
    def name(self) -> str:
        """How messages call it: by its number where it has one."""
        stack = f", stack {self.part}" if self.part else ""
        return f"series {self.series_uid if self.series_number is None else self.series_number}{stack}"


_SORTED_BY: Final = ("StudyInstanceUID", "SeriesInstanceUID")
_TAGS: Final = [
    "SOPClassUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "Modality",
    "ImageType",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "SliceThickness",
    "NumberOfFrames",
    "ConvolutionKernel",
    "BodyPartExamined",
    "LossyImageCompression",
    "FrameOfReferenceUID",
    "AcquisitionNumber",
    "AcquisitionTime",
    "AcquisitionDate",
    "SeriesDescription",
    "ProtocolName",
    "ContrastBolusAgent",
    "ContrastBolusRoute",
    "ContrastBolusStartTime",
]
_WIDE: Final = 1.5  # times the usual step: room for another slice
_SHARP_WORDS: Final = {
    "LUNG",
    "LUNGE",
    "BONE",
    "BONEPLUS",
    "KNOCHEN",
    "EDGE",
    "DETAIL",
    "SHARP",
    "VSHARP",
    "POUMON",
    "OS",
}
_SOFT_WORDS: Final = {"STANDARD", "STND", "SOFT", "SMOOTH", "WEICHTEIL", "WEICHTEILE"}
_PHILIPS: Final = dict.fromkeys("ABC", Kernel.SOFT) | dict.fromkeys(
    ("D", "E", "L", "YA", "YB", "YC", "YD"), Kernel.SHARP
)
_CANON: Final = re.compile(r"FC(\d\d)")  # 01-19 body, 20-29 head, 30-39 bone, 50-59 and 80-89 lung
_SIEMENS: Final = re.compile(r"[A-Z]{1,2}(\d\d)")  # B30f, I40f, Br36, Bl57: the larger, the sharper
_SHARP_FROM: Final = 50
_ABDOMEN: Final = re.compile(r"ABD|LIVER|LEBER|TRUNK|WHOLEBODY|FOIE|HIGADO|CAP\b|TAP\b")
_NEAR: Final = re.compile(r"CHEST|THORAX|LUNG|PELVI|BECKEN")
_ELSEWHERE: Final = re.compile(
    r"HEAD|BRAIN|SKULL|NECK|SINUS|SPINE|JAW|ORBIT|EAR|KNEE|LEG|FOOT|ANKLE|ARM|HAND|WRIST|ELBOW|SHOULDER|HEART|CARDIAC"
    r"|CORONARY|HIP|EXTREMITY|KOPF|SCHAEDEL|SCHADEL|HALS"
)


def by_series(paths: Iterable[Path]) -> dict[tuple[str, str], tuple[Path, ...]]:
    """Files sorted into series by Study and Series Instance UID, series and files in order of appearance.

    By both, because a series that several studies share is as many: each patient gets a verdict of their own.
    Files that are not DICOM and directories of media (DICOMDIR) are left out; images that name no
    series are kept together under "", for a verdict of their own.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    for path in paths:
        try:
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_SORTED_BY))
            convert(ds)
        except UNREADABLE:
            continue
        if ds.file_meta.get("MediaStorageSOPClassUID") != MediaStorageDirectoryStorage:
            study_uid, series_uid = (str(ds.get(keyword) or "") for keyword in _SORTED_BY)
            found.setdefault((study_uid, series_uid), []).append(path)
    return {uids: tuple(files) for uids, files in found.items()}


def read_candidate(paths: Sequence[Path]) -> Candidate:
    """The facts of one series, from its first, middle and last file; the positions from all of them.

    `paths` must not be empty.
    """
    images = []
    faults = []
    for n in sorted({0, len(paths) // 2, len(paths) - 1}):
        try:
            images.append(_header(paths[n], _TAGS))
        except UNREADABLE:
            faults.append(f"{named(paths[n], n + 1, len(paths))} cannot be read as DICOM")
    faults += [fault for ds in images if (fault := _fault(ds))]
    if not faults and len(paths) < MIN_SLICES:
        faults.append(f"{len(paths)} image(s); a volume needs at least {MIN_SLICES}")
    first = images[0] if images else pydicom.Dataset()
    number, thickness = _number(first.get("SeriesNumber")), _number(first.get("SliceThickness"))
    normal = _normal(first)
    reach = _Reach() if faults or normal is None else _reach(paths, normal)
    phases = {read_phase(ds) for ds in images}
    return Candidate(
        study_uid=str(first.get("StudyInstanceUID", "")),
        series_uid=str(first.get("SeriesInstanceUID", "")),
        series_number=None if number is None else int(number),
        paths=tuple(paths),
        image_types=frozenset(word for ds in images for word in _words(ds, "ImageType")),
        normal_lps=normal,
        slice_thickness_mm=thickness,
        faults=tuple(dict.fromkeys(faults)),
        step_mm=reach.step_mm,
        extent_mm=reach.extent_mm,
        kernel=_kernel(first),
        phase=phases.pop() if len({phase.phase for phase in phases}) == 1 else UNKNOWN_PHASE,
        body_part=_body_part(first),
        lossy=any(str(ds.get("LossyImageCompression") or "") == "01" for ds in images),
        acquisition=_acquisition(images),
        gaps=reach.gaps,
        image_numbers=reach.image_numbers,
        mixed=len({(_fault(ds), *(round(x, 2) for x in _numbers(ds, "ImageOrientationPatient"))) for ds in images}) > 1,
    )


def _header(path: Path, tags: list[str]) -> pydicom.Dataset:
    ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
    convert(ds)
    return ds


@dataclass(frozen=True, slots=True)
class _Reach:
    """What all images of a series say together; fields as in `Candidate`."""

    step_mm: float | None = None
    extent_mm: float | None = None
    gaps: int = 0
    image_numbers: tuple[int, ...] = ()


def _reach(paths: Sequence[Path], normal: tuple[float, float, float]) -> _Reach:
    """Where all images lie along the normal, and how they are numbered."""
    along, numbers = [], []
    for path in paths:
        try:
            at, number = _place(path)
        except UNREADABLE:
            continue
        if number is not None:
            numbers.append(int(number))
        if len(at) == len(normal):
            along.append(sum(x * n for x, n in zip(at, normal, strict=True)))
    along.sort()
    numbers.sort()
    steps = [b - a for a, b in pairwise(along) if b - a >= SAME_POSITION_MM]
    if not steps:
        return _Reach(image_numbers=tuple(numbers))
    usual = median(steps)
    wide = sum(step > _WIDE * usual for step in steps)
    return _Reach(usual, along[-1] - along[0], wide, tuple(numbers))


def _place(path: Path) -> tuple[Sequence[float], float | None]:
    """Image Position (Patient) and Instance Number of one image. Raises one of UNREADABLE."""
    image = native_image.read_header(path)
    if image is not None:
        return image.position_lps_mm, image.number
    ds = _header(path, ["ImagePositionPatient", "InstanceNumber"])
    return _numbers(ds, "ImagePositionPatient"), _number(ds.get("InstanceNumber"))


def _fault(ds: pydicom.Dataset) -> str | None:
    """Why an image cannot be a slice of a CT volume."""
    if not ds.get("SeriesInstanceUID"):
        return "no Series Instance UID"
    if ds.get("Modality") != "CT":
        return f"modality {str(ds.get('Modality') or 'unknown')[:16]}, expected CT"
    if "LOCALIZER" in _words(ds, "ImageType"):
        return "Image Type LOCALIZER: no slices of a volume"
    if several := multi_frame(ds):
        return f"images {several}"
    if ds.get("SOPClassUID") != CTImageStorage:
        return f"SOP class {ds.get('SOPClassUID') or 'unknown'}, expected CT Image Storage"
    if _normal(ds) is None:
        return "no Image Orientation (Patient)"
    return None


def _kernel(ds: pydicom.Dataset) -> Kernel:
    """By the kernel's name as the vendors use them, else by what the series is called."""
    for name in _words(ds, "ConvolutionKernel"):
        words = set(re.split(r"[^A-Z]+", name))
        if words & _SHARP_WORDS:
            return Kernel.SHARP
        if words & _SOFT_WORDS:
            return Kernel.SOFT
        if name in _PHILIPS:
            return _PHILIPS[name]
        if canon := _CANON.match(name):
            return {0: Kernel.SOFT, 1: Kernel.SOFT, 3: Kernel.SHARP, 5: Kernel.SHARP, 8: Kernel.SHARP}.get(
                int(canon[1]) // 10, Kernel.UNKNOWN
            )
        if siemens := _SIEMENS.match(name):
            return Kernel.SHARP if int(siemens[1]) >= _SHARP_FROM else Kernel.SOFT
    called = set(re.split(r"[^A-Z]+", str(ds.get("SeriesDescription") or "").upper()))
    return Kernel.SHARP if called & (_SHARP_WORDS - {"OS", "DETAIL"}) else Kernel.UNKNOWN


def _body_part(ds: pydicom.Dataset) -> BodyPart:
    named = str(ds.get("BodyPartExamined") or "").upper()
    for pattern, part in (
        (_ABDOMEN, BodyPart.ABDOMEN),
        (_NEAR, BodyPart.NEAR),
        (_ELSEWHERE, BodyPart.ELSEWHERE),
    ):
        if pattern.search(named):
            return part
    return BodyPart.UNKNOWN


def _acquisition(images: Sequence[pydicom.Dataset]) -> tuple[str, ...]:
    """Frame of reference, number and first time of the acquisition that the images name; empty without a time."""
    times = sorted(str(ds.get("AcquisitionTime") or "") for ds in images)
    if not times or not times[0]:
        return ()
    first = images[0]
    return (
        *(str(first.get(k) or "") for k in ("FrameOfReferenceUID", "AcquisitionNumber", "AcquisitionDate")),
        times[0],
    )


def _number(value: object) -> float | None:
    """A number with which to reckon and to rank: "nan", which is none, would put other series out of order."""
    return float(value) if isinstance(value, int | float | Decimal) and isfinite(value) else None


def _words(ds: pydicom.Dataset, keyword: str) -> tuple[str, ...]:
    given = ds.get(keyword) or ()
    return tuple(str(word).strip().upper() for word in ((given,) if isinstance(given, str) else given))


def _numbers(ds: pydicom.Dataset, keyword: str) -> list[float]:
    given = ds.get(keyword)
    values = given if isinstance(given, MultiValue) else ()
    return [x for value in values if (x := _number(value)) is not None]


def _normal(ds: pydicom.Dataset) -> tuple[float, float, float] | None:
    cosines = _numbers(ds, "ImageOrientationPatient")
    if len(cosines) != 6:
        return None
    ax, ay, az, bx, by, bz = cosines
    x, y, z = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    length = (x * x + y * y + z * z) ** 0.5
    return (x / length, y / length, z / length) if length > 0.5 else None
