"""A C-STORE sender that is never the bottleneck, and made images to send: PS3.8 written out, no DICOM library."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

CT = "1.2.840.10008.5.1.4.1.1.2"
VERIFICATION = "1.2.840.10008.1.1"
EXPLICIT = "1.2.840.10008.1.2.1"
_APPLICATION = "1.2.840.10008.3.1.1.1"


@dataclass(frozen=True, slots=True)
class Image:
    """A CT image of zeros and ones, as bytes of a data set in Explicit VR Little Endian."""

    uid: str
    content: bytes


def images(study: int, count: int, pixels: int = 512, *, first: int = 1, series: int = 1) -> Iterator[Image]:
    """`count` images of `pixels` by `pixels` of one series; the same arguments give the same bytes."""
    study_uid = f"2.25.{study}"
    series_uid = f"{study_uid}.{series}"
    for number in range(first, first + count):
        yield image(study_uid, series_uid, f"{series_uid}.{number}", number, pixels)


def image(study_uid: str, series_uid: str, uid: str, number: int, pixels: int, patient_id: str = "MADE") -> Image:
    """One image; its pixels depend on `number`."""
    ds = b"".join(
        (
            _short(0x0008, 0x0008, "CS", r"ORIGINAL\PRIMARY\AXIAL"),
            _short(0x0008, 0x0016, "UI", CT),
            _short(0x0008, 0x0018, "UI", uid),
            _short(0x0008, 0x0020, "DA", "20260101"),
            _short(0x0008, 0x0060, "CS", "CT"),
            _short(0x0010, 0x0010, "PN", "Made^Up"),
            _short(0x0010, 0x0020, "LO", patient_id),
            _short(0x0018, 0x0050, "DS", "1"),
            _short(0x0020, 0x000D, "UI", study_uid),
            _short(0x0020, 0x000E, "UI", series_uid),
            _short(0x0020, 0x0011, "IS", "1"),
            _short(0x0020, 0x0013, "IS", str(number)),
            _short(0x0020, 0x0032, "DS", rf"0\0\{number}"),
            _short(0x0020, 0x0037, "DS", r"1\0\0\0\1\0"),
            _short(0x0020, 0x0052, "UI", f"{study_uid}.0"),
            _us(0x0028, 0x0002, 1),
            _short(0x0028, 0x0004, "CS", "MONOCHROME2"),
            _us(0x0028, 0x0010, pixels),
            _us(0x0028, 0x0011, pixels),
            _short(0x0028, 0x0030, "DS", r"1\1"),
            _us(0x0028, 0x0100, 16),
            _us(0x0028, 0x0101, 16),
            _us(0x0028, 0x0102, 15),
            _us(0x0028, 0x0103, 1),
            _short(0x0028, 0x1052, "DS", "-1024"),
            _short(0x0028, 0x1053, "DS", "1"),
            struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OW", 0, 2 * pixels * pixels),
            struct.pack("<H", number % 4096) * (pixels * pixels),
        )
    )
    return Image(uid, ds)


def part10(made: Image) -> bytes:
    """The same as a file."""
    meta = (
        struct.pack("<HH2sHL", 2, 1, b"OB", 0, 2)
        + b"\0\1"
        + _short(2, 2, "UI", CT)
        + _short(2, 3, "UI", made.uid)
        + _short(2, 0x10, "UI", EXPLICIT)
        + _short(2, 0x12, "UI", "2.25.1")
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(meta)) + meta + made.content


class Refused(Exception):
    """The association was rejected, or ended by the peer."""


class Association:
    """An association as requestor; a context manager that releases."""

    def __init__(
        self, port: int, called: str = "SALSA_NODE", calling: str = "RAW", *, largest_pdu: int = 1 << 20,
        timeout_s: float = 60.0, classes: Sequence[str] = (CT, VERIFICATION), takes: int = 16384,
    ) -> None:  # fmt: skip
        """largest_pdu: sent, where the peer takes more; takes: the largest PDU that we say we take."""
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._message_id = 0
        self.connection.sendall(request(called, calling, classes, takes))
        kind, body = self.read_pdu()
        if kind != 2:
            self.connection.close()
            raise Refused(f"PDU type {kind} in answer to a request")
        at = body.find(b"\x51\0\0\4")
        their = int(struct.unpack_from(">L", body, at + 4)[0]) if at >= 0 else 0
        self.largest_pdu = min(their or largest_pdu, largest_pdu)

    def __enter__(self) -> Association:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.release()
        finally:
            self.connection.close()

    def store(self, made: Image, sop_class: str = CT) -> int:
        """Send, and wait for the status of the response."""
        self.connection_send(store_pdus(made, self._next_id(), self.largest_pdu, sop_class))
        return self.status()

    def echo(self) -> int:
        """C-ECHO, and the status of the response."""
        self.connection_send([p_data(3, 3, command(VERIFICATION, 0x0030, self._next_id(), None))])
        return self.status()

    def status(self) -> int:
        """The status of the next response."""
        return int(struct.unpack_from("<H", self.response(), _status_at(self.last))[0])

    def response(self) -> bytes:
        """The next PDU, which must be P-DATA."""
        kind, body = self.read_pdu()
        if kind != 4:
            raise Refused(f"PDU type {kind} in answer to a message")
        self.last = body
        return body

    def release(self) -> None:
        """Ask for release, and wait for it."""
        self.connection.sendall(struct.pack(">BBLL", 5, 0, 4, 0))
        kind, _ = self.read_pdu()
        if kind != 6:
            raise Refused(f"PDU type {kind} in answer to a release")

    def connection_send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all, few system calls."""
        for at in range(0, len(parts), 64):
            some = parts[at : at + 64]
            sent = self.connection.sendmsg(some)
            if sent < sum(map(len, some)):
                self.connection.sendall(b"".join(some)[sent:])

    def read_pdu(self) -> tuple[int, bytes]:
        """The type of the next PDU and what follows its length."""
        kind, length = struct.unpack(">BxL", self._read(6))
        return int(kind), self._read(length)

    def _read(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self.connection.recv(count - len(found))
            if not more:
                raise Refused("the peer closed the connection")
            found += more
        return found

    def _next_id(self) -> int:
        self._message_id = self._message_id % 65535 + 1
        return self._message_id


def request(called: str, calling: str, classes: Sequence[str], takes: int = 16384) -> bytes:
    """An A-ASSOCIATE-RQ; the contexts get the numbers 1, 3, 5 …"""
    items = _item(0x10, _APPLICATION.encode())
    for number, sop_class in enumerate(classes):
        context = struct.pack(">BBBB", 2 * number + 1, 0, 0, 0)
        items += _item(0x20, context + _item(0x30, sop_class.encode()) + _item(0x40, EXPLICIT.encode()))
    items += _item(0x50, _item(0x51, struct.pack(">L", takes)) + _item(0x52, b"2.25.1"))
    body = struct.pack(">HH", 1, 0) + called.encode().ljust(16) + calling.encode().ljust(16) + bytes(32) + items
    return struct.pack(">BBL", 1, 0, len(body)) + body


def store_pdus(made: Image, message_id: int, largest_pdu: int, sop_class: str = CT) -> list[bytes | memoryview]:
    """A C-STORE request as pieces of its P-DATA PDUs."""
    parts: list[bytes | memoryview] = [p_data(1, 3, command(sop_class, 0x0001, message_id, made.uid))]
    content = memoryview(made.content)
    step = largest_pdu - 6
    for at in range(0, len(content), step):
        piece = content[at : at + step]
        last = 2 if at + step >= len(content) else 0
        parts += [struct.pack(">BBLLBB", 4, 0, len(piece) + 6, len(piece) + 2, 1, last), piece]
    return parts


def p_data(context_id: int, control: int, fragment: bytes) -> bytes:
    """One P-DATA PDU with one fragment."""
    return struct.pack(">BBLLBB", 4, 0, len(fragment) + 6, len(fragment) + 2, context_id, control) + fragment


def command(sop_class: str, field: int, message_id: int, instance: str | None) -> bytes:
    """A command set; instance: of a C-STORE request, None for a command without data set."""
    body = _element(0x0002, _even(sop_class.encode())) + _element(0x0100, struct.pack("<H", field))
    body += _element(0x0110, struct.pack("<H", message_id))
    if instance is None:
        body += _element(0x0800, b"\1\1")
    else:
        body += _element(0x0700, b"\0\0") + _element(0x0800, b"\0\0") + _element(0x1000, _even(instance.encode()))
    return _element(0, struct.pack("<L", len(body))) + body


def _status_at(pdu: bytes) -> int:
    at = pdu.find(b"\0\0\0\x09\2\0\0\0")
    if at < 0:
        raise Refused("the answer has no status")
    return at + 8


def _even(value: bytes, padding: bytes = b"\0") -> bytes:
    return value + padding * (len(value) % 2)


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(value)) + value


def _element(element: int, value: bytes) -> bytes:
    return struct.pack("<HHL", 0, element, len(value)) + value


def _short(group: int, element: int, vr: str, text: str) -> bytes:
    value = _even(text.encode(), b"\0" if vr == "UI" else b" ")
    return struct.pack("<HH2sH", group, element, vr.encode(), len(value)) + value


def _us(group: int, element: int, value: int) -> bytes:
    return struct.pack("<HH2sHH", group, element, b"US", 2, value)
