"""The node's own parts: one node a folder, loops that outlive errors, a worker process that is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from salsa_node import loopback, node, node_lock
from salsa_node.config import Config, parse
from salsa_node.errors import ConfigError, StoreError
from salsa_node.settings import ListenerSettings, NodeSettings, WorkerSettings
from salsa_node.store import NewInstance, Store, StoreSettings

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
    config = replace(Config(), node=NodeSettings(data_dir=folder))
    with node_lock.only_node(config):
        assert folder.stat().st_mode & 0o077 == 0
        with pytest.raises(ConfigError, match="in use by another node"), node_lock.only_node(config):
            pass
    with node_lock.only_node(config):
        pass


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    config = replace(Config(), node=NodeSettings(data_dir=tmp_path / "file" / "data"))
    with pytest.raises(ConfigError, match=r"node\.data_dir"), node_lock.only_node(config):
        pass


def test_a_start_frees_what_a_dead_node_leased_and_lifts_no_pause(config):
    with node._record(config) as store:
        store.add_instance(NewInstance("1.2.3.1", "1.2.3", "1.2", "1.5", "1.6", "p", "0" * 32, 9, "CT1"), T0)
        store.complete_series(T0, T0)
        store.study_assembled(store.study("1.2"), "looked at", T0)
        run = store.queue_run("1.2", "demo", "d", T0)
        assert store.claim_run("dead", 10**6, T0) is not None
        pause = store.pause("new driver", T0)
    with node._record(config) as store:
        assert store.paused() == pause
        assert store.claim_run("worker", 60.0, T0) is None
        store.resume(T0)
        claimed = store.claim_run("worker", 60.0, T0)
        assert claimed is not None
        assert claimed.id == run.id


@pytest.mark.parametrize("left", ["nothing", "an empty file"])
def test_a_node_does_not_begin_anew_beside_images_whose_record_is_lost(config, left):
    with node._record(config):
        pass
    record = config.node.data_dir / "salsa_node.sqlite"
    for file in record.parent.glob(f"{record.name}*"):
        file.unlink()
    (config.node.data_dir / "studies" / "1.2").mkdir(parents=True)
    if left == "an empty file":
        record.touch()
    with pytest.raises(ConfigError, match="salsa-node restore"), node._record(config):
        pass
    (config.node.data_dir / "studies").rename(config.node.data_dir / "away")
    with node._record(config):
        pass


def test_a_second_signal_ends_a_node_that_is_held_up_and_two_at_once_are_one(tmp_path):
    """A worker that stands still holds up the first."""
    file, log, port = tmp_path / "site.toml", tmp_path / "log", loopback.free_port()
    file.write_text(
        f'[node]\ndata_dir = "{tmp_path / "data"}"\n[listener]\nport = {port}\nmin_free_gib = 0.0\n'
        '[pipeline]\nname = "demo"\n[worker]\nstop_grace_s = 600.0\n'
    )
    command = [sys.executable, "-m", "salsa_node", "serve", "--config", str(file)]
    with log.open("w") as sink, subprocess.Popen(command, stdout=sink, stderr=sink) as process:
        children: list[str] = []
        while not (children and loopback.echoes(port)):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
            tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
            children = [child for task in tasks for child in task.read_text().split()]
        for child in children:
            os.kill(int(child), signal.SIGSTOP)  # it will not end when it is asked to
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        time.sleep(2.0)
        assert process.poll() is None, "two at once are one"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
    assert "SIGINT again ends it at once" in log.read_text()
    assert "goes on at the next start" in log.read_text()


def test_each_node_of_a_shared_record_is_seen_by_the_commands_beside_it_and_no_other(tmp_path):
    one = replace(
        Config(),
        node=NodeSettings(data_dir=tmp_path, store_url="postgresql://u@h/d"),
        listener=ListenerSettings(port=1),
    )
    other = replace(one, listener=ListenerSettings(port=2))
    with node_lock.only_node(one):
        assert (node_lock.is_running(one), node_lock.is_running(other)) == (True, False)
        with node_lock.only_node(other):
            assert node_lock.is_running(other)
        with pytest.raises(ConfigError, match="in use by another node"), node_lock.only_node(one):
            pass
    assert not node_lock.is_running(one)


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


def test_a_loop_that_fails_again_and_again_does_not_fill_the_log(caplog, monkeypatch):
    loop = node.Loop("test", lambda now: None, 0.01)
    for why in ("malformed", "malformed", "locked", "locked", "malformed"):
        loop._failed(why)
        assert loop.failing == why
    assert [record.error for record in caplog.records] == ["malformed", "locked", "malformed"]
    monkeypatch.setattr(node, "_SAY_AGAIN_S", 0.0)
    loop._failed("malformed")
    assert len(caplog.records) == 4, "said again after a while"


def test_the_worker_reads_the_config_as_it_was_at_the_start(config, tmp_path):
    path = tmp_path / "site.toml"
    path.write_text("[assembly]\nquiet_s = 5\n")
    copy = node._own_copy(config, path)
    path.write_text("[assembly]\nquiet_s = 'broken'\n")
    assert copy is not None
    assert parse(copy.read_text()).assembly.quiet_s == 5
    assert node._own_copy(config, None) is None


def test_a_worker_is_stopped_when_nothing_can_start_it_again(config, free_port, monkeypatch):
    ends = [(signum, signal.getsignal(signum)) for signum in (signal.SIGTERM, signal.SIGINT)]
    stopped, asked, under_way = threading.Event(), threading.Event(), []
    ask_to_stop = node.Loop.ask_to_stop

    class Worker:
        """One that is looked after for a while yet when the node is told to stop."""

        failing = ""

        def __init__(self, *_: object) -> None:
            pass

        def step(self, _: datetime) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            under_way.append((asked.wait(60), stopped.wait(0.5)))

        def stop(self) -> None:
            stopped.set()

    monkeypatch.setattr(node, "WorkerProcess", Worker)
    monkeypatch.setattr(node.Loop, "ask_to_stop", lambda loop: (ask_to_stop(loop), asked.set()))
    try:
        node.serve(replace(config, listener=ListenerSettings(port=free_port)), None)
    finally:
        for signum, then in ends:
            signal.signal(signum, then)
    assert under_way == [(True, False)]
    assert stopped.is_set()
