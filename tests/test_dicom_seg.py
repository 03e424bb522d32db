from __future__ import annotations

import subprocess
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import highdicom as hd
import made_findings as made
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from salsa_node import dicom_seg, placement, uids
from salsa_node.criteria import Criteria
from salsa_node.dicom_result import Identity
from salsa_node.errors import EncodingError, GuardFailed
from salsa_node.findings import Disease, measure
from salsa_node.pipelines import Masks, Provenance
from salsa_node.series import headers, inspect, read_volume
from salsa_node.volume import Grid, LabelVolume

IDENTITY = Identity()


def build(findings, source, **kwargs) -> Dataset | None:
    """The one segmentation of these findings, or None."""
    built = dicom_seg.build(findings, source, IDENTITY, made.PRODUCED_AT, **kwargs)
    assert len(built) <= 1
    return built[0] if built else None


def written(ds: Dataset) -> bytes:
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def reread(ds: Dataset) -> Dataset:
    return pydicom.dcmread(BytesIO(written(ds)))


def frames(seg: Dataset):
    """(segment number, mask, affine (row, column) -> LPS mm, source UID) of every frame, from its headers alone."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for mask, item in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
        measures = (item if "PixelMeasuresSequence" in item else shared).PixelMeasuresSequence[0]
        plane = (item if "PlaneOrientationSequence" in item else shared).PlaneOrientationSequence[0]
        cosines = np.array(plane.ImageOrientationPatient, dtype=float)
        affine = np.eye(4)[:, [0, 1, 3]]
        affine[:3, 0] = cosines[3:] * float(measures.PixelSpacing[0])
        affine[:3, 1] = cosines[:3] * float(measures.PixelSpacing[1])
        affine[:3, 2] = [float(x) for x in item.PlanePositionSequence[0].ImagePositionPatient]
        image = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        segment = (item if "SegmentIdentificationSequence" in item else shared).SegmentIdentificationSequence[0]
        yield int(segment.ReferencedSegmentNumber), mask, affine, str(image)


def positions(seg: Dataset, number: int) -> np.ndarray:
    """(voxels, 3): where the voxels of a segment lie, from the object's own headers."""
    found = []
    for segment, mask, affine, _ in frames(seg):
        if segment == number:
            rows, columns = np.nonzero(mask)
            found.append((affine @ np.stack([rows, columns, np.ones_like(rows)]))[:3].T)
    return np.concatenate(found)


def segment_map(seg: Dataset, grid: Grid) -> np.ndarray:
    """Every voxel's segment number on `grid`, found through positions; fails where one is not a voxel of the grid."""
    out = np.zeros(grid.shape, dtype=np.uint8)
    for number in sorted({int(item.SegmentNumber) for item in seg.SegmentSequence}):
        points = np.c_[positions(seg, number), np.ones(len(positions(seg, number)))]
        index = np.linalg.solve(grid.affine_lps_mm, points.T)[:3]
        assert np.abs(index - np.rint(index)).max() < 0.01
        out[tuple(np.rint(index).astype(int))] = number
    return out


def expected_map(findings) -> np.ndarray:
    numbers = {Disease.MEASURABLE: 1, Disease.NON_MEASURABLE: 2}
    out = np.zeros(findings.lesion_labels.grid.shape, dtype=np.uint8)
    for lesion in findings.lesions:
        out[findings.lesion_labels.labels == lesion.number] = numbers[lesion.disease]
    return out


@pytest.mark.parametrize("orientation", made.ORIENTATIONS)
def test_every_voxel_comes_back_where_it_was(orientation):
    findings, source = made.case(orientation)
    seg = reread(build(findings, source))
    grid = findings.lesion_labels.grid
    assert (segment_map(seg, grid) == expected_map(findings)).all()
    # and as another library understands it
    volume = hd.seg.Segmentation.from_dataset(seg).get_volume(combine_segments=True)
    inside = np.argwhere(volume.array > 0)
    found = volume.affine @ np.c_[inside, np.ones(len(inside))].T
    index = np.rint(np.linalg.solve(grid.affine_lps_mm, found)[:3]).astype(int)
    assert (expected_map(findings)[tuple(index)] == volume.array[tuple(inside.T)]).all()
    assert len(inside) == (expected_map(findings) > 0).sum()


@pytest.mark.parametrize("orientation", made.ORIENTATIONS)
def test_the_centroid_by_its_own_headers_is_the_lesions(orientation):
    findings, source = made.case(orientation)
    seg = reread(build(findings, source))
    half_voxel_mm = min(findings.lesion_labels.grid.spacing_mm) / 2
    for lesion, number in zip(findings.lesions, (1, 2), strict=True):
        apart_mm = np.linalg.norm(positions(seg, number).mean(axis=0) - lesion.centroid_lps_mm)
        assert apart_mm < half_voxel_mm


@pytest.mark.parametrize("instance_numbers", ["rising", "falling"])
def test_each_frame_refers_to_the_image_it_lies_on(instance_numbers):
    grid = made.grid()
    source = made.headers(grid, instance_numbers=instance_numbers)
    seg = reread(build(made.findings(grid, source, made.MEASURABLE_BOX, made.SMALL_BOX), source))
    by_uid = {ds.SOPInstanceUID: ds for ds in source}
    seen = list(frames(seg))
    assert len(seen) == seg.NumberOfFrames == 5 + 2  # empty frames are left out
    for _, mask, affine, image in seen:
        assert mask.any()
        assert affine[:3, 2].tolist() == [float(x) for x in by_uid[image].ImagePositionPatient]
    listed = {item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert listed == {image for _, _, _, image in seen}
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == source[0].SeriesInstanceUID


def test_its_own_headers_give_the_volume_and_not_the_slice_thickness():
    findings, source = made.case()
    seg = reread(build(findings, source))
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (float(measures.SliceThickness), float(measures.SpacingBetweenSlices)) == (2.5, 2.5)
    voxel_mm3 = float(np.prod([float(x) for x in measures.PixelSpacing])) * float(measures.SpacingBetweenSlices)
    volume_mm3 = sum(mask.sum() for number, mask, *_ in frames(seg) if number == 1) * voxel_mm3
    assert volume_mm3 == pytest.approx(findings.lesions[0].volume_mm3)
    assert volume_mm3 == pytest.approx(5 * 14 * 12 * 2.5 * 0.9 * 1.1)


def test_segments_say_what_they_are():
    findings, source = made.case()
    seg = reread(build(findings, source, include_organ=True))
    assert dicom_seg.segment_numbers(seg) == {"Measurable lesions": 1, "Non-measurable lesions": 2, "Liver": 3}
    lesion, _, liver = seg.SegmentSequence
    assert lesion.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    assert lesion.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"
    assert lesion.AnatomicRegionSequence[0].CodeValue == "10200004"
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    colours = [
        hd.color.CIELabColor.from_dicom_value(tuple(s.RecommendedDisplayCIELabValue)).to_rgb()
        for s in seg.SegmentSequence
    ]
    assert np.abs(np.array(colours) - [(255, 60, 60), (255, 220, 0), (221, 130, 101)]).max() <= 2
    algorithm = lesion.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("demo", "0.1.0")
    assert "lesions/checkpoint_final.pth sha256:0123456789ab" in algorithm.AlgorithmParameters
    assert seg.SegmentationType == "BINARY"
    assert seg.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
    assert seg.FrameOfReferenceUID == source[0].FrameOfReferenceUID


def test_a_demo_model_marks_every_part_and_a_released_one_does_not():
    findings, source = made.case()
    seg = build(findings, source)
    texts = [seg.SeriesDescription, seg.ContentDescription, *(s.SegmentDescription for s in seg.SegmentSequence)]
    assert all("DEMO MODEL - NOT FOR CLINICAL USE" in text for text in texts)
    assert max(len(seg.SeriesDescription), len(seg.ContentDescription)) <= 64
    released, source = made.case(provenance=Provenance("salsa", "1.0"))
    assert "DEMO" not in str(build(released, source))


def test_an_absent_class_has_no_segment():
    grid = made.grid()
    source = made.headers(grid)
    small = build(made.findings(grid, source, made.SMALL_BOX), source)
    assert dicom_seg.segment_numbers(small) == {"Non-measurable lesions": 1}
    large = build(made.findings(grid, source, made.MEASURABLE_BOX), source)
    assert dicom_seg.segment_numbers(large) == {"Measurable lesions": 1}


def test_nothing_found_is_no_object_unless_the_liver_is_asked_for():
    grid = made.grid()
    source = made.headers(grid)
    nothing = made.findings(grid, source)
    assert build(nothing, source) is None
    assert dicom_seg.segment_numbers(build(nothing, source, include_organ=True)) == {"Liver": 1}
    assert build(replace(nothing, organ=None), source, include_organ=True) is None


def test_the_liver_keeps_the_voxels_that_are_also_lesion():
    findings, source = made.case()
    seg = reread(build(findings, source, include_organ=True))
    assert seg.SegmentsOverlap == "YES"
    assert len(positions(seg, 3)) == findings.organ.labels.sum()
    assert len(positions(seg, 1)) == findings.lesions[0].voxels
    assert seg.SOPInstanceUID != build(findings, source).SOPInstanceUID  # other content, other object


def moved(source: list[Dataset], axis: int, mm: float) -> list[Dataset]:
    for ds in source:
        position = [float(x) for x in ds.ImagePositionPatient]
        position[axis] += mm
        ds.ImagePositionPatient = position
    return source


def swapped(source: list[Dataset]) -> list[Dataset]:
    source[3], source[4] = source[4], source[3]
    return source


def changed(source: list[Dataset], keyword: str, value: object, which: slice = slice(None)) -> list[Dataset]:
    for ds in source[which]:
        setattr(ds, keyword, value)
    return source


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: moved(s, 0, 0.6), "0.600 mm from slice 0"),
        (lambda s: moved(s, 2, -2.5), "2.500 mm from slice 0"),
        (swapped, "2.500 mm from slice 3"),
        (lambda s: s[::-1], "from slice 0"),
        (lambda s: s[:-1], "19 source images for a grid of 20"),
        (lambda s: changed(s, "FrameOfReferenceUID", "1.2.3"), "frame of reference"),
        (lambda s: changed(s, "Rows", 47), "47 x 40 pixels"),
        (lambda s: changed(s, "PixelSpacing", [1.1, 0.9]), "mm from slice 0"),
        (lambda s: changed(s, "ImageOrientationPatient", [-1, 0, 0, 0, 1, 0]), "mm from slice 0"),
        (lambda s: changed(s, "PatientID", "P-2", slice(7, 8)), "images 0 and 7 differ in PatientID"),
        (lambda s: changed(s, "SeriesInstanceUID", "1.2.3", slice(7, 8)), "differ in SeriesInstanceUID"),
        (lambda s: changed(s, "ImagePositionPatient", None, slice(7, 8)), "image 7 has no ImagePositionPatient"),
        (lambda s: changed(s, "SOPInstanceUID", "1.2.3", slice(5, 6)), "lesion 1 names another image"),
    ],
)
def test_a_source_that_is_not_the_findings_own_is_refused(spoil, says):
    findings, source = made.case()
    with pytest.raises(EncodingError, match=says):
        build(findings, spoil(source))


def test_findings_at_odds_with_their_label_map_are_refused():
    findings, source = made.case()
    first, second = findings.lesions
    with pytest.raises(EncodingError, match="numbered 1 to 2"):
        build(replace(findings, lesions=(second, first)), source)
    with pytest.raises(EncodingError, match="value 2, but there are 1"):
        build(replace(findings, lesions=(first,)), source)
    with pytest.raises(EncodingError, match="839 voxels, the label map shows 840"):
        build(replace(findings, lesions=(replace(first, voxels=839), second)), source)


def test_directions_rounded_otherwise_on_another_slice_are_one_orientation():
    findings, source = made.case()
    changed(source, "ImageOrientationPatient", ["1", "0.0002", "0", "-0.0002", "1", "0"], slice(7, 8))
    seg = reread(build(findings, source))
    assert (segment_map(seg, findings.lesion_labels.grid) == expected_map(findings)).all()


def test_a_source_without_frame_of_reference_gets_one_from_its_series():
    grid = replace(made.grid(), frame_of_reference_uid=None)
    source = made.headers(grid)
    for ds in source:
        del ds.FrameOfReferenceUID
    seg = build(made.findings(grid, source, made.MEASURABLE_BOX), source)
    assert seg.FrameOfReferenceUID == uids.derive("frame of reference", source[0].SeriesInstanceUID)


def test_the_same_run_gives_the_same_bytes():
    assert written(build(*made.case())) == written(build(*made.case()))
    assert written(build(*made.case(), include_organ=True)) == written(build(*made.case(), include_organ=True))


def test_another_criterion_makes_another_object():
    one, other = build(*made.case()), build(*made.case(criteria=Criteria(min_diameter_mm=4.0)))
    assert one.SOPInstanceUID != other.SOPInstanceUID
    assert one.SeriesInstanceUID != other.SeriesInstanceUID


def dciodvfy(path: Path, program: str) -> list[str]:
    done = subprocess.run([program, path], capture_output=True, text=True, check=False)
    return [text for text in (done.stdout + done.stderr).splitlines() if text.startswith(("Error", "Warning"))]


@pytest.mark.parametrize("include_organ", [False, True])
@pytest.mark.parametrize("orientation", ["axial", "sagittal", "oblique"])
def test_dciodvfy_has_nothing_to_say(tool, tmp_path, orientation, include_organ):
    path = tmp_path / "seg.dcm"
    path.write_bytes(written(build(*made.case(orientation), include_organ=include_organ)))
    assert dciodvfy(path, tool("dciodvfy", "dicom3tools")) == []


def test_dcmdump_reads_it(tool, tmp_path):
    path = tmp_path / "seg.dcm"
    path.write_bytes(written(build(*made.case())))
    done = subprocess.run([tool("dcmdump"), path], capture_output=True, check=False)
    assert done.returncode == 0
    assert not done.stderr


def with_uids(folder: Path, into: Path) -> list[Path]:
    """Copies of set 01, whose publisher emptied the UIDs."""
    paths = []
    for n, path in enumerate(sorted(folder.iterdir())):
        ds = pydicom.dcmread(path)
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID = uids.derive("set 01", "study"), uids.derive("set 01", "series")
        paths.append(into / f"{n}.dcm")
        ds.save_as(paths[-1])
    return paths


def test_on_a_real_compressed_series(testdata, tool, tmp_path):
    series = inspect(with_uids(testdata / "01_abdomen_ct_siemens_j2k" / "example_ct_dicom", tmp_path))
    source = headers(series)
    drawn = np.zeros(series.grid.shape, dtype=np.uint8)
    drawn[8:14, 200:230, 150:170] = 1
    findings = measure(
        read_volume(series), Masks(None, LabelVolume(drawn, series.grid), Provenance("given_masks", "1")), Criteria()
    )
    seg = reread(build(findings, source))
    assert (segment_map(seg, series.grid) == drawn).all()
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices == pytest.approx(2.0)
    assert seg.StudyInstanceUID == source[0].StudyInstanceUID
    path = tmp_path / "seg.dcm"
    path.write_bytes(written(seg))
    assert [text for text in dciodvfy(path, tool("dciodvfy", "dicom3tools")) if text.startswith("Error")] == []


def label_map(findings, source, **kwargs) -> Dataset:
    return dicom_seg.build_label_map(findings, source, IDENTITY, made.PRODUCED_AT, **kwargs)


@pytest.mark.parametrize("include_organ", [False, True])
@pytest.mark.parametrize("orientation", made.ORIENTATIONS)
def test_a_label_map_holds_every_voxel_lesions_above_the_liver(orientation, include_organ):
    findings, source = made.case(orientation)
    seg = reread(label_map(findings, source, include_organ=include_organ))
    expected = expected_map(findings)
    if include_organ:
        expected[(expected == 0) & (findings.organ.labels == 1)] = 3
    grid, slices = findings.lesion_labels.grid, {ds.SOPInstanceUID: k for k, ds in enumerate(source)}
    found = np.zeros(grid.shape, dtype=np.uint8)
    for pixels, item in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        image = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert item.PlanePositionSequence[0].ImagePositionPatient == source[slices[image]].ImagePositionPatient
        found[slices[image]] = pixels
    np.testing.assert_array_equal(found, expected)
    assert int(seg.NumberOfFrames) == np.count_nonzero(expected.any(axis=(1, 2)))
    # and as another library understands it, by position
    volume = hd.seg.Segmentation.from_dataset(seg).get_volume(combine_segments=True)
    inside = np.argwhere(volume.array > 0)
    index = np.linalg.solve(grid.affine_lps_mm, volume.affine @ np.c_[inside, np.ones(len(inside))].T)[:3]
    index = np.rint(index).astype(int)
    np.testing.assert_array_equal(expected[tuple(index)], volume.array[tuple(inside.T)])
    assert len(inside) == np.count_nonzero(expected)
    placement.check([seg], source, findings)


def test_a_label_map_names_and_colours_its_segments_and_is_the_same_every_time():
    findings, source = made.case()
    seg = label_map(findings, source, include_organ=True)
    assert (seg.SegmentationType, seg.SOPClassUID) == ("LABELMAP", "1.2.840.10008.5.1.4.1.1.66.7")
    assert seg.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.5"
    names = dicom_seg.segment_numbers(seg)
    assert names == {"Background": 0, "Measurable lesions": 1, "Non-measurable lesions": 2, "Liver": 3}
    assert seg.SeriesDescription == "AI liver lesions label map - DEMO MODEL - NOT FOR CLINICAL USE"
    assert int(seg.SeriesNumber) == 9008
    binary = build(findings, source, include_organ=True)
    colours = [[s.RecommendedDisplayCIELabValue for s in of.SegmentSequence] for of in (seg, binary)]
    assert colours[0][1:] == colours[1]
    assert written(seg) == written(label_map(*made.case(), include_organ=True))
    assert len({ds.SOPInstanceUID for ds in (seg, binary, label_map(findings, source))}) == 3
    grid = made.grid()
    assert label_map(made.findings(grid, source), source) is None


def test_a_label_map_with_another_lesion_than_the_findings_is_caught():
    findings, source = made.case()
    seg = label_map(findings, source, include_organ=True)
    seg.decompress(generate_instance_uid=False)
    pixels = seg.pixel_array.copy()
    pixels[pixels == 2] = 3  # the small lesion is now liver
    seg.PixelData = pixels.tobytes()
    with pytest.raises(GuardFailed, match=f"differ in {findings.lesions[1].voxels} voxels"):
        placement.check([seg], source, findings)


def long_case(measurable: slice, small: slice, liver: slice, slices: int = 600):
    """Two classes and a liver in that many slices each: a large box, a wire of one voxel a slice, a block."""
    where = replace(made.grid(spacing_mm=(1.0, 0.9, 1.1)), shape=(slices, 24, 20))
    source = made.headers(where)
    found = made.findings(where, source, (measurable, slice(2, 16), slice(2, 16)), (small, slice(20, 21), slice(3, 4)))
    organ = made.boxes(where, (liver, slice(1, 22), slice(1, 18)))
    return replace(found, organ=organ), source


@pytest.mark.parametrize(
    ("measurable", "small", "liver", "expected"),
    [
        (100, 100, 200, [[100, 100, 200]]),
        (100, 100, 201, [[100, 100], [201]]),
        (200, 200, 300, [[200, 200], [300]]),
        (201, 200, 100, [[201], [200], [100]]),
        (401, 1, 450, [[401], [1], [450]]),
    ],
)
def test_segments_are_shared_out_over_objects_that_viewers_can_show(measurable, small, liver, expected):
    findings, source = long_case(slice(5, 5 + measurable), slice(0, small), slice(0, liver))
    built = dicom_seg.build(findings, source, IDENTITY, made.PRODUCED_AT, include_organ=True)
    numbers = [[n for n, *_ in frames(seg)] for seg in built]
    assert [[found.count(n) for n in sorted(set(found))] for found in numbers] == expected
    together = np.zeros(findings.lesion_labels.grid.shape, dtype=np.uint8)
    for seg in built:
        for label, number in dicom_seg.segment_numbers(seg).items():
            if label != "Liver":
                points = np.c_[positions(seg, number), np.ones(len(positions(seg, number)))]
                index = np.rint(np.linalg.solve(findings.lesion_labels.grid.affine_lps_mm, points.T)[:3]).astype(int)
                together[tuple(index)] = 1 + (label == "Non-measurable lesions")
        assert dicom_seg.made_from(seg, findings)
    assert (together == expected_map(findings)).all()
    assert len({seg.SOPInstanceUID for seg in built}) == len({seg.SeriesInstanceUID for seg in built}) == len(expected)
    assert [int(seg.SeriesNumber) for seg in built] == [9001 + 100 * n for n in range(len(expected))]
    assert (len(dicom_seg.flags(findings, include_organ=True))) == sum(n > 400 for part in expected for n in part)


def test_a_segment_that_some_viewer_will_not_show_is_flagged_and_stays_whole():
    findings, source = long_case(slice(5, 410), slice(0, 1), slice(0, 500))
    (flag,) = dicom_seg.flags(findings)
    assert flag.name == "many_frames"
    assert "'Measurable lesions' has 405 frames" in flag.text
    whole, _ = dicom_seg.build(findings, source, IDENTITY, made.PRODUCED_AT)
    assert int(whole.NumberOfFrames) == 405
    assert [flag.text[:22] for flag in dicom_seg.flags(findings, include_organ=True)][1] == "The segmentation 'Live"


def test_a_shared_out_result_passes_the_guard_and_dciodvfy(tool, tmp_path):
    findings, source = long_case(slice(5, 206), slice(0, 200), slice(0, 100))
    built = dicom_seg.build(findings, source, IDENTITY, made.PRODUCED_AT, include_organ=True)
    placement.check([reread(seg) for seg in built], source, findings)
    with pytest.raises(GuardFailed, match="leaves out lesion 2: 200 voxels"):
        placement.check([built[0], built[2]], source, findings)
    for seg in built:
        path = tmp_path / f"{seg.InstanceNumber}.dcm"
        path.write_bytes(written(seg))
        assert dciodvfy(path, tool("dciodvfy", "dicom3tools")) == []
