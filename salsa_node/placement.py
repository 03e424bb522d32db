"""Before anything leaves: whether the finished objects lie on their own images and show what the findings hold.

They are read beside the headers of their source as a stranger would read them: nothing is trusted that the builders
kept in mind. A failed check keeps the result here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import (
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EncapsulatedPDFStorage,
    KeyObjectSelectionDocumentStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from salsa_node import codes, uids
from salsa_node.dicom_result import GRID_TOLERANCE, LABEL_MAP_STORAGE
from salsa_node.dicom_seg import label_of, tracking_identifier
from salsa_node.errors import EncodingError, GuardFailed
from salsa_node.findings import Axis, Disease, Findings, Lesion, box_around
from salsa_node.owners import distinct, same_patient_and_study
from salsa_node.series import UNDECODABLE
from salsa_node.slice_geometry import DIRECTION_TOLERANCE, PIXEL_SPACING_TOLERANCE_MM

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

_PLANE: Final = ("ImagePositionPatient", "ImageOrientationPatient")
_SEGMENTATIONS: Final = (SegmentationStorage, LABEL_MAP_STORAGE)
_KNOWN: Final = (
    *_SEGMENTATIONS,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EncapsulatedPDFStorage,
    KeyObjectSelectionDocumentStorage,
    SecondaryCaptureImageStorage,
)
_OF_OTHERS: Final = (  # these name what lies outside of the series and its result, as the source does or on purpose
    "PredecessorDocumentsSequence",
    "ReferencedStudySequence",
    "ReferencedPatientSequence",
    "ReferencedPerformedProcedureStepSequence",
    "ReferencedRequestSequence",
)
Segments = dict[str, dict[int, frozenset[int]]]  # SOP Instance UID -> segment number -> lesions


def check(objects: Sequence[Dataset], source: Sequence[Dataset], findings: Findings | None) -> None:
    """Raises GuardFailed unless every object is of the source's patient and study and lies where its images lie.

    objects: all of one result, as they were written. source: the headers of every image of the series, read anew,
    in any order. findings: None where nothing was analysed.
    Checked of every object: whose it is, and that each instance it refers to is a source image or another of these
    objects. Of a segmentation: Frame of Reference, orientation, spacing, size, the position of each frame against
    the image it names, and, voxel for voxel, each segment against what the findings hold under its name. Of the
    reports: that each lesion has its own segment, and its diameters their own ends on their own image.
    """
    try:
        _check(objects, source, findings)
    except UNDECODABLE as exc:  # what cannot be checked is not sent either
        raise GuardFailed(f"an object of the result is malformed and cannot be checked ({type(exc).__name__})") from exc


def _check(objects: Sequence[Dataset], source: Sequence[Dataset], findings: Findings | None) -> None:
    if not objects or not source:
        raise GuardFailed(f"{len(objects)} objects and {len(source)} source images: expected some of each")
    owners = [source[k] for k in distinct(source)]
    for obj in objects:
        if obj.SOPClassUID not in _KNOWN:
            raise GuardFailed(f"an object of SOP class {obj.SOPClassUID}: there is no check for it")
        for ds in owners:
            try:
                same_patient_and_study(obj, ds)
            except EncodingError as exc:
                raise GuardFailed(str(exc)) from exc
    _check_references(objects, source)
    if findings is None:
        if any(obj.SOPClassUID in _SEGMENTATIONS for obj in objects):
            raise GuardFailed("a segmentation, though nothing was analysed")
        return
    beside = _Beside.of(source, findings)
    segments: Segments = {}
    for obj in objects:
        if obj.SOPClassUID in _SEGMENTATIONS:
            segments[obj.SOPInstanceUID] = _check_segmentation(obj, beside)
    _check_all_shown([obj for obj in objects if obj.SOPInstanceUID in segments], segments, findings)
    for obj in objects:
        if obj.SOPClassUID in (Comprehensive3DSRStorage, ComprehensiveSRStorage):
            _check_groups(obj, segments, beside)


def _check_references(objects: Sequence[Dataset], source: Sequence[Dataset]) -> None:
    ours = {obj.SOPInstanceUID for obj in objects}
    known = ours | {ds.SOPInstanceUID for ds in source}
    for obj in objects:
        for item in _references(obj):
            if item.ReferencedSOPInstanceUID not in known:
                raise GuardFailed(
                    f"a {obj.Modality} object names image {item.ReferencedSOPInstanceUID}, which is not of its series, "
                    "nor of this result"
                )


def _references(ds: Dataset) -> Iterator[Dataset]:
    """Every item within that names an instance, but for those that name another study's or an earlier result's.

    Not those of frames: `_check_frame` looks at each.
    """
    for element in ds:
        if element.VR == "SQ" and element.keyword not in (*_OF_OTHERS, "PerFrameFunctionalGroupsSequence"):
            for item in element.value:
                if "ReferencedSOPInstanceUID" in item:
                    yield item
                yield from _references(item)


@dataclass(frozen=True, slots=True, eq=False)
class _Beside:
    """What objects are held against.

    images: SOP Instance UID -> header. slices: SOP Instance UID -> slice index on the findings' grid.
    counts: (slices, lesions + 1) voxels of each lesion in each slice; of the background in the first column.
    """

    images: Mapping[str, Dataset]
    slices: Mapping[str, int]
    findings: Findings
    counts: Indices

    @classmethod
    def of(cls, source: Sequence[Dataset], findings: Findings) -> _Beside:
        images = {ds.SOPInstanceUID: ds for ds in source}
        labels = findings.lesion_labels.labels
        box = box_around(labels)
        counts = np.zeros((len(labels), len(findings.lesions) + 1), dtype=np.int64)
        for row, plane in zip(counts[box[0]], labels[box], strict=True):
            row[:] = np.bincount(plane.ravel(), minlength=len(row))
        counts[:, 0] = labels[0].size - counts[:, 1:].sum(axis=1)
        return cls(images, _slices(images, findings), findings, counts)

    @property
    def allowed_mm(self) -> float:
        """How far something may lie from its place."""
        return GRID_TOLERANCE * min(self.findings.lesion_labels.grid.spacing_mm)

    def plane(self, k: int, lesions: frozenset[int], covered: bool) -> Mask:
        """(rows, columns) of slice k: where these lesions lie; without any, the liver, less lesions that cover it."""
        labels = self.findings.lesion_labels.labels[k]
        if lesions:
            shown = np.zeros(labels.shape, dtype=np.bool_)
            for number in lesions:
                if self.counts[k, number]:
                    shown |= labels == number
            return shown
        organ = self.findings.organ
        if organ is None:
            return np.zeros(labels.shape, dtype=np.bool_)
        liver: Mask = (organ.labels[k] == 1) & ((labels == 0) | (not covered))
        return liver

    def voxels(self, k: int, lesions: frozenset[int], covered: bool) -> int:
        """How many of them `plane` shows."""
        if lesions:
            return int(self.counts[k, list(lesions)].sum())
        return int(np.count_nonzero(self.plane(k, lesions, covered)))


def _check_segmentation(seg: Dataset, beside: _Beside) -> dict[int, frozenset[int]]:
    """Segment number -> the numbers of the lesions that it shows, none of them for the liver."""
    first = next(iter(beside.images.values()))
    frame = first.get("FrameOfReferenceUID") or uids.derive("frame of reference", first.SeriesInstanceUID)
    if seg.FrameOfReferenceUID != frame:
        raise GuardFailed(
            f"the segmentation lies in frame of reference {seg.FrameOfReferenceUID}, its source in {frame}"
        )
    if (seg.Rows, seg.Columns) != (first.Rows, first.Columns):
        raise GuardFailed(
            f"the segmentation has {seg.Rows} x {seg.Columns} pixels, its source {first.Rows} x {first.Columns}"
        )
    label_map = seg.SOPClassUID == LABEL_MAP_STORAGE
    items = {int(item.SegmentNumber): item for item in seg.SegmentSequence}
    if label_map:
        items.pop(0, None)  # the background
    meant = {number: _meant_by(item, beside.findings) for number, item in items.items()}
    seen: dict[int, set[int]] = {number: set() for number in items}
    differing = dict.fromkeys(items, 0)
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    shared = seg.SharedFunctionalGroupsSequence[0]
    for plane, item in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
        k = _check_frame(item, shared, beside)
        if label_map:
            if not np.isin(plane, [0, *items]).all():
                raise GuardFailed("a frame of the label map holds a value that is no segment")
            numbers = list(items)
        else:
            numbers = [int(_group(item, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)]
        for number in numbers:
            if k in seen[number]:
                raise GuardFailed(f"two frames show the same segment on slice {k + 1}")
            seen[number].add(k)
            shown = plane == number if label_map else plane != 0
            differing[number] += int(np.count_nonzero(shown != beside.plane(k, meant[number], label_map)))
    for number, item in items.items():
        absent = [k for k in range(len(beside.counts)) if k not in seen[number]]
        lost = sum(beside.voxels(k, meant[number], label_map) for k in absent)
        if differing[number] + lost:
            raise GuardFailed(
                f"the segment {item.SegmentLabel!r} and the findings differ in {differing[number] + lost} voxels"
            )
    return meant


def _check_frame(item: Dataset, shared: Dataset, beside: _Beside) -> int:
    """The slice index that a frame shows, once it lies like the image that it names."""
    (derived,) = (item if "DerivationImageSequence" in item else shared).DerivationImageSequence
    (drawn_on,) = derived.SourceImageSequence
    named = drawn_on.ReferencedSOPInstanceUID
    if named not in beside.images:
        raise GuardFailed(f"a frame of the segmentation names image {named}, which is not of its series")
    image = beside.images[named]
    orientation = _group(item, shared, "PlaneOrientationSequence").ImageOrientationPatient
    _same(orientation, image.ImageOrientationPatient, DIRECTION_TOLERANCE, "orientation")
    measures = _group(item, shared, "PixelMeasuresSequence")
    _same(measures.PixelSpacing, image.PixelSpacing, PIXEL_SPACING_TOLERANCE_MM, "pixel spacing")
    step_mm = beside.findings.lesion_labels.grid.step_mm
    for keyword in ("SliceThickness", "SpacingBetweenSlices"):
        if keyword in measures:
            _same([measures[keyword].value], [step_mm], PIXEL_SPACING_TOLERANCE_MM, f"{keyword} of a frame")
    position = _group(item, shared, "PlanePositionSequence").ImagePositionPatient
    _same(position, image.ImagePositionPatient, beside.allowed_mm, f"position of the frame on image {named}")
    return beside.slices[named]


def _meant_by(segment: Dataset, findings: Findings) -> frozenset[int]:
    """The numbers of the lesions that a segment should show, by its tracking UID or its label; none for the liver."""
    kind = segment.SegmentedPropertyTypeCodeSequence[0].CodeValue
    if kind == codes.LIVER.value and findings.organ is not None:
        return frozenset()
    tracked, label = segment.get("TrackingUID"), str(segment.SegmentLabel)
    if kind == codes.LESION.value and tracked:
        for lesion in findings.lesions:
            if (
                lesion.tracking_uid == tracked
                and segment.TrackingID == tracking_identifier(lesion)
                and label.startswith(f"L{lesion.number} - {lesion.disease.value} - ")
            ):
                return frozenset([lesion.number])
    elif kind == codes.LESION.value:
        for disease in Disease:
            if label == label_of(disease):
                return frozenset(lesion.number for lesion in findings.lesions if lesion.disease is disease)
    raise GuardFailed(f"the segment {label!r} is of nothing that the findings hold")


def _check_all_shown(segs: Sequence[Dataset], segments: Segments, findings: Findings) -> None:
    """The segmentations of one content label show every lesion together, and where there are lesions there is one."""
    shown: dict[str, set[int]] = {}
    for seg in segs:
        shown.setdefault(seg.ContentLabel, set()).update(*segments[seg.SOPInstanceUID].values())
    if findings.lesions and not shown:
        raise GuardFailed(f"{len(findings.lesions)} lesions and no segmentation of them")
    for label, numbers in shown.items():
        for lesion in findings.lesions:
            if lesion.number not in numbers:
                raise GuardFailed(f"the segmentation {label} leaves out lesion {lesion.number}: {lesion.voxels} voxels")


def _check_groups(report: Dataset, segments: Segments, beside: _Beside) -> None:
    """Each lesion has one measurement group, which refers to its segment, or draws its diameters on their image."""
    lesions = {lesion.tracking_uid: lesion for lesion in beside.findings.lesions}
    told = []
    for group in _content(report, codes.MEASUREMENT_GROUP):
        uid = next((item.UID for item in _content(group, codes.TRACKING_UID)), "")
        lesion = lesions.get(uid)
        told += [lesion.number] if lesion is not None else []
        drawn = report.SOPClassUID == ComprehensiveSRStorage
        if not drawn:
            _check_segment_of(group, lesion, segments)
        elif lesion is not None:
            for name, axis in ((codes.LONG_AXIS, lesion.long_axis), (codes.SHORT_AXIS, lesion.short_axis)):
                (measured,) = _content(group, name)
                _check_line(measured.ContentSequence[0], axis, lesion, beside)
    if sorted(told) != sorted(lesion.number for lesion in lesions.values()):
        raise GuardFailed(f"a report tells of lesions {sorted(told)}, the findings hold {len(lesions)}")


def _check_segment_of(group: Dataset, lesion: Lesion | None, segments: Segments) -> None:
    """A lesion's group refers to segments that show it, at least to one; the liver's to segments of the liver."""
    called = "the liver" if lesion is None else f"lesion {lesion.number}"
    named = [item for item in _references(group) if item.ReferencedSOPInstanceUID in segments]
    if lesion is not None and not named:
        raise GuardFailed(f"the report refers {called} to no segment")
    for item in named:
        meant = segments[item.ReferencedSOPInstanceUID].get(int(item.ReferencedSegmentNumber))
        if meant is None or (lesion is None) != (not meant) or (lesion is not None and lesion.number not in meant):
            raise GuardFailed(f"the report refers {called} to a segment that shows something else")


def _content(item: Dataset, name: Code) -> Iterator[Dataset]:
    """The content items of that concept, nearest first, not looking below one that is found."""
    for child in item.get("ContentSequence") or ():
        concept = child.get("ConceptNameCodeSequence")
        if concept and concept[0].CodeValue == name.value:
            yield child
        else:
            yield from _content(child, name)


def _check_line(drawn: Dataset, axis: Axis, lesion: Lesion, beside: _Beside) -> None:
    """The ends of a line on an image are those of the axis, in the patient."""
    named = drawn.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    if beside.slices.get(named) != lesion.slice_index:
        raise GuardFailed(f"a diameter of lesion {lesion.number} is drawn on another image than its own")
    image = beside.images[named]
    corner, cosines = (np.array(image[k].value, dtype=float) for k in _PLANE)
    between_rows, between_columns = (float(mm) for mm in image.PixelSpacing)
    points = np.array(drawn.GraphicData, dtype=float).reshape(-1, 2) - 0.5  # (0.5, 0.5): the first pixel's centre
    ends = [
        corner + column * between_columns * cosines[:3] + row * between_rows * cosines[3:] for column, row in points
    ]
    expected = [axis.start_lps_mm, axis.end_lps_mm]
    if len(ends) != 2 or max(np.linalg.norm(np.subtract(ends, expected), axis=1)) > beside.allowed_mm:
        raise GuardFailed(f"a diameter of lesion {lesion.number} is drawn elsewhere than it was measured")


def _group(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    """A functional group of a frame: its own, or the one that all frames share (PS3.3 C.7.6.16)."""
    group: Dataset = (frame if keyword in frame else shared)[keyword].value[0]
    return group


def _slices(source: Mapping[str, Dataset], findings: Findings) -> dict[str, int]:
    """SOP Instance UID -> slice index on the findings' grid, from the image's own position."""
    grid = findings.lesion_labels.grid
    found = {}
    for uid, ds in source.items():
        x, y, z = (float(mm) for mm in ds.ImagePositionPatient)
        found[uid] = round(grid.to_index((x, y, z))[0])
    if sorted(found.values()) != list(range(grid.shape[0])):
        raise GuardFailed(f"{len(found)} source images do not fill the {grid.shape[0]} slices of the findings' grid")
    return found


def _same(found: Iterable[float], expected: Iterable[float], tolerance: float, what: str) -> None:
    a, b = (np.array([float(x) for x in values]) for values in (found, expected))
    if a.shape != b.shape or np.abs(a - b).max() > tolerance:
        raise GuardFailed(f"the {what} differs from the source's: found {a.tolist()}, expected {b.tolist()}")
