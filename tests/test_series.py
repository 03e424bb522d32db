"""A series on disk becomes the right volume, or a verdict that says what was found."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from made_series import ORIENTATIONS, edit, files, given_uids, made, move
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from salsa_node.candidate import by_series, read_candidate
from salsa_node.errors import SeriesRejected
from salsa_node.regrid import onto
from salsa_node.series import PADDING_HU, Series, headers, image_numbers, inspect, read_volume
from salsa_node.volume import LabelVolume


def reason(paths: list[Path]) -> str:
    """Why these files are rejected, on inspection or on reading; never with the patient in it."""
    with pytest.raises(SeriesRejected) as caught:
        read_volume(inspect(paths))
    assert "Nobody" not in str(caught.value)
    assert "X-1" not in str(caught.value)
    assert caught.value.reason == str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("axes", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_every_voxel_comes_back_where_it_was(axes, tmp_path):
    ct, paths = made(tmp_path, axes)
    random.Random(0).shuffle(paths)
    read = read_volume(inspect(paths))
    assert read.voxels_hu.dtype == np.int16
    assert read.grid.frame_of_reference_uid == "2.25.3"
    # A slice's own directions fix the slice axis, so a mirrored series comes back in reversed slice order.
    columns, rows, slices = (read.grid.affine_lps_mm[:3, a] / read.grid.spacing_mm[a] for a in (2, 1, 0))
    assert np.allclose(np.cross(columns, rows), slices)
    was = LabelVolume((ct.voxels_hu.astype(np.int32) + 2000).astype(np.uint16), ct.grid)
    assert np.array_equal(onto(was, read.grid).labels.astype(np.int32) - 2000, read.voxels_hu)


def test_instance_numbers_decide_nothing(tmp_path):
    ct, paths = made(tmp_path)
    for n, path in enumerate(paths):
        edit(path, lambda ds, n=n: setattr(ds, "InstanceNumber", (n * 5) % 7))
    series = inspect(sorted(paths, reverse=True))
    assert [i.path for i in series.instances] == paths
    assert np.array_equal(read_volume(series).voxels_hu, ct.voxels_hu)
    assert [str(ds.SOPInstanceUID) for ds in headers(series)] == [i.sop_instance_uid for i in series.instances]
    assert read_volume(series).source_digest == series.source_digest


def test_spacing_comes_from_positions_not_from_thickness(tmp_path):
    _, paths = made(tmp_path, step_mm=2.5)
    for path in paths:
        edit(path, lambda ds: setattr(ds, "SliceThickness", 5))
    assert inspect(paths).grid.spacing_mm == pytest.approx((2.5, 0.7, 0.9))


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_one_grid(tmp_path):
    _, paths = made(tmp_path, slices=12, step_mm=0.625)
    for path in paths:
        edit(
            path, lambda ds: setattr(ds, "ImagePositionPatient", [round(float(x), 1) for x in ds.ImagePositionPatient])
        )
    assert inspect(paths).grid.spacing_mm[0] == pytest.approx(0.625, abs=0.02)


def test_each_slice_has_its_own_rescale_and_fractions_survive(tmp_path):
    ct, paths = made(tmp_path)
    edit(paths[2], lambda ds: (setattr(ds, "RescaleSlope", 2), setattr(ds, "RescaleIntercept", -10)))
    read = read_volume(inspect(paths))
    assert read.voxels_hu.dtype == np.int16
    assert np.array_equal(read.voxels_hu[2], ct.voxels_hu[2] * 2 - 10)
    assert np.array_equal(read.voxels_hu[3], ct.voxels_hu[3])
    edit(paths[2], lambda ds: setattr(ds, "RescaleSlope", 0.5))
    read = read_volume(inspect(paths))
    assert read.voxels_hu.dtype == np.float32
    assert np.array_equal(read.voxels_hu[2], ct.voxels_hu[2] * np.float32(0.5) - 10)


def test_padding_becomes_air(tmp_path):
    ct, paths = made(tmp_path)

    def pad(ds: pydicom.Dataset) -> None:
        stored = ds.pixel_array.copy()
        stored[0, :3] = (-2000, -1990, -1900)
        ds.PixelData = stored.tobytes()
        ds.add_new("PixelPaddingValue", "US", 63536)  # -2000 in the wrong VR, as some writers put it
        ds.add_new("PixelPaddingRangeLimit", "SS", -1950)

    edit(paths[0], pad)
    read = read_volume(inspect(paths)).voxels_hu
    assert read[0, 0, :3].tolist() == [PADDING_HU, PADDING_HU, -1900]
    assert np.array_equal(read[0, 1:], ct.voxels_hu[0, 1:])


def test_monochrome1_is_no_other_number(tmp_path):
    ct, paths = made(tmp_path)
    for path in paths:
        edit(path, lambda ds: setattr(ds, "PhotometricInterpretation", "MONOCHROME1"))
    assert np.array_equal(read_volume(inspect(paths)).voxels_hu, ct.voxels_hu)


def drop(keyword: str) -> Callable[[pydicom.Dataset], object]:
    return lambda ds: delattr(ds, keyword)


def put(keyword: str, value: object) -> Callable[[pydicom.Dataset], object]:
    return lambda ds: setattr(ds, keyword, value)


ONE_BAD_IMAGE = {
    "another patient": (put("PatientID", "X-2"), "images of 2 patients in one series; expected one"),
    "another spelling of the name": (put("PatientName", "Nobody^known"), "images of 2 values of Patient's Name in one"),
    "no name": (drop("PatientName"), "images of 2 values of Patient's Name in one series"),
    "another birth date": (put("PatientBirthDate", "19600102"), "images of 2 values of Patient's Birth Date in one"),
    "another accession number": (put("AccessionNumber", "A-1"), "images of 2 values of Accession Number in one series"),
    "another character set": (put("SpecificCharacterSet", "ISO_IR 100"), "2 values of Specific Character Set in one"),
    "another study": (put("StudyInstanceUID", "2.25.9"), "images of 2 studies"),
    "another series": (put("SeriesInstanceUID", "2.25.9"), "images of 2 series"),
    "another frame of reference": (put("FrameOfReferenceUID", "2.25.9"), "images of 2 frames of reference"),
    "the same instance twice": (put("SOPInstanceUID", "the first"), "6 files carry 5 SOP Instance UIDs"),
    "no instance UID": (drop("SOPInstanceUID"), "the image with Instance Number 4 has no SOP Instance UID"),
    "another modality": (put("Modality", "PT"), "1 of 6 image(s) of modality PT; expected CT"),
    "a screenshot": (put("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7"), "1 of 6 image(s) of SOP class"),
    "a localizer": (put("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), "1 of 6 image(s) of Image Type LOCALIZER"),
    "many frames": (put("NumberOfFrames", 2), "1 of 6 image(s) of 2 frame(s) (multi-frame)"),
    "colour": (put("SamplesPerPixel", 3), "1 of 6 image(s) in colour"),
    "electron density": (put("RescaleType", "ED"), "Rescale Type is not HU"),
    "no position": (drop("ImagePositionPatient"), "1 of 6 images have no Image Position (Patient)"),
    "half a position": (put("ImagePositionPatient", [1, 2]), "1 of 6 images have no Image Position (Patient) of 3"),
    "no orientation": (drop("ImageOrientationPatient"), "1 of 6 images have no Image Orientation (Patient)"),
    "no pixel spacing": (drop("PixelSpacing"), "1 of 6 images have no Pixel Spacing"),
    "no slope": (drop("RescaleSlope"), "1 of 6 images have no Rescale Slope"),
    "slope zero": (put("RescaleSlope", 0), "the image with Instance Number 4 (slice 4 of 6) has a Rescale Slope of 0"),
    "another orientation": (put("ImageOrientationPatient", [1, 0, 0, 0, 0.8, 0.6]), "different orientations"),
    "turned by 2 degrees": (
        put("ImageOrientationPatient", [0.99939, 0.0349, 0, -0.0349, 0.99939, 0]),
        "different orientations in one series (direction cosines differ by 0.0349)",
    ),
    "another pixel spacing": (
        put("PixelSpacing", [0.7, 0.8]),
        "different pixel spacings in one series (they differ by 0.1",
    ),
    "another size": (put("Rows", 11), "images of 2 row counts"),
    "no pixel data": (drop("PixelData"), "the image with Instance Number 4 has no pixel data"),
    "padding in pieces": (lambda ds: ds.add_new("PixelPaddingValue", "SS", [1, 2]), "malformed Pixel Padding Value"),
    "a padding range in pieces": (
        lambda ds: ds.add_new("PixelPaddingRangeLimit", "SS", [1, 2]),
        "1 of 6 images have a malformed Pixel Padding Range Limit; expected one number",
    ),
    "padding in words": (
        lambda ds: ds.add_new("PixelPaddingValue", "LO", "none"),
        "(slice 4 of 6) has a malformed Pixel Padding Value; expected one number",
    ),
}


@pytest.mark.parametrize("case", ONE_BAD_IMAGE)
def test_one_image_that_does_not_belong_rejects_the_series(case, tmp_path):
    _, paths = made(tmp_path)
    change, words = ONE_BAD_IMAGE[case]
    if case == "the same instance twice":
        change = put("SOPInstanceUID", pydicom.dcmread(paths[0]).SOPInstanceUID)
    edit(paths[3], change)
    assert words in reason(paths)


@pytest.mark.parametrize("keyword", ["PatientBirthDate", "AccessionNumber", "FrameOfReferenceUID"])
def test_an_attribute_that_is_absent_here_and_empty_there_is_the_same(keyword, tmp_path):
    _, paths = made(tmp_path)
    for n, path in enumerate(paths):
        edit(path, put(keyword, "") if n % 2 else drop(keyword))
    assert inspect(paths).grid.shape == (6, 12, 10)


@pytest.mark.parametrize("change", [drop("FrameOfReferenceUID"), put("FrameOfReferenceUID", "")], ids=["no", "empty"])
def test_no_frame_of_reference_is_none(change, tmp_path):
    _, paths = made(tmp_path)
    for path in paths:
        edit(path, change)
    assert inspect(paths).grid.frame_of_reference_uid is None


ALL_BAD = {
    "not perpendicular": (put("ImageOrientationPatient", [1, 0, 0, 0.6, 0.8, 0]), "not two perpendicular unit vectors"),
    "no direction": (put("ImageOrientationPatient", [0, 0, 0, 0, 0, 0]), "not two perpendicular unit vectors"),
    "pixels without size": (put("PixelSpacing", [0, 0.9]), "expected two positive numbers"),
}


@pytest.mark.parametrize("case", ALL_BAD)
def test_a_series_that_is_wrong_throughout_is_rejected(case, tmp_path):
    _, paths = made(tmp_path)
    for path in paths:
        edit(path, ALL_BAD[case][0])
    assert ALL_BAD[case][1] in reason(paths)


def test_missing_slices_are_counted(tmp_path):
    _, paths = made(tmp_path, slices=12)
    del paths[7:9]
    assert (
        reason(paths) == "2 of 12 slices missing: gap of 7.5 mm between images 7 and 10, spacing is 2.5 mm; "
        'to have it resampled set series.irregular = "resample"'
    )


def test_a_gap_is_told_in_the_numbers_of_the_pacs_and_in_slices_where_there_are_none(tmp_path):
    _, paths = made(tmp_path, slices=12)
    del paths[7:9]
    for n, path in enumerate(paths):  # as many scanners number them: from the head down
        edit(path, lambda ds, n=n: setattr(ds, "InstanceNumber", 290 - n))
    assert "gap of 7.5 mm between images 284 and 283," in reason(paths)
    assert "gap of 7.5 mm between images 284 and 283," in reason(paths[::-1])
    edit(paths[3], lambda ds: setattr(ds, "InstanceNumber", 290))  # two images of one number: no reader finds either
    assert "gap of 7.5 mm between slices 7 and 8," in reason(paths)


@pytest.mark.parametrize(
    ("found", "numbers"),
    [(["3", "1", "-2"], (3, 1, -2)), (["3", "1", "3"], ()), (["3", "", "4"], ()), (["1", "2", "x"], ()), ([], ())],
)
def test_image_numbers_are_there_where_they_tell_all_images_apart(found, numbers):
    images = []
    for text in found:
        images.append(pydicom.Dataset())
        images[-1][0x00200013] = RawDataElement(Tag(0x00200013), "IS", len(text), text.encode(), 0, False, True)
    assert image_numbers(images) == numbers


def test_two_slices_are_no_volume(tmp_path):
    _, paths = made(tmp_path)
    assert reason(paths[:2]) == "2 slice(s); a volume needs at least 3"
    with pytest.raises(SeriesRejected, match=r"^0 slice\(s\)"):
        inspect([])


def test_a_position_taken_twice_is_rejected(tmp_path):
    _, paths = made(tmp_path)
    move(paths[3], 0, 0, -2.5)
    assert reason(paths).startswith("1 of 6 slices lie where another one lies")


def test_a_tilted_gantry_is_rejected_with_its_angle(tmp_path):
    _, paths = made(tmp_path)
    for n, path in enumerate(paths):
        move(path, 0, n * 2.5 * np.tan(np.radians(12.0)), 0)
    assert reason(paths).startswith(
        "slices are sheared by 12.0 degrees (gantry tilt), so that they lie up to 2.7 mm beside their"
    )


def test_uneven_steps_are_rejected(tmp_path):
    _, paths = made(tmp_path)
    move(paths[3], 0, 0, 0.9)
    assert (
        reason(paths) == "irregular slice spacing: steps from 1.60 to 3.40 mm, median 2.50 mm; expected one spacing; "
        'to have it resampled set series.irregular = "resample"'
    )


@pytest.mark.parametrize(
    "keep", [0, 40, 200, -7, -150], ids=["empty", "40 bytes", "200 bytes", "in the pixels", "most"]
)
def test_a_truncated_file_is_rejected(keep, tmp_path):
    _, paths = made(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:keep])
    named = "the image with Instance Number 2 is truncated: " if keep in (-7, -150) else "file 2 of 6 "
    assert reason(paths).startswith(named)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # its remarks on the damage
def test_damaged_bytes_end_in_a_verdict_and_nothing_else(tmp_path):
    ct, paths = made(tmp_path, slices=4)
    whole, chance, outcomes = paths[1].read_bytes(), random.Random(5), []
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 2, 20])):
            damaged[chance.randrange(128, len(whole) - 250)] = chance.randrange(256)
        paths[1].write_bytes(damaged)
        assert read_candidate(paths).paths == tuple(paths)
        assert sum(map(len, by_series(paths).values())) >= 3
        try:
            outcomes.append(read_volume(inspect(paths)).grid.shape == ct.grid.shape)
        except SeriesRejected:
            outcomes.append(False)
    assert 20 < sum(outcomes) < 80  # some bytes matter, some do not


def test_a_file_that_is_not_dicom_is_rejected_without_its_name(tmp_path):
    _, paths = made(tmp_path)
    named = tmp_path / "Nobody Known.txt"
    named.write_text("liver")
    assert reason([*paths, named]) == "file 7 of 7 is not a DICOM file"
    assert reason([*paths, tmp_path / "Nobody.dcm"]).startswith("file 7 of 7 cannot be read")


def test_a_transfer_syntax_nobody_knows_is_named(tmp_path):
    _, paths = made(tmp_path)
    for path in paths:
        edit(path, lambda ds: setattr(ds.file_meta, "TransferSyntaxUID", ExplicitVRLittleEndian))
    data = paths[5].read_bytes()
    uid = b"1.2.840.10008.1.2.1\0"
    assert data.count(uid) == 1
    paths[5].write_bytes(data.replace(uid, b"1.2.826.0.1.9999.9.9"))
    assert (
        "the image with Instance Number 6 (slice 6 of 6) cannot be decoded (transfer syntax 1.2.826.0.1.9999.9.9"
        in reason(paths)
    )


# The public sets -----------------------------------------------------------------------------------------------------

GOOD = {
    "02_liver_ct_seg_dcmqi/segmentations/ct-3slice": (
        (3, 512, 512),
        (1.0, 0.810547, 0.810547),
        (-235.199997, -226.800003, -128.690002),
    ),
    "02_liver_ct_seg_dcmqi/segmentations/23x38x3/image": ((3, 38, 23), (2.5, 0.7, 0.7), (46.4649, 5.01881, -177.75)),
    "02_liver_ct_seg_dcmqi/segmentations/24x38x3/image": ((3, 38, 24), (2.5, 0.7, 0.7), (46.4649, 5.01881, -177.75)),
    "05_philips_head_study_localizer_dose/S21570/S2010": (
        (28, 512, 512),
        (5.0, 0.451171875, 0.451171875),
        (-115.5, -1.85, 696.21),
    ),
}
BAD = {
    "01_abdomen_ct_siemens_j2k/example_ct_dicom": "the image with Instance Number 267 has no SOP Instance UID",
    "02_liver_ct_seg_dcmqi/segmentations/23x38x3/multiframe": "1 of 1 image(s) of 3 frame(s) "
    "(Legacy Converted Enhanced CT, multi-frame), "
    "which are not analysed; expected one image a slice, of "
    "CT Image Storage: have the scanner or the PACS send the series as single-frame CT",
    "03_tid1500_liver_sr/rsna2018_dataset1": "1 of 1 image(s) of modality SR; expected CT",
    "04_ge_tilt_variable_spacing": "slices are sheared by 18.5 degrees (gantry tilt), so that they lie up to 48.2 mm "
    "beside their stack; expected no shear; "
    "irregular slice spacing: steps from 1.08 to 7.00 mm, median 4.00 mm; expected one spacing; "
    'to have it resampled set series.tilt and series.irregular = "resample"',
    "05_philips_head_study_localizer_dose/S21570": "images of 3 series in one series; expected one",
    "05_philips_head_study_localizer_dose/S21570/S1000": "1 of 1 image(s) of Image Type LOCALIZER; "
    "expected slices of a volume",
    "05_philips_head_study_localizer_dose/S21570/S4010": "1 of 1 image(s) of SOP class 1.2.840.10008.5.1.4.1.1.7, "
    "such as a screenshot; expected CT Image Storage",
    "06_ct_bad_geometry/gantrytilting/001": "slices are sheared by 14.0 degrees (gantry tilt), "
    "so that they lie up to 3.6 mm beside their stack; expected no shear; "
    'to have it resampled set series.tilt = "resample"',
    "06_ct_bad_geometry/sliceincrement/001": "1 of 5 slices missing: gap of 10.0 mm between images 9 and 10, "
    "spacing is 5.0 mm; "
    'to have it resampled set series.irregular = "resample"',
    "06_ct_bad_geometry/sliceincrement/002": "slices are sheared by 15.5 degrees (gantry tilt), "
    "so that they lie up to 0.8 mm beside their stack; expected no shear; "
    "1 of 5 slices missing: gap of 1.5 mm between images 3 and 5, spacing is 0.7 mm; "
    'to have it resampled set series.tilt and series.irregular = "resample"',
    "06_ct_bad_geometry/notavolume/001": "all 4 slices lie at one position; expected one slice at each position",
    "07_ct_one_image_all_syntaxes/no-pixel-data.dcm": "1 of 1 image(s) of modality SR; expected CT",
    "07_ct_one_image_all_syntaxes/no-pixel-spacing.dcm": "1 of 1 image(s) of modality US; expected CT",
    "07_ct_one_image_all_syntaxes/CT0012.fragmented_no_bot_jpeg_baseline.51.dcm": "1 of 1 image(s) of 2 frame(s) "
    "(Enhanced CT, multi-frame), which are not analysed; expected one image a slice, of "
    "CT Image Storage: have the scanner or the PACS send the series as single-frame CT",
    "07_ct_one_image_all_syntaxes/CT1_J2KR": "1 slice(s); a volume needs at least 3",
    "08_odd_ct_and_seg_encodings/eCT_Supplemental.dcm": "1 of 1 image(s) of 2 frame(s) (Enhanced CT, multi-frame), "
    "which are not analysed; expected one image a slice, of "
    "CT Image Storage: have the scanner or the PACS send the series as single-frame CT",
    "08_odd_ct_and_seg_encodings/explicit_VR-UN.dcm": "1 slice(s); a volume needs at least 3",
    "08_odd_ct_and_seg_encodings/HTJ2K_08_RGB.dcm": "file 1 of 1 has no Series Instance UID",
    "08_odd_ct_and_seg_encodings/liver_expb.dcm": "1 of 1 image(s) of modality SEG; expected CT",
    "09_charsets_and_odd_ct/D_CLUNIE_CT1_RLE_FRAGS.dcm": "1 slice(s); a volume needs at least 3",
    "09_charsets_and_odd_ct/GH177_D_CLUNIE_CT1_IVRLE_BigEndian_undefined_length.dcm": "file 1 of 1 cannot be read as "
    "DICOM (OSError): it is truncated or damaged",
    "09_charsets_and_odd_ct/FreezePattern.dcm": "the image with Instance Number 1 has no SOP Instance UID",
    "09_charsets_and_odd_ct/GH178.dcm": "the image with Instance Number 1 has no pixel data",
    "09_charsets_and_odd_ct/GH179A.dcm": "the image with Instance Number 1 has no pixel data",
    "09_charsets_and_odd_ct/GH342.dcm": "1 of 1 image(s) of Image Type LOCALIZER; expected slices of a volume",
    "09_charsets_and_odd_ct/charset/chrGreek.dcm": "1 of 1 image(s) of modality OT; expected CT",
    "10_highdicom_seg_sr/ct_image.dcm": "1 slice(s); a volume needs at least 3",
    "10_highdicom_seg_sr/seg_image_ct_binary.dcm": "1 of 1 image(s) of modality SEG; expected CT",
    "11_oblique_nonsquare": "images of 3 studies in one series; expected one",
}
LOSSLESS = (
    "BigEndianExplicit",
    "DeflatedExplicitVRLittleEndian",
    "JPEG2000LosslessOnly",
    "JPEGLSLossless",
    "JPEGProcess14SV1",
    "JPEGProcess14T",
    "LittleEndianExplicit",
    "LittleEndianImplicit",
    "RLELossless",
)


def itk_read(series: Series) -> np.ndarray:
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([str(i.path) for i in series.instances])
    return SimpleITK.GetArrayFromImage(reader.Execute())


@pytest.mark.parametrize("folder", GOOD)
def test_a_public_series_is_the_volume_that_simpleitk_reads(folder, testdata):
    series = inspect(files(testdata / folder))
    shape, spacing_mm, first_lps_mm = GOOD[folder]
    assert series.grid.shape == shape
    assert series.grid.spacing_mm == pytest.approx(spacing_mm, abs=1e-6)
    assert series.grid.to_lps_mm((0, 0, 0)) == pytest.approx(first_lps_mm, abs=1e-6)
    expected = itk_read(series).astype(np.int32)
    expected[expected == -2000 - 1024] = PADDING_HU  # set 02 declares its padding as -2000 before rescale
    assert np.array_equal(read_volume(series).voxels_hu, expected)


@pytest.mark.parametrize("folder", BAD)
def test_a_public_series_that_is_no_volume_is_rejected_for_its_own_reason(folder, testdata):
    assert reason(files(testdata / folder)) == BAD[folder]


def test_the_abdomen_in_jpeg_2000_is_the_volume_that_simpleitk_reads(testdata, tmp_path):
    series = inspect(given_uids(files(testdata / "01_abdomen_ct_siemens_j2k/example_ct_dicom"), tmp_path))
    ct = read_volume(series)
    assert ct.grid.spacing_mm == pytest.approx((2.0, 0.9765625, 0.9765625))
    assert ct.grid.to_lps_mm((0, 0, 0)) == pytest.approx((-249.51171875, -437.51171875, -804.5))
    assert np.array_equal(ct.voxels_hu, itk_read(series))


def test_oblique_slices_of_non_square_pixels_lie_as_simpleitk_puts_them(testdata, tmp_path):
    series = inspect(given_uids(files(testdata / "11_oblique_nonsquare"), tmp_path))
    ct = read_volume(series)
    assert ct.voxels_hu.dtype == np.float32
    assert ct.grid.spacing_mm == pytest.approx((4.5, 3.5, 2.5), abs=1e-3)
    image = SimpleITK.ReadImage([str(i.path) for i in series.instances])
    assert ct.grid.to_lps_mm((2, 49, 99)) == pytest.approx(image.TransformIndexToPhysicalPoint((99, 49, 2)), abs=0.05)
    assert np.allclose(ct.voxels_hu, SimpleITK.GetArrayFromImage(image), atol=1e-4)


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_every_lossless_transfer_syntax_gives_the_same_numbers(syntax, testdata, tmp_path):
    folder = testdata / "07_ct_one_image_all_syntaxes"
    [source] = folder.glob(f"CTImage.dcm_{syntax}*")
    paths = given_uids([source] * 3, tmp_path)
    for n, path in enumerate(paths):
        move(path, 0, 0, 5 * n)
    read = read_volume(inspect(paths)).voxels_hu
    plain = pydicom.dcmread(folder / "CTImage.dcm")
    assert (read.min(), read.max()) == (-2000 - 1024, 2402 - 1024)
    assert np.array_equal(read[1], plain.pixel_array - 1024)


def test_deflated_images_that_are_cut_off_or_damaged_are_a_verdict_not_a_crash(tmp_path):
    ct, paths = made(tmp_path)
    for path in paths:
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.save_as(path)
    assert np.array_equal(read_volume(inspect(paths)).voxels_hu, ct.voxels_hu)
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[: len(whole) * 3 // 4])
    assert reason(paths) == "file 3 of 6 cannot be read as DICOM (error): it is truncated or damaged"


def test_two_ranges_in_one_series_are_told_apart_by_their_acquisitions(tmp_path):
    """Chest, then pelvis with a gap between: each is a volume, the two together are none."""
    _, paths = made(tmp_path, slices=10)
    for n, path in enumerate(paths):
        edit(path, put("AcquisitionNumber", 3 if n < 6 else 4))
        if n >= 6:
            move(path, 0, 0, 101.3)
    assert "gap of 103.8 mm between images 6 and 7" in reason(paths)
    assert (
        "; before the widest step (103.8 mm) lie images of Acquisition Number 3, behind it of Acquisition Number 4: "
        "send each range as a series of its own"
    ) in reason(paths)
    edit(paths[8], put("AcquisitionNumber", 3))
    assert "Acquisition" not in reason(paths), "the gap parts no acquisitions"
    for n, path in enumerate(paths):
        edit(path, put("AcquisitionNumber", n + 1))
    assert "Acquisition" not in reason(paths), "a scanner that counts every slice up"


def test_a_file_of_the_node_is_called_by_its_instance_and_not_by_its_place_in_our_order(tmp_path):
    _, paths = made(tmp_path)
    held = [path.rename(path.with_name(f"{pydicom.dcmread(path).SOPInstanceUID}.dcm")) for path in paths]
    uid = held[3].stem
    whole = held[3].read_bytes()
    held[3].write_bytes(b"no DICOM")
    assert reason(held) == f"the file of SOP Instance UID {uid} (one of 6) is not a DICOM file"
    assert (
        read_candidate([held[3]]).faults[0] == f"the file of SOP Instance UID {uid} (one of 1) cannot be read as DICOM"
    )
    held[3].write_bytes(whole[:-60])
    assert reason(held).startswith("the image with Instance Number 4 is truncated: ")


def test_an_enhanced_ct_of_one_frame_is_told_from_a_screenshot(tmp_path):
    _, paths = made(tmp_path)
    for path in paths:
        edit(path, put("SOPClassUID", "1.2.840.10008.5.1.4.1.1.2.1"))
    assert reason(paths) == (
        "6 of 6 image(s) of 1 frame(s) (Enhanced CT, multi-frame), which are not analysed; expected one image a slice, "
        "of CT Image Storage: have the scanner or the PACS send the series as single-frame CT"
    )
    [fault] = read_candidate(paths).faults
    assert fault.startswith("images of 1 frame(s) (Enhanced CT, multi-frame), which are not analysed")
