from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ComprehensiveSRStorage, EnhancedCTImageStorage
from told import events

from salsa_node import assembly, dicom_ct, phantom, series
from salsa_node.errors import SeriesRejected
from salsa_node.series_rules import SeriesRules
from salsa_node.settings import AssemblySettings, PipelineChoice
from salsa_node.store import NewInstance, Run, RunState, SeriesState, Store
from salsa_node.volume import CtVolume, Grid

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
QUIET = assembly.Rules(whole=AssemblySettings(quiet_s=30.0))
DEMO = PipelineChoice(name="demo", options={"a": 1})
STUDY = "1.2.3"
WHOLE = T0 + timedelta(seconds=30)
NAME, PATIENT_ID = "Doe^Jane", "ID-OF-JANE"


def after(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


@pytest.fixture
def ct(tmp_path: Path) -> Callable[..., list[Path]]:
    """Files of a small axial CT series, in slice order."""

    def write(number: int = 2, slices: int = 6, study: str = STUDY, **header: object) -> list[Path]:
        affine = np.array([[0, 0, 1, -4], [0, 1, 0, -4], [5, 0, 0, 100], [0, 0, 0, 1]], dtype=np.float64)
        volume = CtVolume(np.zeros((slices, 8, 8), np.int16), Grid((slices, 8, 8), affine, f"{study}.9"))
        identity = {"patient_name": NAME, "patient_id": PATIENT_ID, "acquired": T0, "series_number": number}
        given = dicom_ct.CtHeader(study, f"{study}.{number}", **identity | header)  # type: ignore[arg-type]
        return list(dicom_ct.write(volume, tmp_path / "made" / study / str(number), given))

    return write


@pytest.fixture
def receive(store: Store, data_dir: Path) -> Callable[..., None]:
    """Put files where the door puts them."""

    def keep(files: Sequence[Path], now: datetime = T0) -> None:
        for file in files:
            ds = pydicom.dcmread(file, stop_before_pixels=True)
            path = f"studies/{ds.StudyInstanceUID}/{ds.SeriesInstanceUID}/{ds.SOPInstanceUID}.dcm"
            (data_dir / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, data_dir / path)
            new = NewInstance(
                sop_instance_uid=ds.SOPInstanceUID,
                series_uid=ds.SeriesInstanceUID,
                study_uid=ds.StudyInstanceUID,
                sop_class_uid=ds.SOPClassUID,
                transfer_syntax_uid=ds.file_meta.TransferSyntaxUID,
                path=path,
                digest="digest",
                size_bytes=file.stat().st_size,
                calling_ae="CT1",
                modality=ds.Modality,
                series_number=ds.get("SeriesNumber"),
            )
            store.add_instance(new, now)

    return keep


@pytest.fixture
def settle(store: Store, data_dir: Path) -> Callable[..., list[object]]:
    """Step until there is nothing to do; what was done."""

    def run(now: datetime = WHOLE) -> list[object]:
        done = []
        while (item := assembly.step(store, data_dir, DEMO, now, QUIET)) is not None:
            done.append(item)
            assert len(done) < 20
        return done

    return run


Files = Callable[..., list[Path]]
Receive = Callable[..., None]
Settle = Callable[..., list[object]]


def only_run(store: Store, study_uid: str = STUDY) -> Run:
    (run,) = store.runs_of(study_uid)
    return run


def test_a_series_is_whole_when_it_is_quiet_and_then_goes_to_the_pipeline(
    store: Store, data_dir: Path, ct: Files, receive: Receive
) -> None:
    receive(ct())
    assert assembly.step(store, data_dir, DEMO, after(29.9), QUIET) is None
    complete = assembly.step(store, data_dir, DEMO, after(30), QUIET)
    assert complete == store.series_of(STUDY)[0]
    assert store.series_of(STUDY)[0].state is SeriesState.COMPLETE
    assert store.runs_of(STUDY) == ()
    assert assembly.step(store, data_dir, DEMO, after(30), QUIET) == store.study(STUDY)
    run = only_run(store)
    assert (run.series_uid, run.pipeline, run.options, run.refusal) == (f"{STUDY}.2", "demo", {"a": 1}, None)
    paths = [data_dir / image.path for image in store.instances_of(STUDY)]
    assert run.source_digest == series.inspect(paths).source_digest
    assert assembly.step(store, data_dir, DEMO, after(31), QUIET) is None


def test_a_study_goes_to_the_pipeline_of_the_profile_that_it_came_to(
    store: Store, data_dir: Path, ct: Files, receive: Receive
) -> None:
    receive(ct())
    profiles = {"": PipelineChoice("other", options={"b": 2}), "ELSEWHERE": PipelineChoice("no")}
    assert store.study(STUDY).called_ae == ""
    for _ in range(2):
        assembly.step(store, data_dir, DEMO, after(30), QUIET, profiles)
    assert (only_run(store).pipeline, only_run(store).options) == ("other", {"b": 2})


def test_the_axial_series_of_a_phantom_study_goes_and_its_localizer_does_not(
    store: Store, tmp_path: Path, receive: Receive, settle: Settle
) -> None:
    recipe = phantom.Recipe(seed=1, shape=(8, 32, 32), spacing_mm=(20.0, 12.0, 12.0))
    study = phantom.write_study(phantom.make(recipe), tmp_path / "phantom")
    receive([*study.localizer, *study.axial])
    settle()
    run = only_run(store, study.study_uid)
    assert (run.series_uid, run.refusal) == (study.series_uid, None)
    states = {row.series_uid: (row.state, row.reason) for row in store.series_of(study.study_uid)}
    assert states[study.series_uid] == (SeriesState.COMPLETE, "")
    assert states[study.localizer_uid][0] is SeriesState.REJECTED
    assert "LOCALIZER" in states[study.localizer_uid][1]
    assert any(event.name == "series.ranked" for event in store.events_of(study.study_uid))


def test_a_study_waits_for_its_last_series(store: Store, ct: Files, receive: Receive, settle: Settle) -> None:
    receive(ct(2), T0)
    receive(ct(3, slices=9), after(20))
    assert [type(item).__name__ for item in settle(after(30))] == ["Series"]
    assert store.runs_of(STUDY) == ()
    settle(after(50))
    assert only_run(store).series_uid == f"{STUDY}.3"


def test_a_series_with_a_gap_is_rejected_and_the_reader_hears_why(
    store: Store, ct: Files, receive: Receive, settle: Settle
) -> None:
    files = ct(slices=8)
    receive(files[:3] + files[4:])
    settle()
    (row,) = store.series_of(STUDY)
    run = only_run(store)
    assert row.state is SeriesState.REJECTED
    assert "10" in row.reason
    assert "5" in row.reason
    assert (run.refusal, run.series_uid, run.state) == (row.reason, row.series_uid, RunState.QUEUED)


def test_a_late_slice_that_closes_the_gap_makes_a_run_that_takes_the_refusals_place(
    store: Store, ct: Files, receive: Receive, settle: Settle
) -> None:
    files = ct(slices=8)
    receive(files[:3] + files[4:])
    settle()
    receive([files[3]], after(60))
    assert settle(after(89)) == []
    settle(after(90))
    refused, analysed = store.runs_of(STUDY)
    assert (refused.state, analysed.state, analysed.refusal) == (RunState.CANCELLED, RunState.QUEUED, None)
    assert store.series_of(STUDY)[0].state is SeriesState.COMPLETE


def test_where_the_best_series_is_broken_the_next_one_goes(
    store: Store, ct: Files, receive: Receive, settle: Settle
) -> None:
    larger = ct(2, slices=12)
    receive(larger[:5] + larger[6:] + ct(3, slices=6))
    settle()
    run = only_run(store)
    assert (run.series_uid, run.refusal) == (f"{STUDY}.3", None)
    assert [row.state for row in store.series_of(STUDY)] == [SeriesState.REJECTED, SeriesState.COMPLETE]


def test_where_no_series_will_do_the_reader_hears_of_each(
    store: Store, ct: Files, receive: Receive, settle: Settle
) -> None:
    receive(ct(1, slices=2) + ct(7, slices=5, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")))
    settle()
    run = only_run(store)
    assert run.series_uid is None
    assert run.refusal is not None
    assert run.refusal.startswith("no series of this study can be analysed; series 1: ")
    assert "; series 7: Image Type LOCALIZER" in run.refusal
    assert {row.state for row in store.series_of(STUDY)} == {SeriesState.REJECTED}


@pytest.mark.parametrize("damage", [b"", b"not DICOM at all", None])
def test_a_broken_file_is_a_verdict_and_the_next_study_goes_on(
    store: Store, data_dir: Path, ct: Files, receive: Receive, settle: Settle, damage: bytes | None
) -> None:
    receive(ct(slices=7))
    receive(ct(study="5.5"))
    for image in store.instances_of(STUDY)[1:3]:
        file = data_dir / image.path
        file.write_bytes(file.read_bytes()[:900] if damage is None else damage)
    settle()
    assert only_run(store).refusal
    assert only_run(store, "5.5").refusal is None


def test_a_file_that_is_gone_is_a_verdict(
    store: Store, data_dir: Path, ct: Files, receive: Receive, settle: Settle
) -> None:
    receive(ct())
    (data_dir / store.instances_of(STUDY)[2].path).unlink()
    settle()
    assert only_run(store).refusal


def test_what_nobody_foresaw_in_a_file_does_not_hold_up_the_others(
    store: Store,
    ct: Files,
    receive: Receive,
    settle: Settle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inspect = series.inspect

    def odd(paths: Sequence[Path], rules: SeriesRules) -> series.Series:
        if STUDY in paths[0].parts:
            raise ZeroDivisionError(f"the patient {NAME} has no width")
        return inspect(paths, rules)

    monkeypatch.setattr(series, "inspect", odd)
    receive(ct())
    receive(ct(study="5.5"))
    settle()
    assert only_run(store).refusal == "the series cannot be examined (ZeroDivisionError)"
    assert only_run(store, "5.5").refusal is None
    assert "unforeseen ZeroDivisionError" in " ".join(str(vars(record)) for record in caplog.records)
    assert NAME not in caplog.text


def test_a_study_without_ct_images_is_left_alone(
    store: Store, ct: Files, receive: Receive, settle: Settle, data_dir: Path
) -> None:
    (file, *_) = ct()
    ds = pydicom.dcmread(file)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ComprehensiveSRStorage
    ds.Modality = "SR"
    ds.save_as(file)
    receive([file])
    settle()
    assert store.runs_of(STUDY) == ()
    assert store.events_of(STUDY)[-1].detail == "no CT image in this study; nothing to analyse"
    assert store.series_of(STUDY)[0].state is SeriesState.COMPLETE
    with pytest.raises(SeriesRejected, match="no CT image"):
        assembly.queue_again(store, data_dir, store.study(STUDY), "demo", {}, T0)


def test_late_slices_make_a_new_run_and_other_late_series_do_not(
    store: Store, ct: Files, receive: Receive, settle: Settle
) -> None:
    files = ct(slices=8)
    receive(files[:6])
    settle()
    first = only_run(store)
    receive(ct(1, slices=2), after(40))
    settle(after(70))
    assert only_run(store) == first, "a series that does not change the input"
    receive(files[6:], after(80))
    settle(after(110))
    before, now = store.runs_of(STUDY)
    assert (before.state, now.state) == (RunState.CANCELLED, RunState.QUEUED)
    assert now.source_digest != first.source_digest


def test_the_same_study_sent_again_is_not_analysed_again(
    store: Store, ct: Files, receive: Receive, settle: Settle
) -> None:
    files = ct()
    receive(files)
    settle()
    receive(files, after(60))
    assert settle(after(200)) == []
    only_run(store)


def test_a_person_asking_gets_a_new_run_of_the_same_input(
    store: Store, data_dir: Path, ct: Files, receive: Receive, settle: Settle
) -> None:
    receive(ct())
    settle()
    first = only_run(store)
    masks = ("masks/m.nii.gz", "c" * 64)
    (again,) = assembly.queue_again(store, data_dir, store.study(STUDY), "given_masks", {"b": 2}, after(40), masks)
    assert (again.series_uid, again.source_digest) == (first.series_uid, first.source_digest)
    assert (again.masks_path, again.masks_sha256, again.options) == (*masks, {"b": 2})
    assert store.run(first.id).state is RunState.CANCELLED
    assert settle(after(100)) == []


def test_a_late_slice_leaves_a_persons_masks_in_force(
    store: Store, data_dir: Path, ct: Files, receive: Receive, settle: Settle
) -> None:
    files = ct(slices=8)
    receive(files[:7])
    settle()
    masks = ("masks/m.nii.gz", "c" * 64)
    (asked,) = assembly.queue_again(store, data_dir, store.study(STUDY), "given_masks", {}, after(40), masks)
    receive(files[7:], after(50))
    assert store.claim_run("w", 60, after(51)) is None
    settle(after(80))
    assert [run.state for run in store.runs_of(STUDY)] == [RunState.CANCELLED, RunState.QUEUED]
    kept, looked_at = store.events_of(STUDY)[-2:]
    assert (kept.name, kept.subject_id) == ("run.kept", str(asked.id))
    assert looked_at.detail == f"run {asked.id}: {kept.detail}"
    assert settle(after(200)) == []
    assert store.claim_run("w", 60, after(200)) == store.run(asked.id)


def test_a_late_slice_that_does_not_help_is_a_new_refusal(
    store: Store, ct: Files, receive: Receive, settle: Settle
) -> None:
    files = ct(slices=6, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    receive(files[:5])
    settle()
    receive(files[5:], after(60))
    settle(after(90))
    first, second = store.runs_of(STUDY)
    assert first.refusal == second.refusal
    assert (first.state, second.state) == (RunState.CANCELLED, RunState.QUEUED)


def test_neither_reasons_nor_events_nor_logs_hold_patient_identity(
    store: Store, ct: Files, receive: Receive, settle: Settle, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    files = ct(slices=8)
    ds = pydicom.dcmread(files[4])
    ds.PatientID, ds.PatientName = "SOMEBODY-ELSE", "Roe^Richard"
    ds.save_as(files[4])
    receive(files)
    settle()
    said = f"{events(store)} {store.runs_of(STUDY)} {store.series_of(STUDY)}"
    said += " ".join(str(vars(record)) for record in caplog.records)
    assert only_run(store).refusal
    for secret in (NAME, PATIENT_ID, "SOMEBODY-ELSE", "Roe^Richard"):
        assert secret not in said


def test_a_study_of_multi_frame_ct_alone_says_what_it_is_and_what_to_do(
    store: Store, ct: Files, receive: Receive, settle: Settle
) -> None:
    files = ct()
    for file in files:
        ds = pydicom.dcmread(file)
        ds.SOPClassUID, ds.NumberOfFrames = EnhancedCTImageStorage, 60
        ds.save_as(file)
    receive(files)
    settle()
    words = (
        "images of 60 frame(s) (Enhanced CT, multi-frame), which are not analysed; expected one image a slice, of "
        "CT Image Storage: have the scanner or the PACS send the series as single-frame CT"
    )
    assert only_run(store).refusal == f"no series of this study can be analysed; series 2: {words}"
    [row] = store.series_of(STUDY)
    assert (row.state, row.reason) == (SeriesState.REJECTED, words)
