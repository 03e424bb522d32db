"""What can go wrong at the node itself: what `show` then says, what the admin does, and that the work goes on after.

Each test makes the fault for real: another connection that holds the database, a disk that is full or read-only, a
clock that is set, weights that vanish, a child that prints rubbish, hangs or takes memory.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from made_delivery import an_archive
from shown import salsa_node, show
from test_worker import arrive

from salsa_node import assembly, config, delivery, loopback, phantom, verification
from salsa_node.config import Config
from salsa_node.errors import StoreError
from salsa_node.models import demo_models_dir
from salsa_node.node import Loop
from salsa_node.settings import DeliverySettings, PipelineChoice
from salsa_node.store import DeliveryState, RunState, SeriesState, Store, StoreSettings
from salsa_node.supervisor import WorkerProcess
from salsa_node.worker import Worker

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pynetdicom's, where it is refused
T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)
SETTINGS = DeliverySettings(first_retry_s=30, max_retry_s=60, timeout_s=5, verify_after_s=10)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> phantom.Study:
    """Small enough to be carried in a second."""
    recipe = phantom.Recipe(3, shape=(24, 32, 32), spacing_mm=(9.0, 10.0, 10.0))
    return phantom.write_study(phantom.make(recipe), tmp_path_factory.mktemp("study"))


@dataclass(frozen=True)
class Site:
    """The settings of a node, and its record; record and files may lie on disks of their own."""

    file: Path
    config: Config
    store: Store

    @property
    def data_dir(self) -> Path:
        return self.config.node.data_dir

    def queue(self, study: phantom.Study, pipeline: str = "given_masks") -> int:
        """A run of the study, with the truth as masks where it needs some; its number."""
        arrive(self.store, self.data_dir, study.axial)
        masks = str(study.truth_labels) if pipeline == "given_masks" else None
        return self.store.queue_run(
            study.study_uid, pipeline, "digest", T0, series_uid=study.series_uid, masks_path=masks, masks_sha256=masks
        ).id

    def worker(self) -> Worker:
        return Worker(self.store, self.config, "worker", clock=lambda: T0, chance=lambda: 0.5)


@contextmanager
def a_site(folder: Path, data_dir: Path, store_url: str = "", more: str = "") -> Iterator[Site]:
    data_dir.mkdir(parents=True, exist_ok=True)
    file = folder / "site.toml"
    file.write_text(
        f'[node]\ndata_dir = "{data_dir}"\n'
        + (f'store_url = "{store_url}"\n' if store_url else "")
        + "[worker]\nmax_attempts = 2\nretry_s = 10.0\nlease_s = 60.0\nstop_grace_s = 0.5\nheartbeat_s = 1.0\n"
        + 'run_limit_s = 600.0\n[delivery]\nto = ["pacs"]\n[[destination]]\nname = "pacs"\n'
        + f'ae_title = "PACS"\nhost = "127.0.0.1"\nport = 104\n{more}'
    )
    settings = config.load(file)
    with Store.open(StoreSettings(settings.store_url, busy_timeout_s=0.2), create=True) as store:
        yield Site(file, settings, store)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with a_site(tmp_path, tmp_path / "data") as made:
        yield made


@contextmanager
def a_disk(folder: Path, size_mib: int) -> Iterator[Path]:
    """A disk of that size, in memory."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a disk")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this root may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# ---- the record ----------------------------------------------------------------------------------


@contextmanager
def held_by_another(site: Site) -> Iterator[None]:
    """Another program holds the writer's turn."""
    other = sqlite3.connect(site.config.store_url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.rollback()
        other.close()


def test_a_locked_record_is_waited_for(site: Site, study: phantom.Study, caplog: pytest.LogCaptureFixture) -> None:
    number = site.queue(study)
    worker, done = site.worker(), threading.Event()

    def step(now: datetime) -> object | None:
        run = worker.step(now)
        if run is not None:
            done.set()
        return run

    loop = Loop("worker", step, 0.05)
    with held_by_another(site):
        with pytest.raises(StoreError, match="database is locked"):
            delivery.step(site.store, SETTINGS, [], site.data_dir, "n", T0)
        loop.start()
        shown = show(site.file, study.study_uid)
        assert (shown.page["standing"], shown.run["attempt"], shown.run["error"]) == ("queued", 0, None)
        assert salsa_node(site.file, "cancel", "--yes", study.study_uid).returncode == 5, "it cannot be written"
        assert loop.is_alive()
    assert done.wait(60), "the loop goes on when the record is free again"
    loop.ask_to_stop()
    loop.join()
    assert "the store answered OperationalError: database is locked" in {
        r.__dict__.get("error") for r in caplog.records
    }
    assert site.store.run(number).state is RunState.PRODUCED
    assert show(site.file, study.study_uid).page["standing"] == "sending"


def test_a_record_on_a_full_disk_loses_nothing_and_goes_on(tmp_path: Path, study: phantom.Study) -> None:
    with a_disk(tmp_path / "disk", 8) as disk, a_site(tmp_path, tmp_path / "data", f"sqlite:///{disk}/record") as site:
        number = site.queue(study)
        fill(disk)
        with pytest.raises(StoreError, match="full"):
            write_much(site.store)
        shown = show(site.file, study.study_uid)
        assert (shown.page["standing"], shown.run["state"]) == ("queued", "QUEUED")
        (disk / "ballast").unlink()
        done = site.worker().step(T0)
        assert done is not None
        assert (done.id, done.state) == (number, RunState.PRODUCED)


def write_much(store: Store) -> None:
    for _ in range(1000):
        store.add_event("node", "n", "node.test", "x" * 1000, T0)


def fill(disk: Path) -> None:
    """Leave nothing."""
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    ballast.write(bytes(size))
            except OSError:
                continue


# ---- the disk ------------------------------------------------------------------------------------


def test_a_full_disk_is_waited_for_then_told(tmp_path: Path, study: phantom.Study) -> None:
    with a_disk(tmp_path / "disk", 8) as disk, a_site(tmp_path, disk / "data", f"sqlite:///{tmp_path}/record") as site:
        site.queue(study)
        worker = site.worker()
        fill(disk)
        done = worker.step(T0)
        assert done is not None
        shown = show(site.file, study.study_uid)
        assert (shown.page["standing"], shown.run["failure"]) == ("queued", "disk")
        assert "No space left on device" in shown.text
        assert "this look is not in the audit trail" in shown.told
        worker.step(T0 + timedelta(hours=2))
        shown = show(site.file, study.study_uid)
        assert (shown.page["standing"], shown.run["failure"]) == ("failed", "disk")
        assert "next: a full disk wants room (salsa-node purge)" in shown.text
        (disk / "ballast").unlink()
        assert salsa_node(site.file, "retry", study.study_uid).returncode == 0
        done = worker.step(datetime.now(UTC))
        assert done is not None
        assert done.state is RunState.PRODUCED
        assert not list(disk.rglob("*.part"))


def test_a_read_only_disk_is_told(tmp_path: Path, study: phantom.Study) -> None:
    with a_disk(tmp_path / "disk", 8) as disk, a_site(tmp_path, disk / "data", f"sqlite:///{tmp_path}/record") as site:
        site.queue(study)
        worker = site.worker()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        worker.step(T0)
        worker.step(T0 + timedelta(hours=2))
        shown = show(site.file, study.study_uid)
        assert (shown.page["standing"], shown.run["failure"]) == ("failed", "disk")
        assert "Read-only file system" in shown.text
        assert "this look is not in the audit trail" in shown.told
        doctor = salsa_node(site.file, "doctor")
        assert doctor.returncode == 1
        assert "disk/data cannot be written" in doctor.stdout
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert salsa_node(site.file, "retry", study.study_uid).returncode == 0
        done = worker.step(datetime.now(UTC))
        assert done is not None
        assert done.state is RunState.PRODUCED


# ---- the clock -----------------------------------------------------------------------------------


def test_a_clock_set_back_a_day_holds_up_nothing(site: Site, study: phantom.Study) -> None:
    ahead = T0 + DAY
    arrive_at(site, study, ahead)
    site.store.catch_up(9000, ahead)
    assert assembly.step(site.store, site.data_dir, PipelineChoice("demo"), T0) is None, "no image came yet, it seems"
    assert show(site.file, study.study_uid).page["standing"] == "receiving"
    told = site.store.catch_up(9000, T0)
    assert told is not None
    assert told.endswith("1 series")
    later = T0 + timedelta(minutes=10)
    assert assembly.step(site.store, site.data_dir, PipelineChoice("demo"), later) is not None
    assembly.step(site.store, site.data_dir, PipelineChoice("demo"), later)
    shown = show(site.file, study.study_uid)
    assert shown.page["standing"] == "queued"
    logs = salsa_node(site.file, "logs", "--event", "node.clock").stdout
    assert "the clock was set back; what waited for a time to come goes on now: 1 series" in logs


def arrive_at(site: Site, study: phantom.Study, when: datetime) -> None:
    """As `arrive`, and the series is still open."""
    arrive(site.store, site.data_dir, study.axial)
    with sqlite3.connect(site.config.store_url.removeprefix("sqlite:///")) as raw:
        raw.execute(
            "UPDATE series SET state = 'RECEIVING', last_instance_at = ?", (when.strftime("%Y-%m-%d %H:%M:%S.%f"),)
        )
        raw.execute("UPDATE studies SET assembled_instances = 0")
    raw.close()
    assert site.store.series_of(study.study_uid)[0].state is SeriesState.RECEIVING


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_delivery_goes_on_whichever_way_the_clock_is_set(site: Site, study: phantom.Study, jump: timedelta) -> None:
    site.queue(study)
    site.worker().step(T0)
    with an_archive(loopback.RESULTS) as pacs:
        closed = replace(pacs.destination(), port=1)
        delivery.step(site.store, SETTINGS, [closed], site.data_dir, "n", T0, clock=lambda: T0)
        shown = show(site.file, study.study_uid)
        assert shown.page["standing"] == "sending"
        assert "nobody listens there" in shown.text
        now = T0 + jump
        for _ in range(8):
            site.store.catch_up(9000, now)
            now += timedelta(seconds=30)
            delivery.step(site.store, SETTINGS, [pacs.destination()], site.data_dir, "n", now, clock=lambda at=now: at)  # type: ignore[misc]
            verification.step(
                site.store, SETTINGS, [pacs.destination()], site.data_dir, "n", now, clock=lambda at=now: at
            )  # type: ignore[misc]
        states = {row.state for row in site.store.deliveries_of(1)}
        assert DeliveryState.PENDING not in states
        assert show(site.file, study.study_uid).page["standing"] == "done"


def test_a_record_without_a_future_is_left_alone(site: Site, study: phantom.Study) -> None:
    site.queue(study)
    before = site.store.find_events(limit=1)
    assert site.store.catch_up(9000, T0) is None
    assert site.store.catch_up(9000, T0 + DAY) is None
    assert site.store.find_events(limit=1) == before


# ---- weights -------------------------------------------------------------------------------------


def test_weights_that_vanish_fail_the_run_and_leave_the_next_when_they_are_back(
    tmp_path: Path, study: phantom.Study
) -> None:
    models = tmp_path / "models"
    shutil.copytree(demo_models_dir(), models / "demo")
    more = f'[pipeline]\nname = "demo"\nmodels_dir = "{models}"\n'
    with a_site(tmp_path, tmp_path / "data", more=more) as site:
        site.queue(study, "demo")
        gone = next(path for path in sorted((models / "demo").rglob("*.pth")))
        gone.rename(tmp_path / "kept")
        worker = site.worker()
        worker.step(T0)
        shown = show(site.file, study.study_uid)
        assert (shown.page["standing"], shown.run["failure"], shown.run["attempt"]) == ("failed", "weights", 1)
        assert "WeightsMissing" in shown.run["error"]
        assert "next: install them: salsa-node models list says which; then: salsa-node retry" in shown.text
        (tmp_path / "kept").rename(gone)
        assert salsa_node(site.file, "retry", study.study_uid).returncode == 0
        shown = show(site.file, study.study_uid)
        assert (shown.page["standing"], shown.run["error"]) == ("queued", None)


# ---- the child -----------------------------------------------------------------------------------

WAIT = "import sys; sys.stdin.read()"


class Elapsed:
    """A clock that goes forward when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def carried_by(site: Site, study: phantom.Study, code: str, clock: Elapsed) -> Iterator[WorkerProcess]:
    """A child of that code, which has claimed the study's run."""
    site.queue(study)
    worker = WorkerProcess(site.store, site.config, None, elapsed_s=clock)
    worker._command = [sys.executable, "-c", code]
    assert worker.step(T0) == "started"
    try:
        assert site.store.claim_run(worker._owner, 60.0, T0) is not None
        assert worker.step(T0) is None
        yield worker
    finally:
        worker.stop()


def until(worker: WorkerProcess, told: str, between: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + 60
    while worker.step(T0) != told:
        assert time.monotonic() < deadline, f"never {told}"
        between()
        time.sleep(0.05)


def test_rubbish_on_a_childs_pipe_is_nothing_to_the_node(
    site: Site, study: phantom.Study, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import os, sys; os.write(1, b'\\xff\\0{]' * 20000); os.write(2, b'\\xff' * 1000); sys.stdin.read()"
    with carried_by(site, study, code, Elapsed()):
        assert show(site.file, study.study_uid).page["standing"] == "running"
    shown = show(site.file, study.study_uid)
    assert (shown.page["standing"], shown.run["failure"]) == ("queued", None)
    assert len(capfd.readouterr().out) >= 20000, "it was printed"


def test_a_child_that_hangs_is_ended_and_told(site: Site, study: phantom.Study) -> None:
    clock = Elapsed()
    with carried_by(site, study, "import time; time.sleep(3600)", clock) as worker:
        clock.now_s = 61.0
        until(worker, "killed")
        until(worker, "ended")
        shown = show(site.file, study.study_uid)
    assert (shown.page["standing"], shown.run["failure"], shown.run["attempt"]) == ("queued", "hung", 1)
    assert "not heard of for 60 s (worker.lease_s)" in shown.text


def test_a_child_that_eats_memory_is_ended_and_told(site: Site, study: phantom.Study) -> None:
    clock = Elapsed()
    limited = replace(site.config, worker=replace(site.config.worker, memory_limit_gib=0.125, max_attempts=1))
    code = f"held = bytearray(b'x') * (256 << 20)\n{WAIT}"

    def a_little_later() -> None:
        clock.now_s = min(clock.now_s + 0.5, 50.0)

    with carried_by(replace(site, config=limited), study, code, clock) as worker:
        until(worker, "killed", a_little_later)
        until(worker, "ended")
        shown = show(site.file, study.study_uid)
    assert (shown.page["standing"], shown.run["failure"]) == ("failed", "memory")
    assert "0.125 GiB are allowed (worker.memory_limit_gib)" in shown.text
    assert "raise worker.memory_limit_gib, or analyse a thicker series" in shown.text


def test_a_child_that_dies_is_started_again_and_told(site: Site, study: phantom.Study) -> None:
    with carried_by(site, study, "import os, sys; sys.stdin.read(1); os.abort()", Elapsed()) as worker:
        assert worker._child is not None
        os.kill(worker._child.pid, signal.SIGABRT)
        until(worker, "ended")
        shown = show(site.file, study.study_uid)
    assert (shown.page["standing"], shown.run["failure"]) == ("queued", "crashed")
    assert "attempt 1: the worker was ended by SIGABRT" in shown.text
