"""The whole street as real processes: in by C-STORE, out by C-STORE, whatever is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest

from salsa_node import loopback, overview, phantom
from salsa_node.overview import Standing
from salsa_node.store import RunState, Store, StoreSettings
from salsa_node.uids import derive

WAIT_S = 240.0


@dataclass(frozen=True)
class Site:
    """A config on free ports; the node is started and killed by the test."""

    folder: Path
    config: Path
    port: int
    receiver_port: int

    @property
    def store(self) -> Store:
        return Store.open(StoreSettings(f"sqlite:///{self.folder / 'data' / 'salsa_node.sqlite'}"))

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salsa_node", *arguments, "--config", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    port, receiver_port = loopback.free_port(), loopback.free_port()
    config = tmp_path / "site.toml"
    config.write_text(
        f"""
[node]
data_dir = "{tmp_path / "data"}"
[listener]
port = {port}
[assembly]
quiet_s = 1.0
poll_s = 0.1
[worker]
lease_s = 4.0
heartbeat_s = 1.0
max_attempts = 5
poll_s = 0.1
[delivery]
to = ["viewer"]
first_retry_s = 0.5
poll_s = 0.1
[[destination]]
name = "viewer"
ae_title = "VIEWER"
host = "127.0.0.1"
port = {receiver_port}
"""
    )
    return Site(tmp_path, config, port, receiver_port)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> phantom.Study:
    """A small phantom study; coarse, so that a run takes seconds."""
    recipe = phantom.Recipe(7, shape=(56, 128, 128), spacing_mm=(4.0, 2.25, 2.25))
    return phantom.write_study(phantom.make(recipe), tmp_path_factory.mktemp("study"))


def until(what: Callable[[], object], wait_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + wait_s
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def standing(site: Site, study_uid: str) -> Standing:
    with site.store as store:
        return overview.glance(store, store.study(study_uid)).standing


def running(site: Site, study_uid: str, attempt: int) -> bool:
    """That attempt is under way and has begun its first stage."""
    with site.store as store:
        if [run.attempt for run in store.runs_in(RunState.RUNNING)] != [attempt]:
            return False
        return store.events_of(study_uid)[-1].name == "run.stage"


def kinds(received: list[Path]) -> list[str]:
    return sorted(path.name.split("-")[0] for path in received)


def worker_pid(node: subprocess.Popen[bytes]) -> int:
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    tasks = [p.read_text().split() for p in Path(f"/proc/{node.pid}/task").glob("*/children")]
    pids = {int(pid) for group in [children, *tasks] for pid in group}
    (pid,) = [p for p in pids if b"work" in Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0")]
    return pid


def test_killed_worker_killed_node_and_a_polite_stop_leave_one_result(site, study):
    log = site.folder / "node.log"
    with loopback.receiver(site.receiver_port, site.folder / "results") as received:
        # kill -9 of the worker while it runs, then of the whole node while it runs again
        with loopback.node(site.config, log, site.port) as node:
            loopback.send([*study.localizer, *study.axial], site.port)
            until(lambda: running(site, study.study_uid, 1))
            os.kill(worker_pid(node), signal.SIGKILL)
            until(lambda: b"worker ended" in log.read_bytes())
            until(lambda: running(site, study.study_uid, 2))
            os.kill(node.pid, signal.SIGKILL)
            node.wait()
        # started again, it is asked to stop while the run is under way: the run goes back to the queue
        with loopback.node(site.config, log, site.port) as node:
            until(lambda: running(site, study.study_uid, 3))
            assert loopback.stop(node) == 0, log.read_text()
        with site.store as store:
            assert [run.state for run in store.runs_of(study.study_uid)] == [RunState.QUEUED]
        assert received == []
        # and the next start finishes it
        with loopback.node(site.config, log, site.port):
            until(lambda: standing(site, study.study_uid) is Standing.DONE)
        assert kinds(received) == sorted(kinds(set(received)))  # each once
        assert {"SEG", "SR", "OT", "DOC", "KO"} == set(kinds(received))
        for path in received:
            assert pydicom.dcmread(path).StudyInstanceUID == study.study_uid

        # a re-run with the same input and weights makes the same objects, and a late start delivers them
        first = {path.name: path.read_bytes() for path in received}
        queued = site.cli("rerun", study.study_uid)
        assert queued.returncode == 0, queued.stderr
        with loopback.node(site.config, log, site.port):
            until(lambda: len(received) == 2 * len(first))
            until(lambda: standing(site, study.study_uid) is Standing.DONE)
        assert {path.name: path.read_bytes() for path in received} == first

        # a person's mask supersedes the AI
        queued = site.cli("rerun", study.study_uid, "--masks", str(study.truth_labels))
        assert queued.returncode == 0, queued.stderr
        with loopback.node(site.config, log, site.port):
            until(lambda: len(received) > 2 * len(first))
            until(lambda: standing(site, study.study_uid) is Standing.DONE)
        assert {path.name for path in received[2 * len(first) :]}.isdisjoint(first)
        with site.store as store:
            states = [run.state for run in store.runs_of(study.study_uid)]
        assert states == [RunState.SUPERSEDED, RunState.SUPERSEDED, RunState.PRODUCED]


def test_bad_input_is_answered_with_the_reason_and_the_node_goes_on(site, study, tmp_path):
    def spoiled(name: str, spoil: Callable[[pydicom.Dataset], None]) -> list[Path]:
        """The study again under other UIDs, each image spoiled."""
        folder = tmp_path / name
        folder.mkdir()
        for path in study.axial:
            ds = pydicom.dcmread(path)
            ds.StudyInstanceUID, ds.SeriesInstanceUID = derive(name, "study"), derive(name, "series")
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = derive(name, ds.SOPInstanceUID)
            spoil(ds)
            ds.save_as(folder / path.name)
        return sorted(folder.iterdir())

    def no_pixels(ds: pydicom.Dataset) -> None:
        del ds.PixelData

    def truncated(ds: pydicom.Dataset) -> None:
        ds.PixelData = ds.PixelData[: len(ds.PixelData) // 2]

    def tilted(ds: pydicom.Dataset) -> None:
        x, y, z = (float(mm) for mm in ds.ImagePositionPatient)
        ds.ImagePositionPatient = [x, y + 0.2 * z, z]

    inputs = {
        "gap of 8.0 mm": [path for n, path in enumerate(spoiled("gap", lambda _: None)) if n != 20],
        "has no pixel data": spoiled("no pixels", no_pixels),
        "is truncated": spoiled("truncated", truncated),
        "gantry tilt": spoiled("tilted", tilted),
    }
    log = site.folder / "node.log"
    with (
        loopback.receiver(site.receiver_port, site.folder / "results") as received,
        loopback.node(site.config, log, site.port),
    ):
        for paths in inputs.values():
            loopback.send(paths, site.port)
        until(lambda: len(received) == 3 * len(inputs))  # the report, and the page as picture and as PDF
        assert loopback.echoes(site.port)
        written = [path for path in received if path.name.startswith("SR-")]
        reports = {pydicom.dcmread(path).StudyInstanceUID: path.read_bytes() for path in written}
        for reason, paths in inputs.items():
            study_uid = pydicom.dcmread(paths[0], stop_before_pixels=True).StudyInstanceUID
            assert reason.encode() in reports[study_uid], reason
            assert b"No analysis was possible" in reports[study_uid]
        told = site.cli("studies")
        assert told.stdout.count("not_analysed") == len(inputs)
    assert b"Traceback" not in log.read_bytes()
