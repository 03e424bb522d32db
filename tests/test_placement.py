"""Finished objects beside their source: what lies elsewhere, or shows something else, is kept here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from io import BytesIO

import made_findings as made
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import pack_bits
from pydicom.uid import ExplicitVRLittleEndian

from salsa_node import codes, dicom_ko, dicom_seg, dicom_sr, dicom_viewer_sr, placement
from salsa_node.dicom_result import LABEL_MAP_STORAGE, Identity
from salsa_node.errors import GuardFailed
from salsa_node.findings import Findings

IDENTITY = Identity()


@pytest.fixture
def case() -> tuple[Findings, list[pydicom.Dataset], pydicom.Dataset]:
    findings, source = made.case("oblique")
    (seg,) = dicom_seg.build(findings, source, IDENTITY, made.PRODUCED_AT)
    assert seg is not None
    return findings, source, as_written(seg)


def as_written(ds: pydicom.Dataset) -> pydicom.Dataset:
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return pydicom.dcmread(BytesIO(buffer.getvalue()))


def test_objects_on_their_own_images_pass(case):
    findings, source, seg = case
    report = dicom_sr.build(findings, [seg], source, IDENTITY, made.PRODUCED_AT)
    alone = dicom_seg.build_lesions(findings, source, IDENTITY, made.PRODUCED_AT)
    placement.check([seg, report, *map(as_written, alone)], source[::-1], findings)


@pytest.mark.parametrize("drawn", [(made.MEASURABLE_BOX,), ((slice(4, 5), slice(9, 10), slice(7, 8)),)])
def test_one_lesion_and_one_voxel_pass_too(drawn):
    """One segment, or one frame: its groups are then shared."""
    grid = made.grid()
    source = made.headers(grid)
    findings = made.findings(grid, source, *drawn)
    (seg,) = dicom_seg.build(findings, source, IDENTITY, made.PRODUCED_AT)
    assert seg is not None
    placement.check([as_written(seg)], source, findings)


def test_lesions_in_several_objects_are_looked_at_together(case, monkeypatch):
    findings, source, _ = case
    monkeypatch.setattr(dicom_seg, "MAX_FRAMES", 5)
    parts = [as_written(seg) for seg in dicom_seg.build_lesions(findings, source, IDENTITY, made.PRODUCED_AT)]
    placement.check(parts, source, findings)
    with pytest.raises(GuardFailed, match="voxels"):
        placement.check(parts[:1], source, findings)


def other_patient(seg, source):
    seg.PatientID = "somebody else"


def one_source_of_another_study(seg, source):
    source[3].StudyInstanceUID = "1.2.3"


def other_frame_of_reference(seg, source):
    seg.FrameOfReferenceUID = "1.2.3"


def turned_plane(seg, source):
    plane = seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]


def other_spacing(seg, source):
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1.1, 0.9]


def frame_on_another_slice(seg, source):
    frames = seg.PerFrameFunctionalGroupsSequence
    frames[0].PlanePositionSequence, frames[1].PlanePositionSequence = (
        frames[1].PlanePositionSequence,
        frames[0].PlanePositionSequence,
    )


def image_of_another_series(seg, source):
    image = seg.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
    image.ReferencedSOPInstanceUID = "1.2.3"


def one_pixel_more(seg, source):
    content = bytearray(seg.PixelData)
    content[0] |= 1
    seg.PixelData = bytes(content)


def missing_slice(seg, source):
    del source[0]


def other_thickness(seg, source):
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness = 99


def classes_swapped(seg, source):
    one, other = seg.SegmentSequence
    one.SegmentLabel, other.SegmentLabel = other.SegmentLabel, one.SegmentLabel


def frames_of_another_segment(seg, source):
    for item in seg.PerFrameFunctionalGroupsSequence:
        segment = item.SegmentIdentificationSequence[0]
        segment.ReferencedSegmentNumber = 3 - segment.ReferencedSegmentNumber


def frame_missing(seg, source):
    del seg.PerFrameFunctionalGroupsSequence[-1]


def no_pixel_measures(seg, source):
    del seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence


def pixels_cut_short(seg, source):
    seg.PixelData = seg.PixelData[:10]


def no_source(seg, source):
    source.clear()


def unknown_class(seg, source):
    seg.SOPClassUID = "1.2.840.10008.5.1.4.1.1.66.5"  # Surface Segmentation


def the_same_frame_twice(seg, source):
    frames = seg.PerFrameFunctionalGroupsSequence
    frames[1] = frames[0]


def segment_of_something_else(seg, source):
    seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue = "64033007"  # kidney


@pytest.mark.parametrize(
    ("breakage", "told"),
    [
        (other_patient, "differs from its source in PatientID"),
        (one_source_of_another_study, "differs from its source in StudyInstanceUID"),
        (other_frame_of_reference, "frame of reference 1.2.3"),
        (turned_plane, "the orientation differs"),
        (other_spacing, "the pixel spacing differs"),
        (frame_on_another_slice, "the position of the frame"),
        (image_of_another_series, "names image 1.2.3"),
        (one_pixel_more, "differ in 1 voxels"),
        (missing_slice, "19 source images do not fill the 20 slices"),
        (other_thickness, "SliceThickness"),
        (classes_swapped, "'Non-measurable lesions' and the findings differ in 858 voxels"),
        (frames_of_another_segment, "differ in 858 voxels"),
        (frame_missing, "cannot be checked"),
        (no_pixel_measures, "cannot be checked"),
        (pixels_cut_short, "cannot be checked"),
        (no_source, "0 source images"),
        (unknown_class, "there is no check for it"),
        (the_same_frame_twice, "two frames show the same segment"),
        (segment_of_something_else, "is of nothing that the findings hold"),
    ],
)
def test_whatever_lies_elsewhere_is_kept_here(case, breakage, told):
    findings, source, seg = case
    breakage(seg, source)
    with pytest.raises(GuardFailed, match=told) as caught:
        placement.check([seg], source, findings)
    assert "somebody" not in str(caught.value)


@pytest.mark.parametrize(("share_of_voxel", "caught"), [(0.4, False), (0.6, True)])
def test_a_frame_may_lie_off_by_half_a_voxel_and_no_more(case, share_of_voxel, caught):
    findings, source, seg = case
    off_mm = share_of_voxel * min(findings.lesion_labels.grid.spacing_mm)
    position = seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    x, y, z = (float(mm) for mm in position.ImagePositionPatient)
    position.ImagePositionPatient = [x + off_mm, y, z]
    with pytest.raises(GuardFailed, match="the position of the frame") if caught else nullcontext():
        placement.check([seg], source, findings)


def test_lesions_without_a_segmentation_are_kept_here(case):
    findings, source, _ = case
    with pytest.raises(GuardFailed, match="0 objects"):
        placement.check([], source, findings)
    selection = dicom_ko.build(findings, [], source, IDENTITY, made.PRODUCED_AT)
    with pytest.raises(GuardFailed, match="2 lesions and no segmentation"):
        placement.check([as_written(selection)], source, findings)


def test_a_segmentation_where_nothing_was_analysed_is_kept_here(case):
    _, source, seg = case
    with pytest.raises(GuardFailed, match="though nothing was analysed"):
        placement.check([seg], source, None)


def test_two_lesions_that_changed_names_are_kept_here(case):
    findings, source, _ = case
    (alone,) = map(as_written, dicom_seg.build_lesions(findings, source, IDENTITY, made.PRODUCED_AT))
    one, other = alone.SegmentSequence
    one.TrackingUID, other.TrackingUID = other.TrackingUID, one.TrackingUID
    with pytest.raises(GuardFailed, match="is of nothing that the findings hold"):
        placement.check([alone], source, findings)
    for keyword in ("TrackingID", "SegmentLabel"):
        first, second = one[keyword].value, other[keyword].value
        setattr(one, keyword, second)
        setattr(other, keyword, first)
    with pytest.raises(GuardFailed, match="differ in 858 voxels"):
        placement.check([alone], source, findings)


@pytest.mark.parametrize("as_label_map", [False, True])
def test_a_liver_that_is_mirrored_or_half_empty_is_kept_here(as_label_map):
    findings, source = made.case()
    build = dicom_seg.build_label_map if as_label_map else dicom_seg.build
    built = build(findings, source, IDENTITY, made.PRODUCED_AT, include_organ=True)
    seg = as_written(built if as_label_map else built[0])
    beside = [] if not as_label_map else [as_written(dicom_seg.build(findings, source, IDENTITY, made.PRODUCED_AT)[0])]
    placement.check([seg, *beside], source, findings)
    for breakage in (lambda plane: plane[:, ::-1], np.zeros_like):
        placement.check([seg, *beside], source, findings)
        with pytest.raises(GuardFailed, match="'Liver' and the findings differ in"):
            placement.check([with_other_liver(seg, breakage), *beside], source, findings)


def with_other_liver(seg: Dataset, breakage: Callable[[np.ndarray], np.ndarray]) -> Dataset:
    """The segmentation with each frame's liver changed and its lesions as they were."""
    changed = deepcopy(seg)
    pixels = seg.pixel_array.copy()
    if seg.SOPClassUID == LABEL_MAP_STORAGE:
        for plane in pixels:
            liver = breakage(plane == 3)
            plane[plane == 3] = 0
            plane[liver & (plane == 0)] = 3
        changed.PixelData = pixels.tobytes()
        changed.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        changed["PixelData"].is_undefined_length = False
    else:
        for plane, item in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
            if item.SegmentIdentificationSequence[0].ReferencedSegmentNumber == 3:
                plane[:] = breakage(plane)
        changed.PixelData = pack_bits(pixels.ravel())
    return changed


def test_a_label_map_without_a_lesion_is_kept_here(case):
    findings, source, seg = case
    label_map = as_written(dicom_seg.build_label_map(findings, source, IDENTITY, made.PRODUCED_AT))
    placement.check([label_map, seg], source, findings)
    label_map.PixelData = bytes(label_map.pixel_array.size)
    label_map.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    label_map["PixelData"].is_undefined_length = False
    with pytest.raises(GuardFailed, match="'Measurable lesions' and the findings differ in 840 voxels"):
        placement.check([label_map, seg], source, findings)


# ---- what refers to images and segments ---------------------------------------------------------


@pytest.fixture
def result(case) -> dict[str, Dataset]:
    findings, source, seg = case
    (alone,) = dicom_seg.build_lesions(findings, source, IDENTITY, made.PRODUCED_AT)
    segs = [seg, alone]
    made_of = {
        "seg": seg,
        "alone": alone,
        "record": dicom_sr.build(findings, segs, source, IDENTITY, made.PRODUCED_AT),
        "viewer": dicom_viewer_sr.build(findings, source, IDENTITY, made.PRODUCED_AT),
        "ko": dicom_ko.build(findings, segs, source, IDENTITY, made.PRODUCED_AT),
    }
    return {name: as_written(ds) for name, ds in made_of.items()}


def test_a_whole_result_passes(case, result):
    findings, source, _ = case
    placement.check([*result.values()], source, findings)


@pytest.mark.parametrize("name", ["record", "viewer", "ko"])
def test_a_reference_to_a_foreign_instance_is_kept_here(case, result, name):
    findings, source, _ = case
    for element in result[name].iterall():
        if element.keyword == "ReferencedSOPInstanceUID":
            element.value = "1.2.3.4"
            break
    with pytest.raises(GuardFailed, match=r"names image 1\.2\.3\.4"):
        placement.check([*result.values()], source, findings)


def test_an_earlier_report_may_be_named(case, result):
    findings, source, _ = case
    segs = [result["seg"], result["alone"]]
    report = dicom_sr.build(findings, segs, source, IDENTITY, made.PRODUCED_AT, result["record"])
    report.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[
        0
    ].ReferencedSOPInstanceUID = "1.2.3.4"
    result["record"] = as_written(report)
    placement.check([*result.values()], source, findings)


def test_a_record_that_points_at_the_other_lesions_segment_is_kept_here(case, result):
    findings, source, _ = case
    for element in result["record"].iterall():
        if element.keyword == "ReferencedSegmentNumber" and element.value in (1, 2):
            element.value = 3 - element.value
    with pytest.raises(GuardFailed, match="refers lesion 1 to a segment that shows something else"):
        placement.check([*result.values()], source, findings)


def test_a_record_without_segments_is_kept_here(case, result):
    findings, source, _ = case
    for container in result["record"].iterall():
        if container.keyword == "ContentSequence":
            container.value = [item for item in container.value if item.get("ValueType") != "IMAGE"]
    with pytest.raises(GuardFailed, match="refers lesion 1 to no segment"):
        placement.check([*result.values()], source, findings)


def test_a_diameter_that_was_not_drawn_is_kept_here(case, result):
    findings, source, _ = case
    for element in result["viewer"].iterall():
        if element.keyword == "CodeMeaning" and element.value == "Short Axis":
            element.value = "Long Axis"
    for element in result["viewer"].iterall():
        if element.keyword == "CodeValue" and element.value == codes.SHORT_AXIS.value:
            element.value = codes.LONG_AXIS.value
    with pytest.raises(GuardFailed, match="cannot be checked"):
        placement.check([*result.values()], source, findings)


def test_a_report_that_leaves_out_a_lesion_is_kept_here(case, result):
    findings, source, _ = case
    for container in result["viewer"].ContentSequence:
        if container.ConceptNameCodeSequence[0].CodeValue == codes.IMAGING_MEASUREMENTS.value:
            del container.ContentSequence[1]
    with pytest.raises(GuardFailed, match=r"tells of lesions \[1\], the findings hold 2"):
        placement.check([*result.values()], source, findings)


@pytest.mark.parametrize("breakage", ["half", "one pixel", "another slice"])
def test_a_diameter_drawn_elsewhere_is_kept_here(case, result, breakage):
    findings, source, _ = case
    for element in result["viewer"].iterall():
        if element.keyword == "GraphicData" and breakage == "half":
            element.value = [x / 2 for x in element.value]
        if element.keyword == "GraphicData" and breakage == "one pixel":
            element.value = [element.value[0] + 1, *element.value[1:]]
    if breakage == "another slice":
        lesion = findings.lesions[0]
        for element in result["viewer"].iterall():
            if element.keyword == "ReferencedSOPInstanceUID" and element.value == lesion.slice_sop_uid:
                element.value = source[lesion.slice_index + 1].SOPInstanceUID
    with pytest.raises(GuardFailed, match="a diameter of lesion 1 is drawn"):
        placement.check([*result.values()], source, findings)


def test_cosines_that_differ_as_much_as_a_series_may_pass_whichever_image_comes_first(case):
    findings, source, _ = case
    for ds in source[1::2]:
        ds.ImageOrientationPatient = [float(x) + 4e-4 for x in ds.ImageOrientationPatient]
    (seg,) = dicom_seg.build(findings, source, IDENTITY, made.PRODUCED_AT)
    for images in (source, source[::-1]):
        placement.check([as_written(seg)], images, findings)
