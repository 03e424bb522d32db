"""What the quick way in does is what pynetdicom does, byte for byte; and it keeps its limits."""

from __future__ import annotations

import gc
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import raw_scu
from pynetdicom.association import Association as PynetdicomAssociation
from raw_scu import Association, Image, p_data
from told import events

from salsa_node import fast_receive
from salsa_node.instance_header import (
    CANNOT_UNDERSTAND,
    CONTENT_CONFLICT,
    DOES_NOT_MATCH,
    PATIENT_CONFLICT,
    SOP_CLASS_NOT_SUPPORTED,
    SUCCESS,
)
from salsa_node.listener import Listener
from salsa_node.settings import ListenerSettings
from salsa_node.store import Instance, Store, StoreSettings

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
MR, REPORT = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.88.33"


@contextmanager
def door(folder: Path, **settings: object) -> Iterator[tuple[Listener, Store]]:
    folder.mkdir()
    wanted = replace(ListenerSettings(port=0, min_free_gib=0.0), **settings)  # type: ignore[arg-type]
    with (
        Store.open(StoreSettings(f"sqlite:///{folder / 'record.sqlite'}"), create=True) as store,
        Listener(wanted, store, folder / "data", clock=lambda: T0) as listener,
    ):
        yield listener, store


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    with door(tmp_path / "one") as (listener, _):
        yield listener.port


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The instances that came the quick way."""
    found: list[str] = []
    finish = fast_receive.Connection._finish

    def noted(self: fast_receive.Connection) -> None:
        assert self._incoming is not None
        found.append(self._incoming.request.sop_instance_uid)
        finish(self)

    monkeypatch.setattr(fast_receive.Connection, "_finish", noted)
    return found


def some(count: int = 3, pixels: int = 16) -> list[Image]:
    return list(raw_scu.images(7, count, pixels))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.dcm")}


# ---- the same as the plain way ------------------------------------------------------------------


def dialogue() -> list[list[bytes]]:
    """Messages, each as the pieces that are sent before its response is awaited."""
    first, second, third = some()
    odd = Image(second.uid, second.content[:150])
    other = Image(first.uid, first.content[:-1] + b"\7")
    stranger = raw_scu.image("2.25.7", "2.25.7.1", "2.25.7.1.9", 9, 16, patient_id="OTHER")
    elsewhere = Image("2.25.7.1.77", third.content)

    def store(image: Image, number: int, largest: int = 1 << 14, sop_class: str = raw_scu.CT) -> list[bytes]:
        return [bytes(part) for part in raw_scu.store_pdus(image, number, largest, sop_class)]

    def in_fragments(image: Image, number: int) -> list[bytes]:
        command = raw_scu.command(raw_scu.CT, 1, number, image.uid)
        parts = [p_data(1, 1, command[:20]), p_data(1, 3, command[20:])]
        return [*parts, p_data(1, 0, image.content[:100]), p_data(1, 2, image.content[100:])]

    def in_one_pdu(image: Image, number: int) -> list[bytes]:
        command, half = raw_scu.command(raw_scu.CT, 1, number, image.uid), len(image.content) // 2
        fragments = [(3, command), (0, image.content[:half]), (2, image.content[half:])]
        body = b"".join(struct.pack(">LBB", len(text) + 2, 1, control) + text for control, text in fragments)
        return [struct.pack(">BBL", 4, 0, len(body)) + body]

    echo = p_data(3, 3, raw_scu.command(raw_scu.VERIFICATION, 0x0030, 5, None))
    return [
        store(first, 1), store(first, 2), store(odd, 3), [echo], store(second, 4, 128), store(other, 6),
        store(stranger, 7), store(elsewhere, 8), in_fragments(third, 9), in_one_pdu(third, 10),
        store(second, 12, sop_class=MR), [echo],
    ]  # fmt: skip


def spoken(folder: Path, *, fast: bool) -> tuple[list[bytes], dict[str, bytes], tuple[Instance, ...], list[str]]:
    with door(folder, fast=fast) as (listener, store):
        answers = []
        with Association(listener.port, timeout_s=20) as assoc:
            for message in dialogue():
                assoc.connection_send(message)
                answers.append(assoc.response())
        told = [f"{event.name} {event.detail}" for event in events(store)]
        return answers, files(folder / "data"), store.instances_of("2.25.7"), told


def test_files_rows_events_and_responses_are_those_of_the_plain_way(tmp_path: Path, taken: list[str]) -> None:
    quick = spoken(tmp_path / "fast", fast=True)
    assert len(taken) == 8
    plain = spoken(tmp_path / "plain", fast=False)
    assert len(taken) == 8, "the plain way must not be this one"
    for one, other in zip(quick, plain, strict=True):
        assert one == other
    statuses = [struct.unpack_from("<H", answer, raw_scu._status_at(answer))[0] for answer in quick[0]]
    assert statuses == [
        SUCCESS, SUCCESS, CANNOT_UNDERSTAND, SUCCESS, SUCCESS, CONTENT_CONFLICT, PATIENT_CONFLICT, DOES_NOT_MATCH,
        SUCCESS, SUCCESS, SOP_CLASS_NOT_SUPPORTED, SUCCESS,
    ]  # fmt: skip
    assert len(quick[2]) == 3


@pytest.mark.parametrize("largest", [64, 4096, 1 << 17])
def test_pdus_of_every_size_make_the_same_file(tmp_path: Path, taken: list[str], largest: int) -> None:
    (image,) = some(1, pixels=300)
    with door(tmp_path / "one") as (listener, store):
        with Association(listener.port, largest_pdu=largest) as assoc:
            assert assoc.store(image) == SUCCESS
        (row,) = store.instances_of("2.25.7")
        assert (tmp_path / "one" / "data" / row.path).read_bytes().endswith(image.content)
    assert taken == [image.uid]


def test_an_instance_larger_than_the_buffer_makes_the_same_file(
    tmp_path: Path, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_receive, "_BUFFER_BYTES", 1)
    made = some(2, pixels=400)
    with door(tmp_path / "one", max_pdu_bytes=70_000) as (listener, store):
        for largest in (70_000, 9_000):
            with Association(listener.port, largest_pdu=largest) as assoc:
                assert assoc.store(made[largest == 9_000]) == SUCCESS
        rows = store.instances_of("2.25.7")
        for row, image in zip(rows, made, strict=True):
            assert (tmp_path / "one" / "data" / row.path).read_bytes().endswith(image.content)
    assert taken == [image.uid for image in made]


def test_a_connection_that_ended_holds_no_buffer(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[bool, bool]] = []
    close = fast_receive.Connection.close

    def noted(self: fast_receive.Connection) -> None:
        had = "_buffer" in vars(self)
        close(self)
        ended.append((had, "_buffer" in vars(self)))

    monkeypatch.setattr(fast_receive.Connection, "close", noted)
    with Association(port) as assoc:
        assert assoc.store(some(1)[0]) == SUCCESS
    until = time.monotonic() + 20
    while not ended and time.monotonic() < until:
        time.sleep(0.01)
    assert ended[0] == (True, False)


def test_a_peer_that_waits_for_no_answer_is_answered_in_turn(tmp_path: Path, taken: list[str]) -> None:
    first, second = some(2)
    echo = p_data(3, 3, raw_scu.command(raw_scu.VERIFICATION, 0x0030, 2, None))
    with door(tmp_path / "one") as (listener, store):
        assoc = Association(listener.port, timeout_s=20)
        pdus = [*raw_scu.store_pdus(first, 1, 4096), echo, *raw_scu.store_pdus(second, 3, 4096)]
        assoc.connection.sendall(b"".join(pdus) + struct.pack(">BBLL", 5, 0, 4, 0))
        assert [assoc.status() for _ in range(3)] == [SUCCESS] * 3
        assert assoc.read_pdu()[0] == 6, "release"
        assoc.connection.close()
        assert len(store.instances_of("2.25.7")) == 2
    assert taken == [first.uid, second.uid]


def test_bytes_that_come_one_by_one_make_the_same_file(port: int, taken: list[str]) -> None:
    (image,) = some(1, pixels=4)
    with Association(port) as assoc:
        for byte in b"".join(raw_scu.store_pdus(image, 1, 256)):
            assoc.connection.sendall(bytes([byte]))
        assert assoc.status() == SUCCESS
    assert taken == [image.uid]


def test_a_peer_that_takes_only_the_smallest_pdus_is_left_to_pynetdicom(port: int, taken: list[str]) -> None:
    with Association(port, takes=100) as assoc:
        assoc.connection_send(raw_scu.store_pdus(some()[0], 1, 1 << 14))
        control = 0
        while not control & 2:
            kind, body = assoc.read_pdu()
            assert (kind, len(body) <= 100) == (4, True)
            control = body[5]
    assert taken == []


# ---- limits -------------------------------------------------------------------------------------


def ended(connection: socket.socket, seconds: float = 20) -> bool:
    """Whether the peer ends the connection, with or without an abort."""
    connection.settimeout(seconds)
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        return True
    return True


def nothing_left(folder: Path) -> bool:
    """Whether no unfinished file is left, at once or soon."""
    for _ in range(100):
        if not list(folder.rglob("*.part")):
            return True
        threading.Event().wait(0.05)
    return False


HALF = [bytes(part) for part in raw_scu.store_pdus(some(1)[0], 1, 256)][:5]


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([struct.pack(">BBL", 4, 0, 1 << 20)], id="a PDU beyond the limit"),
        pytest.param([*HALF, struct.pack(">BBL", 4, 0, 1 << 20)], id="such a PDU within an instance"),
        pytest.param([struct.pack(">BBL", 9, 0, 4) + bytes(4)], id="a PDU of no known type"),
        pytest.param([p_data(1, 2, b"data")], id="data without a command"),
        pytest.param([*HALF, p_data(3, 0, b"data")], id="data of another context"),
        pytest.param([*HALF, p_data(1, 3, raw_scu.command(raw_scu.CT, 1, 2, "1.2"))], id="a command within data"),
        pytest.param([struct.pack(">BBLLBB", 4, 0, 6, 9999, 1, 3)], id="a fragment longer than its PDU"),
        pytest.param([struct.pack(">BBLL", 4, 0, 4, 0)], id="a fragment without its header"),
        pytest.param([*HALF, struct.pack(">BBLHBB", 7, 0, 4, 0, 0, 0)], id="an abort within an instance"),
    ],
)
def test_who_breaks_the_rules_is_cut_off_and_leaves_nothing(tmp_path: Path, bad: Sequence[bytes]) -> None:
    with door(tmp_path / "one", max_pdu_bytes=1 << 14) as (listener, store):
        assoc = Association(listener.port)
        assoc.connection_send(bad)
        assert ended(assoc.connection)
        assoc.connection.close()
        assert nothing_left(tmp_path)
        assert store.studies() == ()
        with Association(listener.port) as after:
            assert after.echo() == SUCCESS
            assert after.store(some(1)[0]) == SUCCESS


def test_a_request_for_an_association_has_a_limit_too(port: int) -> None:
    for fast in (b"\x01\0\xff\xff\xff\xff", b"\x01\0\x00\x20\0\0"):
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(fast + bytes(100))
            assert ended(raw)


def test_a_peer_that_falls_silent_within_an_instance_is_let_go(tmp_path: Path) -> None:
    with door(tmp_path / "one", idle_timeout_s=0.5) as (listener, _):
        assoc = Association(listener.port)
        assoc.connection_send(HALF[:-1])
        assert ended(assoc.connection)
        assoc.connection.close()
        assert nothing_left(tmp_path)


def test_a_peer_that_drips_is_let_go(tmp_path: Path) -> None:
    with door(tmp_path / "one", idle_timeout_s=0.5) as (listener, _):
        assoc = Association(listener.port)
        assoc.connection_send(HALF[:2])
        drops, is_over = iter(struct.pack(">BBL", 4, 0, 10_000) + bytes(10_000)), threading.Event()

        def drip() -> None:
            while not is_over.wait(0.05):
                with suppress(OSError):
                    assoc.connection.sendall(bytes([next(drops)]))

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            assert ended(assoc.connection)
        finally:
            is_over.set()
            dripping.join()
            assoc.connection.close()
        assert nothing_left(tmp_path)


def test_an_idle_association_is_ended(tmp_path: Path) -> None:
    with door(tmp_path / "one", idle_timeout_s=0.5) as (listener, _):
        assoc = Association(listener.port)
        assert assoc.store(some(1)[0]) == SUCCESS
        assert ended(assoc.connection)
        assoc.connection.close()


def test_a_door_closes_in_the_middle_of_an_instance(tmp_path: Path) -> None:
    with door(tmp_path / "one") as (listener, store):
        assoc = Association(listener.port)
        assert assoc.store(some(2)[1]) == SUCCESS
        assoc.connection_send(HALF)
        began = time.monotonic()
        listener.stop()
        assert time.monotonic() - began < 30, "it waits for no sender"
        assert ended(assoc.connection)
        assoc.connection.close()
        assert nothing_left(tmp_path)
        assert len(store.instances_of("2.25.7")) == 1
    assert not [thread for thread in threading.enumerate() if "Acceptor" in thread.name]


def test_what_comes_at_the_wrong_moment_ends_its_connection_and_no_thread(tmp_path: Path) -> None:
    """pytest fails on a thread that dies of an exception."""
    echo = p_data(3, 3, raw_scu.command(raw_scu.VERIFICATION, 0x0030, 2, None))
    asked = raw_scu.request("SALSA_NODE", "RAW", (raw_scu.CT, raw_scu.VERIFICATION))
    for fast in (True, False):
        with door(tmp_path / str(fast), fast=fast) as (listener, _):
            for noise in (asked + echo, asked + asked, asked + struct.pack(">BBLL", 5, 0, 4, 0), asked + bytes(20)):
                with socket.create_connection(("127.0.0.1", listener.port)) as raw:
                    raw.sendall(noise)
                    assert ended(raw)
            with Association(listener.port) as after:
                assert after.echo() == SUCCESS


def test_connections_that_go_wrong_leave_nothing_in_memory(tmp_path: Path) -> None:
    asked = raw_scu.request("SALSA_NODE", "RAW", (raw_scu.CT,))
    with door(tmp_path / "one") as (listener, _):
        for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", asked[:40], asked + asked, asked + bytes(9)) * 4:
            with socket.create_connection(("127.0.0.1", listener.port)) as raw:
                raw.sendall(noise)
                raw.shutdown(socket.SHUT_WR)
                assert ended(raw)
        for thread in threading.enumerate():
            if isinstance(thread, PynetdicomAssociation):
                thread.join(20)
        gc.collect()
        left = [each for each in gc.get_objects() if type(each) is fast_receive.Connection]  # isinstance wakes torch's
        assert len(left) <= 2, "what is still in some frame"
