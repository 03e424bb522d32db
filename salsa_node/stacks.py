"""Several stacks of slices in one series: its files sorted apart where their headers say what belongs together.

Images of another orientation, size or frame of reference are another stack. Of those that are alike, an attribute
tells stacks apart only where each of them is then a volume over the same part of the body, or with a step of its own:
a stack with a hole in it is never taken for two.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.multival import MultiValue

from salsa_node.candidate import Candidate, read_candidate
from salsa_node.errors import SeriesRejected
from salsa_node.series import UNREADABLE, WHOSE, convert, inspect
from salsa_node.series_rules import SeriesRules
from salsa_node.slice_geometry import DIRECTION_TOLERANCE, MIN_SLICES, SAME_POSITION_MM, SPACING_TOLERANCE, STRICT

_ALIKE: Final = ("Modality", "SOPClassUID", "Rows", "Columns", "FrameOfReferenceUID", "NumberOfFrames")
_TELLING: Final = (  # in this order, one of them
    "AcquisitionNumber",
    "TemporalPositionIndex",
    "TemporalPositionIdentifier",
    "AcquisitionDateTime",
    "AcquisitionTime",
    "ImageType",
    "ConvolutionKernel",
    "KVP",
    "SliceThickness",
    "ContentTime",
)
_TIMES: Final = ("AcquisitionDateTime", "AcquisitionTime", "ContentTime")
_PLACE: Final = ("ImagePositionPatient", "ImageOrientationPatient")
_ONE: Final = (*WHOSE, "SeriesInstanceUID")
_TAGS: Final = [
    *(*_ONE, *_ALIKE, *_TELLING, *_PLACE),
    *("PixelSpacing", "AcquisitionDate", "InstanceNumber", "SOPInstanceUID"),
]
_SAME_REGION: Final = 0.5  # of the shorter stack's length


@dataclass(frozen=True, slots=True, eq=False)
class _Image:
    """One file and what its header says."""

    path: Path
    header: pydicom.Dataset
    cosines: tuple[float, ...]
    position_lps_mm: tuple[float, ...]

    def said(self, keyword: str) -> str:
        value = self.header.get(keyword)
        return "" if value is None else str(value)


_Images = Sequence[_Image]


def apart(candidate: Candidate, rules: SeriesRules = STRICT) -> tuple[Candidate, ...]:
    """The stacks that a series holds, each a candidate of its own, named in `part`; () where headers tell of no two.

    A stack that is no volume is among them; at least one other is.
    """
    images = _read(candidate.paths)
    parts = [part for alike in _sorted_by(images, _kinds(images)) for part in _told_apart(alike, rules)]
    if len(parts) < 2 or not any(_is_volume(part, rules) for part in parts):
        return ()
    parts.sort(key=_first)
    return tuple(
        replace(read_candidate([image.path for image in part]), part=f"{n} of {len(parts)}")
        for n, part in enumerate(parts, start=1)
    )


def _read(paths: Iterable[Path]) -> _Images:
    """The images with their headers; none where one cannot be read, or they are not all of one patient and series."""
    images = []
    for path in paths:
        try:
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
            convert(ds)
            position, cosines = (_numbers(ds, keyword) for keyword in _PLACE)
        except UNREADABLE:
            return ()
        images.append(_Image(path, ds, cosines, position))
    whose = {tuple(str(image.header.get(keyword) or "") for keyword in _ONE) for image in images}
    names = {image.said("SOPInstanceUID") for image in images}
    return images if len(whose) == 1 and len(names) == len(images) else ()


def _numbers(ds: pydicom.Dataset, keyword: str) -> tuple[float, ...]:
    value = ds.get(keyword)
    return tuple(float(x) for x in value) if isinstance(value, MultiValue) else ()


def _kinds(images: _Images) -> list[Hashable]:
    """Of each image what must be the same throughout a volume."""
    ways: list[npt.NDArray[np.float64]] = []
    kinds: list[Hashable] = []
    for image in images:
        way = np.array(image.cosines)
        same = (n for n, w in enumerate(ways) if w.shape == way.shape and _near(w, way))
        number = next(same, len(ways))
        if number == len(ways):
            ways.append(way)
        localizer = "LOCALIZER" in image.said("ImageType").upper()
        pixels = tuple(round(x, 3) for x in _numbers(image.header, "PixelSpacing"))
        kinds.append((number, localizer, pixels, *(image.said(keyword) for keyword in _ALIKE)))
    return kinds


def _near(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> bool:
    return bool(np.abs(one - other).max(initial=0.0) <= DIRECTION_TOLERANCE)


def _sorted_by(images: _Images, keys: Sequence[Hashable]) -> list[_Images]:
    groups: dict[Hashable, list[_Image]] = {}
    for image, key in zip(images, keys, strict=True):
        groups.setdefault(key, []).append(image)
    return list(groups.values())


def _told_apart(images: _Images, rules: SeriesRules) -> list[_Images]:
    """The stacks of images that are alike; these images where nothing tells them apart."""
    if len(images) < 2 * MIN_SLICES or _is_volume(images, rules):
        return [images]
    ways: list[Callable[[_Images], list[_Images]]] = [partial(_by, keyword=keyword) for keyword in _TELLING]
    tries = [parts for way in (*ways, _by_visits) if _are_several(parts := way(images))]
    whole = [parts for parts in tries if all(_is_volume(part, rules) for part in parts)]
    some = [parts for parts in tries if any(_is_volume(part, rules) for part in parts)]
    return [*whole, *some, [images]][0]


def _by(images: _Images, keyword: str) -> list[_Images]:
    return _sorted_by(images, [image.said(keyword) for image in images])


def _by_visits(images: _Images) -> list[_Images]:
    """By how often their place was visited before, where one round of the scanner ended before the next began."""
    for keyword in _TIMES:
        times = [image.said("AcquisitionDate") + image.said(keyword) for image in images]
        if not all(image.said(keyword) for image in images):
            continue
        order = sorted(range(len(images)), key=lambda n: times[n])
        visits: dict[int, int] = {}
        rounds: dict[int, list[int]] = {}
        along = np.round(_along(images) / SAME_POSITION_MM / 2).astype(int)
        for n in order:
            visit = visits[along[n]] = visits.get(along[n], 0) + 1
            rounds.setdefault(visit, []).append(n)
        ordered = [rounds[visit] for visit in sorted(rounds)]
        pairs = pairwise(ordered)
        if all(times[before[-1]] < times[after[0]] for before, after in pairs):
            return [[images[n] for n in one] for one in ordered]
    return [images]


def _are_several(parts: Sequence[_Images]) -> bool:
    """Whether these can be several stacks: long enough, and over one region or with steps of their own."""
    if len(parts) < 2 or min(map(len, parts)) < MIN_SLICES:
        return False
    reaches = [np.sort(_along(part)) for part in parts]
    for n, one in enumerate(reaches):
        for other in reaches[n + 1 :]:
            shared_mm = min(one[-1], other[-1]) - max(one[0], other[0])
            together = shared_mm >= _SAME_REGION * min(np.ptp(one), np.ptp(other))
            steps = [float(np.median(np.diff(reach))) for reach in (one, other)]
            if not together and abs(steps[0] - steps[1]) <= SPACING_TOLERANCE * max(steps):
                return False
    return True


def _along(images: _Images) -> npt.NDArray[np.float64]:
    """Where they lie along the normal of the first one, in mm; all at 0 where they say no place."""
    cosines = images[0].cosines
    if len(cosines) != 6 or any(len(image.position_lps_mm) != 3 for image in images):
        return np.zeros(len(images))
    normal = np.cross(cosines[:3], cosines[3:])
    places: npt.NDArray[np.float64] = np.array([image.position_lps_mm for image in images]) @ normal
    return places


def _is_volume(images: _Images, rules: SeriesRules) -> bool:
    try:
        inspect([image.path for image in images], rules)
    except SeriesRejected:
        return False
    return True


def _first(images: _Images) -> tuple[int, str, str]:
    """The lowest Instance Number, time and UID: stacks are counted in that order, whichever way the files came."""
    numbers = [int(text) if (text := image.said("InstanceNumber")).isdigit() else 0 for image in images]
    times = [image.said("AcquisitionDate") + image.said("AcquisitionTime") for image in images]
    return min(numbers), min(times), min(image.said("SOPInstanceUID") for image in images)
