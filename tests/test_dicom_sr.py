from __future__ import annotations

import subprocess
from dataclasses import replace
from io import BytesIO

import highdicom as hd
import made_findings as made
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from salsa_node import codes, dicom_seg, dicom_sr
from salsa_node.contrast_phase import ContrastPhase, Phase
from salsa_node.criteria import Criteria, Rule
from salsa_node.dicom_result import CAVEAT, Identity
from salsa_node.errors import EncodingError
from salsa_node.findings import Disease, Findings, measure
from salsa_node.pipelines import Flag, Masks, Provenance
from salsa_node.series import headers, inspect, read_volume
from salsa_node.volume import LabelVolume

IDENTITY = Identity()
PRIVATE_WARNING = "Warning - Unrecognized defined term <99SALSA> for value 1 of attribute <Coding Scheme Designator>"


def both(findings: Findings, source: list[Dataset]) -> tuple[Dataset | None, Dataset]:
    seg = next(iter(dicom_seg.build(findings, source, IDENTITY, made.PRODUCED_AT)), None)
    return seg, dicom_sr.build(findings, [] if seg is None else [seg], source, IDENTITY, made.PRODUCED_AT)


def report(findings: Findings, source: list[Dataset]) -> Dataset:
    return both(findings, source)[1]


def not_analysed(**kwargs) -> Dataset:
    source = made.headers(made.grid())[0]
    reason = "gap of 10.0 mm between images 41 and 43, spacing is 5.0 mm"
    return dicom_sr.build_not_analysed(reason, source, IDENTITY, made.PRODUCED_AT, "run", **kwargs)


def nothing_found() -> Dataset:
    grid = made.grid()
    source = made.headers(grid)
    return report(made.findings(grid, source), source)


def written(ds: Dataset) -> bytes:
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def reread(ds: Dataset) -> Dataset:
    return pydicom.dcmread(BytesIO(written(ds)))


def items(ds: Dataset):
    """Every content item of the tree, depth first."""
    for item in ds.get("ContentSequence", ()):
        yield item
        yield from items(item)


def sentences(ds: Dataset) -> list[str]:
    return [str(item.TextValue) for item in items(ds) if item.ValueType == "TEXT"]


def coded(ds: Dataset):
    for element in ds.iterall():
        if element.VR == "SQ":
            yield from (item for item in element.value if "CodeValue" in item)


def groups(ds: Dataset):
    content = hd.sr.Comprehensive3DSR.from_dataset(reread(ds)).content
    return content.get_volumetric_roi_measurement_groups()


def measured(group) -> dict[str, tuple[float, str]]:
    """Name (and derivation) -> value and unit."""
    out = {}
    for m in group.get_measurements():
        name = " ".join(part.meaning for part in (m.derivation, m.name) if part is not None)
        out[name] = (m.value, m.unit.value)
    return out


def test_each_lesion_is_a_group_with_its_numbers():
    findings, source = made.case()
    seg, sr = both(findings, source)
    found = groups(sr)
    assert len(found) == 2
    for lesion, group, segment in zip(findings.lesions, found, (1, 2), strict=True):
        assert group.tracking_uid == lesion.tracking_uid
        assert group.tracking_identifier == f"Lesion {lesion.number}"
        assert group.finding_type == codes.LESION
        assert [site.value for site in group.finding_sites] == [codes.LIVER]
        assert measured(group) == {
            "Volume": (pytest.approx(lesion.volume_mm3 / 1000, abs=1e-6), "cm3"),
            "Long axis": (pytest.approx(lesion.long_axis.length_mm, abs=1e-6), "mm"),
            "Short axis": (pytest.approx(lesion.short_axis.length_mm, abs=1e-6), "mm"),
            "Mean Attenuation Coefficient": (pytest.approx(lesion.mean_hu, abs=1e-6), "[hnsf'U]"),
            "Standard Deviation Attenuation Coefficient": (pytest.approx(lesion.sd_hu, abs=1e-6), "[hnsf'U]"),
        }
        reference = group.referenced_segment.referenced_sop_instance_uid
        assert reference == seg.SOPInstanceUID
        image = group.referenced_segment[0].ReferencedSOPSequence[0]
        assert image.ReferencedSegmentNumber == segment
        assert seg.SegmentSequence[segment - 1].SegmentLabel == dicom_seg.label_of(lesion.disease)
        assert group.referenced_segment.source_series_for_segmentation.value == source[0].SeriesInstanceUID


def test_each_axis_names_the_image_it_was_seen_on():
    findings, source = made.case("axial from head to feet")
    sr = report(findings, source)
    named = [
        item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for item in items(sr)
        if item.ValueType == "IMAGE" and item.ConceptNameCodeSequence[0].CodeValue == "121112"
    ]
    assert named == [lesion.slice_sop_uid for lesion in findings.lesions for _ in ("long", "short")]


@pytest.mark.parametrize(("rule", "method"), [(Rule.DIAMETER, codes.RECIST_1_1), (Rule.VOLUME, codes.VOLUME_RULE)])
def test_measurability_comes_with_the_rule_that_decided_it(rule, method):
    findings, source = made.case(criteria=Criteria(rule=rule))
    assert [lesion.disease for lesion in findings.lesions] == [Disease.MEASURABLE, Disease.NON_MEASURABLE]
    sr = report(findings, source)
    answers = [{q.name: q.value for q in group.get_qualitative_evaluations()} for group in groups(sr)]
    assert answers == [
        {codes.MEASURABILITY: codes.MEASURABLE, codes.RESPONSE_EVALUATION_METHOD: method},
        {codes.MEASURABILITY: codes.NON_MEASURABLE, codes.RESPONSE_EVALUATION_METHOD: method},
    ]
    assert dicom_sr.rule_text(findings.criteria) in sentences(sr)


def test_the_rule_in_words_holds_its_numbers():
    assert "at least 10 mm" in dicom_sr.rule_text(Criteria())
    assert "exceeds 5 mm also at least 2 x that spacing" in dicom_sr.rule_text(Criteria())
    assert "at least 12.5 mm" in dicom_sr.rule_text(Criteria(min_diameter_mm=12.5))
    assert "at least 523.6 mm3" in dicom_sr.rule_text(Criteria(rule=Rule.VOLUME))


def test_the_report_says_the_same_in_sentences():
    findings, source = made.case()
    said = sentences(report(findings, source))
    assert said.index(CAVEAT) < said.index("The algorithm found 2 candidate lesions: 1 measurable, 1 non-measurable.")
    assert "DEMO MODEL - NOT FOR CLINICAL USE" in said
    assert f"Liver volume as segmented: {15 * 39 * 29 * 2.5 * 0.9 * 1.1 / 1000:.1f} cm3." in said
    assert "lesions/checkpoint_final.pth sha256:0123456789ab" in said
    assert {"demo", "0.1.0"} <= set(said)


def test_what_the_guards_flagged_reaches_the_record():
    findings, source = made.case()
    odd = (Flag("mirrored", "They are probably mirrored.", blocks=True), Flag("thick_slices", "Thick slices."))
    said = sentences(report(replace(findings, flags=odd), source))
    assert {flag.text for flag in odd} <= set(said)
    assert not {flag.text for flag in odd} & set(sentences(report(findings, source)))


def test_what_limits_the_numbers_is_said():
    grid = made.grid()
    source = made.headers(grid)
    at_the_edge = (slice(0, 4), slice(10, 24), slice(8, 20))
    findings = made.findings(grid, source, at_the_edge, made.SMALL_BOX, criteria=Criteria(min_lesion_mm3=50.0))
    said = sentences(report(findings, source))
    assert "The algorithm found 1 candidate lesion: 1 measurable, 0 non-measurable." in said
    assert "Left out and not measured, because smaller than 50 mm3: 1." in said
    assert "Lesion 1 touches the edge of the scanned volume and may be larger than measured." in said


def test_the_contrast_phase_is_said_known_or_not():
    unknown = "Contrast phase unknown: the headers do not name it."
    assert unknown in sentences(report(*made.case()))
    assert unknown in sentences(nothing_found())
    assert not any("phase" in text for text in sentences(not_analysed()))
    findings, source = made.case()
    portal = ContrastPhase(Phase.PORTAL_VENOUS, (("Series Description", "portal venous"),))
    known = sentences(report(replace(findings, contrast_phase=portal), source))
    assert "Contrast phase: portal venous, as the headers have it (Series Description)." in known
    assert unknown not in known


def overall(sr: Dataset) -> Dataset:
    """The measurement group of the liver as a whole."""
    (summary,) = (item for item in sr.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "121111")
    (group,) = summary.ContentSequence
    return group


def numbers(group: Dataset) -> list[tuple[str, str, float, str]]:
    """(code, measurability or "", value, unit) of each number right below the group."""
    found = []
    for item in group.ContentSequence:
        if item.ValueType == "NUM":
            of_class = [
                c for c in item.get("ContentSequence", ()) if c.ConceptNameCodeSequence[0].CodeValue == "MEASURABILITY"
            ]
            value = item.MeasuredValueSequence[0]
            found.append(
                (
                    item.ConceptNameCodeSequence[0].CodeValue,
                    of_class[0].ConceptCodeSequence[0].CodeValue if of_class else "",
                    float(value.NumericValue),
                    value.MeasurementUnitsCodeSequence[0].CodeValue,
                )
            )
    return found


THIRD_BOX = (slice(11, 13), slice(6, 20), slice(22, 32))
LIVER_CM3 = 15 * 39 * 29 * 2.5 * 0.9 * 1.1 / 1000


def three_lesions(**kwargs) -> tuple[Findings, list[Dataset]]:
    grid = made.grid()
    source = made.headers(grid)
    return made.findings(grid, source, made.MEASURABLE_BOX, made.SMALL_BOX, THIRD_BOX, **kwargs), source


def test_the_whole_liver_is_a_group_of_coded_numbers():
    findings, source = three_lesions()
    group = overall(reread(report(findings, source)))
    large, third, small = findings.lesions
    assert [lesion.disease.value[:3] for lesion in findings.lesions] == ["mea", "mea", "non"]
    total_mm = large.long_axis.length_mm + third.long_axis.length_mm
    assert numbers(group) == [
        ("118565006", "", pytest.approx(LIVER_CM3, abs=1e-6), "cm3"),
        ("246206008", "", 3, "1"),
        ("246206008", "MEASURABLE", 2, "1"),
        ("246206008", "NONMEASURABLE", 1, "1"),
        ("SUMDIAMETERS", "", pytest.approx(total_mm, abs=1e-5), "mm"),
    ]
    named = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in group.ContentSequence}
    assert named["Finding"].ConceptCodeSequence[0].CodeValue == "91723000"
    assert named["Finding Site"].ConceptCodeSequence[0].CodeValue == "10200004"
    addends = [
        (item.ContentSequence[1].UID, float(item.MeasuredValueSequence[0].NumericValue), item.RelationshipType)
        for item in named[codes.SUM_OF_DIAMETERS.meaning].ContentSequence
    ]
    by_length = sorted((large, third), key=lambda lesion: -lesion.long_axis.length_mm)
    assert addends == [
        (lesion.tracking_uid, pytest.approx(lesion.long_axis.length_mm, abs=1e-6), "INFERRED FROM")
        for lesion in by_length
    ]
    assert small.tracking_uid not in [uid for uid, *_ in addends]
    assert len(groups(report(findings, source))) == 3  # the liver is not counted among the lesions


def test_the_liver_refers_to_its_segment_where_there_is_one():
    findings, source = three_lesions()
    assert not any(item.ValueType == "IMAGE" for item in overall(report(findings, source)).ContentSequence)
    (seg,) = dicom_seg.build(findings, source, IDENTITY, made.PRODUCED_AT, include_organ=True)
    sr = dicom_sr.build(findings, [seg], source, IDENTITY, made.PRODUCED_AT)
    (image,) = (item for item in overall(sr).ContentSequence if item.ValueType == "IMAGE")
    reference = image.ReferencedSOPSequence[0]
    assert (reference.ReferencedSOPInstanceUID, reference.ReferencedSegmentNumber) == (seg.SOPInstanceUID, 3)


def test_the_couinaud_segments_are_sites_beside_the_liver(tool, tmp_path):
    findings, source = made.case()
    first, second = findings.lesions
    findings = replace(findings, lesions=(replace(first, segments=(8, 4)), second))
    told = "Couinaud segments, the one with most of the lesion first: Lesion 1 in VIII and IV."
    assert told in dicom_sr.sentences(findings)
    assert not any("Couinaud" in sentence for sentence in dicom_sr.sentences(replace(findings, lesions=(second,))))
    sr = report(findings, source)
    sites = [[site.value.CodeValue for site in group.finding_sites] for group in groups(sr)]
    assert sites == [["10200004", "277962002", "277958008"], ["10200004"]]
    path = tmp_path / "sr.dcm"
    path.write_bytes(written(sr))
    done = subprocess.run([tool("dciodvfy", "dicom3tools"), path], capture_output=True, text=True, check=False)
    assert "Error" not in done.stdout + done.stderr


def test_numbers_that_are_not_known_are_left_out():
    small, source = three_lesions(with_organ=False, criteria=Criteria(min_diameter_mm=1000))
    counts = [("246206008", "", 3), ("246206008", "MEASURABLE", 0), ("246206008", "NONMEASURABLE", 3)]
    assert [number[:3] for number in numbers(overall(report(small, source)))] == counts
    grid = made.grid()
    nothing = made.findings(grid, source, with_organ=False)
    assert codes.SUMMARY.value not in {item.CodeValue for item in coded(report(nothing, source))}
    assert [number[0] for number in numbers(overall(nothing_found()))] == ["118565006"]


def test_nothing_found_is_said_of_the_algorithm_not_of_the_patient():
    sr = nothing_found()
    said = sentences(sr)
    assert "The algorithm found no candidate lesion." in said
    assert {CAVEAT, "DEMO MODEL - NOT FOR CLINICAL USE"} <= set(said)
    assert not any("no lesion" in text.lower() for text in said)
    assert [item.ConceptNameCodeSequence[0].CodeMeaning for item in items(sr) if item.ValueType == "NUM"] == ["Volume"]
    assert len(sr.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence) == 20


def test_no_analysis_says_why():
    said = sentences(not_analysed())
    assert "No analysis was possible. Reason: gap of 10.0 mm between images 41 and 43, spacing is 5.0 mm" in said
    assert CAVEAT in said
    assert not any("found" in text for text in said)
    with_pipeline = sentences(not_analysed(provenance=made.PROVENANCE))
    assert {"demo", "DEMO MODEL - NOT FOR CLINICAL USE"} <= set(with_pipeline)


def test_the_notice_marks_the_series_only_where_there_is_one():
    assert report(*made.case()).SeriesDescription == "AI liver lesions report - DEMO MODEL - NOT FOR CLINICAL USE"
    released = report(*made.case(provenance=Provenance("salsa", "1.0")))
    assert released.SeriesDescription == "AI liver lesions report"
    assert "DEMO" not in str(released)


def test_the_report_never_picks_target_lesions():
    values = {item.CodeValue for item in coded(report(*made.case()))}
    assert "52988006" in values
    assert not values & {"112074", "112075", "112016"}


def test_a_private_code_comes_with_its_scheme_and_a_public_report_without():
    scheme = report(*made.case()).CodingSchemeIdentificationSequence[0]
    assert (scheme.CodingSchemeDesignator, scheme.CodingSchemeResponsibleOrganization) == ("99SALSA", "salsa_node")
    for public in (nothing_found(), not_analysed()):
        assert "CodingSchemeIdentificationSequence" not in public
        assert "99SALSA" not in {item.CodingSchemeDesignator for item in coded(public)}


def test_the_report_is_of_the_same_study_and_not_verified_by_anyone():
    findings, source = made.case()
    seg, sr = both(findings, source)
    assert sr.StudyInstanceUID == seg.StudyInstanceUID == source[0].StudyInstanceUID
    assert len({sr.SeriesInstanceUID, seg.SeriesInstanceUID, source[0].SeriesInstanceUID}) == 3
    assert sr.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.34"
    assert (sr.CompletionFlag, sr.VerificationFlag, sr.PreliminaryFlag) == ("COMPLETE", "UNVERIFIED", "PRELIMINARY")
    assert sr.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert reread(sr).PatientName == "Müller^Grün"
    evidence = [s.SeriesInstanceUID for s in sr.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence]
    assert set(evidence) == {seg.SeriesInstanceUID, source[0].SeriesInstanceUID}


def test_what_is_referred_to_must_be_evidence(monkeypatch):
    findings, source = three_lesions()
    images = dicom_sr.evidence(source)
    monkeypatch.setattr(dicom_sr, "evidence", lambda _: images[:1])
    with pytest.raises(EncodingError, match="not among its evidence"):
        report(findings, source)


def test_reports_that_cannot_be_true_are_refused():
    findings, source = made.case()
    seg, _ = both(findings, source)
    with pytest.raises(EncodingError, match="needs their segmentation"):
        dicom_sr.build(findings, [], source, IDENTITY, made.PRODUCED_AT)
    other = made.findings(made.grid(), source, made.MEASURABLE_BOX, criteria=Criteria(min_diameter_mm=11))
    with pytest.raises(EncodingError, match="made from other findings"):
        dicom_sr.build(findings, [both(other, source)[0]], source, IDENTITY, made.PRODUCED_AT)
    with pytest.raises(EncodingError, match="slice 0"):
        dicom_sr.build(findings, [seg], source[::-1], IDENTITY, made.PRODUCED_AT)
    seg.StudyInstanceUID = "1.2.3"
    with pytest.raises(EncodingError, match="StudyInstanceUID"):
        dicom_sr.build(findings, [] if seg is None else [seg], source, IDENTITY, made.PRODUCED_AT)


def test_the_same_run_gives_the_same_bytes():
    assert written(report(*made.case())) == written(report(*made.case()))
    assert written(nothing_found()) == written(nothing_found())
    assert written(not_analysed()) == written(not_analysed())


def test_another_criterion_makes_another_report():
    uids = {report(*made.case(criteria=c)).SOPInstanceUID for c in (Criteria(), Criteria(min_diameter_mm=12))}
    assert len(uids) == 2


REPORTS = {
    "two lesions": lambda: report(*made.case()),
    "two lesions, volume rule": lambda: report(*made.case("oblique", criteria=Criteria(rule=Rule.VOLUME))),
    "nothing found": nothing_found,
    "not analysed": not_analysed,
    "not analysed by the demo": lambda: not_analysed(provenance=made.PROVENANCE),
}


@pytest.mark.parametrize("name", REPORTS)
def test_dciodvfy_finds_no_error(tool, tmp_path, name):
    path = tmp_path / "sr.dcm"
    sr = REPORTS[name]()
    path.write_bytes(written(sr))
    done = subprocess.run([tool("dciodvfy", "dicom3tools"), path], capture_output=True, text=True, check=False)
    lines = [text for text in (done.stdout + done.stderr).splitlines() if text.startswith(("Error", "Warning"))]
    assert set(lines) <= {PRIVATE_WARNING}
    assert bool(lines) == ("CodingSchemeIdentificationSequence" in sr)


@pytest.mark.parametrize("name", REPORTS)
def test_dsrdump_reads_the_whole_tree(tool, tmp_path, name):
    path = tmp_path / "sr.dcm"
    sr = REPORTS[name]()
    path.write_bytes(written(sr))
    done = subprocess.run([tool("dsrdump"), "+Pl", path], capture_output=True, check=False)
    assert done.returncode == 0
    shown = done.stdout.decode("latin-1")
    assert all(text in shown for text in sentences(sr))
    assert not done.stderr


def test_the_published_liver_measurement_comes_out_of_the_report(testdata, tool, tmp_path):
    folder = testdata / "02_liver_ct_seg_dcmqi" / "segmentations"
    series = inspect(sorted((folder / "ct-3slice").iterdir()))
    ct = read_volume(series)
    liver = pydicom.dcmread(folder / "liver.dcm").pixel_array.astype(np.uint8)  # its frames run from feet to head too
    masks = Masks(None, LabelVolume(liver, ct.grid), Provenance("given_masks", "1"), lesion_per_value=True)
    seg, sr = both(measure(ct, masks, Criteria()), headers(series))
    [group] = groups(sr)
    numbers = measured(group)
    assert numbers["Volume"][0] == pytest.approx(70.3619, rel=1e-4)
    assert numbers["Mean Attenuation Coefficient"][0] == pytest.approx(37.3289, abs=1e-3)
    assert numbers["Standard Deviation Attenuation Coefficient"][0] == pytest.approx(59.1691, abs=1e-3)
    assert reread(seg).pixel_array.sum() == 107_098
    for name, ds in (("seg", seg), ("sr", sr)):
        path = tmp_path / f"{name}.dcm"
        path.write_bytes(written(ds))
        done = subprocess.run([tool("dciodvfy", "dicom3tools"), path], capture_output=True, text=True, check=False)
        assert "Error" not in done.stdout + done.stderr


def test_names_in_any_character_set_stay_readable_beside_our_words(testdata):
    path = testdata / "09_charsets_and_odd_ct" / "charset" / "chrH32.dcm"
    source = pydicom.dcmread(path, stop_before_pixels=True)
    sr = reread(dicom_sr.build_not_analysed("no CT series", source, IDENTITY, made.PRODUCED_AT, "run"))
    assert str(sr.PatientName) == "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"
    assert "No analysis was possible. Reason: no CT series" in sentences(sr)


def test_a_pipeline_with_many_weights_and_a_long_name_still_fits():
    provenance = replace(
        made.PROVENANCE, pipeline="x" * 90, weights_sha256={f"fold_{n}/checkpoint.pth": "f" * 64 for n in range(40)}
    )
    findings, source = made.case(provenance=provenance)
    seg, sr = both(findings, source)
    assert len(seg.SegmentSequence[0].SegmentAlgorithmName) <= 64
    assert sum("sha256:" in text for text in sentences(sr)) == 40


def test_what_a_person_marked_is_not_called_an_algorithm_s():
    findings, source = made.case(provenance=Provenance("given_masks", "1", by_person=True))
    seg, sr = both(findings, source)
    assert {s.SegmentAlgorithmType for s in seg.SegmentSequence} == {"MANUAL"}
    assert not any("SegmentAlgorithmName" in s for s in seg.SegmentSequence)
    assert sr.SeriesDescription == "Liver lesions report by a person"
    told = sentences(sr)
    assert CAVEAT not in told
    assert "A person marked 2 lesions: 1 measurable, 1 non-measurable." in told
    everything = str(seg) + " ".join(told)
    assert "AI " not in everything
    assert "algorithm found" not in everything
