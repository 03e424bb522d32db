"""The viewers' report, the summary page, and what carries them: each is valid, and says what the findings say."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta, timezone
from io import BytesIO
from pathlib import Path

import made_findings as made
import numpy as np
import pydicom
import pypdfium2
import pytest
from pydicom.dataset import Dataset

from salsa_node import codes, dicom_ko, dicom_pdf, dicom_sc, dicom_seg, dicom_viewer_sr, page, picture
from salsa_node.analysis import Lineage, Terms, _objects
from salsa_node.criteria import Criteria, Rule
from salsa_node.dicom_result import CAVEAT, Identity, Kind, series_read
from salsa_node.findings import Findings, lengths_mm, measure, table
from salsa_node.pipelines import DEMO_NOTICE, Flag, Masks
from salsa_node.products import Products
from salsa_node.volume import CtVolume

IDENTITY = Identity()


def ct_of(findings: Findings) -> CtVolume:
    grid = findings.lesion_labels.grid
    return CtVolume(np.full(grid.shape, 60, dtype=np.int16), grid)


def written(ds: Dataset) -> bytes:
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def everything(findings: Findings, source: list[Dataset]) -> dict[str, Dataset]:
    when = made.PRODUCED_AT
    segs = dicom_seg.build_lesions(findings, source, IDENTITY, when)
    sheet = page.of_findings(ct_of(findings), findings, when)
    signed = (source[0], IDENTITY, when, findings.run_digest, findings.provenance)
    key = np.asarray(picture.key_image(ct_of(findings), findings, findings.lesions[0].slice_index))
    shown = source[findings.lesions[0].slice_index]
    captures = dicom_sc.build([*((p, None) for p in sheet.pictures()), (key, shown)], *signed)
    return {
        "viewer_sr": dicom_viewer_sr.build(findings, source, IDENTITY, when),
        "lesion_seg": segs[0],
        "ko": dicom_ko.build(findings, segs, source, IDENTITY, when),
        "pdf": dicom_pdf.build(sheet.pdf, *signed),
        "page": captures[0],
        "key_image": captures[-1],
    }


NAMES = ("viewer_sr", "lesion_seg", "ko", "pdf", "page", "key_image")


@pytest.fixture(scope="module")
def objects() -> dict[str, Dataset]:
    return everything(*made.case())


@pytest.mark.parametrize("name", NAMES)
def test_no_validator_finds_an_error(objects, name, tool, tmp_path):
    path = tmp_path / f"{name}.dcm"
    path.write_bytes(written(objects[name]))
    for program in ("dcmdump", *(["dsrdump"] if name in ("viewer_sr", "ko") else [])):
        subprocess.run([tool(program), str(path)], check=True, capture_output=True)
    verdict = subprocess.run([tool("dciodvfy", "dicom3tools"), str(path)], capture_output=True, text=True, check=False)
    said = [line for line in verdict.stderr.splitlines() if line.startswith(("Error", "Warning"))]
    assert said == []


def test_a_source_of_another_body_part_makes_no_picture_that_asks_for_its_side(tool, tmp_path):
    findings, source = made.case()
    for ds in source:
        ds.BodyPartExamined = "PARTIALBODY"  # as a scanner wrote it
    path = tmp_path / "page.dcm"
    path.write_bytes(written(everything(findings, source)["page"]))
    verdict = subprocess.run([tool("dciodvfy", "dicom3tools"), str(path)], capture_output=True, text=True, check=False)
    assert not [line for line in verdict.stderr.splitlines() if line.startswith("Error")]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_run_gives_the_same_bytes(objects, name):
    assert written(everything(*made.case())[name]) == written(objects[name])


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_the_patients_and_says_that_it_is_a_demonstration(objects, name):
    source = made.case()[1][0]
    ds = objects[name]
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "AccessionNumber", "SpecificCharacterSet"):
        assert ds.get(keyword) == source.get(keyword), keyword
    assert ds.SeriesDescription.endswith(DEMO_NOTICE.replace("–", "-")), "no title may crowd it out"


def test_each_kind_is_a_series_of_its_own(objects):
    numbers = {name: ds.SeriesNumber for name, ds in objects.items()}
    assert numbers == {
        "lesion_seg": 9003, "viewer_sr": 9004, "page": 9005, "key_image": 9005, "pdf": 9006, "ko": 9007,
    }  # fmt: skip
    assert len({ds.SeriesInstanceUID for ds in objects.values()}) == 5
    assert [IDENTITY.series_number(kind) for kind in (Kind.SEG, Kind.SR)] == [9001, 9002]


# ---- the diameters as lines -----------------------------------------------------------------------


def on_the_image(item: Dataset, source: list[Dataset]) -> tuple[Dataset, np.ndarray]:
    """The image that a SCOORD names, and its points in the patient, by PS3.3 C.7.6.2.1.1 alone."""
    named = item.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    image = next(ds for ds in source if named == ds.SOPInstanceUID)
    column, row = np.array(item.GraphicData, dtype=float).reshape(-1, 2).T - 0.5  # of the first pixel's centre
    between_rows, between_columns = (float(mm) for mm in image.PixelSpacing)
    along, down = np.array(image.ImageOrientationPatient, dtype=float).reshape(2, 3)
    corner = np.array(image.ImagePositionPatient, dtype=float)
    return image, corner + np.outer(column * between_columns, along) + np.outer(row * between_rows, down)


@pytest.mark.parametrize("orientation", made.ORIENTATIONS)
def test_the_lines_lie_where_the_axes_lie(orientation):
    findings, source = made.case(orientation)
    report = dicom_viewer_sr.build(findings, source, IDENTITY, made.PRODUCED_AT)
    measurements = next(
        i for i in report.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == codes.IMAGING_MEASUREMENTS.value
    )
    assert len(measurements.ContentSequence) == len(findings.lesions) == 2
    for lesion, group in zip(findings.lesions, measurements.ContentSequence, strict=True):
        by_name = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in group.ContentSequence}
        assert by_name["Tracking Identifier"].TextValue == "Cornerstone3DTools@^0.1.0:Bidirectional"
        assert lesion.tracking_uid == by_name["Tracking Unique Identifier"].UID
        for name, axis in (("Long Axis", lesion.long_axis), ("Short Axis", lesion.short_axis)):
            number = by_name[name]
            assert float(number.MeasuredValueSequence[0].NumericValue) == pytest.approx(axis.length_mm, abs=0.006)
            (drawn,) = number.ContentSequence  # a viewer drops a number with other children
            image, points = on_the_image(drawn, source)
            assert image is source[lesion.slice_index]
            np.testing.assert_allclose(points, [axis.start_lps_mm, axis.end_lps_mm], atol=1e-3)


def test_without_lesions_there_is_nothing_to_draw_or_to_select():
    grid = made.grid()
    source = made.headers(grid)
    findings = made.findings(grid, source)
    assert dicom_viewer_sr.build(findings, source, IDENTITY, made.PRODUCED_AT) is None
    assert dicom_ko.build(findings, [], source, IDENTITY, made.PRODUCED_AT) is None
    assert dicom_seg.build_lesions(findings, source, IDENTITY, made.PRODUCED_AT) == ()


def test_the_selection_names_the_slices_of_the_diameters_and_the_segmentation(objects):
    findings, source = made.case()
    references = [item for item in objects["ko"].ContentSequence if "ReferencedSOPSequence" in item]
    assert {item.ValueType for item in references} == {"IMAGE"}  # TID 2010 rows 3 to 5: images have no name
    assert not any("ConceptNameCodeSequence" in item for item in references)
    named = {item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in references}
    slices = {source[lesion.slice_index].SOPInstanceUID for lesion in findings.lesions}
    assert named == slices | {objects["lesion_seg"].SOPInstanceUID}


# ---- one segment per lesion ---------------------------------------------------------------------------


def test_each_lesion_has_a_segment_of_its_own():
    findings, source = made.case()
    (seg,) = dicom_seg.build_lesions(findings, source, IDENTITY, made.PRODUCED_AT)
    first, second = findings.lesions
    assert [item.SegmentLabel for item in seg.SegmentSequence] == [
        "L1 - measurable - 18.2 mm",  # 14 rows of 0.9 mm by 12 columns of 1.1 mm: 18.2 mm
        "L2 - non-measurable - 4.3 mm",  # 3 by 3 pixels: 4.26 mm
    ]
    assert [(item.TrackingID, item.TrackingUID) for item in seg.SegmentSequence] == [
        ("Lesion 1", first.tracking_uid),
        ("Lesion 2", second.tracking_uid),
    ]
    frames = np.atleast_3d(seg.pixel_array)
    for lesion in findings.lesions:
        of_segment = [
            f for f, item in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True)
            if item.SegmentIdentificationSequence[0].ReferencedSegmentNumber == lesion.number
        ]  # fmt: skip
        assert sum(int(f.sum()) for f in of_segment) == lesion.voxels
        assert dicom_seg.segment_of(lesion, [seg]) == (seg, lesion.number)


def test_a_length_just_below_ten_is_not_named_ten():
    grid = replace(made.grid(spacing_mm=(2.5, 0.996, 0.001)), shape=made.SHAPE)
    source = made.headers(grid)
    findings = made.findings(grid, source, (slice(5, 7), slice(10, 20), slice(8, 9)))
    assert findings.lesions[0].long_axis.length_mm == pytest.approx(9.96)
    (seg,) = dicom_seg.build_lesions(findings, source, IDENTITY, made.PRODUCED_AT)
    assert seg.SegmentSequence[0].SegmentLabel == "L1 - non-measurable - 9.9 mm"
    assert "9.9 x 0.0" in text_of(page.of_findings(ct_of(findings), findings, made.PRODUCED_AT).pdf)


@pytest.mark.parametrize(
    ("pixel_mm", "spacing_mm", "criteria", "said"),
    [
        (1.3814, 2.5, Criteria(), (13.8, 13.81)),
        (0.996, 2.5, Criteria(), (9.9, 9.96)),
        (0.9996, 2.5, Criteria(), (9.9, 9.99)),
        (1.0, 2.5, Criteria(), (10.0, 10.0)),
        (1.3996, 7.0, Criteria(), (13.9, 13.99)),  # 2 x 7 mm are measurable
        (0.9996, 2.5, Criteria(rule=Rule.VOLUME), (10.0, 10.0)),  # the length decides nothing
    ],
)
def test_one_rule_for_every_length_that_is_written(pixel_mm, spacing_mm, criteria, said):
    grid = made.grid(spacing_mm=(spacing_mm, pixel_mm, 0.001))
    lesions = made.boxes(grid, (slice(5, 7), slice(10, 20), slice(8, 9)))
    ct = CtVolume(np.full(grid.shape, 60, dtype=np.int16), grid)
    findings = measure(ct, Masks(None, lesions, made.PROVENANCE), criteria)
    (lesion,) = findings.lesions
    assert (lengths_mm(lesion, findings)[0], lengths_mm(lesion, findings, 2)[0]) == said
    assert table(findings)[0]["long_axis_mm"] == said[1]


def test_many_frames_become_several_objects_each_a_series_of_its_own(monkeypatch):
    monkeypatch.setattr(dicom_seg, "MAX_FRAMES", 5)
    findings, source = made.case()  # 5 and 2 slices
    first, second = dicom_seg.build_lesions(findings, source, IDENTITY, made.PRODUCED_AT)
    assert (first.NumberOfFrames, second.NumberOfFrames) == (5, 2)
    assert first.SeriesInstanceUID != second.SeriesInstanceUID
    assert (first.SeriesNumber, second.SeriesNumber) == (9003, 9103)
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert dicom_seg.segment_of(findings.lesions[1], [first, second]) == (second, 1)
    assert dicom_seg.made_from(second, findings)


# ---- the page -------------------------------------------------------------------------------------------


def text_of(pdf: bytes) -> str:
    document = pypdfium2.PdfDocument(pdf)
    words = "\n".join(sheet.get_textpage().get_text_range() for sheet in document)
    document.close()
    return words.replace("\r\n", "\n")


def test_the_page_says_what_was_found_in_words_that_can_be_searched(objects):
    findings, _ = made.case()
    text = text_of(objects["pdf"].EncapsulatedDocument)
    for lesion in findings.lesions:
        assert f"{lesion.long_axis.length_mm:.1f} x {lesion.short_axis.length_mm:.1f}" in text
        assert f"{lesion.volume_mm3 / 1000:.2f}" in text
    assert CAVEAT in text
    assert DEMO_NOTICE.replace("–", "-") in text
    assert "2 candidate lesions: 1 measurable, 1 non-measurable" in text
    assert "sha256:0123456789ab" in text
    assert "Müller" not in text
    assert "P-1" not in text


def test_the_pictures_lie_in_the_page_pixel_by_pixel_and_no_stream_is_spelled_out_as_text():
    findings, _ = made.case()
    ct = ct_of(findings)
    pdf = page.of_findings(ct, findings, made.PRODUCED_AT).pdf
    assert b"/FlateDecode" in pdf
    assert b"ASCII85" not in pdf
    document = pypdfium2.PdfDocument(pdf)
    drawn = [item for sheet in document for item in sheet.get_objects() if isinstance(item, pypdfium2.PdfImage)]
    (held,) = (np.array(item.get_bitmap().to_pil().convert("RGB")) for item in drawn)
    document.close()
    assert np.array_equal(held, np.array(picture.mosaic(ct, findings)))


def test_the_page_has_the_same_bytes_whatever_the_environment_says_of_time(monkeypatch):
    pages = set()
    for epoch in (None, "0", "1700000000"):
        monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
        if epoch is not None:
            monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        pages.add(page.of_refusal("2 slices", None, made.PRODUCED_AT).pdf)
    pages.add(page.of_refusal("3 slices", None, made.PRODUCED_AT).pdf)
    assert len(pages) == 2


def test_the_page_names_images_as_the_pacs_does():
    findings, _ = made.case()
    numbers = tuple(range(300, 300 - findings.lesion_labels.grid.shape[0], -1))
    pages = {}
    for those in (numbers, ()):
        numbered = replace(findings, image_numbers=those)
        pages[those] = text_of(page.of_findings(ct_of(findings), numbered, made.PRODUCED_AT).pdf).splitlines()
    for lesion in findings.lesions:
        row = f"{round(lesion.mean_hu)} ({round(lesion.sd_hu)})"
        for those, expected in ((numbers, 300 - lesion.slice_index), ((), lesion.slice_index + 1)):
            at = next(n for n, words in enumerate(pages[those]) if words.startswith(f"L{lesion.number}"))
            told = " ".join(pages[those][at : at + 6]).split(row)[1].split()
            assert told[0] == str(expected)
    assert any("image" in words.split() for words in pages[numbers][:12])
    assert any("slice" in words.split() for words in pages[()][:12])


def test_a_result_is_the_same_wherever_it_was_made(objects):
    findings, source = made.case()
    elsewhere = replace(findings, provenance=replace(findings.provenance, device="cuda:0"))
    again = everything(elsewhere, source)
    assert {name: written(ds) for name, ds in again.items()} == {name: written(ds) for name, ds in objects.items()}


def test_page_key_image_and_record_say_which_series_was_read():
    findings, source = made.case()
    for ds in source:
        ds.SeriesDescription = "Abdomen venös 5.0"
    said = 'Images read: series 3 "Abdomen ven?s 5.0", 20 images.'
    assert series_read(source) == said
    whole = Terms(products=Products(key_images=1))
    objects = {
        item.name: item.ds for item in _objects(ct_of(findings), findings, source, whole, Lineage(made.PRODUCED_AT))
    }
    assert said in text_of(objects["pdf"].EncapsulatedDocument)
    assert said in [item.TextValue for item in objects["sr"].ContentSequence[-1].ContentSequence if "TextValue" in item]
    other = np.asarray(picture.key_image(ct_of(findings), findings, findings.lesions[0].slice_index, "another series"))
    ours = objects["sc_2"].pixel_array
    (differs,) = np.nonzero((ours[:, :400] != other[: len(ours), :400]).any(axis=(1, 2)))
    assert len(differs)
    assert differs.min() > 0.9 * len(ours)  # in the words below, nowhere else
    del source[0].SeriesNumber, source[0].SeriesDescription
    assert series_read(source[:1]) == "Images read: series without a number, 1 image."


def test_the_pdf_says_in_its_properties_what_it_is_and_when_it_was_made(objects):
    def properties(pdf: bytes) -> dict[str, str]:
        document = pypdfium2.PdfDocument(pdf)
        found = document.get_metadata_dict()
        document.close()
        return found

    found = properties(objects["pdf"].EncapsulatedDocument)
    assert found["Title"] == "AI liver lesions summary"
    assert found["Subject"] == f"{CAVEAT} DEMO MODEL - NOT FOR CLINICAL USE"
    assert found["CreationDate"] == f"D:{made.PRODUCED_AT:%Y%m%d%H%M%S}+00'00'"
    by_person = replace(made.PROVENANCE, by_person=True, notice="")
    tokyo = made.PRODUCED_AT.astimezone(timezone(timedelta(hours=9)))
    found = properties(page.of_refusal("no CT", by_person, tokyo).pdf)
    assert found["Title"] == "Liver lesions summary by a person"
    assert found["CreationDate"] == f"D:{tokyo:%Y%m%d%H%M%S}+09'00'"


def test_numbers_are_written_as_people_write_them():
    """One lesion has no sum of several, and nothing is -0 HU."""
    grid = made.grid()
    ct = CtVolume(np.full(grid.shape, 0, dtype=np.int16), grid)
    voxels = ct.voxels_hu.copy()
    voxels[5, 10, 8] = -1
    masks = Masks(None, made.boxes(grid, made.MEASURABLE_BOX), made.PROVENANCE)
    findings = measure(CtVolume(voxels, grid), masks, Criteria())
    text = text_of(page.of_findings(ct, findings, made.PRODUCED_AT).pdf)
    assert -0.5 < findings.lesions[0].mean_hu < 0
    assert "-0 (0)" not in text
    assert "0 (0)" in text
    assert "sum of diameters in the liver 18.2 mm, of the one measurable lesion" in text


def test_what_is_odd_stands_on_the_page_before_the_numbers():
    findings, _ = made.case()
    odd = (Flag("not_an_abdomen", "This may not be an abdomen."), Flag("thick_slices", "Thick slices."))
    text = text_of(page.of_findings(ct_of(findings), replace(findings, flags=odd), made.PRODUCED_AT).pdf)
    places = [
        text.index(words) for words in ("2 candidate lesions", odd[0].text, odd[1].text, "volume, ml", "Proposal")
    ]
    assert places == sorted(places)
    assert [text.count(flag.text) for flag in odd] == [1, 1]


def test_a_page_about_nothing_says_why():
    why = page.of_refusal("gap of 10.0 mm between images 41 and 43", None, made.PRODUCED_AT)
    assert "No analysis was possible. Reason: gap of 10.0 mm between images 41 and 43" in text_of(why.pdf)
    grid = made.grid()
    findings = made.findings(grid, made.headers(grid))
    nothing = text_of(page.of_findings(ct_of(findings), findings, made.PRODUCED_AT).pdf)
    assert "The algorithm found no candidate lesion." in nothing
    assert "no lesions" not in nothing


def test_sixty_lesions_go_on_to_a_second_page():
    grid = made.grid()
    source = made.headers(grid)
    boxes = [
        (slice(k, k + 1), slice(r, r + 2), slice(c, c + 2))
        for k in (3, 9, 15)
        for r in range(8, 40, 8)
        for c in range(6, 36, 6)
    ]
    findings = made.findings(grid, source, *boxes)
    assert len(findings.lesions) == 60
    sheet = page.of_findings(ct_of(findings), findings, made.PRODUCED_AT)
    assert len(sheet.pictures()) >= 2
    assert "L60" in text_of(sheet.pdf)


def test_the_report_for_viewers_says_the_outcome_and_the_selection_its_words_of_caution(objects):
    said = [item.TextValue for item in texts(objects["viewer_sr"])]
    assert "The algorithm found 2 candidate lesions: 1 measurable, 1 non-measurable." in said
    (words,) = (item.TextValue for item in texts(objects["ko"]))
    assert words.startswith(CAVEAT)
    assert DEMO_NOTICE.replace("–", "-") in words


def texts(ds: Dataset) -> Iterator[Dataset]:
    for item in ds.get("ContentSequence") or ():
        if item.ValueType == "TEXT":
            yield item
        yield from texts(item)


def test_a_key_image_carries_its_words_of_caution(monkeypatch):
    findings, _ = made.case()
    told: list[str] = []
    draw = picture._mosaic
    monkeypatch.setattr(picture, "_mosaic", lambda tiles, words, *more: told.extend(words) or draw(tiles, words, *more))
    picture.key_image(ct_of(findings), findings, findings.lesions[0].slice_index)
    assert any(CAVEAT in words for words in told)
    assert any(DEMO_NOTICE.replace("–", "-") in words for words in told)


def test_a_key_image_names_its_slice_and_is_not_blank(objects):
    findings, source = made.case()
    key = objects["key_image"]
    named = key.SourceImageSequence[0].ReferencedSOPInstanceUID
    assert named == source[findings.lesions[0].slice_index].SOPInstanceUID
    pixels = key.pixel_array.astype(int)
    red = (np.abs(pixels - codes.MEASURABLE_RGB).max(axis=2) < 20).sum()
    assert red > 50
    assert key.BurnedInAnnotation == "NO"
    assert Path(key.get("filename", "")).name == ""
    assert pydicom.dcmread(BytesIO(written(key))).pixel_array.shape == key.pixel_array.shape
