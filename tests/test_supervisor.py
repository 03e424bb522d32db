"""A worker process that dies, hangs, takes too long or too much costs its run one attempt, and says which it was."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from test_store import an_instance

from salsa_node import failures, monitoring, process_memory, supervisor
from salsa_node.config import Config
from salsa_node.errors import ConfigError, DeviceExhausted, EncodingError, LeaseLost, OrganNotFound, WeightsMissing
from salsa_node.failures import POLICIES, Failure
from salsa_node.settings import NodeSettings, WorkerSettings
from salsa_node.store import Run, RunState, Store, StoreSettings
from salsa_node.supervisor import WorkerProcess

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
WAIT = "import sys; sys.stdin.read()"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    settings = WorkerSettings(stop_grace_s=0.5, lease_s=60.0, run_limit_s=600.0, retry_s=10.0, max_attempts=3)
    return replace(Config(), node=NodeSettings(data_dir=tmp_path), worker=settings)


@pytest.fixture
def store(config: Config) -> Iterator[Store]:
    with Store.open(StoreSettings(config.store_url), create=True) as opened:
        yield opened


class Clock:
    """A clock that goes forward when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def a_worker(store: Store, config: Config, code: str = WAIT, clock: Clock | None = None) -> WorkerProcess:
    worker = WorkerProcess(store, config, None, elapsed_s=clock or Clock())
    worker._command = [sys.executable, "-c", code]
    return worker


def a_run(store: Store, uid: str = "1.2.3") -> Run:
    """A run that waits, of a study of one image."""
    store.add_instance(replace(an_instance(), study_uid=uid, series_uid=f"{uid}.1", sop_instance_uid=f"{uid}.1.1"), T0)
    store.complete_series(T0, T0)
    store.study_assembled(store.study(uid), "looked at", T0)
    return store.queue_run(uid, "demo", "digest", T0)


def until_ended(worker: WorkerProcess, now: datetime) -> None:
    deadline = time.monotonic() + 30
    while worker.step(now) != "ended":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_dead_worker_frees_its_lease_and_is_started_again_later_and_later(store, config, caplog):
    worker = a_worker(store, config, "raise SystemExit(3)")
    now = T0
    waits = []
    for _ in range(3):
        assert worker.step(now) == "started"
        until_ended(worker, now)
        wait = next(s for s in range(1, 100) if worker._not_before <= now + timedelta(seconds=s))
        waits.append(wait)
        assert worker.step(now) is None, "it waits before it is started again"
        now += timedelta(seconds=wait)
    assert waits == [1, 2, 4]
    assert [record.code for record in caplog.records if record.message == "worker ended"] == [
        "the worker ended with exit code 3"
    ] * 3


def test_a_worker_that_ends_at_its_start_is_told_until_one_lives(store, config):
    clock = Clock()
    worker = a_worker(store, config, "raise SystemExit(7)", clock)
    worker.step(T0)
    until_ended(worker, T0)
    assert worker.failing == "the worker ended with exit code 7"
    (fault,) = monitoring.examine(store, config.node.data_dir, 0.0, (), [worker]).faults
    assert fault.startswith("no run is carried: the worker ended with exit code 7")
    worker._command = [sys.executable, "-c", "import time; time.sleep(600)"]
    later = T0 + timedelta(minutes=5)
    assert worker.step(later) == "started"
    worker.step(later)
    assert worker.failing, "it may end again"
    clock.now_s += supervisor.STEADY_S + 1
    worker.step(later)
    assert worker.failing == ""
    worker.stop()


def test_a_crash_costs_one_attempt_waits_longer_each_time_and_is_given_up_in_the_end(store, config):
    run = a_run(store)
    now, waits = T0, []
    for attempt in range(1, 4):
        worker = a_worker(store, config)
        worker.step(now)
        claimed = store.claim_run(worker._owner, 1000.0, now)
        assert (claimed.id, claimed.attempt) == (run.id, attempt)
        os.kill(worker._child.pid, signal.SIGSEGV)
        until_ended(worker, now)
        run = store.run(run.id)
        assert run.failure == "crashed"
        assert run.error == f"attempt {attempt}: the worker was ended by SIGSEGV"
        if run.state is RunState.QUEUED:
            waits.append((run.not_before - now).total_seconds())
            assert store.claim_run("other", 60.0, now) is None, "it waits"
            now = run.not_before
    assert run.state is RunState.FAILED
    assert 7.5 <= waits[0] <= 12.5
    assert 15 <= waits[1] <= 25


def test_a_study_that_kills_its_worker_does_not_hold_up_the_next(store, config):
    poisoned, healthy = a_run(store), a_run(store, "1.2.4")
    worker = a_worker(store, config)
    worker.step(T0)
    assert store.claim_run(worker._owner, 1000.0, T0).id == poisoned.id
    os.kill(worker._child.pid, signal.SIGKILL)
    until_ended(worker, T0)
    worker.step(T0 + timedelta(seconds=2))
    assert store.claim_run(worker._owner, 1000.0, T0 + timedelta(seconds=2)).id == healthy.id
    worker.stop()


def test_a_worker_that_is_not_heard_of_is_killed(store, config):
    run, clock = a_run(store), Clock()
    worker = a_worker(store, config, clock=clock)
    worker.step(T0)
    store.claim_run(worker._owner, 60.0, T0)
    assert worker.step(T0) is None
    clock.now_s = 50.0
    store.heartbeat(run.id, worker._owner, 60.0, T0 + timedelta(seconds=50))
    assert worker.step(T0) is None
    clock.now_s = 109.0
    assert worker.step(T0) is None
    clock.now_s = 111.0
    assert worker.step(T0) == "killed"
    until_ended(worker, T0)
    run = store.run(run.id)
    assert (run.state, run.failure) == (RunState.QUEUED, "hung")
    assert "not heard of for 60 s (worker.lease_s)" in run.error


PULSE = "import os, sys, time; fd = int(sys.argv[sys.argv.index('--pulse') + 1])\n"


def test_a_worker_that_hangs_without_a_run_is_killed_and_started_again(store, config):
    clock = Clock()
    worker = a_worker(store, config, WAIT, clock)
    worker.step(T0)
    clock.now_s = 599.0
    assert worker.step(T0) is None
    clock.now_s = 601.0
    assert worker.step(T0) == "killed"
    until_ended(worker, T0)
    (told,) = store.find_events(name="worker.ended")
    assert told.detail.startswith("the worker carried nothing and looked for no work in 600 s (worker.run_limit_s)")
    later = T0 + timedelta(minutes=5)
    assert worker.step(later) == "started"
    clock.now_s = 1100.0
    assert worker.step(later) is None, "a new one has its own time"
    worker.stop()


def test_a_worker_that_cannot_be_started_leaves_no_file_open(store, config):
    worker = a_worker(store, config)
    worker._command = ["/no/such/program"]
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - as the system counts them
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            worker.step(T0)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("code", [PULSE + "while True: os.write(fd, b'.'); time.sleep(0.01)", ""])
def test_a_worker_that_looks_for_work_lives_as_long_as_it_likes(store, config, code):
    clock = Clock()
    worker = a_worker(store, config, code, clock)
    if not code:  # the real one
        worker._command = [sys.executable, "-m", "salsa_node", "work", "--config", str(site(config))]
    worker.step(T0)
    try:
        for _ in range(3):
            assert select.select([worker._pulse], [], [], 120)[0]
            clock.now_s += 400.0
            assert worker.step(T0) is None
    finally:
        worker.stop()


def site(config: Config) -> Path:
    path = config.node.data_dir / "site.toml"
    path.write_text(f'[node]\ndata_dir = "{config.node.data_dir}"\n[worker]\npoll_s = 0.1\n')
    return path


@pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1)])
def test_a_clock_that_is_set_harms_nobody(store, config, jump):
    run, clock = a_run(store), Clock()
    worker = a_worker(store, config, clock=clock)
    worker.step(T0)
    store.claim_run(worker._owner, 60.0, T0)
    worker.step(T0)
    clock.now_s = 5.0
    assert worker.step(T0 + jump) is None
    assert store.run(run.id).state is RunState.RUNNING
    os.kill(worker._child.pid, signal.SIGKILL)
    until_ended(worker, T0 + timedelta(days=1))
    assert worker.step(T0) == "started", "a wait that the clock moved into a far future is none"
    worker.stop()


def test_a_run_that_takes_too_long_is_ended_however_lively(store, config):
    run, clock = a_run(store), Clock()
    worker = a_worker(store, config, clock=clock)
    worker.step(T0)
    store.claim_run(worker._owner, 60.0, T0)
    for at_s in range(0, 601, 30):
        clock.now_s = float(at_s)
        store.heartbeat(run.id, worker._owner, 60.0, T0 + timedelta(seconds=at_s))
        assert worker.step(T0) is None, at_s
    clock.now_s = 601.0
    assert worker.step(T0) == "killed"
    until_ended(worker, T0)
    run = store.run(run.id)
    assert (run.state, run.failure) == (RunState.QUEUED, "overdue")
    assert "600 s (worker.run_limit_s)" in run.error


def test_the_time_of_one_run_is_not_counted_against_the_next(store, config):
    first, clock = a_run(store), Clock()
    worker = a_worker(store, config, clock=clock)
    worker.step(T0)
    store.claim_run(worker._owner, 60.0, T0)
    worker.step(T0)
    store.produce(first.id, worker._owner, [], [], "no_candidate", None, "digest", T0)
    a_run(store, "1.2.4")
    store.claim_run(worker._owner, 60.0, T0)
    clock.now_s = 601.0
    assert worker.step(T0) is None
    worker.stop()


def test_a_run_that_takes_too_much_memory_is_ended(store, config):
    run, clock = a_run(store), Clock()
    limited = replace(config, worker=replace(config.worker, memory_limit_gib=0.125))
    worker = a_worker(store, limited, "held = bytearray(b'x') * (256 << 20)\nimport sys; sys.stdin.read()", clock)
    worker.step(T0)
    store.claim_run(worker._owner, 60.0, T0)
    deadline = time.monotonic() + 30
    while worker.step(T0) != "killed":
        assert time.monotonic() < deadline
        clock.now_s += 0.1
        store.heartbeat(run.id, worker._owner, 60.0, T0 + timedelta(seconds=clock.now_s))
        time.sleep(0.02)
    until_ended(worker, T0)
    run = store.run(run.id)
    assert (run.state, run.failure) == (RunState.QUEUED, "memory")
    assert "0.125 GiB are allowed (worker.memory_limit_gib)" in run.error


@pytest.mark.parametrize(("by", "failure"), [(signal.SIGKILL, "memory"), (signal.SIGSEGV, "crashed")])
def test_the_kernels_want_of_memory_is_told_from_a_crash(store, config, monkeypatch, by, failure):
    """The kernel killed somebody for memory meanwhile; whoever crashed by himself was not it."""
    counts = iter([4, 5])
    monkeypatch.setattr(supervisor, "killed_for_memory", lambda: next(counts))
    run = a_run(store)
    worker = a_worker(store, config)
    worker.step(T0)
    store.claim_run(worker._owner, 60.0, T0)
    os.kill(worker._child.pid, by)
    until_ended(worker, T0)
    assert store.run(run.id).failure == failure


def test_what_a_worker_prints_is_nothing_to_the_node(store, config, capfd):
    run = a_run(store)
    worker = a_worker(store, config, "import os, sys; os.write(1, os.urandom(100000)); sys.stdin.read()")
    worker.step(T0)
    store.claim_run(worker._owner, 60.0, T0)
    assert worker.step(T0) is None
    assert store.run(run.id).state is RunState.RUNNING
    worker.stop()
    assert (store.run(run.id).state, store.run(run.id).failure) == (RunState.QUEUED, None)


def test_a_worker_that_ends_by_a_signal_without_a_name_is_told_and_started_again(store, config):
    number = signal.SIGRTMIN + 3
    worker = a_worker(store, config, f"import os; os.kill(os.getpid(), {number})")
    worker.step(T0)
    until_ended(worker, T0)
    assert worker.failing == f"the worker was ended by signal {number}"
    assert worker.step(T0 + timedelta(minutes=2)) == "started"
    worker.stop()


def test_a_run_that_was_cancelled_stays_so_when_its_worker_dies(store, config):
    run = a_run(store)
    worker = a_worker(store, config)
    worker.step(T0)
    store.claim_run(worker._owner, 60.0, T0)
    store.queue_run("1.2.3", "demo", "another", T0, force=True)
    os.kill(worker._child.pid, signal.SIGKILL)
    until_ended(worker, T0)
    assert store.run(run.id).state is RunState.CANCELLED


def test_memory_is_that_of_the_group_alone():
    own = process_memory.held_bytes(os.getpgrp())
    assert own > 5 << 20
    assert process_memory.held_bytes(2**30) == 0
    assert process_memory._counted("oom 3\noom_kill 2\n", "oom_kill") == 2
    assert process_memory._counted("", "oom_kill") == 0
    assert process_memory.killed_for_memory() >= 0


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (DeviceExhausted("full"), Failure.DEVICE_MEMORY),
        (MemoryError(), Failure.MEMORY),
        (OSError(28, "full"), Failure.DISK),
        (WeightsMissing("none"), Failure.WEIGHTS),
        (OrganNotFound("none"), Failure.PIPELINE),
        (EncodingError("odd"), Failure.OUTPUT),
        (LeaseLost("gone"), Failure.STORE),
        (ConfigError("odd"), Failure.PIPELINE),
        (RuntimeError("odd"), Failure.UNFORESEEN),
    ],
)
def test_each_error_has_its_class(error, failure):
    assert failures.of(error) is failure


def test_each_failure_has_a_policy_and_what_a_person_does():
    assert set(POLICIES) == set(Failure)
    assert all(policy.action for policy in POLICIES.values())


def test_waits_double_within_the_jitter_and_never_pass_an_hour_by_more():
    assert [failures.wait_s(Failure.CRASHED, n, 9, 10.0, lambda: 0.5) for n in (1, 2, 3)] == [10, 20, 40]
    assert failures.wait_s(Failure.CRASHED, 1, 9, 10.0, lambda: 0.0) == 7.5
    assert failures.wait_s(Failure.CRASHED, 1, 9, 10.0, lambda: 1.0) == 12.5
    assert failures.wait_s(Failure.CRASHED, 40, 99, 10.0, lambda: 1.0) == 4500
    assert failures.wait_s(Failure.OVERDUE, 1, 9, 10.0, lambda: 0.5) == 10
    assert failures.wait_s(Failure.OVERDUE, 2, 9, 10.0) is None
    assert failures.wait_s(Failure.WEIGHTS, 1, 9, 10.0) is None
    assert failures.wait_s(Failure.CRASHED, 3, 3, 10.0) is None
    by_chance = [failures.wait_s(Failure.CRASHED, 1, 9, 10.0) for _ in range(50)]
    assert len(set(by_chance)) > 40
    assert all(7.5 <= wait <= 12.5 for wait in by_chance if wait is not None)


def test_what_a_worker_carried_that_was_stopped_waits_again_at_once(store, config):
    run = a_run(store)
    worker = a_worker(store, config)
    worker.step(T0)
    assert store.claim_run(worker._owner, 3600, T0) is not None
    worker.stop()  # which it does not hear in time to give its run back
    assert store.run(run.id).state is RunState.QUEUED
    assert store.claim_run("the next", 60, T0) is not None


PARENT = (
    "import os, signal, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "open('PIDS', 'w').write(f'{child.pid}')\n"
    "WHAT_THEN\n"
)


@pytest.mark.parametrize("then", ["time.sleep(600)", "os.kill(os.getpid(), signal.SIGSEGV)"])
def test_a_worker_leaves_nothing_behind_that_it_had_started(store, config, then):
    """Stopped, it ends by SIGTERM at once and nobody else of its group does; so where it crashes."""
    pids = config.node.data_dir / "pids"
    worker = a_worker(store, config, PARENT.replace("PIDS", str(pids)).replace("WHAT_THEN", then))
    worker.step(T0)
    deadline = time.monotonic() + 60
    while not pids.exists() or not pids.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if "SIGSEGV" in then:
        until_ended(worker, T0)
    else:
        worker.stop()
    grandchild = Path(f"/proc/{pids.read_text()}")
    while grandchild.exists() and "Z" not in (grandchild / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "it outlived its worker"
        time.sleep(0.02)


def test_a_worker_that_does_not_stop_is_killed_with_its_group(store, config):
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('PIDS', 'w').write(f'{child.pid}')\n"
        "time.sleep(600)\n"
    ).replace("PIDS", str(config.node.data_dir / "pids"))
    worker = a_worker(store, config, code)
    worker.step(T0)
    deadline = time.monotonic() + 30
    pids = config.node.data_dir / "pids"
    while not pids.exists() or not pids.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.stop()
    grandchild = Path(f"/proc/{pids.read_text()}")
    while grandchild.exists() and "Z" not in (grandchild / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the group was not killed"
        time.sleep(0.02)
