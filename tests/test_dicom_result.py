from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from zoneinfo import ZoneInfo

import made_findings as made
import pydicom
import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import SecondaryCaptureImageStorage

from salsa_node import dicom_sr, uids
from salsa_node.dicom_result import (
    AS_ITS_IMAGES,
    Identity,
    _numbers,
    check_source,
    described,
    line,
    local,
    plain,
    sign,
)
from salsa_node.errors import EncodingError
from salsa_node.owners import distinct, same_patient_and_study
from salsa_node.pipelines import DEMO_NOTICE
from salsa_node.series import WHOSE

IDENTITY = Identity()


def report(source: Dataset, produced_at: datetime = made.PRODUCED_AT, identity: Identity = IDENTITY) -> Dataset:
    return dicom_sr.build_not_analysed("no suitable series", source, identity, produced_at, "run")


def written(ds: Dataset) -> bytes:
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def reread(ds: Dataset) -> Dataset:
    return pydicom.dcmread(BytesIO(written(ds)))


def raw(ds: Dataset, keyword: str) -> bytes:
    """The value's bytes as they stand in the file, without what ends them: padding, an empty group, an idle escape."""
    return bytes(ds.get_item(keyword).value or b"").rstrip(b" =").removesuffix(b"\x1b(B")


CHARACTER_SETS = {
    "chrArab": "قباني^لنزار",
    "chrFren": "Buc^Jérôme",
    "chrGerm": "Äneas^Rüdiger",
    "chrGreek": "Διονυσιος",
    "chrH31": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "chrH32": "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    "chrHbrw": "שרון^דבורה",
    "chrI2": "Hong^Gildong=洪^吉洞=홍^길동",
    "chrJapMulti": "やまだ^たろう",
    "chrJapMultiExplicitIR6": "やまだ^たろう",
    "chrKoreanMulti": "김희중",
    "chrRuss": "Люкceмбypг",
    "chrX1": "Wang^XiaoDong=王^小東",
    "chrX2": "Wang^XiaoDong=王^小东",
}


@pytest.mark.parametrize(
    ("character_set", "keyword", "value"),
    [
        ("ISO_IR 192", "PatientID", b"P\xfc1 "),  # no UTF-8
        ("GB18030", "PatientName", b"Wang\xff\xff"),
        (["ISO 2022 IR 6", "ISO 2022 IR 100"], "PatientName", b"M\x1b-A\xfcller^Hans"),
        (None, "PatientName", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B"),
        ("ISO_IR 100", "PatientName", b"A^B==="),
        ("ISO_IR 100", "PatientBirthDate", b"1960.01.02"),
        ("ISO_IR 100", "StudyDescription", b"CT  \xc3\xbc"),
    ],
)
def test_bytes_arrive_as_they_were_even_where_they_break_their_character_set(character_set, keyword, value):
    _, source = made.case()
    ds = made.with_meta(source[0])
    for name in ("PatientName", "StudyDescription", "ReferringPhysicianName", "SpecificCharacterSet"):
        delattr(ds, name)
    if character_set is not None:
        ds.SpecificCharacterSet = character_set
    tag = tag_for_keyword(keyword)
    original = reread(ds)
    original[tag] = RawDataElement(Tag(tag), dictionary_VR(tag), len(value), value, 0, False, True)
    original = pydicom.dcmread(BytesIO(written(original)))
    assert original.get_item(tag).value == value
    result = reread(report(original))
    same_patient_and_study(result, original)
    assert result.get_item(tag).value == value


@pytest.mark.parametrize("notice", ["", DEMO_NOTICE])
@pytest.mark.parametrize("by_person", [False, True])
def test_a_list_of_series_tells_results_apart(notice, by_person):
    provenance = replace(made.PROVENANCE, notice="" if by_person else notice, by_person=by_person)
    titles = ("SEG", "report", "SEG, single", "diameters", "summary", "key objects", "label map")
    said = [described(what, provenance, replace(IDENTITY, revision=n)) for what in titles for n in (1, 2, 10)]
    assert len(set(said)) == len(said)
    assert all(len(words) <= 64 for words in said)
    assert all(words.endswith(plain(provenance.notice)) for words in said)


def test_the_guard_compares_the_bytes_themselves():
    """Both read as "P" and a replacement character."""
    _, source = made.case()
    made.with_meta(source[0]).SpecificCharacterSet = "ISO_IR 192"
    one, other = reread(source[0]), reread(source[0])
    for ds, value in ((one, b"P\xfc"), (other, b"P\xfd")):
        ds["PatientID"] = RawDataElement(Tag("PatientID"), "LO", 2, value, 0, False, True)
    with pytest.raises(EncodingError, match="PatientID"):
        same_patient_and_study(one, other)


@pytest.mark.parametrize("name", CHARACTER_SETS)
def test_names_survive_in_their_own_character_set(testdata, name):
    path = testdata / "09_charsets_and_odd_ct" / "charset" / f"{name}.dcm"
    result = reread(report(pydicom.dcmread(path, stop_before_pixels=True)))
    untouched = pydicom.dcmread(path, stop_before_pixels=True)
    assert raw(result, "PatientName") == raw(untouched, "PatientName")
    assert str(result.PatientName) == CHARACTER_SETS[name]
    assert result.get("SpecificCharacterSet") == untouched.get("SpecificCharacterSet")
    assert result.StudyInstanceUID == untouched.StudyInstanceUID


def test_the_study_is_carried_and_the_series_is_ours():
    source = made.headers(made.grid())[0]
    result = reread(report(source))
    for keyword in (
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "StudyDate",
        "StudyTime",
        "AccessionNumber",
        "StudyID",
    ):
        assert result[keyword].value == source[keyword].value
    assert result.PatientName == "Müller^Grün"
    assert result.StudyDescription == "CT Oberbauch für Leber"
    assert result.ReferringPhysicianName == "Arzt^Jürg"
    assert result.SeriesInstanceUID != source.SeriesInstanceUID
    assert (result.SeriesNumber, result.Manufacturer, result.StationName) == (9002, "salsa_node", "SALSA_NODE")
    assert (result.ContentDate, result.ContentTime) == ("20261120", "223015.250000")
    assert (result.SeriesDate, result.InstanceCreationTime) == ("20261120", "223015.250000")


@pytest.mark.parametrize("zone", [UTC, ZoneInfo("Asia/Tokyo")])
def test_no_result_is_older_than_its_study(zone):
    """Taken in Tokyo at 08:30 and answered five minutes later; the images name no time zone."""
    source = made.headers(made.grid())[0]
    source.StudyDate, source.StudyTime = "20261120", "083000"
    result = reread(report(source, datetime(2026, 11, 19, 23, 35, tzinfo=UTC).astimezone(zone)))
    assert (result.SeriesDate, result.SeriesTime) == ("20261120", "083000.000000" if zone is UTC else "083500.000000")
    source.AcquisitionDate, source.AcquisitionTime = "20261121", "0904"
    assert local(AS_ITS_IMAGES.astimezone(zone), source) == datetime(2026, 11, 21, 9, 4, tzinfo=zone)


@pytest.mark.parametrize(("day", "time"), [("20261301", "08"), ("2026.11.20", "08"), ("20261120", "8")])
def test_a_date_that_is_none_dates_nothing(day, time):
    source = made.headers(made.grid())[0]
    for of in ("Study", "Series", "Acquisition"):
        for part in ("Date", "Time"):
            source.pop(f"{of}{part}", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source.StudyDate, source.StudyTime = day, time
    expected = datetime(2026, 11, 20, tzinfo=UTC) if day == "20261120" else AS_ITS_IMAGES
    assert local(AS_ITS_IMAGES, source) == expected


def test_dates_follow_the_offset_that_the_source_names():
    source = made.headers(made.grid())[0]
    source.TimezoneOffsetFromUTC = "+0200"
    result = reread(report(source))
    assert (result.ContentDate, result.ContentTime) == ("20261121", "003015.250000")
    assert result.TimezoneOffsetFromUTC == "+0200"
    source.TimezoneOffsetFromUTC = "-0330"
    assert local(made.PRODUCED_AT, source).strftime("%H%M") == "1900"
    source.TimezoneOffsetFromUTC = "+1400"
    assert local(made.PRODUCED_AT, source).strftime("%H%M") == "1230"


@pytest.mark.parametrize("offset", ["nowhere", "+9900", "+1401", "-1230", "+0260", "0200", "", "+²200"])
def test_an_offset_that_is_none_is_ignored(offset):
    source = made.headers(made.grid())[0]
    source.TimezoneOffsetFromUTC = offset
    assert local(made.PRODUCED_AT, source).utcoffset() == timedelta(0)


def test_a_naive_time_is_refused():
    with pytest.raises(ValueError, match="aware"):
        report(made.headers(made.grid())[0], produced_at=datetime(2026, 11, 20))  # noqa: DTZ001


def test_missing_type_2_attributes_become_empty():
    source = made.headers(made.grid())[0]
    required = (
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "StudyDate",
        "StudyTime",
        "AccessionNumber",
    )
    for keyword in (*required, "StudyID", "ReferringPhysicianName", "SpecificCharacterSet", "StudyDescription"):
        del source[keyword]
    result = reread(report(source))
    assert all(keyword in result and not result[keyword].value for keyword in (*required, "StudyID"))
    assert "StudyDescription" not in result


def test_an_empty_character_set_is_left_out_as_the_standard_wants():
    source = made.headers(made.grid())[0]
    source.PatientName, source.StudyDescription, source.ReferringPhysicianName = "Plain^Name", "CT", ""
    source.SpecificCharacterSet = ""
    result = reread(report(source))
    assert "SpecificCharacterSet" not in result
    assert result.PatientName == "Plain^Name"


def test_an_empty_patient_id_stays_empty():
    source = made.headers(made.grid())[0]
    source.PatientID = ""
    result = reread(report(source))
    assert not result.PatientID
    assert result.PatientName == "Müller^Grün"


def with_bytes(source: Dataset, old: bytes, new: bytes) -> Dataset:
    """The source read back from a file in which some bytes were exchanged."""
    file = BytesIO()
    made.with_meta(source).save_as(file, implicit_vr=False, little_endian=True)
    assert file.getvalue().count(old) == 1
    assert len(old) == len(new)
    return pydicom.dcmread(BytesIO(file.getvalue().replace(old, new)), force=True)


def test_odd_values_in_the_source_are_carried_not_judged():
    source = with_bytes(made.headers(made.grid())[0], b"DA\x08\x0019600102", b"DA\x08\x001960.1.2")
    assert report(source).PatientBirthDate == "1960.1.2"
    source = with_bytes(made.headers(made.grid())[0], b"CS\x02\x00F ", b"CS\x02\x00x ")
    assert report(source).PatientSex == "x"


def test_an_optional_attribute_that_cannot_be_read_is_left_out():
    source = made.headers(made.grid())[0]
    source.PatientWeight = "70.5"
    result = report(with_bytes(source, b"DS\x04\x0070.5", b"FD\x04\x0070.5"))
    assert "PatientWeight" not in result
    assert result.PatientName == "Müller^Grün"


def test_a_source_without_a_study_is_refused():
    source = made.headers(made.grid())[0]
    del source.StudyInstanceUID
    with pytest.raises(EncodingError, match="no StudyInstanceUID"):
        report(source)


def test_any_kind_of_instance_can_stand_for_the_study():
    source = made.headers(made.grid())[0]
    source.SOPClassUID = SecondaryCaptureImageStorage
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID", "Rows"):
        del source[keyword]
    evidence = report(source).CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert evidence.ReferencedSOPSequence[0].ReferencedSOPClassUID == SecondaryCaptureImageStorage


@pytest.mark.parametrize(
    "keyword", ["PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "AccessionNumber"]
)
def test_the_guard_stops_another_patient_or_study_and_names_no_value(keyword):
    source = made.headers(made.grid())[0]
    result = report(source)
    same_patient_and_study(result, source)
    other = made.headers(made.grid())[0]
    value = "19991231" if keyword == "PatientBirthDate" else "1.2.3"
    setattr(other, keyword, value)
    with pytest.raises(EncodingError, match=keyword) as caught:
        same_patient_and_study(result, other)
    assert value not in str(caught.value)
    assert str(source[keyword].value) not in str(caught.value)


def test_a_result_of_another_study_is_not_signed():
    result = report(made.headers(made.grid())[0])
    result.StudyInstanceUID = "2.25.9"
    with pytest.raises(EncodingError, match="differs from its source in StudyInstanceUID"):
        sign(result, made.headers(made.grid())[0], IDENTITY, made.PRODUCED_AT)


@pytest.mark.parametrize("keyword", WHOSE)
def test_a_source_of_two_patients_or_studies_is_no_source(keyword):
    where = made.grid()
    source = made.headers(where)
    value = "19991231" if keyword == "PatientBirthDate" else "1.2.3"
    setattr(source[7], keyword, value)
    with pytest.raises(EncodingError, match=f"source images 0 and 7 differ in {keyword}") as caught:
        check_source(source, where)
    assert value not in str(caught.value)


def test_headers_that_write_alike_whose_they_are_are_compared_once():
    source = made.headers(made.grid())
    assert distinct(source) == [0]
    read = [reread(made.with_meta(ds)) for ds in source]
    assert distinct(read) == [0]
    str(read[3].PatientName)  # no longer as it was read
    assert distinct(read) == [0, 3]


@pytest.mark.parametrize("keyword", WHOSE)
@pytest.mark.parametrize("as_read", [True, False])
def test_whichever_header_is_another_patients_is_compared(keyword, as_read):
    source = made.headers(made.grid())
    setattr(source[5], keyword, "ISO_IR 192" if keyword == "SpecificCharacterSet" else "1.2.3")
    if as_read:
        source = [reread(made.with_meta(ds)) for ds in source]
    assert distinct(source) == [0, 5]
    del source[9][keyword]
    assert distinct(source) == [0, 5, 9]


@pytest.mark.parametrize("as_read", [True, False])
def test_another_patients_header_of_the_same_length_is_compared(as_read):
    source = made.headers(made.grid())
    source[5].PatientID = str(source[0].PatientID)[:-1] + "?"
    if as_read:
        source = [reread(made.with_meta(ds)) for ds in source]
    assert distinct(source) == [0, 5]


@pytest.mark.parametrize(
    ("written_so", "expected"),
    [
        (b"1.5\\-2\\3e1 ", [1.5, -2.0, 30.0]),
        (b" +1.50 \\ -2\\30", [1.5, -2.0, 30.0]),
        (b"7 ", TypeError),  # one value is no position
        (b"1\\x\\3", ValueError),
        (b"1\\\\3", ValueError),
    ],
)
@pytest.mark.parametrize("vr", ["DS", None])
def test_numbers_as_they_were_read_are_those_that_pydicom_makes_of_them(vr, written_so, expected):
    tag = Tag("ImagePositionPatient")

    def ask(how: Callable[[Dataset], object]) -> object:
        ds = Dataset()
        ds[tag] = RawDataElement(tag, vr, len(written_so), written_so, 0, vr is None, True)
        try:
            return how(ds), isinstance(ds.get_item(tag), RawDataElement)
        except (ValueError, TypeError) as exc:
            return type(exc)

    ours = ask(lambda ds: _numbers(ds, tag, 4))
    pydicoms = ask(lambda ds: [float(number) for number in ds[tag].value])
    if isinstance(expected, list):
        assert ours == (expected, vr == "DS")  # left as it was read
        assert pydicoms == (expected, False)
    else:
        assert ours is pydicoms is expected


def test_a_source_attribute_absent_here_and_empty_there_is_the_same():
    where = made.grid()
    source = made.headers(where)
    for k, ds in enumerate(source):
        ds.AccessionNumber = ""
        if k % 2:
            del ds.AccessionNumber
    check_source(source, where)


def item(keyword: str, value: object) -> list[Dataset]:
    ds = Dataset()
    setattr(ds, keyword, value)
    return [ds]


# What a source may say of patient, study, visit and trial beside what every object must (PS3.3 C.7.1, C.7.2).
OPTIONAL = {
    "IssuerOfPatientID": "Ward 7",
    "IssuerOfPatientIDQualifiersSequence": item("UniversalEntityID", "1.2.3"),
    "TypeOfPatientID": "TEXT",
    "PatientBirthTime": "0102",
    "OtherPatientIDs": "X-2",
    "OtherPatientIDsSequence": item("PatientID", "X-2"),
    "OtherPatientNames": "Other^Name",
    "EthnicGroup": "none",
    "PatientComments": "a comment",
    "QualityControlSubject": "NO",
    "PatientIdentityRemoved": "NO",
    "DeidentificationMethod": "by hand",
    "DeidentificationMethodCodeSequence": item("CodeValue", "113100"),
    "StudyDescription": "CT liver",
    "IssuerOfAccessionNumberSequence": item("LocalNamespaceEntityID", "RIS"),
    "ReferringPhysicianIdentificationSequence": item("InstitutionName", "Ward 7"),
    "PhysiciansOfRecord": "First^Doctor",
    "NameOfPhysiciansReadingStudy": "Second^Doctor",
    "RequestingService": "Oncology",
    "ReferencedStudySequence": item("ReferencedSOPInstanceUID", "1.2.3"),
    "ProcedureCodeSequence": item("CodeValue", "P5-09051"),
    "PatientAge": "061Y",
    "PatientSize": "1.7",
    "PatientWeight": "70.5",
    "AdmissionID": "V-1",
    "IssuerOfAdmissionIDSequence": item("LocalNamespaceEntityID", "HIS"),
    "AdditionalPatientHistory": "known lesions",
    "AdmittingDiagnosesDescription": "follow-up",
    "ClinicalTrialSponsorName": "sponsor",
    "ClinicalTrialProtocolID": "P-1",
    "ClinicalTrialProtocolName": "a trial",
    "ClinicalTrialSiteID": "S-1",
    "ClinicalTrialSiteName": "a site",
    "ClinicalTrialSubjectID": "T-1",
    "ClinicalTrialSubjectReadingID": "R-1",
    "ClinicalTrialTimePointID": "2",
    "ClinicalTrialTimePointDescription": "after six weeks",
}


def test_all_that_a_source_says_of_its_patient_and_study_arrives():
    source = made.headers(made.grid())[0]
    for keyword, value in OPTIONAL.items():
        setattr(source, keyword, value)
    result = reread(report(source))
    assert {keyword: result.get(keyword) for keyword in OPTIONAL} == {
        keyword: source[keyword].value for keyword in OPTIONAL
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"manufacturer": "x" * 65},
        {"station_name": "x" * 17},
        {"institution_name": "Spital Zürich"},
        {"model_name": "a\\b"},
        {"first_series_number": 0},
        {"first_series_number": 2**31 - 2},
    ],
)
def test_an_identity_that_no_object_can_carry_is_refused(wrong):
    with pytest.raises(ValueError, match=r"characters|number"):
        replace(IDENTITY, **wrong)


def test_the_identity_is_in_the_object():
    identity = Identity(institution_name="Ward 7", device_serial_number="42", first_series_number=77)
    result = report(made.headers(made.grid())[0], identity=identity)
    assert (result.InstitutionName, result.DeviceSerialNumber, result.SeriesNumber) == ("Ward 7", "42", 78)
    assert Identity().device_uid != identity.device_uid


def test_our_words_are_ascii_and_fit():
    assert plain(DEMO_NOTICE) == "DEMO MODEL - NOT FOR CLINICAL USE"
    assert plain("≥ 10 mm³\x07 é") == ">= 10 mm3? ?"
    assert line("a", "", "b\\c\nd") == "a - b/c d"
    assert len(line("x" * 80)) == 64
    assert line("x" * 80).endswith("...")


def test_the_same_run_gives_the_same_bytes():
    source = made.headers(made.grid())[0]
    assert written(report(source)) == written(report(made.headers(made.grid())[0]))
    later = datetime(2026, 11, 20, 22, 30, 16, tzinfo=UTC)
    assert written(report(source)) != written(report(source, produced_at=later))


def test_the_file_says_who_wrote_it():
    meta = reread(report(made.headers(made.grid())[0])).file_meta
    assert meta.ImplementationClassUID == uids.IMPLEMENTATION_CLASS_UID
    assert meta.ImplementationVersionName == uids.IMPLEMENTATION_VERSION_NAME
    assert meta.ImplementationVersionName.startswith("SALSA_NODE_")
    assert len(meta.ImplementationVersionName) <= 16
    assert meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"


def test_what_is_empty_or_malformed_and_optional_is_left_out():
    source = made.headers(made.grid())[0]
    source.DeidentificationMethod = ""  # type 1C: with a value or not at all
    source.PatientAge = "0Y"
    source.PatientWeight = None
    obj = dicom_sr.build_not_analysed("no CT", source, Identity(), made.PRODUCED_AT, "run")
    for keyword in ("DeidentificationMethod", "PatientAge", "PatientWeight"):
        assert keyword not in obj, keyword
    source.PatientAge = "066Y"
    obj = dicom_sr.build_not_analysed("no CT", source, Identity(), made.PRODUCED_AT, "run")
    assert obj.PatientAge == "066Y"
