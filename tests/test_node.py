"""The node's own parts: one node a folder, loops that outlive errors, a worker process that is started again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from salsa_node import node
from salsa_node.config import Config, parse
from salsa_node.errors import ConfigError, StoreError
from salsa_node.settings import NodeSettings, WorkerSettings
from salsa_node.store import Store, StoreSettings

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    settings = WorkerSettings(stop_grace_s=0.5)
    return replace(Config(), node=NodeSettings(data_dir=tmp_path), worker=settings)


@pytest.fixture
def store(config: Config) -> Iterator[Store]:
    with Store.open(StoreSettings(config.store_url), create=True) as opened:
        yield opened


def test_a_folder_has_one_node(tmp_path):
    folder = tmp_path / "data"
    with node.only_node(folder):
        assert folder.stat().st_mode & 0o077 == 0
        with pytest.raises(ConfigError, match="in use by another node"), node.only_node(folder):
            pass
    with node.only_node(folder):
        pass


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"node\.data_dir"), node.only_node(tmp_path / "file" / "data"):
        pass


def test_a_loop_goes_on_after_what_nobody_foresaw_and_ends_when_asked():
    seen = threading.Event()
    calls = []

    def step(now: datetime) -> object | None:
        assert now.tzinfo is UTC
        calls.append(now)
        if len(calls) == 1:
            raise StoreError("locked")
        if len(calls) == 2:
            raise ZeroDivisionError
        seen.set()
        return None

    loop = node.Loop("test", step, 0.01)
    loop.start()
    assert seen.wait(30)
    loop.ask_to_stop()
    loop.join(30)
    assert not loop.is_alive()


def a_worker(store: Store, config: Config, code: str) -> node.WorkerProcess:
    worker = node.WorkerProcess(store, config, None)
    worker._command = [sys.executable, "-c", code]
    return worker


def until_ended(worker: node.WorkerProcess, now: datetime) -> None:
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
    assert [record.code for record in caplog.records if record.message == "worker ended"] == ["exit code 3"] * 3


def test_a_dead_worker_s_run_is_queued_again(store, config):
    from test_store import an_instance

    store.add_instance(an_instance(), T0)
    store.complete_series(T0, T0)
    store.study_assembled(store.study("1.2.3"), "looked at", T0)
    run = store.queue_run("1.2.3", "demo", "digest", T0)
    worker = a_worker(store, config, "import sys; sys.stdin.read()")
    worker.step(T0)
    assert store.claim_run(worker._owner, 1000.0, T0) is not None
    assert worker._child is not None
    os.kill(worker._child.pid, signal.SIGKILL)
    until_ended(worker, T0)
    assert store.run(run.id).state.value == "QUEUED"


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


def test_the_worker_reads_the_config_as_it_was_at_the_start(config, tmp_path):
    path = tmp_path / "site.toml"
    path.write_text("[assembly]\nquiet_s = 5\n")
    copy = node._own_copy(config, path)
    path.write_text("[assembly]\nquiet_s = 'broken'\n")
    assert copy is not None
    assert parse(copy.read_text()).assembly.quiet_s == 5
    assert node._own_copy(config, None) is None
