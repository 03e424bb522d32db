"""Two nodes share a PostgreSQL and a data folder: what one of them leaves behind, the other carries on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import raw_scu
from postgres import a_database
from pydicom.uid import ExplicitVRLittleEndian

from salsa_node import loopback, node, overview, phantom
from salsa_node.config import Config
from salsa_node.instance_header import CONTENT_CONFLICT, SUCCESS
from salsa_node.intake import Incoming, Intake, Request
from salsa_node.listener import INCOMING
from salsa_node.notes import Notes
from salsa_node.overview import Standing
from salsa_node.settings import NodeSettings
from salsa_node.store import RunState, Store, StoreSettings

WAIT_S = 240.0
SERIES = "2.25.4.1"


def incoming(door: Intake, pixels: int) -> Incoming:
    """One and the same instance, of as many rows and columns."""
    uid = f"{SERIES}.1"
    come = door.begin(Request(raw_scu.CT, uid, raw_scu.CT, ExplicitVRLittleEndian, "CT1", "SALSA_NODE"))
    come.write([raw_scu.image("2.25.4", SERIES, uid, 1, pixels).content])
    return come


def test_what_one_door_acknowledged_another_door_does_not_set_aside(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two contents of one instance come to two nodes at once; the other commits between the one's file and its row."""
    url = a_database(request)
    with Store.open(StoreSettings(url)) as store, Store.open(StoreSettings(url)) as others:
        one, other = (Intake(each, tmp_path / "data", Notes(each, clock), clock) for each in (store, others))
        commit, told = one._committed, []

        def late(mine: Any) -> Any:
            told.append(other.take(incoming(other, pixels=16))[0])
            return commit(mine)

        monkeypatch.setattr(one, "_committed", late)
        told.append(one.take(incoming(one, pixels=8))[0])
        assert told == [SUCCESS, CONTENT_CONFLICT]
        [kept], [aside] = store.instances_of("2.25.4"), store.quarantined()
        for row, pixels in ((kept, 16), (aside, 8)):
            content = raw_scu.image("2.25.4", SERIES, f"{SERIES}.1", 1, pixels).content
            assert (tmp_path / "data" / row.path).read_bytes().endswith(content)
        assert len([path for path in (tmp_path / "data").rglob("*") if path.is_file()]) == 2


def test_a_zero_byte_in_a_header_is_no_reason_to_refuse_an_image_for_ever(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The sender would be told to try again, and PostgreSQL takes no such text however often it comes."""
    uid = f"{SERIES}.1"
    with Store.open(StoreSettings(a_database(request))) as store:
        door = Intake(store, tmp_path / "data", Notes(store, clock), clock)
        come = door.begin(Request(raw_scu.CT, uid, raw_scu.CT, ExplicitVRLittleEndian, "CT1", "SALSA_NODE"))
        come.write([raw_scu.image("2.25.4", SERIES, uid, 1, 8, patient_id="MA\0DE").content])
        assert door.take(come) == (SUCCESS, "")
        assert store.study("2.25.4").patient_id == "MA DE"


def test_a_node_that_starts_leaves_alone_what_another_machine_is_at(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Its leases, and the files that it is writing; what lies half written since days goes."""
    settings = replace(Config(), node=NodeSettings(tmp_path / "data", a_database(request)))
    writing, left = (tmp_path / "data" / INCOMING / f"{name}.part" for name in ("writing", "left"))
    writing.parent.mkdir(parents=True)
    for file in (writing, left):
        file.write_bytes(b"half")
    os.utime(left, (0, 0))
    with Store.open(StoreSettings(settings.store_url)) as store:
        door = Intake(store, tmp_path / "data", Notes(store, clock), clock)
        assert door.take(incoming(door, 8))[0] == SUCCESS
        store.complete_series(clock(), clock())
        store.study_assembled(store.study("2.25.4"), "", clock())
        run = store.queue_run("2.25.4", "demo", "d", clock())
        assert store.claim_run("another machine", 60, clock()) is not None
        with node._record(settings):
            assert (writing.exists(), left.exists()) == (True, False)
        assert (store.run(run.id).state, store.run(run.id).lease_owner) == (RunState.RUNNING, "another machine")


def clock() -> datetime:
    return datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def test_the_work_of_a_dead_machine_goes_on_at_the_other(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = a_database(request)
    recipe = phantom.Recipe(11, shape=(24, 64, 64), spacing_mm=(8.0, 4.5, 4.5))
    study = phantom.write_study(phantom.make(recipe), tmp_path / "study")
    viewer = loopback.free_port()
    configs = {}
    for name in ("one", "other"):
        port = loopback.free_port()
        configs[port] = tmp_path / f"{name}.toml"
        configs[port].write_text(
            f"""
[node]
data_dir = "{tmp_path / "data"}"
store_url = "{url}"
[listener]
port = {port}
[assembly]
quiet_s = 1.0
[worker]
lease_s = 4.0
heartbeat_s = 1.0
[delivery]
to = ["viewer"]
[[destination]]
name = "viewer"
ae_title = "VIEWER"
host = "127.0.0.1"
port = {viewer}
"""
        )
    (first, config), (second, other) = configs.items()
    with (
        loopback.receiver(viewer, tmp_path / "results") as received,
        Store.open(StoreSettings(url)) as store,
        loopback.node(config, tmp_path / "one.log", first) as node,
    ):
        loopback.send(study.axial, first)
        until(lambda: store.runs_in(RunState.RUNNING))
        node.send_signal(signal.SIGKILL)
        node.wait()
        with loopback.node(other, tmp_path / "other.log", second):
            done = (Standing.DONE, Standing.FAILED)
            until(lambda: overview.glance(store, store.study(study.study_uid)).standing in done)
        (run,) = store.runs_of(study.study_uid)
        assert (run.state, run.attempt) == (RunState.PRODUCED, 2), run.error
        assert sorted(path.name.split("-")[0] for path in received).count("SEG") == len(
            [item for item in store.objects_of(run.id) if item.kind in ("SEG", "LESION_SEG")]
        )
        command = [sys.executable, "-m", "salsa_node", "studies", "--json", "--config", str(other)]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        assert [row["study_uid"] for row in json.loads(told.stdout)] == [study.study_uid]


def until(what: object) -> None:
    assert callable(what)
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
