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
from scipy.ndimage import find_objects

from salsa_node import codes, uids
from salsa_node.dicom_result import (
    Identity,
    Kind,
    caveat,
    check_source,
    line,
    plain,
    reference,
    sign,
    titled,
    weights,
)
from salsa_node.errors import EncodingError
from salsa_node.findings import Disease, Findings, Lesion, lengths_mm
from salsa_node.pipelines import Flag, Provenance

Labels = npt.NDArray[np.uint8]
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
    pixels: (slices, rows, columns): segment number, or one more axis of 0 and 1 where segments overlap.
    number: 1, 2, ... among the parts of its kind.
    """

    series: _Series
    number: int
    kinds: Sequence[_Kind]
    pixels: Labels
    uid: str


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
    _check_lesions(findings, source)
    made = []
    for number, kinds in enumerate(_shared_out(_frames(findings, include_organ=include_organ)), start=1):
        uid = _uid_of([kind.label for kind in kinds], findings)
        part = _Part(_BY_CLASS, number, kinds, _pixels(kinds, findings), uid)
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
    _check_lesions(findings, source)
    labels = findings.lesion_labels.labels
    objects = []
    for number, lesions in enumerate(_parts(findings), start=1):
        segment_of = np.zeros(len(findings.lesions) + 1, dtype=np.uint8)
        segment_of[[lesion.number for lesion in lesions]] = range(1, len(lesions) + 1)
        kinds = [_alone(lesion, findings) for lesion in lesions]
        uid = uids.derive(findings.run_digest, "LESION_SEG", str(number))
        part = _Part(_ONE_BY_ONE, number, kinds, segment_of[labels], uid)
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
    _check_lesions(findings, source)
    kinds = list(_frames(findings, include_organ=include_organ))
    if not kinds:
        return None
    pixels = np.zeros(findings.lesion_labels.labels.shape, dtype=np.uint8)
    for number in range(len(kinds), 0, -1):  # the liver, which is the last, goes below
        pixels[_mask(kinds[number - 1], findings)] = number
    uid = uids.derive(findings.run_digest, "LABELMAP", *(kind.label for kind in kinds))
    return _signed(_Part(_LABEL_MAP, 1, kinds, pixels, uid), findings, source, identity, produced_at)


def flags(findings: Findings, *, include_organ: bool = False) -> tuple[Flag, ...]:
    """What a reader should know of the segmentations: a segment of so many frames that a viewer may not show it."""
    return tuple(
        Flag(
            "many_frames",
            f"The segmentation {kind.label!r} has {frames} frames: some viewers show none of more than {MAX_FRAMES}.",
        )
        for kind, frames in _frames(findings, include_organ=include_organ).items()
        if frames > MAX_FRAMES
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


def _parts(findings: Findings) -> list[list[Lesion]]:
    """The lesions in order, in parts of at most MAX_FRAMES frames and 255 segments."""
    boxes = find_objects(findings.lesion_labels.labels.astype(np.int32, copy=False))
    parts: list[list[Lesion]] = []
    frames = 0
    for lesion in findings.lesions:
        more = boxes[lesion.number - 1][0].stop - boxes[lesion.number - 1][0].start
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
    provenance, series, pixels = findings.provenance, part.series, part.pixels
    words = "Lesions marked by a person" if provenance.by_person else "AI candidate lesions"
    shown = np.flatnonzero(pixels.any(axis=tuple(range(1, pixels.ndim))))  # highdicom's cost grows with the others too
    return hd.seg.Segmentation(
        source_images=_references([source[int(k)] for k in shown], findings.lesion_labels.grid.spacing_mm[0]),
        pixel_array=pixels[shown],
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
        series_description=line(titled(series.title, provenance), provenance.notice),
    )


def _frames(findings: Findings, *, include_organ: bool) -> dict[_Kind, int]:
    """The segments at hand, and in how many slices each shows something."""
    kinds = [*_LESIONS.values(), *([_ORGAN] if include_organ and findings.organ is not None else [])]
    frames = {kind: int(np.count_nonzero(_mask(kind, findings).any(axis=(1, 2)))) for kind in kinds}
    return {kind: number for kind, number in frames.items() if number}


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


def _pixels(kinds: Sequence[_Kind], findings: Findings) -> Labels:
    """(slices, rows, columns): segment number, or with the liver among others one more axis of 0 and 1."""
    masks = [_mask(kind, findings) for kind in kinds]
    if _ORGAN in kinds[1:]:
        return np.stack(masks, axis=-1).astype(np.uint8)
    pixels = np.zeros(masks[0].shape, dtype=np.uint8)
    for number, mask in enumerate(masks, start=1):
        pixels[mask] = number
    return pixels


def _mask(kind: _Kind, findings: Findings) -> Mask:
    """(slices, rows, columns): what that segment shows."""
    if kind is _ORGAN and findings.organ is not None:
        organ: Mask = findings.organ.labels == 1
        return organ
    of_class = np.zeros(len(findings.lesions) + 1, dtype=np.bool_)
    for lesion in findings.lesions:
        of_class[lesion.number] = _LESIONS[lesion.disease] is kind
    mask: Mask = of_class[findings.lesion_labels.labels]
    return mask


def _check_lesions(findings: Findings, source: Sequence[Dataset]) -> None:
    numbers = [lesion.number for lesion in findings.lesions]
    if numbers != list(range(1, len(numbers) + 1)):
        raise EncodingError(f"lesions must be numbered 1 to {len(numbers)} in order, found {numbers}")
    labels = findings.lesion_labels.labels
    counts = np.bincount(labels[labels > 0], minlength=len(numbers) + 1)
    if len(counts) > len(numbers) + 1:
        raise EncodingError(f"the label map holds the value {len(counts) - 1}, but there are {len(numbers)} lesions")
    for lesion in findings.lesions:
        if counts[lesion.number] != lesion.voxels:
            raise EncodingError(
                f"lesion {lesion.number} has {lesion.voxels} voxels, the label map shows {counts[lesion.number]}"
            )
        if lesion.slice_sop_uid not in ("", source[lesion.slice_index].SOPInstanceUID):
            raise EncodingError(f"lesion {lesion.number} names another image than source image {lesion.slice_index}")


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


def _references(source: Sequence[Dataset], step_mm: float) -> list[Dataset]:
    """The source's headers as the segmentation copies them: one orientation, slices as thick as their step.

    A voxel reaches halfway to its neighbours, so the nominal Slice Thickness of the source would
    give a reader another volume than ours.
    """
    references = [reference(ds) for ds in source]
    for ds in references:
        ds.ImageOrientationPatient = references[0].ImageOrientationPatient
        ds.SliceThickness = ds.SpacingBetweenSlices = DSfloat(step_mm, auto_format=True)
        if not ds.get("FrameOfReferenceUID"):
            ds.FrameOfReferenceUID = uids.derive("frame of reference", ds.SeriesInstanceUID)
    return references


def _fix_dimension_uid(seg: Dataset, uid: str) -> None:
    """Put a derived UID where highdicom draws a random one."""
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid
