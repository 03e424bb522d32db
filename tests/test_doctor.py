"""The doctor names each illness and what to do about it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from postgres import a_database
from pynetdicom import AE
from test_retention import arrive, finish

from salsa_node import doctor
from salsa_node.config import Config
from salsa_node.node_lock import only_node
from salsa_node.preflight import Check
from salsa_node.settings import (
    AuditSettings,
    Destination,
    ListenerSettings,
    NodeSettings,
    NotifySettings,
    PipelineChoice,
    QuerySettings,
    WebSettings,
)
from salsa_node.store import Store, StoreSettings

NOW = datetime.now(UTC)


@pytest.fixture
def config(tmp_path: Path, free_port: int) -> Config:
    return Config(
        node=NodeSettings(data_dir=tmp_path),
        listener=ListenerSettings(port=free_port, min_free_gib=0.0),
        pipeline=PipelineChoice("demo", device="cpu"),
    )


@pytest.fixture
def store(config: Config) -> Iterator[Store]:
    with Store.open(StoreSettings(config.store_url), create=True) as opened:
        yield opened


def found(config: Config, name: str, now: datetime = NOW) -> Check:
    (one,) = [check for check in doctor.examine(config, now) if check.name == name]
    return one


def test_a_sound_node_has_no_fault(config, store):
    assert [check for check in doctor.examine(config, NOW) if not check.ok] == []


def test_a_port_that_somebody_else_has(config):
    with socket.create_server(("127.0.0.1", config.listener.port)):
        check = found(config, "listener.port")
        assert (check.ok, "another program" in check.detail) == (False, True)
        with only_node(config):
            assert found(config, "listener.port").ok
    with only_node(config):
        check = found(config, "listener.port")
        assert (check.ok, "restart the node" in check.detail) == (False, True)
    check = found(config, "listener.port")
    assert (check.ok, check.warns) == (True, True)


def test_a_disk_that_is_full_or_nearly_so(config):
    full = replace(config, listener=replace(config.listener, min_free_gib=1e8))
    check = found(full, "disk")
    assert (check.ok, "salsa-node purge" in check.detail) == (False, True)
    none = doctor._disk(config, lambda _: 2**20)
    assert (none.ok, "make room outside" in none.detail) == (False, True), "though no least is asked for"
    near = doctor._disk(replace(config, listener=replace(config.listener, min_free_gib=1.0)), lambda _: 2 * 2**30)
    assert (near.ok, near.warns) == (True, True)


def test_a_damaged_record(config, store, tmp_path):
    store.close()
    file = tmp_path / "salsa_node.sqlite"
    for beside in ("-wal", "-shm"):
        file.with_name(file.name + beside).unlink(missing_ok=True)
    content = bytearray(file.read_bytes())
    content[-4096:] = b"\xff" * 4096
    file.write_bytes(content)
    check = found(config, "record")
    assert (check.ok, "salsa-node restore" in check.detail) == (False, True)


def test_studies_that_wait_for_a_person(config, store, tmp_path):
    arrive(store, tmp_path, "1.2")
    finish(store, tmp_path, "1.2", "failed")
    arrive(store, tmp_path, "1.3", NOW - timedelta(hours=5))
    store.queue_run("1.3", "demo", "d", NOW - timedelta(hours=5))
    check = found(config, "failed")
    assert (check.warns, "salsa-node studies --state failed" in check.detail) == (True, True)
    check = found(config, "queue")
    assert "waits for 5 h: start the node" in check.detail


def test_a_record_in_postgresql_is_looked_at_too(config, request, tmp_path):
    url = a_database(request)
    shared = replace(config, node=replace(config.node, store_url=url))
    with Store.open(StoreSettings(url), create=True) as store:
        arrive(store, tmp_path, "1.2")
        finish(store, tmp_path, "1.2", "failed")
    assert "the database answers" in found(shared, "record").detail
    assert found(shared, "failed").warns


def test_a_clock_that_went_back(config, store):
    store.add_event("node", "here", "node.tested", "", NOW)
    assert found(config, "clock against the record").ok
    check = found(config, "clock against the record", NOW - timedelta(days=1))
    assert (check.ok, "went back" in check.detail) == (False, True)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pynetdicom drops a refused connection's socket
def test_peers_that_answer_and_that_do_not(config, free_port):
    ae = AE("PACS")
    ae.add_supported_context("1.2.840.10008.1.1")
    server = ae.start_server(("127.0.0.1", 0), block=False)
    assert server is not None
    try:
        port = server.socket.getsockname()[1]
        peers = (
            Destination("up", "PACS", "127.0.0.1", port),
            Destination("down", "X", "127.0.0.1", free_port),
            Destination("folder", folder=str(config.node.data_dir)),
            Destination("gone", folder=str(config.node.data_dir / "gone")),
        )
        asked = replace(config, destination=peers, query=QuerySettings("PACS", "127.0.0.1", port))
        assert found(asked, "destination up").ok
        assert found(asked, "query").ok
        assert found(asked, "destination folder").ok
        assert not found(asked, "destination gone").ok
        check = found(asked, "destination down")
        assert (check.ok, "is it up" in check.detail) == (False, True)
    finally:
        server.shutdown()


def test_the_port_of_the_figures(config, free_port):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check = found(replace(config, web=WebSettings(port=port)), "web.port")
        assert (check.ok, "taken by another program" in check.detail) == (False, True)
    assert found(replace(config, web=WebSettings(port=port)), "web.port").ok


def test_who_is_told_of_faults_and_accesses(config, free_port):
    def settings(port: int, by: str = "tcp") -> Config:
        notify = NotifySettings(webhook=f"http://127.0.0.1:{port}/x", email_to=("it@example.org",), smtp_port=port)
        return replace(config, notify=notify, audit=AuditSettings(syslog=f"{by}://127.0.0.1:{port}"))

    names = ("notify.webhook", "notify.smtp_host", "audit.syslog")
    with socket.create_server(("127.0.0.1", 0)) as server:
        up = settings(server.getsockname()[1])
        assert [found(up, name).ok for name in names] == [True] * 3
    for name in names:
        check = found(up, name)
        assert (check.ok, "does not answer" in check.detail) == (False, True)
    assert not found(settings(up.notify.smtp_port, "tls"), "audit.syslog").ok
    assert not {check.name for check in doctor.examine(config, NOW)} & set(names), "none is configured"


def test_a_record_of_several_machines_that_is_down(config, free_port):
    url = f"postgresql://nobody@127.0.0.1:{free_port}/salsa"
    check = found(replace(config, node=replace(config.node, store_url=url)), "record")
    assert (check.ok, "is not there yet" in check.detail) == (False, False), check.detail


def test_what_to_do_fits_the_kind_of_destination(config, tmp_path):
    away = replace(config, destination=(Destination("share", folder=str(tmp_path / "absent")),))
    assert "AE title" not in found(away, "destination share").detail


def test_through_the_real_process(config, store, tmp_path):
    file = tmp_path / "site.toml"
    file.write_text(
        f'[node]\ndata_dir = "{tmp_path}"\n[listener]\nport = {config.listener.port}\n[pipeline]\nname = "demo"\n'
    )
    command = [sys.executable, "-m", "salsa_node", "doctor", "--config", str(file)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout
    assert "ok    record: " in told.stdout
    file.write_text(file.read_text() + "[delivery]\nto = ['x']\n" + "[[destination]]\nname = 'x'\nae_title = 'X'\n"
                    "host = '127.0.0.1'\nport = 1\n")  # fmt: skip
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert [check["check"] for check in json.loads(told.stdout) if not check["ok"]] == ["destination x"]
