"""Is a study whole? What speaks for it and against it, the archive's own word, and how long it is waited for."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest
from made_series import edit, made
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, evt

from salsa_node import assembly, evidence, pacs_count
from salsa_node.association import taking_turns
from salsa_node.candidate import read_candidate
from salsa_node.evidence import Weight
from salsa_node.listener import Listener
from salsa_node.settings import AssemblySettings, ListenerSettings, PipelineChoice, QuerySettings
from salsa_node.store import Event, NewInstance, RunState, Series, SeriesState, Store, Study

FIND = "1.2.840.10008.5.1.4.1.2.2.1"
T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
DEMO = PipelineChoice(name="demo")
STUDY, SERIES = "2.25.1", "2.25.2"


def after(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


class Archive:
    """A Study Root C-FIND SCP that counts as it is told and remembers what it was asked."""

    def __init__(self) -> None:
        self.images: Mapping[str, int] = {}
        self.asked: list[Dataset] = []
        self.status = 0x0000
        self.pause_s = 0.0
        ae = AE("ARCHIVE")
        ae.add_supported_context(FIND)
        self._server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_FIND, self._found)])
        self.settings = QuerySettings("ARCHIVE", "127.0.0.1", self._server.server_address[1], timeout_s=5.0)

    def _found(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        self.asked.append(event.identifier)
        for uid, number in self.images.items():
            time.sleep(self.pause_s)
            match = Dataset()
            match.QueryRetrieveLevel, match.StudyInstanceUID, match.SeriesInstanceUID = "SERIES", STUDY, uid
            match.NumberOfSeriesRelatedInstances = number
            yield 0xFF00, match
        yield self.status, None

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture
def archive() -> Iterator[Archive]:
    served = Archive()
    yield served
    served.close()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return made(tmp_path / "studies", slices=8)[1]


def receive(store: Store, paths: list[Path], now: datetime) -> None:
    for path in paths:
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        new = NewInstance(
            sop_instance_uid=ds.SOPInstanceUID,
            series_uid=ds.SeriesInstanceUID,
            study_uid=ds.StudyInstanceUID,
            sop_class_uid=ds.SOPClassUID,
            transfer_syntax_uid=ds.file_meta.TransferSyntaxUID,
            path=f"studies/{path.name}",
            digest=path.name,
            size_bytes=path.stat().st_size,
            calling_ae="CT1",
            modality=ds.Modality,
            series_number=1,
        )
        store.add_instance(new, now)


def steps(store: Store, folder: Path, now: datetime, rules: assembly.Rules) -> list[Series | Study]:
    done = []
    while (item := assembly.step(store, folder, DEMO, now, rules)) is not None:
        done.append(item)
        assert len(done) < 20
    return done


def another_series(folder: Path, images: int) -> list[Path]:
    """CT images of series 2.25.3 of the same study, beside the others."""
    paths = []
    for number, made_path in enumerate(made(folder / "another", slices=images)[1]):
        path = made_path.rename(folder / "studies" / f"another {number}.dcm")
        edit(path, lambda ds, uid=f"2.25.3.{number}": ds.update({"SeriesInstanceUID": "2.25.3", "SOPInstanceUID": uid}))
        paths.append(path)
    return paths


def told(store: Store) -> dict[tuple[str, str], tuple[str, str]]:
    """(about, kind) -> (weight, found) of the last look."""
    lines: Any = store.looks_of(STUDY)[-1].evidence
    return {(line["about"], line["kind"]): (line["weight"], line["found"]) for line in lines}


def test_the_archive_is_asked_for_the_study_and_counts_its_series(archive):
    archive.images = {SERIES: 120, "2.25.9": 4}
    assert pacs_count.ask(archive.settings, STUDY) == pacs_count.Answer({SERIES: 120, "2.25.9": 4})
    [question] = archive.asked
    assert (question.QueryRetrieveLevel, question.StudyInstanceUID) == ("SERIES", STUDY)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pynetdicom forgets a socket that found nobody
def test_an_archive_that_does_not_answer_is_told_and_nobody_is_asked_by_default(archive):
    assert pacs_count.ask(QuerySettings(), STUDY) == pacs_count.Answer()
    archive.images, archive.status = {SERIES: 3}, 0xA700
    assert pacs_count.ask(archive.settings, STUDY).silence == "answered status 0xA700"
    archive.images, archive.status = {}, 0x0000
    assert pacs_count.ask(archive.settings, STUDY).silence == "counts no images of this study"
    nobody = QuerySettings("ARCHIVE", "127.0.0.1", 1, timeout_s=5.0)
    assert pacs_count.ask(nobody, STUDY).silence == "takes no association for C-FIND"


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pynetdicom forgets a socket that nobody answers on
def test_an_archive_that_hangs_holds_up_no_step_and_is_not_asked_again_for_a_while(
    store, files, tmp_path, silent_port, monkeypatch
):
    """Its own study waits for the time limit; another one goes on; and the next one does not wait at all."""
    rules = assembly.Rules(query=QuerySettings("ARCHIVE", "127.0.0.1", silent_port, timeout_s=1.5))
    clock = [after(30)]
    archive = pacs_count.Archive(rules.query, lambda: clock[0])

    def step() -> Series | Study | None:
        return assembly.step(store, tmp_path, DEMO, clock[0], rules, archive=archive)

    receive(store, files, T0)
    mr = pydicom.dcmread(files[0])
    mr.StudyInstanceUID, mr.SeriesInstanceUID, mr.SOPInstanceUID, mr.Modality = "2.25.70", "2.25.71", "2.25.72", "MR"
    mr.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    mr.save_as(tmp_path / "studies" / "mr.dcm")
    receive(store, [tmp_path / "studies" / "mr.dcm"], after(0.5))
    clock[0] = after(31)
    began = time.monotonic()
    done = [step(), step(), step()]
    assert time.monotonic() - began < 1.5, "the steps waited for the archive"
    assert [getattr(item, "study_uid", None) for item in done] == ["2.25.70", "2.25.70", None]
    deadline = time.monotonic() + 60
    while step() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert steps_of(step) == ["Study"]
    assert told(store)["study", "pacs"] == ("unknown", "the archive takes no association for C-FIND")

    asked = []
    monkeypatch.setattr(pacs_count, "ask", lambda _, study_uid: asked.append(study_uid))
    clock[0] = after(80)
    assert archive.counts("2.25.99", after(80)) == pacs_count.Answer({}, "takes no association for C-FIND", True)
    assert asked == []
    clock[0] = after(31 + pacs_count.DOWN_S + 1)
    monkeypatch.setattr(pacs_count, "ask", lambda _, study_uid: pacs_count.Answer({study_uid: 3}))
    assert archive.counts("2.25.99", clock[0]) == pacs_count.Answer({"2.25.99": 3}), "it is asked again"


def steps_of(step: Any) -> list[str]:
    """The kinds of what is done until there is nothing to do."""
    kinds = []
    while (item := step()) is not None:
        kinds.append(type(item).__name__)
        assert len(kinds) < 20
    return kinds


def test_an_archive_is_asked_once_for_all_series_of_a_study_and_again_for_what_came_later(archive):
    clock = [after(40)]
    beside = pacs_count.Archive(archive.settings, lambda: clock[0])
    archive.images = {SERIES: 8, "2.25.9": 4}
    deadline = time.monotonic() + 30
    while (answer := beside.counts(STUDY, after(30))) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert answer == beside.counts(STUDY, after(35)) == beside.latest(STUDY) == pacs_count.Answer(archive.images)
    assert len(archive.asked) == 1
    clock[0] = after(90)
    while (answer := beside.counts(STUDY, after(80))) is None:
        time.sleep(0.02)
    assert len(archive.asked) == 2


def test_an_archive_that_drips_matches_for_ever_is_cut_off(archive, monkeypatch):
    archive.images = {f"2.25.9.{n}": n for n in range(12)}
    patient = pacs_count.ask(archive.settings, STUDY)
    assert (len(patient.images), patient.is_down) == (12, False)
    monkeypatch.setattr(archive, "pause_s", 0.3)
    cut = pacs_count.ask(replace(archive.settings, timeout_s=1.0), STUDY)
    assert cut.is_down
    assert cut.images == {}


def test_evidence_is_kept_with_the_run(store, files, tmp_path, archive):
    archive.images = {SERIES: 8}
    receive(store, files, T0)
    rules = assembly.Rules(query=archive.settings)
    assert steps(store, tmp_path, after(31), rules)
    [run], [look] = store.runs_of(STUDY), store.looks_of(STUDY)
    assert look.run_id == run.id
    assert told(store) == {
        ("study", "association"): ("unknown", "nobody saw the sender end its association"),
        ("study", "quiet"): ("weak", "no image for 31 s"),
        (SERIES, "quiet"): ("weak", "no image for 31 s"),
        (SERIES, "numbers"): ("weak", "images 1 to 8, none missing"),
        (SERIES, "positions"): ("weak", "no gap between slices 2.5 mm apart"),
        (SERIES, "pacs"): ("strong", "the archive holds 8 images too"),
    }


def test_a_series_waits_for_the_images_that_the_archive_holds_and_then_goes_whole(store, files, tmp_path, archive):
    archive.images = {SERIES: 8}
    rules = assembly.Rules(query=archive.settings)
    receive(store, files[:7], T0)
    assert [item.state for item in steps(store, tmp_path, after(31), rules)] == [SeriesState.RECEIVING]
    assert steps(store, tmp_path, after(32), rules) == []  # and is not asked about every second
    assert len(archive.asked) == 1
    receive(store, files[7:], after(40))
    steps(store, tmp_path, after(71), rules)
    assert [run.refusal for run in store.runs_of(STUDY)] == [None]
    waited = [event.detail for event in store.events_of(STUDY) if event.name == "series.waiting"]
    assert waited == ["the archive holds 8 images, 7 came"]


def test_nobody_waits_longer_than_the_longest_wait(store, files, tmp_path, archive):
    archive.images = {SERIES: 9}
    rules = assembly.Rules(whole=AssemblySettings(quiet_s=30, max_wait_s=100), query=archive.settings)
    receive(store, files, T0)
    for seconds in range(31, 100, 10):
        steps(store, tmp_path, after(seconds), rules)
    assert store.runs_of(STUDY) == ()
    steps(store, tmp_path, after(100), rules)
    assert len(store.runs_of(STUDY)) == 1
    assert told(store)[SERIES, "pacs"] == ("against", "the archive holds 9 images, 8 came")


def test_a_series_that_never_rests_is_looked_at_in_the_end_and_its_late_image_makes_a_new_run(store, files, tmp_path):
    rules = assembly.Rules(whole=AssemblySettings(quiet_s=30, max_wait_s=60))
    for n, path in enumerate(files[:7]):
        receive(store, [path], after(10 * n))
        steps(store, tmp_path, after(10 * n), rules)
    [first] = store.runs_of(STUDY)
    assert told(store)[SERIES, "quiet"] == ("against", "the last image came 0 s ago, less than 30 s")
    receive(store, files[7:], after(75))
    assert store.claim_run("worker", 60, after(76)) == store.run(first.id)  # waited for long enough, whatever comes
    steps(store, tmp_path, after(106), rules)
    runs = store.runs_of(STUDY)
    assert [run.state for run in runs] == [RunState.CANCELLED, RunState.QUEUED]
    assert runs[0].id == first.id
    assert told(store)[SERIES, "quiet"][0] == "weak"


def test_a_study_that_images_pour_into_is_analysed_at_the_cap_and_not_before(store, files, tmp_path, monkeypatch):
    """Images come between any two steps, and while a step looks."""
    rules = assembly.Rules(whole=AssemblySettings(quiet_s=30, max_wait_s=60))
    pouring = iter(another_series(tmp_path, 70))
    examine = assembly.examine

    def meanwhile(*arguments: Any) -> Any:
        receive(store, [next(pouring)], after(60))
        return examine(*arguments)

    monkeypatch.setattr(assembly, "examine", meanwhile)
    receive(store, files, T0)
    for second in range(1, 60):
        receive(store, [next(pouring)], after(second))
        assert store.claim_run("worker", 60, after(second)) is None
        assembly.step(store, tmp_path, DEMO, after(second), rules)
    assert store.runs_of(STUDY) == ()
    receive(store, [next(pouring)], after(60))
    assembly.step(store, tmp_path, DEMO, after(60), rules)
    receive(store, [next(pouring)], after(61))
    [run] = store.runs_of(STUDY)
    assert [row.state for row in store.series_of(STUDY) if row.series_uid == "2.25.3"] == [SeriesState.RECEIVING]
    claimed = store.claim_run("worker", 600, after(61))
    assert claimed is not None
    assert claimed.id == run.id


def test_a_run_that_waits_for_other_images_goes_at_the_cap(store, files, tmp_path):
    """The same input again: it is the run that was queued before, which was held back by a late image of no use."""
    rules = assembly.Rules(whole=AssemblySettings(quiet_s=30, max_wait_s=60))
    receive(store, files, T0)
    steps(store, tmp_path, after(30), rules)
    ds = pydicom.dcmread(files[0])
    ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.88.33", "SR"
    for second in range(31, 95):
        ds.SOPInstanceUID, ds.SeriesInstanceUID = f"2.25.80.{second}", "2.25.80"
        ds.save_as(tmp_path / "studies" / f"report {second}.dcm")
        receive(store, [tmp_path / "studies" / f"report {second}.dcm"], after(second))
        steps(store, tmp_path, after(second), rules)
        is_free = store.claim_run("worker", 60, after(second)) is not None
        if is_free:
            break
    assert second == 91
    assert len(store.runs_of(STUDY)) == 1


def test_images_of_another_day_do_not_hurry_a_series(store, files, tmp_path):
    ds = pydicom.dcmread(files[0])
    ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.Modality = "2.25.80", "2.25.81", "MR"
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    ds.save_as(tmp_path / "studies" / "mr.dcm")
    receive(store, [tmp_path / "studies" / "mr.dcm"], T0)
    assert steps(store, tmp_path, after(31), assembly.DEFAULT_RULES)
    assert store.runs_of(STUDY) == ()
    a_day = 86400
    receive(store, files[:4], after(a_day))
    assert steps(store, tmp_path, after(a_day + 1), assembly.DEFAULT_RULES) == []
    receive(store, files[4:], after(a_day + 20))
    assert steps(store, tmp_path, after(a_day + 49), assembly.DEFAULT_RULES) == []
    steps(store, tmp_path, after(a_day + 50), assembly.DEFAULT_RULES)
    [run] = store.runs_of(STUDY)
    assert run.refusal is None


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize(("ends", "weight"), [("release", "weak"), ("abort", "against")])
def test_how_the_sender_left_is_evidence(ends, weight, fast, store, files, tmp_path):
    settings = ListenerSettings(port=0, min_free_gib=0.0, fast=fast)
    with Listener(settings, store, tmp_path / "data", clock=lambda: T0) as door:
        ae = AE("CT1")
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 120  # a machine may be busy
        ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)  # as the files are: nothing is converted
        handlers = [(evt.EVT_CONN_OPEN, taking_turns)]
        assoc = ae.associate("127.0.0.1", door.port, ae_title="SALSA_NODE", evt_handlers=handlers)
        assert [assoc.send_c_store(path).Status for path in files] == [0] * len(files)
        getattr(assoc, ends)()
        deadline = time.monotonic() + 20
        while not any(event.name.startswith(f"study.{ends}") for event in store.events_of(STUDY)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    steps(store, tmp_path / "data", after(31), assembly.DEFAULT_RULES)
    assert told(store)["study", "association"][0] == weight
    assert len([event for event in store.events_of(STUDY) if event.name in ("study.released", "study.aborted")]) == 1


def test_holes_and_gaps_speak_against_a_series(store, files, tmp_path):
    receive(store, [*files[:3], *files[4:]], T0)
    steps(store, tmp_path, after(31), assembly.DEFAULT_RULES)
    assert told(store)[SERIES, "numbers"] == ("against", "1 of images 1 to 8 missing")
    assert told(store)[SERIES, "positions"] == ("against", "1 gaps between slices 2.5 mm apart")


def test_images_with_one_number_tell_nothing(files):
    for path in files:
        edit(path, lambda ds: setattr(ds, "InstanceNumber", 1))
    assert set(read_candidate(files).image_numbers) == {1}
    for path in files:
        edit(path, lambda ds: delattr(ds, "InstanceNumber"))
    assert read_candidate(files).image_numbers == ()


@pytest.mark.parametrize(("last_s", "weight"), [(0, Weight.WEAK), (1, Weight.UNKNOWN)])
def test_an_association_that_ended_before_the_last_image_came_tells_nothing(last_s, weight):
    study = Study("2.25.1", "CT1", "", "", "", T0, T0 + timedelta(seconds=last_s), 2, 0, "SALSA_NODE")
    ended = Event(1, T0, "2.25.1", "study", "2.25.1", "study.released", "CT1 released its association")
    assert evidence.of_association(study, [ended]).weight is weight
