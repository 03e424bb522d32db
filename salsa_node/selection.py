"""Which series of a study to analyse: every series gets a verdict with its reason, one is chosen.

A series can be analysed if it consists of axial CT images, enough of them for a volume. Of those,
original images go before secondary ones (reformats, copies), then the most slices, then the
thinnest, then the lowest series number. Only a few headers of a series are read: `series.inspect`
has the last word on its geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from math import cos, inf, radians
from pathlib import Path

import pydicom
from pydicom.uid import CTImageStorage, MediaStorageDirectoryStorage

from salsa_node.errors import SeriesRejected
from salsa_node.series import MIN_SLICES, UNREADABLE, Series, convert, inspect

MAX_TILT_DEGREES = 30.0  #: between the slices' normal and the patient's z; beyond, an in-plane diameter is not axial
_SCREENS = {"LOCALIZER", "SCREEN SAVE", "DOSEINFO", "DOSE_INFO", "SCREENSHOT", "PERFUSION", "MIP"}
_TAGS = [
    "SOPClassUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "Modality",
    "ImageType",
    "ImageOrientationPatient",
    "SliceThickness",
    "NumberOfFrames",
]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a few headers of one series say about it.

    paths: its files, in the order given. image_types: every value of Image Type in the headers read.
    normal_lps: unit vector across the slices; None where an image has no orientation.
    slice_thickness_mm: as declared, for preference only; geometry never relies on it.
    faults: header facts that rule the series out, in words.
    """

    study_uid: str
    series_uid: str
    series_number: int | None
    paths: tuple[Path, ...]
    image_types: frozenset[str]
    normal_lps: tuple[float, float, float] | None
    slice_thickness_mm: float | None
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a series was chosen, passed over or ruled out.

    accepted: it could be analysed, whether or not it was the one chosen.
    """

    series_uid: str
    accepted: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The series to analyse, or None, and a verdict on each candidate, in the order given."""

    chosen: Candidate | None
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class VolumeChoice:
    """The series to analyse and its geometry, or why there is none.

    chosen: the best candidate that is one volume, with its `series`; both None where none is.
    best_refused: the best candidate whose headers were fit but whose files are no volume, for a report
        that says so; None where every one that was looked at is a volume.
    verdicts: one on each candidate, in the order given.
    """

    chosen: Candidate | None
    series: Series | None
    best_refused: Candidate | None
    verdicts: tuple[Verdict, ...]


def by_series(paths: Iterable[Path]) -> dict[str, tuple[Path, ...]]:
    """Files sorted into series by their Series Instance UID, series and files in order of appearance.

    Files that are not DICOM and directories of media (DICOMDIR) are left out; images that name no
    series are kept together under "", for a verdict of their own.
    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        try:
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
            convert(ds)
        except UNREADABLE:
            continue
        if ds.file_meta.get("MediaStorageSOPClassUID") != MediaStorageDirectoryStorage:
            found.setdefault(str(ds.get("SeriesInstanceUID") or ""), []).append(path)
    return {uid: tuple(files) for uid, files in found.items()}


def read_candidate(paths: Sequence[Path]) -> Candidate:
    """The facts of one series, from its first, middle and last file. `paths` must not be empty."""
    sample = sorted({0, len(paths) // 2, len(paths) - 1})
    images = []
    faults = []
    for n in sample:
        try:
            ds = pydicom.dcmread(paths[n], stop_before_pixels=True, specific_tags=_TAGS)
            convert(ds)
            images.append(ds)
        except UNREADABLE:
            faults.append(f"file {n + 1} of {len(paths)} cannot be read as DICOM")
    faults += [fault for ds in images if (fault := _fault(ds))]
    if not faults and len(paths) < MIN_SLICES:
        faults.append(f"{len(paths)} image(s); a volume needs at least {MIN_SLICES}")
    first = images[0] if images else pydicom.Dataset()
    number, thickness = _number(first.get("SeriesNumber")), _number(first.get("SliceThickness"))
    return Candidate(
        study_uid=str(first.get("StudyInstanceUID", "")),
        series_uid=str(first.get("SeriesInstanceUID", "")),
        series_number=None if number is None else int(number),
        paths=tuple(paths),
        image_types=frozenset(word for ds in images for word in _image_type(ds)),
        normal_lps=_normal(first),
        slice_thickness_mm=thickness,
        faults=tuple(dict.fromkeys(faults)),
    )


def choose(candidates: Sequence[Candidate]) -> Choice:
    """One series of those that can be analysed, and the reason for each verdict."""
    usable = sorted((c for c in candidates if not c.faults), key=_preference)
    chosen = usable[0] if usable else None
    verdicts = tuple(Verdict(c.series_uid, not c.faults, _reason(c, chosen)) for c in candidates)
    return Choice(chosen, verdicts)


def choose_volume(
    candidates: Sequence[Candidate], look: Callable[[tuple[Path, ...]], Series] = inspect
) -> VolumeChoice:
    """The best series that `look` accepts; those it refuses are ruled out for its reason, one after the other.

    look: gives the series that these files make, or raises SeriesRejected.
    """
    told = list(candidates)
    best_refused: Candidate | None = None
    while (choice := choose(told)).chosen is not None:
        chosen = choice.chosen
        try:
            series = look(chosen.paths)
        except SeriesRejected as verdict:
            best_refused = best_refused or chosen
            told[told.index(chosen)] = replace(chosen, faults=(verdict.reason,))
        else:
            return VolumeChoice(chosen, series, best_refused, choice.verdicts)
    return VolumeChoice(None, None, best_refused, choice.verdicts)


def _preference(candidate: Candidate) -> tuple[bool, int, float, float, str]:
    """Sorts the better series first."""
    return (
        "SECONDARY" in candidate.image_types,
        -len(candidate.paths),
        inf if candidate.slice_thickness_mm is None else candidate.slice_thickness_mm,
        inf if candidate.series_number is None else candidate.series_number,
        candidate.series_uid,
    )


def _reason(candidate: Candidate, chosen: Candidate | None) -> str:
    if candidate.faults:
        return "; ".join(candidate.faults)
    kind = "secondary" if "SECONDARY" in candidate.image_types else "original"
    thickness = "" if candidate.slice_thickness_mm is None else f" of {candidate.slice_thickness_mm:g} mm"
    facts = f"axial CT, {kind}, {len(candidate.paths)} slices{thickness}"
    return f"chosen: {facts}" if candidate is chosen else f"passed over for a series that ranks higher: {facts}"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float | Decimal) else None


def _fault(ds: pydicom.Dataset) -> str | None:
    """Why an image cannot be a slice of an axial CT volume."""
    if not ds.get("SeriesInstanceUID"):
        return "no Series Instance UID"
    if ds.get("Modality") != "CT":
        return f"modality {str(ds.get('Modality') or 'unknown')[:16]}, expected CT"
    screens = _SCREENS & set(_image_type(ds))
    if screens:
        return f"Image Type {', '.join(sorted(screens))}: no slices of a volume"
    if (_number(ds.get("NumberOfFrames")) or 1) > 1:
        return "multi-frame images, which are not supported"
    if ds.get("SOPClassUID") != CTImageStorage:
        return f"SOP class {ds.get('SOPClassUID') or 'unknown'}, expected CT Image Storage"
    normal = _normal(ds)
    if normal is None:
        return "no Image Orientation (Patient)"
    if abs(normal[2]) < cos(radians(MAX_TILT_DEGREES)):
        return f"not axial: the slices' normal is more than {MAX_TILT_DEGREES:g} degrees from the patient's z axis"
    return None


def _image_type(ds: pydicom.Dataset) -> tuple[str, ...]:
    given = ds.get("ImageType") or ()
    return (given,) if isinstance(given, str) else tuple(given)


def _normal(ds: pydicom.Dataset) -> tuple[float, float, float] | None:
    cosines = [x for value in ds.get("ImageOrientationPatient") or () if (x := _number(value)) is not None]
    if len(cosines) != 6:
        return None
    ax, ay, az, bx, by, bz = cosines
    x, y, z = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    length = (x * x + y * y + z * z) ** 0.5
    return (x / length, y / length, z / length) if length > 0.5 else None
