"""Findings -> DICOM Segmentation: the lesions by class, or one by one, on the grid of their source images.

BINARY and uncompressed, because every viewer tried shows that; empty frames are left out; each
frame takes its position, word for word, from the source image it refers to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import UID, ExplicitVRLittleEndian, RLELossless
from pydicom.valuerep import DSfloat

from salsa_node import codes, uids
from salsa_node.dicom_result import (
    Identity,
    Kind,
    caveat,
    check_source,
    described,
    line,
    plain,
    reference,
    sign,
    weights,
)
from salsa_node.errors import EncodingError
from salsa_node.findings import Disease, Findings, Lesion, lengths_mm
from salsa_node.pipelines import Flag, Provenance
from salsa_node.volume import Grid

Labels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a segment is named, coded and coloured.

    tracking: Tracking ID and Tracking UID, where the segment is one lesion.
    """

    label: str
    category: Code
    property_type: Code
    regions: tuple[Code, ...]
    rgb: tuple[int, int, int]
    tracking: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class _Series:
    """What tells the segmentations of a result apart."""

    kind: Kind
    title: str
    content_label: str
    encoding: hd.seg.SegmentationTypeValues = hd.seg.SegmentationTypeValues.BINARY
    transfer_syntax_uid: UID = ExplicitVRLittleEndian


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One object of a segmentation, and a series of its own: viewers open one segmentation a series (OHIF issue 6243).

    kinds: segment 1, 2, ... of it.
    slices: in which it shows anything; highdicom's cost grows with the others, too.
    pixels: (slices, rows, columns): segment number, or one more axis of 0 and 1 where segments overlap.
    number: 1, 2, ... among the parts of its kind.
    """

    series: _Series
    number: int
    kinds: Sequence[_Kind]
    slices: Indices
    pixels: Labels
    uid: str


@dataclass(frozen=True, slots=True, eq=False)
class _Shown:
    """What the findings hold in those slices that show anything.

    slices: ascending indices. lesions: (slices, rows, columns), the lesions' numbers there.
    organ: (slices, rows, columns), where the liver is shown.
    voxels: (slices, lesion numbers from 0 on): how many voxels of each.
    """

    slices: Indices
    lesions: npt.NDArray[np.unsignedinteger]
    organ: Mask | None
    voxels: Indices

    @classmethod
    def of(cls, findings: Findings, *, with_organ: bool = False) -> _Shown:
        """Raises EncodingError where lesions and label map do not agree."""
        labels, liver = findings.lesion_labels.labels, findings.organ if with_organ else None
        used = _highest(labels) > 0
        if liver is not None:
            used |= _highest(liver.labels) > 0
        slices = np.flatnonzero(used)
        lesions = labels[slices]
        numbers = max(int(lesions.max(initial=0)), len(findings.lesions)) + 1
        voxels = np.zeros((len(slices), numbers), dtype=np.int64)
        for k, plane in enumerate(lesions):
            voxels[k] = np.bincount(plane[plane > 0], minlength=numbers)
        _check_lesions(findings, voxels.sum(axis=0))
        return cls(slices, lesions, None if liver is None else liver.labels[slices] == 1, voxels)

    def frames(self, findings: Findings) -> dict[_Kind, int]:
        """The segments by class at hand, and in how many slices each shows something."""
        frames = {}
        for disease, kind in _LESIONS.items():
            numbers = [lesion.number for lesion in findings.lesions if lesion.disease is disease]
            frames[kind] = int(np.count_nonzero(self.voxels[:, numbers].any(axis=1)))
        if self.organ is not None:
            frames[_ORGAN] = int(np.count_nonzero(self.organ.any(axis=(1, 2))))
        return {kind: number for kind, number in frames.items() if number}

    def part(
        self, series: _Series, number: int, segment_of: Mapping[int, int], kinds: Sequence[_Kind], uid: str
    ) -> _Part:
        """The part that shows these lesions (number -> segment) and, where it is among the kinds, the liver."""
        segments = np.zeros(self.voxels.shape[1], dtype=np.uint8)
        segments[list(segment_of)] = list(segment_of.values())
        organ = self.organ if _ORGAN in kinds else None
        here = self.voxels[:, list(segment_of)].any(axis=1)
        if organ is not None:
            here |= organ.any(axis=(1, 2))
        pixels: Labels = np.zeros((np.count_nonzero(here), *self.lesions.shape[1:]), dtype=np.uint8)
        for plane, lesions in zip(pixels, (self.lesions[k] for k in np.flatnonzero(here)), strict=True):
            inside = lesions > 0  # few voxels are
            plane[inside] = segments[lesions[inside]]
        if organ is not None:
            pixels = _with_organ(pixels, organ[here], list(kinds), in_one_layer=series is _LABEL_MAP)
        return _Part(series, number, kinds, self.slices[here], pixels, uid)


_BY_CLASS: Final = _Series(Kind.SEG, "SEG", "LIVER_LESIONS")
_ONE_BY_ONE: Final = _Series(Kind.LESION_SEG, "SEG, single", "EACH_LESION")
_LABEL_MAP: Final = _Series(
    Kind.LABELMAP, "label map", "LIVER_LABEL_MAP", hd.seg.SegmentationTypeValues.LABELMAP, RLELossless
)
MAX_FRAMES: Final = 400  # a known viewer shows no segmentation of more (Weasis issue 680)

_LESIONS: Final = {
    Disease.MEASURABLE: _Kind(
        "Measurable lesions", codes.ABNORMAL_STRUCTURE, codes.LESION, (codes.LIVER,), codes.MEASURABLE_RGB
    ),
    Disease.NON_MEASURABLE: _Kind(
        "Non-measurable lesions", codes.ABNORMAL_STRUCTURE, codes.LESION, (codes.LIVER,), codes.NON_MEASURABLE_RGB
    ),
}
_ORGAN: Final = _Kind("Liver", codes.ANATOMICAL_STRUCTURE, codes.LIVER, (), (221, 130, 101))


def build(
    findings: Findings,
    source: Sequence[Dataset],
    identity: Identity,
    produced_at: datetime,
    *,
    include_organ: bool = False,
) -> tuple[Dataset, ...]:
    """Valid Segmentations by class; none where there is nothing to show.

    source: the headers of the images the findings were made from, in slice order along the grid.
    produced_at: aware; becomes the object's dates.
    include_organ: add the liver as the last segment, where the findings have it.
    Segments: "Measurable lesions", then "Non-measurable lesions"; an absent class has no segment.
    One object where its frames number at most 400; else the liver goes into an object of its own, and where
    the lesions alone are still too many, so does each class. A segment is never divided: see `flags`.
    A source without Frame of Reference UID gets one that derives from its series, in the result alone.
    Raises EncodingError where source and findings do not lie on the same grid, slice by slice.
    """
    check_source(source, findings.lesion_labels.grid)
    _check_images(findings, source)
    shown = _Shown.of(findings, with_organ=include_organ)
    made = []
    for number, kinds in enumerate(_shared_out(shown.frames(findings)), start=1):
        uid = _uid_of([kind.label for kind in kinds], findings)
        part = shown.part(_BY_CLASS, number, _by_class(kinds, findings), kinds, uid)
        made.append(_signed(part, findings, source, identity, produced_at))
    return tuple(made)


def build_lesions(
    findings: Findings, source: Sequence[Dataset], identity: Identity, produced_at: datetime
) -> tuple[Dataset, ...]:
    """Valid Segmentations with one segment per lesion, named "L1 - measurable - 23.0 mm" and tracked by UID.

    One object where its frames number at most 400, else as many as keep to that.
    Arguments and errors as of `build`.
    """
    check_source(source, findings.lesion_labels.grid)
    _check_images(findings, source)
    shown = _Shown.of(findings)
    objects = []
    for number, lesions in enumerate(_parts(findings, shown), start=1):
        segment_of = {lesion.number: n for n, lesion in enumerate(lesions, start=1)}
        uid = uids.derive(findings.run_digest, "LESION_SEG", str(number))
        part = shown.part(_ONE_BY_ONE, number, segment_of, [_alone(lesion, findings) for lesion in lesions], uid)
        objects.append(_signed(part, findings, source, identity, produced_at))
    return tuple(objects)


def build_label_map(
    findings: Findings,
    source: Sequence[Dataset],
    identity: Identity,
    produced_at: datetime,
    *,
    include_organ: bool = False,
) -> Dataset | None:
    """The segments of `build` in one LABELMAP Segmentation (DICOM Supplement 243), RLE; None where there are none.

    Each voxel belongs to one segment: a lesion covers the liver. One frame a slice, never divided.
    Arguments and errors as of `build`.
    """
    check_source(source, findings.lesion_labels.grid)
    _check_images(findings, source)
    shown = _Shown.of(findings, with_organ=include_organ)
    kinds = list(shown.frames(findings))
    if not kinds:
        return None
    uid = uids.derive(findings.run_digest, "LABELMAP", *(kind.label for kind in kinds))
    part = shown.part(_LABEL_MAP, 1, _by_class(kinds, findings), kinds, uid)
    return _signed(part, findings, source, identity, produced_at)


def flags(findings: Findings, *, include_organ: bool = False) -> tuple[Flag, ...]:
    """What a reader should know of the segmentations: a segment of so many frames that a viewer may not show it."""
    frames = _Shown.of(findings, with_organ=include_organ).frames(findings)
    return tuple(
        Flag(
            "many_frames",
            f"The segmentation {kind.label!r} has {number} frames: some viewers show none of more than {MAX_FRAMES}.",
        )
        for kind, number in frames.items()
        if number > MAX_FRAMES
    )


def segment_of(lesion: Lesion, segs: Sequence[Dataset]) -> tuple[Dataset, int]:
    """The segmentation and the segment number that show this lesion: alone if there is such a segment, else its class.

    Raises EncodingError where none does.
    """
    for seg in segs:
        for item in seg.SegmentSequence:
            if item.get("TrackingUID") == lesion.tracking_uid:
                return seg, int(item.SegmentNumber)
    for seg in segs:
        number = segment_numbers(seg).get(label_of(lesion.disease))
        if number is not None:
            return seg, number
    raise EncodingError(f"no segmentation shows lesion {lesion.number}")


def organ_segment(segs: Sequence[Dataset]) -> tuple[Dataset, int] | None:
    """The segmentation and the segment number that show the liver, or None where none does."""
    for seg in segs:
        number = segment_numbers(seg).get(_ORGAN.label)
        if number is not None:
            return seg, number
    return None


def tracking_identifier(lesion: Lesion) -> str:
    """What every object calls this lesion."""
    return f"Lesion {lesion.number}"


def _alone(lesion: Lesion, findings: Findings) -> _Kind:
    of_class = _LESIONS[lesion.disease]
    # ASCII: OHIF 3.12 reads text below the top level as Latin-1, whatever the character set says.
    label = f"L{lesion.number} - {lesion.disease.value} - {lengths_mm(lesion, findings)[0]:.1f} mm"
    return replace(of_class, label=label, tracking=(tracking_identifier(lesion), lesion.tracking_uid))


def _parts(findings: Findings, shown: _Shown) -> list[list[Lesion]]:
    """The lesions in order, in parts of at most MAX_FRAMES frames and 255 segments."""
    parts: list[list[Lesion]] = []
    frames = 0
    for lesion in findings.lesions:
        more = int(np.count_nonzero(shown.voxels[:, lesion.number]))
        if not parts or frames + more > MAX_FRAMES or len(parts[-1]) == 255:
            parts.append([])
            frames = 0
        parts[-1].append(lesion)
        frames += more
    return parts


def _signed(
    part: _Part, findings: Findings, source: Sequence[Dataset], identity: Identity, produced_at: datetime
) -> Dataset:
    try:
        seg = _segmentation(part, findings, source, identity)
    except (ValueError, TypeError, AttributeError) as exc:
        raise EncodingError(f"the segmentation could not be put together ({type(exc).__name__})") from exc
    seg.BodyPartExamined = source[0].get("BodyPartExamined") or "ABDOMEN"
    _fix_dimension_uid(seg, uids.derive(part.uid, "dimensions"))
    sign(seg, source[0], identity, produced_at)
    return seg


def _uid_of(segment_labels: Sequence[str], findings: Findings) -> str:
    """The SOP Instance UID of the segmentation by class with these segments: other content, other UID."""
    return uids.derive(findings.run_digest, "SEG", *segment_labels)


def made_from(seg: Dataset, findings: Findings) -> bool:
    """Whether `build` or `build_lesions` made this segmentation from these findings."""
    by_class = _uid_of(list(segment_numbers(seg)), findings)
    return seg.SOPInstanceUID in (by_class, uids.derive(findings.run_digest, "LESION_SEG", str(seg.InstanceNumber)))


def segment_numbers(seg: Dataset) -> dict[str, int]:
    """Segment label -> segment number, of a segmentation made by `build`."""
    return {str(item.SegmentLabel): int(item.SegmentNumber) for item in seg.SegmentSequence}


def label_of(disease: Disease) -> str:
    """The label of the segment that holds the lesions of this class."""
    return _LESIONS[disease].label


def _segmentation(part: _Part, findings: Findings, source: Sequence[Dataset], identity: Identity) -> Dataset:
    provenance, series = findings.provenance, part.series
    words = "Lesions marked by a person" if provenance.by_person else "AI candidate lesions"
    shown = [source[int(k)] for k in part.slices]
    return hd.seg.Segmentation(
        source_images=_references(shown, findings.lesion_labels.grid),
        pixel_array=part.pixels,
        segmentation_type=series.encoding,
        segment_descriptions=[_describe(n, kind, provenance, identity) for n, kind in enumerate(part.kinds, start=1)],
        series_instance_uid=uids.derive(part.uid, "series"),
        series_number=identity.series_number(series.kind, part.number),
        sop_instance_uid=part.uid,
        instance_number=part.number,
        manufacturer=identity.manufacturer,
        manufacturer_model_name=identity.model_name,
        software_versions=identity.software_version,
        device_serial_number=identity.device_serial_number,
        content_label=series.content_label,
        content_description=line(words, provenance.notice),
        content_creator_name=f"{identity.manufacturer}^",
        transfer_syntax_uid=series.transfer_syntax_uid,
        omit_empty_frames=True,
        series_description=described(series.title, provenance, identity),
    )


def _shared_out(frames: Mapping[_Kind, int]) -> list[list[_Kind]]:
    """Which segments go together into one object."""
    lesions = [kind for kind in frames if kind is not _ORGAN]
    organ = [kind for kind in frames if kind is _ORGAN]
    if sum(frames.values()) <= MAX_FRAMES:
        parts = [[*lesions, *organ]]
    elif sum(frames[kind] for kind in lesions) <= MAX_FRAMES:
        parts = [lesions, organ]
    else:
        parts = [[kind] for kind in frames]
    return [part for part in parts if part]


def _by_class(kinds: Sequence[_Kind], findings: Findings) -> dict[int, int]:
    """The segment of each lesion whose class is among the kinds, by its number."""
    segments = {kind: number for number, kind in enumerate(kinds, start=1)}
    of_lesions = ((lesion.number, _LESIONS[lesion.disease]) for lesion in findings.lesions)
    return {number: segments[kind] for number, kind in of_lesions if kind in segments}


def _with_organ(lesions: Labels, organ: Mask, kinds: list[_Kind], *, in_one_layer: bool) -> Labels:
    """The segments of lesions and the liver: in one layer, lesions above, or one more axis of 0 and 1."""
    number = kinds.index(_ORGAN) + 1
    if in_one_layer or len(kinds) == 1:
        return np.where((lesions == 0) & organ, np.uint8(number), lesions)
    return np.stack([*(lesions == n for n in range(1, number)), organ], axis=-1).astype(np.uint8)


def _highest(labels: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    """Of each slice."""
    highest: npt.NDArray[np.unsignedinteger] = labels.reshape(len(labels), -1).max(axis=1)
    return highest


def _check_images(findings: Findings, source: Sequence[Dataset]) -> None:
    for lesion in findings.lesions:
        if lesion.slice_sop_uid not in ("", source[lesion.slice_index].SOPInstanceUID):
            raise EncodingError(f"lesion {lesion.number} names another image than source image {lesion.slice_index}")


def _check_lesions(findings: Findings, counts: Indices) -> None:
    """counts: voxels of each number in the label map."""
    numbers = [lesion.number for lesion in findings.lesions]
    if numbers != list(range(1, len(numbers) + 1)):
        raise EncodingError(f"lesions must be numbered 1 to {len(numbers)} in order, found {numbers}")
    if len(counts) > len(numbers) + 1:
        raise EncodingError(f"the label map holds the value {len(counts) - 1}, but there are {len(numbers)} lesions")
    for lesion in findings.lesions:
        if counts[lesion.number] != lesion.voxels:
            raise EncodingError(
                f"lesion {lesion.number} has {lesion.voxels} voxels, the label map shows {counts[lesion.number]}"
            )


def _describe(number: int, kind: _Kind, provenance: Provenance, identity: Identity) -> hd.seg.SegmentDescription:
    made = hd.seg.SegmentAlgorithmTypeValues
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=kind.label,
        segmented_property_category=kind.category,
        segmented_property_type=kind.property_type,
        algorithm_type=made.MANUAL if provenance.by_person else made.AUTOMATIC,
        algorithm_identification=None if provenance.by_person else _algorithm(provenance, identity),
        anatomic_regions=list(kind.regions) or None,
        display_color=hd.color.CIELabColor.from_rgb(*kind.rgb),
        tracking_id=kind.tracking[0] if kind.tracking else None,
        tracking_uid=kind.tracking[1] if kind.tracking else None,
    )
    description.SegmentDescription = plain(" ".join(part for part in (caveat(provenance), provenance.notice) if part))
    return description


def _algorithm(provenance: Provenance, identity: Identity) -> hd.AlgorithmIdentificationSequence:
    return hd.AlgorithmIdentificationSequence(
        name=line(provenance.pipeline),
        family=codes.ARTIFICIAL_INTELLIGENCE,
        version=line(provenance.version),
        source=identity.manufacturer,
        parameters={"weights": "; ".join(weights(provenance))} if provenance.weights_sha256 else None,
    )


def _references(source: Sequence[Dataset], grid: Grid) -> list[Dataset]:
    """The source's headers as the segmentation copies them: one orientation, slices as thick as their step.

    A voxel reaches halfway to its neighbours, so the nominal Slice Thickness of the source would
    give a reader another volume than ours.
    """
    references = [reference(ds) for ds in source]
    for ds in references:
        ds.ImageOrientationPatient = references[0].ImageOrientationPatient
        ds.SliceThickness = DSfloat(grid.step_mm, auto_format=True)
        if grid.slice_offsets is None:
            ds.SpacingBetweenSlices = ds.SliceThickness
        if not ds.get("FrameOfReferenceUID"):
            ds.FrameOfReferenceUID = uids.derive("frame of reference", ds.SeriesInstanceUID)
    return references


def _fix_dimension_uid(seg: Dataset, uid: str) -> None:
    """Put a derived UID where highdicom draws a random one."""
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid
