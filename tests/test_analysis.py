"""From files to what is sent: whose UIDs the results bear, and what is checked before they leave."""

from __future__ import annotations

from pathlib import Path

import made_findings as made
import numpy as np
import pydicom
import pytest
from made_series import edit
from made_series import made as made_on_disk

from salsa_node.analysis import Analysis, Lineage, Terms, analyse, check, refuse
from salsa_node.dicom_result import Kind
from salsa_node.errors import EncodingError, GuardFailed, SeriesRejected
from salsa_node.pipelines import Masks, Observer, Provenance, unobserved
from salsa_node.volume import CtVolume, LabelVolume
from salsa_node.worker import encoded

BORN = Lineage(made.PRODUCED_AT)


def refused(paths: list[Path], reason: str = "2 slices; a volume needs at least 3") -> Analysis:
    return refuse(paths, reason, Terms(), lambda _: BORN)


def told(result: Analysis) -> list[str]:
    """The texts of the record."""
    (report,) = result.of(Kind.SR)
    return [str(item.TextValue) for item in report.ContentSequence[-1].ContentSequence if "TextValue" in item]


def uids(result: Analysis) -> set[str]:
    return {uid for item in result.objects for uid in (item.ds.SOPInstanceUID, item.ds.SeriesInstanceUID)}


def of_patient(folder: Path, patient: str, study: str) -> list[Path]:
    """Two slices under the same file names, whoever the patient is."""
    _, paths = made_on_disk(folder, slices=2)
    for n, path in enumerate(paths):
        edit(path, lambda ds, n=n: ds.update(whose(patient, study, n)))
    return paths


def whose(patient: str, study: str, n: int) -> pydicom.Dataset:
    ds = pydicom.Dataset()
    ds.PatientID, ds.StudyInstanceUID = patient, study
    ds.SeriesInstanceUID, ds.SOPInstanceUID = f"{study}.1", f"{study}.1.{n}"
    return ds


def test_refusals_of_two_patients_share_no_uid_though_their_files_are_called_alike(tmp_path):
    anna = refused(of_patient(tmp_path / "a", "ANNA", "1.2.3"))
    bob = refused(of_patient(tmp_path / "b", "BOB", "1.2.4"))
    renamed = refused(of_patient(tmp_path / "c", "BERTA", "1.2.3"))
    assert len(uids(anna)) == 6
    assert not uids(anna) & uids(bob)
    assert not uids(anna) & uids(renamed)  # the same images under another name are other bytes


def test_a_refusal_before_any_algorithm_ran_says_so_and_what_wrote_it(tmp_path):
    paths = of_patient(tmp_path, "ANNA", "1.2.3")
    words = "No algorithm looked at the images. Written by salsa_node"
    assert any(words in said for said in told(refused(paths)))
    gave_up = refuse(paths, "no liver", Terms(), lambda _: BORN, made.PROVENANCE)
    assert not any(words in said for said in told(gave_up))
    assert "demo" in told(gave_up)


def test_a_second_refusal_is_told_from_the_first(tmp_path):
    paths = of_patient(tmp_path, "ANNA", "1.2.3")
    again = refuse(paths, "no liver", Terms(), lambda _: Lineage(made.PRODUCED_AT, revision=2))
    assert {item.ds.SeriesDescription for item in again.objects} == {
        "AI liver lesions report, rev 2",
        "AI liver lesions summary, rev 2",
    }


def test_the_same_images_elsewhere_and_in_another_order_give_the_same_refusal(tmp_path):
    first = refused(of_patient(tmp_path / "a", "ANNA", "1.2.3"))
    paths = of_patient(tmp_path / "b", "ANNA", "1.2.3")
    assert uids(refused(paths[::-1])) == uids(first)


def test_a_refusal_of_more_images_is_another_one(tmp_path):
    paths = of_patient(tmp_path, "ANNA", "1.2.3")
    assert not uids(refused(paths)) & uids(refused(paths[:1]))


def test_files_without_uids_are_told_from_files_that_cannot_be_read(tmp_path):
    paths = of_patient(tmp_path, "ANNA", "1.2.3")
    for path in paths:
        edit(path, lambda ds: ds.update(dict.fromkeys(("StudyInstanceUID", "SOPInstanceUID"), "")))
    with pytest.raises(SeriesRejected, match=r"without a value are StudyInstanceUID, SOPInstanceUID$"):
        refused(paths)
    for path in paths:
        path.write_bytes(b"no DICOM at all")
    with pytest.raises(SeriesRejected, match="none of the 2 files can be read"):
        refused(paths)


@pytest.mark.parametrize("name", ["empty", "text", "broken number", "broken value"])
def test_a_header_that_cannot_be_read_is_passed_over_for_one_that_can(tmp_path, name):
    paths = of_patient(tmp_path, "ANNA", "1.2.3")
    whole = paths[0].read_bytes()
    at = whole.index(b"\x20\x00\x0d\x00UI")  # Study Instance UID
    broken = {
        "empty": b"",
        "text": b"no DICOM at all",
        "broken number": whole[: at + 4] + b"FD\x03\x00abc",
        "broken value": whole[: at + 4] + b"ZZ\x00\x00\x02\x00\x00\x00ab",
    }[name]
    paths[0].write_bytes(broken)
    assert refused(paths).objects[0].ds.PatientID == "ANNA"
    with pytest.raises(SeriesRejected, match="none of the 1 files"):
        refused(paths[:1])


def test_a_report_on_an_object_of_a_private_class_is_an_error_of_ours(tmp_path):
    paths = of_patient(tmp_path / "a", "A", "1.2.3")
    for path in paths:
        edit(path, lambda ds: setattr(ds, "SOPClassUID", "1.3.12.2.1107.5.9.1"))
    with pytest.raises(EncodingError, match="the report could not be put together"):
        refused(paths)


def test_a_refusal_for_another_patient_is_kept_here(tmp_path):
    result = refused(of_patient(tmp_path / "a", "A", "1.2.3"))
    contents = [encoded(item.ds) for item in result.objects]
    with pytest.raises(GuardFailed, match="differs from its source in"):
        check(contents, of_patient(tmp_path / "b", "B", "1.2.4"), result)


def test_what_cannot_be_read_is_kept_here_as_what_is_wrong_is(tmp_path):
    paths = of_patient(tmp_path / "a", "A", "1.2.3")
    result = refused(paths)
    contents = [encoded(item.ds) for item in result.objects]
    check(contents, paths, result)
    with pytest.raises(GuardFailed, match="cannot be read"):
        check([b"not DICOM", *contents[1:]], paths, result)
    for path in paths:
        path.write_bytes(b"nor this")
    with pytest.raises(GuardFailed, match="cannot be read"):
        check(contents, paths, result)


class Corner:
    """A pipeline that marks one block."""

    provenance = Provenance("corner", "1")

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
        labels = np.zeros(ct.grid.shape, np.uint8)
        labels[1:4, 2:6, 2:6] = 1
        return Masks(None, LabelVolume(labels, ct.grid), self.provenance)

    def unload(self) -> None: ...


def test_values_of_no_stated_unit_are_said_to_be_taken_for_hounsfield_units(tmp_path):
    _, paths = made_on_disk(tmp_path)
    plain = analyse(paths, Corner(), Terms(), lambda _: BORN)
    for path in paths[:2]:
        edit(path, lambda ds: setattr(ds, "RescaleType", "US"))
    result = analyse(paths, Corner(), Terms(), lambda _: BORN)
    (report,) = result.of(Kind.SR)
    words = " ".join(str(each.value) for each in report.iterall() if each.keyword == "TextValue")
    assert f"2 of {len(paths)} images give no unit of their values" in words
    assert "no_unit" not in {flag.name for flag in plain.findings.flags}
    assert not uids(plain) & uids(result), "other words are other bytes, and go out under other UIDs"
