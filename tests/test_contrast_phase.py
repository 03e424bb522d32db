from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from salsa_node import phantom
from salsa_node.analysis import Lineage, Terms, analyse, summary
from salsa_node.contrast_phase import ContrastPhase, Phase, read
from salsa_node.dicom_result import Kind
from salsa_node.pipelines import PipelineSettings
from salsa_node.pipelines.given_masks import GivenMasksPipeline
from salsa_node.products import Products

NATIVE, ARTERIAL, PORTAL, DELAYED, UNKNOWN = (
    Phase.NATIVE, Phase.ARTERIAL, Phase.PORTAL_VENOUS, Phase.DELAYED, Phase.UNKNOWN,
)  # fmt: skip


def phase_of(**attributes: str) -> Phase:
    return said(**attributes).phase


def said(**attributes: str) -> ContrastPhase:
    header = Dataset()
    for keyword, value in attributes.items():
        tag = tag_for_keyword(keyword)
        header.add(DataElement(tag, dictionary_VR(tag), value, validation_mode=IGNORE))  # as reading does
    return read(header)


@pytest.mark.parametrize(
    ("text", "phase"),
    [
        # Dutch
        ("Abdomen blanco", NATIVE), ("CT lever zonder contrast", NATIVE), ("Lever arterieel", ARTERIAL),
        ("arteriële fase", ARTERIAL), ("laat-arterieel", ARTERIAL), ("vroege arteriële fase", ARTERIAL),
        ("Abdomen portoveneus", PORTAL), ("portaal-veneuze fase", PORTAL), ("Abdomen veneus 3mm", PORTAL),
        ("late fase", DELAYED), ("laat 5 min", DELAYED), ("CT abdomen met contrast", UNKNOWN),
        ("abdomen blanco en veneus", UNKNOWN), ("voor contrast", NATIVE), ("uitscheidingsfase", DELAYED),
        # Turkish
        ("KONTRASTSIZ BATIN", NATIVE), ("kontrastsız üst batın", NATIVE), ("İlaçsız", NATIVE),
        ("Arteriyel faz", ARTERIAL), ("GEÇ ARTERİYEL", ARTERIAL), ("arter fazı", ARTERIAL),
        ("Erken arteriyel", ARTERIAL),
        ("Portal venöz faz", PORTAL), ("VENÖZ", PORTAL), ("portal faz", PORTAL), ("Geç faz", DELAYED),
        ("gecikmiş 5 dk", DELAYED), ("denge fazı", DELAYED), ("kontrastlı batın", UNKNOWN),
        ("kontrast öncesi", NATIVE), ("arteriyel ve venöz", UNKNOWN), ("Batın 70 sn", PORTAL),
        # English
        ("ABD W/O CONTRAST", NATIVE), ("Abdomen WO 5.0", NATIVE), ("non-contrast 3mm", NATIVE), ("Noncon Abd", NATIVE),
        ("UNENHANCED", NATIVE), ("LIVER PRE CONTRAST", NATIVE), ("Abd C- 5.0 B30f", NATIVE), ("PLAIN ABDOMEN", NATIVE),
        ("NCCT liver", NATIVE), ("without IV contrast", NATIVE),
        ("Arterial Phase 1.25", ARTERIAL), ("LIVER ART 3.0", ARTERIAL), ("LATE ARTERIAL", ARTERIAL),
        ("early-arterial", ARTERIAL), ("Abd 30s", ARTERIAL), ("ABD_ART_1.5", ARTERIAL),
        ("Portal Venous 5.0", PORTAL), ("PV 3mm", PORTAL), ("abd portal", PORTAL), ("LIVER VEN", PORTAL),
        ("Venous phase", PORTAL), ("PVP", PORTAL), ("CE Abd venous", PORTAL), ("Thorax/Abd 70 sec", PORTAL),
        ("Abdomen C+ portal venous", PORTAL), ("ABD_PV_5.0_Br40", PORTAL),
        ("DELAYED 5 MIN", DELAYED), ("Delay", DELAYED), ("equilibrium", DELAYED), ("excretory phase", DELAYED),
        ("Abd 180s", DELAYED),
        # German
        ("Abdomen nativ 5.0", NATIVE), ("Leber ohne KM", NATIVE), ("Oberbauch o. KM", NATIVE), ("NATIV", NATIVE),
        ("ohne Kontrastmittel", NATIVE), ("vor KM", NATIVE),
        ("Leber arteriell", ARTERIAL), ("früharteriell", ARTERIAL), ("Spätarteriell 3 mm", ARTERIAL),
        ("arterielle Phase", ARTERIAL), ("Abd. art. 1.0", ARTERIAL), ("spaetarteriell", ARTERIAL),
        ("Abdomen portalvenös", PORTAL), ("Abd venös 5.0", PORTAL), ("portal-venöse Phase", PORTAL),
        ("Oberbauch pv", PORTAL), ("portalvenoes", PORTAL), ("mit KM venös", PORTAL), ("Leber 70 Sek", PORTAL),
        ("Spätphase", DELAYED), ("Abdomen spät", DELAYED), ("Ausscheidungsphase", DELAYED),
        # French
        ("ABDO SANS INJECTION", NATIVE), ("sans contraste", NATIVE), ("Foie SPC", NATIVE), ("sans IV", NATIVE),
        ("ABDO IV- 2mm", NATIVE), ("sans produit de contraste", NATIVE),
        ("temps artériel", ARTERIAL), ("Phase artérielle tardive", ARTERIAL), ("FOIE ARTERIEL", ARTERIAL),
        ("temps portal", PORTAL), ("ABDO VEINEUX", PORTAL), ("temps porto-veineux", PORTAL), ("phase veineuse", PORTAL),
        ("temps tardif", DELAYED), ("phase tardive", DELAYED),
        # Spanish
        ("ABDOMEN SIN CONTRASTE", NATIVE), ("TC simple", NATIVE), ("sin CIV", NATIVE), ("fase basal", NATIVE),
        ("fase arterial", ARTERIAL), ("HIGADO ARTERIAL TARDÍA", ARTERIAL),
        ("fase portal", PORTAL), ("FASE VENOSA", PORTAL), ("abdomen venoso", PORTAL),
        ("fase tardía", DELAYED), ("TARDIA 5 min", DELAYED), ("fase de equilibrio", DELAYED),
        ("fase excretora", DELAYED),
        # no phase, or more than one
        ("", UNKNOWN), ("Abdomen 5.0 B70s", UNKNOWN), ("Abd 5.0 I30f 3", UNKNOWN), ("ABD WITH CONTRAST", UNKNOWN),
        ("mit KM", UNKNOWN), ("C-SPINE", UNKNOWN), ("Artefaktreduktion iMAR", UNKNOWN), ("intravenous", UNKNOWN),
        ("Abd W WO CONTRAST", UNKNOWN), ("art/pv", UNKNOWN), ("nativ + venös", UNKNOWN),
        ("arterial and portal", UNKNOWN),
        ("with and without contrast", UNKNOWN), ("0.75s rotation", UNKNOWN), ("Tronco del encefalo", UNKNOWN),
        ("delayed venous", UNKNOWN), ("Abd 50s", UNKNOWN), ("TAP avec injection", UNKNOWN), ("con contraste", UNKNOWN),
        ("Spatial resolution", UNKNOWN), ("ohne/mit KM", UNKNOWN),
        ("sin y con contraste", UNKNOWN), ("avec et sans injection", UNKNOWN),
    ],
)  # fmt: skip
def test_a_series_description_in_four_languages(text, phase):
    assert phase_of(SeriesDescription=text) is phase
    assert phase_of(SeriesDescription=text.upper()) is phase
    assert phase_of(ProtocolName=f"  {text}  ") is phase


@pytest.mark.parametrize(
    ("bolus", "image", "phase"),
    [
        ("101500", "101530", ARTERIAL),
        ("101500.000", "101610.5", PORTAL),
        ("10:15:00", "10:16:15", PORTAL),
        ("235930", "000040", PORTAL),
        ("101500", "102000", DELAYED),
        ("101500", "101552", UNKNOWN),
        ("101500", "101500", UNKNOWN),
        ("101500", "101400", UNKNOWN),
        ("101500", "131500", UNKNOWN),
        ("", "101500", UNKNOWN),
        ("101500", "", UNKNOWN),
        ("soon", "101500", UNKNOWN),
    ],
)
def test_the_time_since_the_injection(bolus, image, phase):
    assert phase_of(ContrastBolusStartTime=bolus, AcquisitionTime=image) is phase


def test_attributes_that_agree_are_all_named():
    found = said(SeriesDescription="Abd art", ContrastBolusStartTime="101500", AcquisitionTime="101530")
    assert found.phase is ARTERIAL
    assert found.wrong.startswith("Phase wrong: arterial, expected portal venous")
    assert "Series Description and Contrast/Bolus Start Time" in found.wrong
    assert found.sentence == found.wrong


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"SeriesDescription": "arterial", "ProtocolName": "Abdomen portal venous"}, "Protocol Name: portal venous"),
        (
            {"SeriesDescription": "venous", "ContrastBolusStartTime": "101500", "AcquisitionTime": "101530"},
            "Series Description: portal venous, Contrast/Bolus Start Time: arterial",
        ),
        ({"SeriesDescription": "nativ", "ContrastBolusAgent": "ULTRAVIST 370"}, "contrast agent: given"),
        ({"SeriesDescription": "venös", "ContrastBolusAgent": "NONE"}, "Contrast/Bolus Agent: non-contrast"),
        ({"SeriesDescription": "art + pv", "ProtocolName": "arteriell"}, "Series Description: several"),
        ({"SeriesDescription": "nativ", "ProtocolName": "Abdomen arteriell + venös"}, "Protocol Name: several"),
    ],
)
def test_what_is_at_odds_is_unknown(attributes, told):
    found = said(**attributes)
    assert found.phase is UNKNOWN
    assert told in found.sentence
    assert found.wrong == ""


@pytest.mark.parametrize(
    ("attributes", "phase"),
    [
        ({"SeriesDescription": "venös 5.0", "ProtocolName": "Leber nativ/art/venös"}, PORTAL),
        ({"SeriesDescription": "nativ", "ContrastBolusAgent": "Gastrografin oral"}, NATIVE),
        ({"SeriesDescription": "nativ", "ContrastBolusAgent": "Telebrix", "ContrastBolusRoute": "ORAL"}, NATIVE),
        ({"SeriesDescription": "5.0 B30f", "ContrastBolusAgent": "NONE"}, NATIVE),
        ({"SeriesDescription": "5.0 B30f", "ContrastBolusAgent": ""}, UNKNOWN),
        ({"SeriesDescription": "5.0 B30f", "ContrastBolusAgent": "IOMERON 400"}, UNKNOWN),
        ({"SeriesDescription": "venous", "ContrastBolusAgent": "IOMERON 400"}, PORTAL),
    ],
)
def test_what_does_not_contradict_does_not_hinder(attributes, phase):
    assert phase_of(**attributes) is phase


def test_the_expected_phase_is_said_and_not_wrong():
    found = said(SeriesDescription="portal venous")
    assert (found.wrong, found.sentence) == (
        "",
        "Contrast phase: portal venous, as the headers have it (Series Description).",
    )
    assert said().sentence == "Contrast phase unknown: the headers do not name it."


def test_who_was_scanned_never_comes_out():
    for text in ("arterial DOE^JANE 1960-01-02", "DOE^JANE", "DOE^JANE art pv", "venous DOE^JANE"):
        found = said(SeriesDescription=text, ProtocolName=text, ContrastBolusAgent="DOE^JANE")
        assert "doe" not in (found.sentence + found.wrong + repr(found)).lower()
        assert "1960" not in repr(found)


@pytest.mark.parametrize(("told", "flagged"), [("arterial", True), ("portal_venous", False)])
def test_an_analysis_flags_the_wrong_phase_and_says_the_right_one(tmp_path, told, flagged):
    study = phantom.write_study(
        phantom.make(phantom.Recipe(5, shape=(24, 64, 64), spacing_mm=(8.0, 5.0, 5.0), phase=told)), tmp_path
    )
    pipeline = GivenMasksPipeline(PipelineSettings(masks_path=study.truth_labels))
    products = Products(per_lesion_seg=False, viewer_sr=False, summary_page=False, summary_pdf=False, key_images=0)
    result = analyse(
        study.axial, pipeline, Terms(products=products), lambda _: Lineage(datetime(2026, 1, 2, tzinfo=UTC))
    )
    assert ("phase_wrong" in {flag.name for flag in result.findings.flags}) == flagged
    assert summary(result)["contrast_phase_in_headers"] == told.replace("_", " ")
    (report,) = result.of(Kind.SR)
    texts = [str(element.value) for element in report.iterall() if element.keyword == "TextValue"]
    opening = "Phase wrong: arterial, expected portal venous" if flagged else "Contrast phase: portal venous"
    assert len([text for text in texts if text.startswith(opening)]) == 1
    assert not any("unknown" in text for text in texts)
