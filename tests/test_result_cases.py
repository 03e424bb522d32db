"""Odd patients, odd series, odd lesions: every object that is sent for them passes every validator at hand."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import allowed_warnings
import made_findings as made
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from salsa_node import placement
from salsa_node.analysis import Lineage, Terms, _objects, refuse
from salsa_node.dicom_result import Identity, Kind, Made
from salsa_node.dicom_sr import build_not_analysed
from salsa_node.errors import GuardFailed
from salsa_node.findings import Findings
from salsa_node.pipelines import Provenance
from salsa_node.products import Products
from salsa_node.volume import CtVolume, Grid

Case = tuple[Findings, list[Dataset]]
Box = tuple[slice, slice, slice]
BORN = Lineage(made.PRODUCED_AT)
TERMS = Terms(products=Products(key_images=1), label_map=True)
OPTIONAL_PATIENT_AND_STUDY = ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDescription")
FULL_SR = ("SR", "VIEWER_SR")
DOCUMENTS = (*FULL_SR, "KO")


def named(character_set: str | list[str], name: str, **more: str) -> Case:
    findings, source = made.case()
    for ds in source:
        ds.SpecificCharacterSet, ds.PatientName = character_set, name
        ds.StudyDescription, ds.ReferringPhysicianName = "CT", ""
        for keyword, value in more.items():
            setattr(ds, keyword, value)
    return findings, source


def stripped(*keywords: str) -> Case:
    findings, source = made.case()
    for ds in source:
        for keyword in keywords:
            delattr(ds, keyword)
    return findings, source


def drawn(where: Grid, *boxes: Box, **kwargs) -> Case:
    source = made.headers(where)
    return made.findings(where, source, *boxes, **kwargs), source


def of_shape(*shape: int) -> Grid:
    return replace(made.grid(), shape=shape)


def one(k: int, row: int, column: int) -> Box:
    return slice(k, k + 1), slice(row, row + 1), slice(column, column + 1)


def whole_slice(k: int) -> Box:
    return slice(k, k + 1), slice(0, made.SHAPE[1]), slice(0, made.SHAPE[2])


def without_frame_of_reference() -> Case:
    findings, source = drawn(replace(made.grid(), frame_of_reference_uid=None), made.MEASURABLE_BOX)
    for ds in source:
        del ds.FrameOfReferenceUID
    return findings, source


def with_vendors_procedure() -> Case:
    findings, source = made.case()
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "CTBUK", "SECTRA", "CT abdomen"
    for ds in source:
        ds.ProcedureCodeSequence = [code]
    return findings, source


SIXTY = [one(2 + n // 12, 6 + 3 * (n % 12), 6 + 2 * (n // 12)) for n in range(60)]

CASES: dict[str, Callable[[], Case]] = {
    "Latin-1": lambda: named("ISO_IR 100", "Müller^Grün"),
    "Greek": lambda: named("ISO_IR 126", "Διονυσιος^Α"),
    "Arabic": lambda: named("ISO_IR 127", "قباني^لنزار"),
    "Japanese": lambda: named(["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    "Japanese in UTF-8": lambda: named("ISO_IR 192", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    "no PatientID": lambda: named("ISO_IR 100", "", PatientID=""),
    "no optional module": lambda: stripped(*OPTIONAL_PATIENT_AND_STUDY, "PositionReferenceIndicator"),
    "no study date": lambda: named("ISO_IR 100", "Doe^Jane", StudyDate="", StudyTime=""),
    "a name without components": lambda: named("ISO_IR 100", "Anonymized"),
    "a coding scheme of the vendor": with_vendors_procedure,
    "a body part of the vendor": lambda: named("ISO_IR 100", "Doe^Jane", BodyPartExamined="PARTIALBODY"),
    "no character set": lambda: named("", "Doe^Jane"),
    "no Frame of Reference": without_frame_of_reference,
    "1 slice": lambda: drawn(of_shape(1, 48, 40), (slice(0, 1), *made.MEASURABLE_BOX[1:]), with_organ=False),
    "600 slices": lambda: drawn(
        of_shape(600, 24, 20),
        (slice(20, 320), slice(2, 6), slice(2, 6)),
        (slice(100, 400), slice(10, 14), slice(2, 6)),
        with_organ=False,
    ),
    "60 lesions": lambda: drawn(made.grid(), *SIXTY),
    "one voxel": lambda: drawn(made.grid(), one(10, 20, 20)),
    "on every edge": lambda: drawn(
        made.grid(),
        (slice(0, 3), slice(0, 6), slice(0, 6)),
        (slice(17, 20), slice(42, 48), slice(34, 40)),
        one(0, 47, 39),
        whole_slice(10),
    ),
    "no candidate": lambda: drawn(made.grid()),
    "by a person": lambda: made.case(provenance=Provenance("given_masks", "1", by_person=True)),
    "oblique": lambda: made.case("oblique"),
}


def objects(case: Case, terms: Terms = TERMS) -> tuple[Made, ...]:
    findings, source = case
    grid = findings.lesion_labels.grid
    ct = CtVolume(np.full(grid.shape, 60, dtype=np.int16), grid)
    return _objects(ct, findings, source, terms, Lineage(made.PRODUCED_AT))


def not_analysed(provenance: Provenance | None) -> tuple[Made, ...]:
    source = made.headers(made.grid())[0]
    reason = "gap of 10.0 mm between images 41 and 43, spacing is 5.0 mm"
    report = build_not_analysed(reason, source, Identity(), made.PRODUCED_AT, "run", provenance)
    return (Made(Kind.SR, "sr", report),)


def refused(source: Dataset, folder: Path, provenance: Provenance | None) -> tuple[Made, ...]:
    """All that is sent for a series that could not be analysed."""
    path = folder / "source.dcm"
    made.with_meta(source).save_as(path, enforce_file_format=True)
    return refuse([path], "2 slices; a volume needs at least 3", TERMS, lambda _: BORN, provenance).objects


def put(made_objects: tuple[Made, ...], folder: Path) -> list[tuple[Made, Path]]:
    paths = [folder / f"{item.name}.dcm" for item in made_objects]
    for item, path in zip(made_objects, paths, strict=True):
        item.ds.save_as(path, enforce_file_format=True)
    return list(zip(made_objects, paths, strict=True))


def told(command: list[str | Path]) -> tuple[int, list[str]]:
    done = subprocess.run(command, capture_output=True, check=False)
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace").splitlines()


def judge(item: Made, path: Path, tool: Callable[..., str], case: str = "") -> None:
    """dciodvfy has no error and no warning that is not allowed; dcmdump, and dsrdump for a report, read it all.

    case: what is odd about the source, and may draw warnings of its own.
    """
    _, lines = told([tool("dciodvfy", "dicom3tools"), path])
    said = {text for text in lines if text.startswith(("Error", "Warning"))}
    allowed = set(allowed_warnings.DCIODVFY) | set(allowed_warnings.DCIODVFY_SOURCE.get(case, {}))
    if item.kind is Kind.LABELMAP:
        allowed |= set(allowed_warnings.DCIODVFY_LABEL_MAP)
    assert said <= allowed, f"{item.name}: {said - allowed}"
    readers = [tool("dcmdump", "dcmtk"), *([tool("dsrdump", "dcmtk")] if item.kind.value in DOCUMENTS else [])]
    for reader in readers:
        code, lines = told([reader, path])
        said = {text for text in lines if text.startswith(("E:", "W:"))}
        assert code == 0, f"{item.name}: {reader} {lines}"
        assert said <= set(allowed_warnings.DCMTK), f"{item.name}: {said - set(allowed_warnings.DCMTK)}"


@pytest.mark.parametrize("name", CASES)
def test_every_object_of_an_odd_case_is_valid(tool, tmp_path, name):
    findings, source = case = CASES[name]()
    sent = put(objects(case), tmp_path)
    kinds = {item.kind for item, _ in sent}
    expected = set(Kind) if findings.lesions else {Kind.SR, Kind.SC, Kind.PDF}
    assert kinds == expected
    placement.check([pydicom.dcmread(path) for _, path in sent], source, findings)
    for item, path in sent:
        judge(item, path, tool, name)
        assert str(item.ds.PatientName) == str(source[0].PatientName)
        assert (item.ds.get("SpecificCharacterSet") or None) == (source[0].get("SpecificCharacterSet") or None)


@pytest.mark.parametrize("name", ["one voxel", "600 slices"])
def test_a_segment_that_lost_its_voxels_is_caught_in_whichever_object_it_is(name):
    findings, source = case = CASES[name]()
    for item in objects(case):
        if item.kind in (Kind.SEG, Kind.LESION_SEG, Kind.LABELMAP):
            if item.kind is Kind.LABELMAP:
                item.ds.decompress(generate_instance_uid=False)
            item.ds.PixelData = bytes(len(item.ds.PixelData))
            with pytest.raises(GuardFailed, match="differ in"):
                placement.check([item.ds], source, findings)


@pytest.mark.parametrize("provenance", [None, made.PROVENANCE])
def test_a_report_that_nothing_was_analysed_is_valid(tool, tmp_path, provenance):
    for item, path in put(not_analysed(provenance), tmp_path):
        judge(item, path, tool)


@pytest.mark.parametrize("provenance", [None, made.PROVENANCE])
@pytest.mark.parametrize("removed", ["YES", "NO", None])
def test_all_that_is_sent_of_a_refusal_is_valid(tool, tmp_path, provenance, removed):
    """Also where the source says that identity was removed and not how."""
    source = made.headers(made.grid())[0]
    if removed is not None:
        source.PatientIdentityRemoved = removed
    sent = put(refused(source, tmp_path, provenance), tmp_path)
    assert [item.kind for item, _ in sent] == [Kind.SR, Kind.SC, Kind.PDF]
    for item, path in sent:
        judge(item, path, tool)


def test_what_says_how_identity_was_removed_is_carried(tmp_path):
    source = made.headers(made.grid())[0]
    source.PatientIdentityRemoved, source.DeidentificationMethod = "YES", "by hand"
    for item in refused(source, tmp_path, None):
        assert (item.ds.PatientIdentityRemoved, item.ds.DeidentificationMethod) == ("YES", "by hand")


def test_pictures_say_of_their_pixels_what_the_images_say(tool, tmp_path):
    """Identity burned in, and compression with loss: no picture of such an image is without them."""
    findings, source = made.case()
    for ds in source:
        ds.BurnedInAnnotation, ds.LossyImageCompression = "YES", "01"
        ds.LossyImageCompressionRatio, ds.LossyImageCompressionMethod = "10", "ISO_15444_1"
    pictures = [item for item in objects((findings, source)) if item.kind in (Kind.SC, Kind.PDF)]
    assert len(pictures) == 3
    for item, path in put(tuple(pictures), tmp_path):
        assert item.ds.BurnedInAnnotation == "YES"
        if item.kind is Kind.SC:
            assert (item.ds.LossyImageCompression, item.ds.LossyImageCompressionRatio) == ("01", "10")
            assert item.ds.LossyImageCompressionMethod == "ISO_15444_1"
        judge(item, path, tool)
    findings, source = made.case()
    source[findings.lesions[0].slice_index].BurnedInAnnotation = "YES"  # of this image alone
    (*others, key) = (item.ds for item in objects((findings, source)) if item.kind is Kind.SC)
    assert (key.BurnedInAnnotation, {ds.BurnedInAnnotation for ds in others}) == ("YES", {"NO"})
    usual = [item.ds for item in objects(made.case()) if item.kind in (Kind.SC, Kind.PDF)]
    assert {(ds.BurnedInAnnotation, ds.get("LossyImageCompression")) for ds in usual} == {("NO", None)}


def test_key_images_show_the_slices_of_the_largest_lesions_and_name_them():
    boxes = [
        (slice(3, 4), slice(2, 8), slice(2, 8)),
        (slice(9, 10), slice(10, 30), slice(10, 14)),  # the longest
        (slice(14, 15), slice(20, 32), slice(20, 30)),  # the largest
    ]
    findings, source = drawn(made.grid(), *boxes)
    sent = objects((findings, source), Terms(products=replace(TERMS.products, key_images=2)))
    shown = [item.ds.SourceImageSequence for item in sent if item.kind is Kind.SC and "SourceImageSequence" in item.ds]
    assert [images[0].ReferencedSOPInstanceUID for images in shown] == [source[k].SOPInstanceUID for k in (9, 14)]


def test_a_missing_frame_of_reference_is_the_same_one_in_every_object_that_has_one():
    sent = objects(without_frame_of_reference())
    frames = {item.ds.FrameOfReferenceUID for item in sent if item.kind in (Kind.SEG, Kind.LESION_SEG, Kind.LABELMAP)}
    assert len(frames) == 1
    assert frames != {None}


def test_lesions_in_many_slices_are_shared_out_over_objects_below_the_limit_of_viewers():
    sent = objects(CASES["600 slices"]())
    frames = [int(item.ds.NumberOfFrames) for item in sent if item.kind is Kind.LESION_SEG]
    assert frames == [300, 300]


PIXELMED = Path("/usr/share/java/pixelmed.jar")
JAVA = (  # the validator's templates need more XPath operators than this Java allows by default (JAXP0801003)
    "java", "-Djdk.xml.xpathTotalOpLimit=0", "-Djdk.xml.xpathExprOpLimit=0", "-Djdk.xml.xpathExprGrpLimit=0",
    "-cp", f"{PIXELMED}:/usr/share/java/slf4j-api.jar:/usr/share/java/slf4j-nop.jar",
    "com.pixelmed.validate.DicomSRValidator",
)  # fmt: skip


def test_the_reports_keep_to_their_templates(tool, tmp_path):
    tool("DicomSRValidator", "pixelmed-apps")
    findings, source = CASES["Latin-1"]()
    with_liver = replace(TERMS, products=replace(TERMS.products, include_liver=True))
    sent = [item for item in objects((findings, source), with_liver) if item.kind.value in DOCUMENTS]
    refused = [replace(item, name="not_analysed") for item in not_analysed(made.PROVENANCE)]
    nothing = [replace(item, name="no_candidate") for item in objects(CASES["no candidate"]()) if item.kind is Kind.SR]
    reports = put((*sent, *refused, *nothing), tmp_path)
    assert {item.name for item, _ in reports} == {"sr", "viewer_sr", "ko", "not_analysed", "no_candidate"}
    running = {
        n: subprocess.Popen([*JAVA, path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for n, (_, path) in enumerate(reports)
    }
    for (item, _), process in zip(reports, running.values(), strict=True):
        lines = process.communicate()[0].splitlines()
        assert "Root Template Validation Complete" in lines, lines
        assert "IOD validation complete" in lines, lines
        template = "2010 (KeyObjectSelection)" if item.kind is Kind.KO else "1500 (MeasurementReport)"
        assert f"Found Root Template TID_{template}" in lines, lines
        assert not [text for text in lines if text.startswith("Error")]
        said = {re.sub(r"\b1(\.\d+)+: ", "", text.removeprefix("Warning: ")) for text in lines if "Warning" in text}
        assert said <= set(allowed_warnings.PIXELMED), said - set(allowed_warnings.PIXELMED)
