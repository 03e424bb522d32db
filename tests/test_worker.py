"""A worker carries runs; what stands in the way is written against the run, and nothing is made twice."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from pathlib import Path

import pydicom
import pypdfium2
import pytest

from salsa_node import analysis as analysis_module
from salsa_node import overview, phantom
from salsa_node import worker as worker_module
from salsa_node.analysis import Analysis, analyse
from salsa_node.config import Config, parse
from salsa_node.errors import LeaseLost, WeightsMissing
from salsa_node.limits import Limits
from salsa_node.nifti import read_labels, write_labels
from salsa_node.pipelines import Masks, PipelineSettings, Provenance
from salsa_node.pipelines.given_masks import GivenMasksPipeline
from salsa_node.products import Products
from salsa_node.series import inspect
from salsa_node.settings import NodeSettings, Profile
from salsa_node.store import DeliveryState, NewInstance, Run, RunState, Store, StoreSettings
from salsa_node.volume import Grid, LabelVolume
from salsa_node.worker import Worker

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> phantom.Study:
    recipe = phantom.Recipe(11, shape=(24, 64, 64), spacing_mm=(8.0, 4.5, 4.5))
    return phantom.write_study(phantom.make(recipe), tmp_path_factory.mktemp("study"))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = """
        [worker]
        max_attempts = 2
        retry_s = 10.0
        [delivery]
        to = ["pacs"]
        [[destination]]
        name = "pacs"
        ae_title = "PACS"
        host = "127.0.0.1"
        port = 104
    """
    return replace(parse(text), node=NodeSettings(data_dir=tmp_path))


@pytest.fixture
def store(config: Config) -> Iterator[Store]:
    with Store.open(StoreSettings(config.store_url), create=True) as opened:
        yield opened


@pytest.fixture
def worker(store: Store, config: Config) -> Worker:
    return Worker(store, config, "worker", clock=lambda: T0, chance=lambda: 0.5)


def arrive(store: Store, data_dir: Path, paths: tuple[Path, ...]) -> None:
    """Put the files where the listener would, with their rows."""
    for path in paths:
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        place = f"studies/{ds.StudyInstanceUID}/{ds.SeriesInstanceUID}/{ds.SOPInstanceUID}.dcm"
        (data_dir / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, data_dir / place)
        new = NewInstance(
            sop_instance_uid=ds.SOPInstanceUID,
            series_uid=ds.SeriesInstanceUID,
            study_uid=ds.StudyInstanceUID,
            sop_class_uid=ds.SOPClassUID,
            transfer_syntax_uid=ds.file_meta.TransferSyntaxUID,
            path=place,
            digest=path.name,
            size_bytes=path.stat().st_size,
            calling_ae="CT",
            modality="CT",
        )
        store.add_instance(new, T0)
    store.complete_series(T0, T0)
    for seen in store.studies():
        store.study_assembled(seen, "looked at", T0)


def queue(store: Store, study: phantom.Study, masks: Path | None = None, **more: object) -> Run:
    arrive(store, Path(store_folder(store)), study.axial)
    return store.queue_run(
        study.study_uid,
        "given_masks",
        "digest",
        T0,
        series_uid=study.series_uid,
        masks_path=None if masks is None else str(masks),
        masks_sha256=None if masks is None else "sha",
        **more,
    )


def store_folder(store: Store) -> str:
    return str(Path(str(store._engine.url.database)).parent)


def test_a_run_becomes_objects_with_rows_files_and_deliveries(store, worker, config, study):
    run = queue(store, study, study.truth_labels)
    done = worker.step(T0)
    assert done is not None
    assert (done.state, done.outcome) == (RunState.PRODUCED, "lesions"), done.error
    objects = store.objects_of(run.id)
    measured_in = {lesion["slice_index"] for lesion in done.findings["lesions"]}
    pages = 1 + min(len(measured_in), config.results.key_images)
    kinds = ["SEG", "SR", "LESION_SEG", "VIEWER_SR", *["SC"] * pages, "PDF", "KO"]
    assert [item.kind for item in objects] == kinds
    for item in objects:
        content = (config.node.data_dir / item.path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == item.sha256
        ds = pydicom.dcmread(config.node.data_dir / item.path)
        assert ds.StudyInstanceUID == study.study_uid
        assert ds.SOPInstanceUID == item.sop_instance_uid
    assert [(d.destination, d.state) for d in store.deliveries_of(run.id)] == [("pacs", DeliveryState.PENDING)] * len(
        kinds
    )
    assert done.findings is not None
    assert len(done.findings["lesions"]) >= 1
    assert worker.step(T0) is None


def test_a_destination_that_asks_for_a_label_map_has_one_made_beside_the_rest(store, config, study):
    wanted = replace(config, destination=(replace(config.destination[0], seg="labelmap"),))
    run = queue(store, study, study.truth_labels)
    done = Worker(store, wanted, "worker", clock=lambda: T0).step(T0)
    assert done is not None
    assert done.state is RunState.PRODUCED, done.error
    objects = store.objects_of(run.id)
    kinds = [item.kind for item in objects]
    assert (kinds[0], kinds[-1]) == ("SEG", "LABELMAP")
    read = {item.kind: pydicom.dcmread(config.node.data_dir / item.path) for item in objects}
    lesions = read["LESION_SEG"].SOPInstanceUID
    referred = {
        str(element.value)
        for kind in ("SR", "KO")
        for element in read[kind].iterall()
        if element.keyword == "ReferencedSOPInstanceUID"
    }
    assert lesions in referred
    assert not referred & {read["SEG"].SOPInstanceUID, read["LABELMAP"].SOPInstanceUID}
    queue(store, study, study.truth_labels, force=True)
    without = Worker(store, config, "worker", clock=lambda: T0).step(T0)
    assert without is not None
    assert "LABELMAP" not in {item.kind for item in store.objects_of(without.id)}
    assert without.digest != done.digest


def test_the_same_result_again_is_the_same_objects(store, worker, study):
    queue(store, study, study.truth_labels)
    first = worker.step(T0)
    later = T0 + timedelta(days=1)
    again = rerun(store, study, study.truth_labels, later)
    worker.step(later)
    before, after = store.objects_of(first.id), store.objects_of(again.id)
    assert [(o.sop_instance_uid, o.sha256, o.path) for o in before] == [
        (o.sop_instance_uid, o.sha256, o.path) for o in after
    ]
    assert store.run(first.id).state is RunState.SUPERSEDED


@pytest.mark.parametrize("other", [{"results": Products(include_liver=True)}, {"guards": Limits(near_liver_mm=11.0)}])
def test_other_settings_make_other_objects(store, worker, config, study, other):
    """Also other limits, which may change what is flagged, and so the words of a report."""
    first = queue(store, study, study.truth_labels)
    worker.step(T0)
    again = rerun(store, study, study.truth_labels, T0)
    Worker(store, replace(config, **other), "worker", clock=lambda: T0).step(T0)
    before = {item.sop_instance_uid for item in store.objects_of(first.id)}
    after = {item.sop_instance_uid for item in store.objects_of(again.id)}
    assert len(before) == len(after) > 2
    assert not before & after


def rerun(store: Store, study: phantom.Study, masks: Path, now: datetime) -> Run:
    return store.queue_run(
        study.study_uid, "given_masks", "digest", now, series_uid=study.series_uid,
        masks_path=str(masks), masks_sha256="sha", force=True,
    )  # fmt: skip


def test_a_damaged_result_is_made_again_with_the_same_bytes(store, worker, config, study):
    first = queue(store, study, study.truth_labels)
    worker.step(T0)
    before = store.objects_of(first.id)
    path = config.node.data_dir / before[1].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    later = T0 + timedelta(days=1)
    again = rerun(store, study, study.truth_labels, later)
    worker.step(later)
    after = store.objects_of(again.id)
    assert [(o.sop_instance_uid, o.sha256) for o in after] == [(o.sop_instance_uid, o.sha256) for o in before]
    assert (config.node.data_dir / after[1].path).read_bytes() == whole
    assert after[1].path != before[1].path


def test_going_back_to_an_earlier_mask_sends_the_earlier_objects(store, worker, study, tmp_path):
    first = queue(store, study, study.truth_labels)
    worker.step(T0)
    other = tmp_path / "other.nii.gz"
    labels = read_labels(study.truth_labels)
    fewer = labels.labels.copy()
    fewer[fewer == fewer.max()] = 1
    write_labels(LabelVolume(fewer, labels.grid), other)
    second = rerun(store, study, other, T0)
    worker.step(T0)
    third = rerun(store, study, study.truth_labels, T0)
    worker.step(T0)

    def uids(run: Run) -> list[str]:
        return [item.sop_instance_uid for item in store.objects_of(run.id)]

    assert uids(first) == uids(third)
    assert not set(uids(first)) & set(uids(second))


def test_the_last_attempt_is_carried(store, worker, study):
    run = queue(store, study, study.truth_labels)
    assert store.claim_run("dead", 1.0, T0) is not None  # the first of two
    done = worker.step(T0 + timedelta(seconds=100))
    assert (done.id, done.attempt, done.state) == (run.id, 2, RunState.PRODUCED)


def test_retries_wait_longer_each_time(store, config, study, monkeypatch):
    from salsa_node.errors import DeviceExhausted

    queue(store, study, study.truth_labels)

    def full(*_: object, **__: object) -> None:
        raise DeviceExhausted("the GPU has no memory left")

    monkeypatch.setattr("salsa_node.worker.analyse", full)
    settings = replace(config, worker=replace(config.worker, max_attempts=5))
    patient = Worker(store, settings, "worker", clock=lambda: T0, chance=lambda: 0.5)
    waits = []
    for n in range(3):
        done = patient.step(T0 + timedelta(hours=n))
        waits.append((done.not_before - T0).total_seconds())
    assert waits == [20, 40, 80]


def test_a_run_that_comes_right_in_the_end_shows_no_error(store, worker, study, monkeypatch):
    run = queue(store, study, study.truth_labels)
    store.claim_run("other", 60.0, T0)
    store.return_run(run.id, "other", "the worker was stopped", T0, T0, counts=False)
    done = worker.step(T0)
    assert (done.state, done.error) == (RunState.PRODUCED, None)


def test_the_heartbeat_prolongs_the_lease_while_the_work_goes_on(store, config, study, monkeypatch):
    run = queue(store, study, study.truth_labels)
    ticks = iter(range(1, 10**6))
    quick = replace(config, worker=replace(config.worker, heartbeat_s=0.01))
    beating = Worker(store, quick, "worker", clock=lambda: T0 + timedelta(seconds=next(ticks)))
    analysed = worker_module.analyse

    def slow(*arguments: object, **more: object) -> object:
        wait_for_a_heartbeat(store, run)
        return analysed(*arguments, **more)

    monkeypatch.setattr("salsa_node.worker.analyse", slow)
    assert beating.step(T0).state is RunState.PRODUCED


def wait_for_a_heartbeat(store: Store, run: Run) -> None:
    until = store.run(run.id).lease_until
    deadline = time.monotonic() + 30
    while store.run(run.id).lease_until == until:
        assert time.monotonic() < deadline, "no heartbeat"
        time.sleep(0.01)


def test_the_heartbeat_goes_on_while_a_network_is_loaded(store, config, study, monkeypatch):
    run = queue(store, study)
    ticks = iter(range(1, 10**6))
    quick = replace(config, worker=replace(config.worker, heartbeat_s=0.01))
    beating = Worker(store, quick, "worker", clock=lambda: T0 + timedelta(seconds=next(ticks)))

    def slow(*_: object) -> None:
        wait_for_a_heartbeat(store, run)
        raise WeightsMissing("loaded, as far as this test goes")

    monkeypatch.setattr("salsa_node.pipelines.load", slow)
    assert "as far as this test goes" in beating.step(T0).error


CARRIES_FOR_EVER = """
import sys, time
from pathlib import Path
from salsa_node import config, worker

worker.Worker._carry = lambda self, run: time.sleep(600)
worker.work(config.load(Path(sys.argv[1])), "owner")
"""


def test_what_is_computed_for_a_cancelled_run_is_broken_off(store, config, study, tmp_path):
    """In the process that the node starts, by a signal to itself: the next run begins at once."""
    first = queue(store, study)
    file = tmp_path / "site.toml"
    file.write_text(f'[node]\ndata_dir = "{tmp_path}"\n[worker]\nheartbeat_s = 0.05\npoll_s = 0.05\n')
    command = [sys.executable, "-c", CARRIES_FOR_EVER, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            wait_for_state(store, first, RunState.RUNNING)
            store.cancel(study.study_uid, datetime.now(UTC))
            following = store.queue_run(study.study_uid, "demo", "other", datetime.now(UTC), force=True)
            wait_for_state(store, following, RunState.RUNNING)
        finally:
            process.kill()
    assert store.run(first.id).state is RunState.CANCELLED


def wait_for_state(store: Store, run: Run, state: RunState) -> None:
    deadline = time.monotonic() + 120
    while store.run(run.id).state is not state:
        assert time.monotonic() < deadline, store.run(run.id).state
        time.sleep(0.02)


def test_a_cancelled_run_is_let_go_and_leaves_no_file(store, config, study, monkeypatch):
    run = queue(store, study, study.truth_labels)
    told = threading.Event()
    quick = replace(config, worker=replace(config.worker, heartbeat_s=0.01))
    beating = Worker(store, quick, "worker", clock=lambda: T0, on_lost=told.set)
    analysed = worker_module.analyse

    heard = []

    def cancelled_meanwhile(*arguments: object, **more: object) -> object:
        rerun(store, study, study.truth_labels, T0)
        heard.append(told.wait(30))  # an assertion here would be one more failure of the run
        return analysed(*arguments, **more)

    monkeypatch.setattr("salsa_node.worker.analyse", cancelled_meanwhile)
    done = beating.step(T0)
    assert heard == [True], "the worker did not hear of it"
    assert (done.id, done.state) == (run.id, RunState.CANCELLED)
    assert not list((config.node.data_dir).glob("results/**/*.dcm"))
    monkeypatch.undo()
    assert beating.step(T0).state is RunState.PRODUCED


def test_a_refusal_becomes_a_report_that_says_why(store, worker, config, study):
    run = queue(store, study, refusal="gap of 10.0 mm between images 4 and 6, spacing is 5.0 mm")
    done = worker.step(T0)
    assert (done.state, done.outcome) == (RunState.PRODUCED, "not_analysed"), done.error
    report, *pages = store.objects_of(run.id)
    assert [report.kind, *(item.kind for item in pages)] == ["SR", "SC", "PDF"]
    assert b"gap of 10.0 mm between images 4 and 6" in (config.node.data_dir / report.path).read_bytes()


def test_a_series_that_is_no_volume_becomes_a_report_too(store, worker, config, study, tmp_path):
    holed = tuple(path for n, path in enumerate(study.axial) if n != 9)
    arrive(store, config.node.data_dir, holed)
    store.queue_run(
        study.study_uid, "given_masks", "digest", T0, series_uid=study.series_uid,
        masks_path=str(study.truth_labels), masks_sha256="sha",
    )  # fmt: skip
    done = worker.step(T0)
    assert (done.state, done.outcome) == (RunState.PRODUCED, "not_analysed"), done.error
    assert "gap of 16.0 mm" in done.findings["reason"]


def test_a_pipeline_error_fails_the_run_and_says_so(store, worker, study, tmp_path):
    queue(store, study, tmp_path / "absent.nii.gz")
    done = worker.step(T0)
    assert done.state is RunState.FAILED
    assert "absent.nii.gz" in done.error


def test_an_unforeseen_error_fails_the_run_without_repeating_foreign_words(store, worker, study, monkeypatch):
    queue(store, study, study.truth_labels)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Doe^Jane was here")

    monkeypatch.setattr("salsa_node.worker.analyse", broken)
    done = worker.step(T0)
    assert done.state is RunState.FAILED
    assert "RuntimeError" in done.error
    assert "Doe" not in done.error


def test_a_retryable_error_waits_and_is_given_up_in_the_end(store, worker, study, monkeypatch):
    from salsa_node.errors import DeviceExhausted

    queue(store, study, study.truth_labels)

    def full(*_: object, **__: object) -> None:
        raise DeviceExhausted("the GPU has no memory left")

    monkeypatch.setattr("salsa_node.worker.analyse", full)
    done = worker.step(T0)
    assert (done.state, done.not_before) == (RunState.QUEUED, T0 + timedelta(seconds=20))
    assert worker.step(T0) is None
    done = worker.step(T0 + timedelta(seconds=21))
    assert (done.state, done.failure) == (RunState.FAILED, "device memory")
    assert "no memory left" in done.error


def test_the_machines_memory_is_told_from_the_gpus(store, worker, study, monkeypatch):
    queue(store, study, study.truth_labels)

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("salsa_node.worker.analyse", full)
    done = worker.step(T0)
    assert (done.state, done.failure) == (RunState.QUEUED, "memory")


def test_a_full_disk_is_waited_for(store, worker, study, monkeypatch):
    run = queue(store, study, study.truth_labels)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("salsa_node.durable.write", full)
    done = worker.step(T0)
    assert (done.state, done.failure) == (RunState.QUEUED, "disk")
    monkeypatch.undo()
    done = worker.step(done.not_before)
    assert (done.id, done.state, done.failure) == (run.id, RunState.PRODUCED, None)


def test_a_pause_holds_every_run_until_it_is_over(store, worker, study):
    queue(store, study, study.truth_labels)
    pause = store.pause("driver update", T0)
    assert store.pause("again", T0 + timedelta(hours=1)) == pause, "the first one stays"
    assert worker.step(T0) is None
    assert store.paused() == pause
    assert store.resume(T0) == pause
    assert store.resume(T0) is None
    assert worker.step(T0).state is RunState.PRODUCED


@pytest.mark.parametrize(
    ("hours", "at", "within"),
    [
        ("20:00-06:00", "23:59", True),
        ("20:00-06:00", "00:00", True),
        ("20:00-06:00", "06:00", False),
        ("20:00-06:00", "19:59", False),
        ("20:00-06:00", "20:00", True),
        ("09:00-17:00", "12:00", True),
        ("09:00-17:00", "17:00", False),
        ("00:00-00:00", "12:00", True),
    ],
)
def test_the_hours_off_peak_may_pass_midnight(hours, at, within):
    assert worker_module.off_peak(hours, time_of_day.fromisoformat(at)) is within


def test_studies_off_peak_wait_for_their_hours_unless_a_person_asks(store, config, study):
    queue(store, study, study.truth_labels)
    local = T0.astimezone()
    hours = f"{local + timedelta(hours=1):%H:%M}-{local + timedelta(hours=2):%H:%M}"
    settings = replace(config.worker, off_peak_ae_titles=("CT",), off_peak=hours)
    patient = Worker(store, replace(config, worker=settings), "worker", clock=lambda: T0)
    assert patient.step(T0) is None
    assert store.claim_run("other", 60.0, T0, later_ae_titles=("ANOTHER",)) is not None
    store.release_owner("other", T0)
    assert patient.step(T0 + timedelta(hours=1, minutes=1)).state is RunState.PRODUCED
    forced = rerun(store, study, study.truth_labels, T0)
    assert patient.step(T0).id == forced.id


def test_off_peak_is_by_the_machines_own_clock(store, config, study, monkeypatch):
    queue(store, study, study.truth_labels)
    monkeypatch.setenv("TZ", "XYZ-9")  # nine hours ahead of UTC
    time.tzset()
    try:
        hours = f"{T0 + timedelta(hours=8):%H:%M}-{T0 + timedelta(hours=10):%H:%M}"
        settings = replace(config.worker, off_peak_ae_titles=("CT",), off_peak=hours)
        worker = Worker(store, replace(config, worker=settings), "worker", clock=lambda: T0)
        assert worker.step(T0 + timedelta(hours=9)) is None
        assert worker.step(T0) is not None
    finally:
        monkeypatch.undo()
        time.tzset()


def test_exhausted_memory_lets_every_warm_pipeline_go(store, config, study, monkeypatch):
    from salsa_node.errors import DeviceExhausted

    class Warm:
        """A pipeline that is resident, and then full."""

        unloaded = 0

        def __init__(self, *_: object) -> None:
            self.provenance = Provenance("warm", "1")

        def segment(self, *_: object, **__: object) -> Masks:
            raise DeviceExhausted("the GPU has no memory left")

        def unload(self) -> None:
            Warm.unloaded += 1

    monkeypatch.setattr("salsa_node.pipelines.load", Warm)
    run = queue(store, study)
    settings = replace(config.worker, retry_s=10, max_attempts=5)
    full = Worker(store, replace(config, worker=settings), "worker", clock=lambda: T0)
    for n in range(2):
        full._next.begin("another study", lambda: "its volume")
        assert full.step(T0 + timedelta(hours=n)).state is RunState.QUEUED
        assert full._next.take("another study") is None
    assert Warm.unloaded == 2  # loaded anew for the second attempt, since the first one let go of it
    assert store.run(run.id).attempt == 2


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_what_stays_loaded_is_kept_from_the_collector_until_it_is_let_go_of(store, config, study, monkeypatch):
    class Knot(GivenMasksPipeline):
        """Holds itself, as nnU-Net's predictor and its plans hold one another."""

        def __init__(self, settings: PipelineSettings) -> None:
            super().__init__(settings)
            self.itself = self

        def unload(self) -> None:
            """There is nothing to let go of."""

    monkeypatch.setattr("salsa_node.pipelines.load", lambda *_: Knot(PipelineSettings(masks_path=study.truth_labels)))
    worker = Worker(store, config, "worker", clock=lambda: T0)
    worker.settle()
    assert gc.get_freeze_count() == 0
    queue(store, study)
    worker.step(T0)
    knot = weakref.ref(next(iter(worker._warm.values())))
    worker.settle()
    frozen = gc.get_freeze_count()
    assert frozen > 1000
    with monkeypatch.context() as patched:
        patched.setattr(gc, "freeze", lambda: pytest.fail("nothing was loaded since"))
        worker.settle()
    worker._unload()
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert knot() is None


def test_the_next_study_is_read_ahead_while_this_one_is_segmented(store, worker, config, study, tmp_path, monkeypatch):
    asked: list[tuple[str, int, int]] = []

    def advise(handle: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((str(Path(f"/proc/self/fd/{handle}").readlink()), start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    queue(store, study, study.truth_labels)
    following = phantom.write_study(
        phantom.make(phantom.Recipe(12, shape=(24, 64, 64), spacing_mm=(8.0, 4.5, 4.5))), tmp_path / "following"
    )
    queue(store, following, following.truth_labels)
    assert worker.step(T0).study_uid == study.study_uid
    images = [config.node.data_dir / image.path for image in store.instances_of(following.study_uid)]
    assert asked == [(str(path), 0, path.stat().st_size) for path in images]
    assert len(asked) == 24
    asked.clear()
    assert worker.step(T0).study_uid == following.study_uid  # nobody waits behind it
    assert asked == []


class OnGpu(GivenMasksPipeline):
    """Says that a GPU computed."""

    @property
    def provenance(self) -> Provenance:
        return replace(super().provenance, device="cuda:0")


@pytest.fixture
def read_by(monkeypatch) -> list[tuple[str, str]]:
    """Of each series that is read: by which thread, and its folder."""
    read: list[tuple[str, str]] = []

    def noted(paths, rules):
        read.append((threading.current_thread().name, paths[0].parent.name))
        return analysis_module.read(paths, rules)

    monkeypatch.setattr(worker_module, "read", noted)
    return read


@pytest.fixture
def following(tmp_path) -> phantom.Study:
    recipe = phantom.Recipe(12, shape=(24, 64, 64), spacing_mm=(8.0, 4.5, 4.5))
    return phantom.write_study(phantom.make(recipe), tmp_path / "following")


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_a_gpu_leaves_time_to_read_the_next_volume(store, config, study, following, read_by, monkeypatch, device):
    monkeypatch.setattr("salsa_node.pipelines.load", lambda _, settings: (
        OnGpu(settings) if device == "cuda:0" else GivenMasksPipeline(settings)
    ))  # fmt: skip
    worker = Worker(store, config, "worker", clock=lambda: T0)
    main = threading.current_thread().name
    for one in (study, following):
        queue(store, one, one.truth_labels)
    done = [worker.step(T0) for _ in range(2)]
    assert [run.state for run in done] == [RunState.PRODUCED] * 2
    second = "ahead" if device == "cuda:0" else main
    assert read_by == [(main, study.series_uid), (second, following.series_uid)]


def test_a_volume_whose_files_have_changed_since_is_read_again(store, config, study, following, read_by, monkeypatch):
    monkeypatch.setattr("salsa_node.pipelines.load", lambda _, settings: OnGpu(settings))
    worker = Worker(store, config, "worker", clock=lambda: T0)
    for one in (study, following):
        queue(store, one, one.truth_labels)
    worker.step(T0)
    image = config.node.data_dir / store.instances_of(following.study_uid)[3].path
    image.write_bytes(image.read_bytes())
    os.utime(image, (1, 1))
    assert worker.step(T0).state is RunState.PRODUCED
    main = threading.current_thread().name
    assert [by for by, folder in read_by if folder == following.series_uid] == ["ahead", main]


def test_a_run_whose_worker_died_is_carried_again_beside_no_other_reading(
    store, config, study, following, read_by, monkeypatch
):
    """The next study's damaged pixels may have ended it inside a decoder, and would do so again and again."""
    monkeypatch.setattr("salsa_node.pipelines.load", lambda _, settings: OnGpu(settings))
    for one in (study, following):
        queue(store, one, one.truth_labels)
    store.claim_run("dead", config.worker.lease_s, T0 - timedelta(days=1))
    run = Worker(store, config, "worker", clock=lambda: T0).step(T0)
    assert (run.study_uid, run.attempt, run.state) == (study.study_uid, 2, RunState.PRODUCED)
    assert {folder for _, folder in read_by} == {study.series_uid}


def test_what_was_read_ahead_is_let_go_of_where_nobody_needs_it(store, config, study, following, monkeypatch):
    monkeypatch.setattr("salsa_node.pipelines.load", lambda _, settings: OnGpu(settings))
    worker = Worker(store, config, "worker", clock=lambda: T0)
    for one in (study, following):
        queue(store, one, one.truth_labels)
    worker.step(T0)
    assert worker._next._key is not None
    Worker(store, config, "faster", clock=lambda: T0).step(T0)
    assert worker.step(T0) is None
    assert worker._next._key is None


def arriving(store: Store, called_ae: str = "") -> None:
    """The first image of a study that has not come to an end."""
    new = NewInstance(
        "1.2.3.4", "1.2.3", "1.2", "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1", "a.dcm", "", 1, "CT",
        modality="CT", called_ae=called_ae,
    )  # fmt: skip
    store.add_instance(new, T0)


def test_the_pipeline_is_loaded_while_the_study_still_arrives(store, config, study, monkeypatch):
    loaded: list[tuple[str, dict[str, object]]] = []

    def load(name: str, settings: PipelineSettings) -> object:
        loaded.append((name, dict(settings.options)))
        return GivenMasksPipeline(replace(settings, masks_path=study.truth_labels, options={}))

    monkeypatch.setattr(worker_module.pipelines, "load", load)
    profile = Profile(ae_title="OTHER", pipeline="demo", options={"mirroring": True})
    worker = Worker(store, replace(config, profile=(profile,)), "worker", clock=lambda: T0)
    assert not worker.prepare()
    queue(store, study)  # whole: nothing arrives any more
    assert not worker.prepare()
    assert loaded == []
    arriving(store, "OTHER")
    assert worker.prepare()
    assert not worker.prepare()
    assert loaded == [("demo", {"mirroring": True})]
    store.cancel(study.study_uid, T0)
    run = store.queue_run(
        study.study_uid, "demo", "digest", T0, series_uid=study.series_uid, options={"mirroring": True}
    )
    assert worker.step(T0).state is RunState.PRODUCED, store.run(run.id).error
    assert len(loaded) == 1
    stages = [event.detail for event in store.events_of(study.study_uid) if event.name == "run.stage"]
    assert stages == ["reading", "segmenting", "measuring", "writing", "checking"]


@pytest.mark.parametrize("error", [WeightsMissing("no model here"), RuntimeError("no such file: /secret")])
def test_what_cannot_be_loaded_ahead_is_left_to_the_run(store, worker, monkeypatch, caplog, error):
    tried: list[str] = []

    def load(name: str, settings: PipelineSettings) -> object:
        tried.append(name)
        raise error

    monkeypatch.setattr(worker_module.pipelines, "load", load)
    arriving(store)
    assert not worker.prepare()
    assert not worker.prepare()
    assert len(tried) == 1
    (line,) = (record for record in caplog.records if record.event == "pipeline.not_ahead")
    assert ("no model here" in line.error) == isinstance(error, WeightsMissing)
    assert "secret" not in line.error


def test_a_run_that_kills_its_worker_is_given_up(store, worker, study):
    run = queue(store, study, study.truth_labels)
    for n in range(2):
        assert store.claim_run(f"dead {n}", 1.0, T0 + timedelta(seconds=10 * n)) is not None
    done = worker.step(T0 + timedelta(seconds=100))
    assert (done.id, done.state) == (run.id, RunState.FAILED)
    assert "2 attempts" in done.error


def test_a_worker_that_is_stopped_gives_its_run_back(store, worker, study, monkeypatch):
    run = queue(store, study, study.truth_labels)

    def stopped(*_: object, **__: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr("salsa_node.worker.analyse", stopped)
    with pytest.raises(SystemExit):
        worker.step(T0)
    assert (store.run(run.id).state, store.run(run.id).attempt) == (RunState.QUEUED, 0)


def test_a_worker_that_lost_its_lease_puts_nothing_down(store, worker, study, monkeypatch):
    run = queue(store, study, study.truth_labels)
    produce = store.produce

    def too_late(*arguments: object, **more: object) -> Run:
        store.claim_run("other", 60.0, T0 + timedelta(days=1))
        return produce(*arguments, **more)

    monkeypatch.setattr(store, "produce", too_late)
    done = worker.step(T0)
    assert (done.state, done.lease_owner) == (RunState.RUNNING, "other")
    assert store.objects_of(run.id) == ()
    with pytest.raises(LeaseLost):
        store.fail_run(run.id, "worker", "late", T0)


def test_the_axial_series_of_the_study_is_one_volume(study):
    assert inspect(study.axial).grid.shape == (24, 64, 64)


def test_a_result_that_fits_its_images_only_when_mirrored_is_kept_here(store, worker, config, study, tmp_path):
    labels = read_labels(study.truth_labels)
    mirrored = tmp_path / "mirrored.nii.gz"
    write_labels(LabelVolume(labels.labels[:, :, ::-1].copy(), labels.grid), mirrored)
    run = queue(store, study, mirrored)
    done = worker.step(T0)
    assert done.state is RunState.BLOCKED
    assert "mirrored" in done.error
    assert store.deliveries_of(run.id) == ()
    kept = store.objects_of(run.id)
    assert {"SEG", "SR"} <= {item.kind for item in kept}
    assert all((config.node.data_dir / item.path).is_file() for item in kept)
    assert done.findings["flags"][0] == {"name": "mirrored", "text": done.error, "blocks": True}
    page = overview.detail(store, overview.glance(store, store.study(study.study_uid)))
    assert (page["standing"], page["error"]) == ("blocked", done.error)


def test_an_object_that_was_changed_on_disk_into_another_patients_is_kept_here(store, worker, study, monkeypatch):
    original = worker_module.encoded

    def of_somebody_else(ds: pydicom.Dataset) -> bytes:
        ds.PatientID = "another"
        return original(ds)

    monkeypatch.setattr(worker_module, "encoded", of_somebody_else)
    queue(store, study, study.truth_labels)
    done = worker.step(T0)
    assert done.state is RunState.BLOCKED
    assert "PatientID" in done.error
    assert "another" not in done.error


def test_an_image_that_comes_while_its_series_is_carried_blocks_nothing(store, config, study, tmp_path, monkeypatch):
    """The run ends on the images it began with; the late one is a reason for another run."""
    labels = read_labels(study.truth_labels)
    without_last = tmp_path / "shorter.nii.gz"
    grid = Grid((labels.grid.shape[0] - 1, *labels.grid.shape[1:]), labels.grid.affine_lps_mm)
    write_labels(LabelVolume(labels.labels[:-1].copy(), grid), without_last)
    arrive(store, config.node.data_dir, study.axial[:-1])
    store.queue_run(
        study.study_uid,
        "given_masks",
        "digest",
        T0,
        series_uid=study.series_uid,
        masks_path=str(without_last),
        masks_sha256="sha",
    )

    def late(*arguments: object, **more: object) -> Analysis:
        result = analyse(*arguments, **more)
        arrive(store, config.node.data_dir, study.axial[-1:])
        return result

    monkeypatch.setattr(worker_module, "analyse", late)
    done = Worker(store, config, "worker", clock=lambda: T0).step(T0)
    assert len(store.instances_of(study.study_uid, study.series_uid)) == len(study.axial)
    assert done.state is RunState.PRODUCED, done.error


def test_results_are_dated_in_the_time_zone_of_the_site(store, config, study):
    assert T0.utcoffset() == timedelta(0)
    dates = []
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        site = replace(config, results=replace(config.results, time_zone=zone))
        run = rerun(store, study, study.truth_labels, T0) if dates else queue(store, study, study.truth_labels)
        Worker(store, site, "worker", clock=lambda: T0).step(T0)
        ds = pydicom.dcmread(config.node.data_dir / store.objects_of(run.id)[0].path)
        dates.append(datetime.strptime(f"{ds.SeriesDate} {ds.SeriesTime}", "%Y%m%d %H%M%S.%f").replace(tzinfo=UTC))
    assert dates == [T0 + timedelta(hours=14), T0 - timedelta(hours=11)]


def test_a_blocked_result_leaves_the_earlier_one_current(store, worker, study, tmp_path):
    first = queue(store, study, study.truth_labels)
    worker.step(T0)
    labels = read_labels(study.truth_labels)
    mirrored = tmp_path / "mirrored.nii.gz"
    write_labels(LabelVolume(labels.labels[:, :, ::-1].copy(), labels.grid), mirrored)
    second = rerun(store, study, mirrored, T0)
    worker.step(T0)
    assert store.run(second.id).state is RunState.BLOCKED
    assert [run.id for run in store.current_runs(study.study_uid)] == [first.id]


def test_a_new_result_names_the_one_it_takes_the_place_of(store, worker, config, study, tmp_path):
    first = queue(store, study, study.truth_labels)
    worker.step(T0)
    with_liver = replace(config, results=replace(config.results, include_liver=True))
    second = rerun(store, study, study.truth_labels, T0)
    Worker(store, with_liver, "worker", clock=lambda: T0).step(T0)

    def report(run: Run, kind: str) -> pydicom.Dataset:
        (item,) = (item for item in store.objects_of(run.id) if item.kind == kind)
        return pydicom.dcmread(config.node.data_dir / item.path)

    for kind in ("SR", "VIEWER_SR"):
        assert "PredecessorDocumentsSequence" not in report(first, kind)
        (series,) = report(second, kind).PredecessorDocumentsSequence[0].ReferencedSeriesSequence
        assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == report(first, kind).SOPInstanceUID

    def made_by(run: Run) -> list[pydicom.Dataset]:
        return [pydicom.dcmread(config.node.data_dir / item.path) for item in store.objects_of(run.id)]

    assert not any("rev" in ds.SeriesDescription for ds in made_by(first))
    assert all(ds.SeriesDescription.endswith(", rev 2") for ds in made_by(second))
    words = "Result 2 of this study: it takes the place of result 1."
    document = pypdfium2.PdfDocument(bytes(report(second, "PDF").EncapsulatedDocument))
    assert words in document[0].get_textpage().get_text_range()
    assert words in "".join(item.get("TextValue", "") for item in report(second, "KO").ContentSequence)
    rerun(store, study, study.truth_labels, T0)  # back to what the first one was: the same bytes go out again
    last = worker.step(T0)
    assert {ds.SOPInstanceUID for ds in made_by(last)} == {ds.SOPInstanceUID for ds in made_by(first)}


def test_a_report_that_was_changed_on_disk_is_nobodys_predecessor(store, worker, config, study):
    first = queue(store, study, study.truth_labels)
    worker.step(T0)
    (record,) = (item for item in store.objects_of(first.id) if item.kind == "SR")
    path = config.node.data_dir / record.path
    path.write_bytes(path.read_bytes().replace(b"esion", b"esiom"))
    second = rerun(store, study, study.truth_labels, T0)
    other = replace(config, results=Products(include_liver=True))
    Worker(store, other, "worker", clock=lambda: T0).step(T0)
    named = {
        item.kind: "PredecessorDocumentsSequence" in pydicom.dcmread(config.node.data_dir / item.path)
        for item in store.objects_of(second.id)
        if item.kind in ("SR", "VIEWER_SR")
    }
    assert named == {"SR": False, "VIEWER_SR": True}
