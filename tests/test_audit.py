"""The audit trail: nothing can be changed, left out or put in unseen; and what a collector receives of it."""

from __future__ import annotations

import errno
import getpass
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from made_papers import Papers
from test_retention import arrive, finish

from salsa_node import audit_message
from salsa_node.audit import AUDITED, FILE, NOBODY_BEFORE, Chain, Entry, Trail, _digest
from salsa_node.config import Config
from salsa_node.errors import ConfigError, DeliveryError
from salsa_node.node_lock import only_node
from salsa_node.settings import AuditSettings, NodeSettings
from salsa_node.store import DeliveryState, RunState, Store, StoreSettings

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'salsa_node.sqlite'}"), create=True) as opened:
        yield opened


@pytest.fixture
def trail(store: Store, tmp_path: Path) -> Trail:
    """A trail that tells of a study that came, was sent, was looked at and was purged."""
    arrive(store, tmp_path, "1.2")
    finish(store, tmp_path, "1.2", "done")
    made = Trail(tmp_path)
    assert made.take(store, T0) == 4
    made.accessed("show", "1.2", T0)
    store.purge("1.2", "by hand", T0, lambda paths: None)
    assert made.take(store, T0) == 1
    return made


def test_who_did_what_to_which_study(trail):
    told = [(entry.number, entry.action, entry.who, entry.study_uid) for entry in trail.entries()]
    assert [line[1:3] for line in told[:4]] == [
        ("study.new", "CT1"), ("run.queued", "node"), ("delivery.pending", "pacs"), ("delivery.sent", "pacs"),
    ]  # fmt: skip
    assert told[4][1] == "access.show"
    assert told[5] == (6, "study.purged", "node", "1.2")
    assert {line[3] for line in told} == {"1.2"}


def test_what_was_written_down_is_not_written_down_again(trail, store, tmp_path):
    assert trail.take(store, T0) is None
    assert Trail(tmp_path).take(store, T0) is None  # nor by the next process
    store.add_event("node", "here", "node.tested", "not an access", T0)
    assert trail.take(store, T0) is None
    store.add_event("node", "here", "node.started", "port 1", T0)
    assert trail.take(store, T0) == 1


def test_a_whole_chain(trail):
    entries = list(trail.entries())
    assert entries[0].before == NOBODY_BEFORE
    assert trail.verify() == Chain(6, entries[-1].sha256, None)


def changed(line: str) -> str:
    return line.replace("1.2", "1.3", 1)


def forged(line: str) -> str:
    """Changed by who knows how a line's own digest is made."""
    entry = Entry(**json.loads(changed(line)))
    return json.dumps(asdict(entry) | {"sha256": _digest(entry)})


def linked(line: str, to: str) -> str:
    """Hung by hand onto another line before it, its own digest left as it was."""
    return json.dumps(json.loads(line) | {"before": json.loads(to)["sha256"]})


@pytest.mark.parametrize(
    ("spoil", "told", "good"),
    [
        (
            lambda lines: [*lines[:2], forged(lines[2]), linked(lines[3], forged(lines[2])), *lines[4:]],
            "line 4 has been changed",
            3,
        ),
        (lambda lines: [*lines[:2], forged(lines[2]), *lines[3:]], "before line 4", 3),
        (lambda lines: [*lines[:2], changed(lines[2]), *lines[3:]], "line 3 has been changed", 2),
        (lambda lines: [*lines[:2], *lines[3:]], "before line 3", 2),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], "before line 4", 3),
        (lambda lines: lines[1:], "before line 1", 0),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "before line 1", 0),
        (lambda lines: [*lines[:5], "nothing"], "line 6 cannot be read", 5),
    ],
)
def test_a_broken_chain(trail, tmp_path, spoil, told, good):
    file = tmp_path / FILE
    file.write_text("\n".join(spoil(file.read_text().splitlines())) + "\n")
    chain = trail.verify()
    assert told in (chain.broken or "")
    assert chain.lines == good


def test_half_a_line_that_a_power_cut_left_is_cut_off(trail, store, tmp_path):
    with (tmp_path / FILE).open("a") as file:
        file.write('{"number": 7, "at"')
    trail.accessed("show", "1.2", T0)
    chain = trail.verify()
    assert (chain.lines, chain.broken) == (7, None)


@pytest.mark.parametrize("garbage", [b"hello\n", b"\xff\xfe\x00\n", b"[1]\n", b'{"number": 7}\n'])
def test_a_spoiled_last_line_is_named_and_the_trail_goes_on(trail, store, tmp_path, garbage):
    with (tmp_path / FILE).open("ab") as file:
        file.write(garbage)
    assert Trail(tmp_path).take(store, T0) is None
    trail.accessed("show", "1.2", T0)
    chain = trail.verify()
    assert (chain.lines, chain.broken) == (6, "line 7 cannot be read")
    assert [entry.number for entry in trail.entries()] == [1, 2, 3, 4, 5, 6, 7]


def _look(folder: Path, times: int) -> None:
    for _ in range(times):
        Trail(folder).accessed("show", "1.2", T0)


def test_processes_take_turns(tmp_path):
    context = multiprocessing.get_context("spawn")
    looking = [context.Process(target=_look, args=(tmp_path, 20)) for _ in range(2)]
    for process in looking:
        process.start()
    for process in looking:
        process.join(60)
    chain = Trail(tmp_path).verify()
    assert (chain.lines, chain.broken) == (40, None)


def test_a_trail_that_cannot_be_written_stops_the_access(tmp_path):
    (tmp_path / "audit").write_text("a file where the folder belongs")
    with pytest.raises(ConfigError, match="cannot be written"):
        Trail(tmp_path).accessed("show", "1.2", T0)


def test_a_full_disk_takes_no_part_of_what_is_written_together(store, tmp_path, monkeypatch):
    arrive(store, tmp_path, "1.2")
    finish(store, tmp_path, "1.2", "done")
    write, calls = os.write, []

    def full(file: int, content: bytes) -> int:
        calls.append(len(content))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, bytes(content)[:-300])

    trail = Trail(tmp_path)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ConfigError, match="No space left"):
        trail.take(store, T0)
    assert trail.entries() == ()
    monkeypatch.undo()
    assert trail.take(store, T0) == 4
    assert trail.verify(store, T0) == Chain(4, trail.entries()[-1].sha256, None)


def test_nodes_that_share_a_data_folder_write_each_event_down_once(trail, store, tmp_path):
    other = Trail(tmp_path)
    assert other.take(store, T0) is None
    store.add_event("node", "here", "node.started", "port 1", T0)
    assert trail.take(store, T0) == 1
    assert other.take(store, T0) is None
    store.add_event("node", "there", "node.started", "port 2", T0)
    assert other.take(store, T0) == 1
    assert trail.take(store, T0) is None
    assert trail.verify().lines == 8


def test_lines_that_are_cut_off_at_the_end_are_missed(trail, store, tmp_path):
    later = T0 + timedelta(minutes=2)
    assert trail.verify(store, later) == trail.verify()
    file = tmp_path / FILE
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    assert trail.verify().broken is None, "the chain alone does not tell"
    assert trail.verify(store, later).untold == 2
    assert trail.take(store, T0) == 3, "the node that runs tells it, and all again"
    assert [entry.action for entry in trail.entries()][3:] == ["delivery.sent", "study.purged", "audit.cut"]
    assert trail.verify(store, later).untold == 0


def test_an_event_may_take_a_minute_to_its_line(trail, store):
    store.add_event("node", "here", "node.started", "port 1", T0)
    assert trail.verify(store, T0 + timedelta(seconds=59)).untold == 0
    assert trail.verify(store, T0 + timedelta(seconds=61)).untold == 1


def test_a_line_may_be_longer_than_what_is_read_at_once(trail, tmp_path):
    for length in (1 << 15, 1 << 16, 1 << 18):
        trail.accessed("show", "1.2", T0, "x" * length)
        trail.accessed("show", "1.2", T0)
    chain = Trail(tmp_path).verify()
    assert (chain.lines, chain.broken) == (12, None)


def an_entry(action: str, who: str = "CT1") -> Entry:
    return Entry(1, T0.isoformat(), action, who, "1.2.3", "detail <&>", 5, NOBODY_BEFORE, "")


@pytest.mark.parametrize(
    ("action", "code", "done", "outcome"),
    [
        ("study.new", "110104", "C", "0"),
        ("delivery.sent", "110104", "R", "0"),
        ("delivery.gave_up", "110104", "R", "4"),
        ("access.show", "110103", "R", "0"),
        ("access.export", "110106", "R", "0"),
        ("command.purge", "110103", "U", "0"),
        ("study.purged", "110105", "D", "0"),
        ("node.started", "110100", "E", "0"),
        ("instance.quarantined", "110113", "E", "4"),
        ("node.association_rejected", "110113", "E", "4"),
    ],
)
def test_a_line_as_a_dicom_audit_message(action, code, done, outcome):
    root = ET.fromstring(audit_message.message(an_entry(action), "NODE"))
    assert [child.tag for child in root] == [
        "EventIdentification", "ActiveParticipant", "ActiveParticipant", "AuditSourceIdentification",
        "ParticipantObjectIdentification",
    ]  # fmt: skip
    event = root[0]
    assert (event.get("EventActionCode"), event.get("EventOutcomeIndicator")) == (done, outcome)
    assert event[0].get("csd-code") == code
    assert event[0].get("codeSystemName") == "DCM"
    assert (event.find("EventTypeCode") is not None) == (action == "node.started")
    assert root[4].get("ParticipantObjectID") == "1.2.3"
    assert root[4][0].get("csd-code") == "110180"


def test_a_collector_over_udp(trail, tmp_path):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(10)
        settings = AuditSettings(syslog=f"udp://127.0.0.1:{sock.getsockname()[1]}")
        collector = audit_message.Collector(settings, tmp_path)
        assert collector.step(trail) == 6
        lines = [sock.recv(65536) for _ in range(6)]
        assert collector.step(trail) is None
        trail.accessed("show", "1.2", T0)
        assert audit_message.Collector(settings, tmp_path).step(trail) == 7  # the next process goes on
        lines.append(sock.recv(65536))
    head, _, body = lines[0].partition(b"\xef\xbb\xbf")
    assert head.startswith(b"<85>1 2026-11-01T12:00:00+00:00 ")
    assert head.endswith(b" DICOM+RFC3881 - ")
    assert [ET.fromstring(line.partition(b"\xef\xbb\xbf")[2])[0][0].get("csd-code") for line in lines] == [
        "110104", "110103", "110104", "110104", "110103", "110105", "110103",
    ]  # fmt: skip
    assert b"1.2" in body


def test_a_collector_over_tcp_counts_octets(trail, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = AuditSettings(syslog=f"tcp://127.0.0.1:{server.getsockname()[1]}")
        assert audit_message.Collector(settings, tmp_path).step(trail) == 6
        server.settimeout(10)
        peer, _ = server.accept()
        with peer, peer.makefile("rb") as stream:
            content = stream.read()
    count = 0
    while content:
        length, _, rest = content.partition(b" ")
        ET.fromstring(rest[: int(length)].partition(b"\xef\xbb\xbf")[2])
        content, count = rest[int(length) :], count + 1
    assert count == 6


@pytest.mark.parametrize("shown", ["server", "expired"])
def test_a_collector_over_tls_must_show_a_good_certificate(trail, tmp_path, shown):
    papers = Papers(tmp_path)
    taken: list[bytes] = []

    def collect(server: socket.socket) -> None:
        peer, _ = server.accept()
        with suppress(OSError), peer, papers.server(shown).wrap_socket(peer, server_side=True) as secure:
            time.sleep(0.3)  # a busy collector: all has been sent before it reads
            while more := secure.recv(65536):
                taken.append(more)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=collect, args=(server,))
        thread.start()
        url = f"tls://127.0.0.1:{server.getsockname()[1]}"
        collector = audit_message.Collector(AuditSettings(syslog=url, authorities=str(papers.authority)), tmp_path)
        if shown == "server":
            assert collector.step(trail) == 6
        else:
            with pytest.raises(DeliveryError, match="certificate has expired"):
                collector.step(trail)
        thread.join(20)
    assert b"".join(taken).count(b"<AuditMessage>") == (6 if shown == "server" else 0)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("left", [3, 4, 5])
def test_what_stands_in_the_place_of_lines_that_were_cut_off_is_sent_too(trail, store, tmp_path, left, restarted):
    """Nobody hides from the collector what he cut off: it hears of the cut, whatever number that line has now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        settings = AuditSettings(syslog=f"udp://127.0.0.1:{sock.getsockname()[1]}")
        collector = audit_message.Collector(settings, tmp_path)
        assert collector.step(trail) == 6
        file = tmp_path / FILE
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:left]))
        trail.take(store, T0)
        if restarted:
            collector = audit_message.Collector(settings, tmp_path)
        for _ in range(2):
            assert collector.step(trail) == len(trail.entries())
            assert collector.step(trail) is None
            trail.accessed("show", "1.2", T0)
        sock.setblocking(False)
        heard = []
        with suppress(BlockingIOError):
            while True:
                heard.append(sock.recv(65536))
    *told, _ = [audit_message.message(entry, "SALSA_NODE").encode() for entry in trail.entries()]
    assert [line for line in told if not any(line in one for one in heard)] == []
    assert b"audit.cut: " in b"".join(told)
    assert heard[-1].endswith(told[-1])
    assert len(heard) == (8 if left == 5 else 13)  # the sixth of the first time was written again as it was


def test_a_collector_that_is_down_gets_all_of_it_later(trail, tmp_path, free_port):
    settings = AuditSettings(syslog=f"tcp://127.0.0.1:{free_port}")
    collector = audit_message.Collector(settings, tmp_path)
    for _ in range(2):
        with pytest.raises(DeliveryError, match="cannot be reached"):
            collector.step(trail)
    with socket.create_server(("127.0.0.1", free_port)):
        assert collector.step(trail) == 6


def test_through_the_real_process(trail, tmp_path):
    config = tmp_path / "site.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path}"\n')

    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salsa_node", *words, "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert cli("show", "1.2").returncode == 0
    told = cli("audit", "show", "--json", "--study", "1.2", "--limit", "2")
    assert [json.loads(line)["action"] for line in told.stdout.splitlines()] == ["study.purged", "access.show"]
    assert "7 lines hang together" in cli("audit", "verify").stdout
    whole = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text("".join(whole.splitlines(keepends=True)[:3]))
    told = cli("audit", "verify")
    assert (told.returncode, "2 events of the record are missing at its end" in told.stdout) == (0, True)
    with only_node(replace(Config(), node=NodeSettings(data_dir=tmp_path))):
        assert cli("audit", "verify").returncode == 1, "a running node would have written them down"
    (tmp_path / FILE).write_text(whole)
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text().replace("CT1", "CT2"))
    told = cli("audit", "verify")
    assert (told.returncode, told.stdout) == (1, "broken after 0 lines: line 1 has been changed\n")


def test_only_events_that_somebody_writes_are_waited_for():
    package = Path(audit_message.__file__).parent
    source = "".join(path.read_text() for path in package.glob("*.py") if path.name != "audit.py")
    changes = {f"{kind}.{state.value.lower()}" for kind, states in (("run", RunState), ("delivery", DeliveryState))
               for state in states}  # fmt: skip
    changes.add("audit.cut")  # the trail's own: test_lines_that_are_cut_off_at_the_end_are_missed
    missing = [name for name in AUDITED if f'"{name}"' not in source and name not in changes]
    assert not missing


def test_who_had_something_done_and_the_trail_of_one_study(store, tmp_path):
    """By the commands; a study is named there as everywhere."""
    config = tmp_path / "site.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path}"\n')
    for uid in ("1.2.77", "1.3"):
        arrive(store, tmp_path, uid)
        finish(store, tmp_path, uid, "done")

    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salsa_node", *words, "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    done = (["hold", "1.3"], ["release", "1.2.7"], ["resend", "1.2.77"], ["cancel", "1.2.77", "--yes"],
            ["retry", "1.2.77"], ["pause"], ["resume"], ["purge", "1.3", "--yes"])  # fmt: skip
    for words in done:
        assert cli(*words).returncode in (0, 1)
    told = [(entry.action, entry.who, entry.study_uid) for entry in Trail(tmp_path).entries()]
    studies = ["1.3", "1.2.77", "1.2.77", "1.2.77", "1.2.77", None, None, "1.3"]
    user = getpass.getuser()
    assert told == [(f"command.{words[0]}", user, uid) for words, uid in zip(done, studies, strict=True)]
    of_one = [json.loads(line) for line in cli("audit", "show", "--study", "1.3", "--json").stdout.splitlines()]
    assert [line["action"] for line in of_one] == ["command.hold", "command.purge"]
    assert cli("audit", "show", "--study", "1.2.7", "--json").stdout.count("\n") == 4, "a beginning of its UID"
    assert cli("audit", "show", "--study", "nobody").returncode == 4
