"""A line of the audit trail as a DICOM audit message (PS3.15 A.5), sent to a syslog collector (RFC 5424).

Over UDP one datagram a message (RFC 5426), over TCP (RFC 6587) and TLS (RFC 5425) by octet counting. PS3.15 wants
the patient named among the objects of some messages; here none is, by intention: the study's UID leads to it.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from xml.etree import ElementTree as ET

from salsa_node import durable
from salsa_node.audit import SENT, Entry, Trail
from salsa_node.errors import DeliveryError
from salsa_node.settings import AuditSettings, Destination
from salsa_node.tls import client_context

_PRIORITY: Final = 10 * 8 + 5  # facility "security/authorization messages", severity "notice"
_DCM = "DCM"
_LEAVE_S = 5.0  # how long a collector may take to hear what was sent
#: beginning of an action -> code and meaning of the event (CID 400), what was done (RFC 3881 5.1.2)
EVENTS: Final = (
    ("node.association_rejected", "110113", "Security Alert", "E"),
    ("node.", "110100", "Application Activity", "E"),
    ("queue.", "110100", "Application Activity", "E"),
    ("access.backup", "110106", "Export", "R"),
    ("access.export", "110106", "Export", "R"),
    ("access.", "110103", "DICOM Instances Accessed", "R"),
    ("command.", "110103", "DICOM Instances Accessed", "U"),
    ("run.", "110103", "DICOM Instances Accessed", "R"),
    ("study.new", "110104", "DICOM Instances Transferred", "C"),
    ("delivery.", "110104", "DICOM Instances Transferred", "R"),
    ("study.purged", "110105", "DICOM Study Deleted", "D"),
    ("study.", "110103", "DICOM Instances Accessed", "U"),
    ("", "110113", "Security Alert", "E"),
)
_TYPES: Final = {"node.started": ("110120", "Application Start"), "node.stopped": ("110121", "Application Stop")}
_FAILED: Final = ("delivery.gave_up", "node.association_rejected", "instance.quarantined")


def message(entry: Entry, source: str) -> str:
    """The XML of that line; source: our name among the sources of audit messages."""
    code, meaning, action = next(found[1:] for found in EVENTS if entry.action.startswith(found[0]))
    root = ET.Element("AuditMessage")
    outcome = "4" if entry.action in _FAILED else "0"  # RFC 3881: minor failure, success
    event = ET.SubElement(
        root, "EventIdentification",
        EventActionCode=action, EventDateTime=entry.at, EventOutcomeIndicator=outcome,
    )  # fmt: skip
    _coded(event, "EventID", code, meaning)
    if entry.action in _TYPES:
        _coded(event, "EventTypeCode", *_TYPES[entry.action])
    ET.SubElement(event, "EventOutcomeDescription").text = f"{entry.action}: {entry.detail}"
    node = ET.SubElement(root, "ActiveParticipant", UserID=source, UserIsRequestor="false")
    _coded(node, "RoleIDCode", "110150", "Application")
    if entry.who not in ("node", source):
        ET.SubElement(root, "ActiveParticipant", UserID=entry.who, UserIsRequestor="true")
    ET.SubElement(root, "AuditSourceIdentification", AuditSourceID=source)
    if entry.study_uid:
        study = ET.SubElement(
            root, "ParticipantObjectIdentification",
            ParticipantObjectID=entry.study_uid, ParticipantObjectTypeCode="2", ParticipantObjectTypeCodeRole="3",
        )  # fmt: skip
        _coded(study, "ParticipantObjectIDTypeCode", "110180", "Study Instance UID")
    return ET.tostring(root, encoding="unicode")


def syslog_line(entry: Entry, source: str) -> bytes:
    """That message behind an RFC 5424 header."""
    host = socket.gethostname() or "-"
    header = f"<{_PRIORITY}>1 {entry.at} {host} salsa_node {os.getpid()} DICOM+RFC3881 - "
    return header.encode("ascii", "replace") + b"\xef\xbb\xbf" + message(entry, source).encode()


def send(entries: Iterable[Entry], settings: AuditSettings, timeout_s: float = 10.0) -> int:
    """Send them to `settings.syslog`; the number of the last, 0 for none.

    Raises DeliveryError where the collector cannot be reached or shows no certificate of a known authority; of UDP
    nobody knows. ConfigError for certificates of ours that cannot be read.
    """
    place = urlsplit(settings.syslog)
    last = 0
    kind = socket.SOCK_DGRAM if place.scheme == "udp" else socket.SOCK_STREAM
    try:
        where = socket.getaddrinfo(place.hostname, place.port or 514, type=kind)[0]
        with socket.socket(where[0], kind) as plain:
            plain.settimeout(timeout_s)
            plain.connect(where[4])
            with _secured(plain, settings, place.hostname or "") if place.scheme == "tls" else plain as sock:
                for entry in entries:
                    line = syslog_line(entry, settings.source)
                    sock.sendall(line if kind == socket.SOCK_DGRAM else b"%d " % len(line) + line)
                    last = entry.number
                _take_leave(sock)
    except OSError as error:
        why = getattr(error, "verify_message", "") or error.strerror or type(error).__name__
        raise DeliveryError(f"audit.syslog: {settings.syslog} cannot be reached ({why})") from error
    return last


def _take_leave(connection: socket.socket) -> None:
    """Over TLS say that nothing follows (RFC 5425 4.4), and hear the collector out.

    Closed with its session tickets unread, the connection would be reset and what is still on its way be lost.
    """
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(_LEAVE_S)
        with suppress(OSError):  # most collectors hang up without a word, when they have read all
            connection.unwrap()


def _secured(plain: socket.socket, settings: AuditSettings, host: str) -> ssl.SSLSocket:
    """TLS on an open connection (RFC 5425): its certificate is required, for that host."""
    collector = Destination(
        "audit.syslog", authorities=settings.authorities, certificate=settings.certificate, key=settings.key
    )
    return client_context(collector).wrap_socket(plain, server_hostname=host)


@dataclass(slots=True)
class Collector:
    """Sends the trail on, each line once; all again where lines were cut off, for what stands in their place is new.

    Remembers in the data folder which line it sent last. read_bytes, last: how far it has read, and that line's digest.
    """

    settings: AuditSettings
    data_dir: Path
    read_bytes: int = 0
    last: str = ""

    def step(self, trail: Trail) -> int | None:
        """Send what is new; the number of the last line, None where there is nothing. Raises DeliveryError."""
        size = trail.size_bytes
        if not self.settings.syslog or size == self.read_bytes:
            return None
        lines, read_bytes = trail.read(self.read_bytes)
        hangs_on = lines[0].before if lines else None
        if size < self.read_bytes or (self.read_bytes and read_bytes > self.read_bytes and hangs_on != self.last):
            lines, read_bytes = trail.read()
        new = self._unsent(lines)
        if new:
            send(new, self.settings)
            durable.write(self.data_dir / SENT, [f"{new[-1].number} {new[-1].sha256}".encode()])
        self.read_bytes = read_bytes
        if lines:
            self.last = lines[-1].sha256
        return new[-1].number if new else None

    def _unsent(self, lines: Sequence[Entry]) -> Sequence[Entry]:
        """Those behind the last that was sent; all where that is not among them: they come after it, or it was cut."""
        file = self.data_dir / SENT
        number, _, digest = (file.read_text() if file.exists() else "0").partition(" ")
        for at, entry in enumerate(lines):
            if entry.number == int(number) and digest in ("", entry.sha256):  # "": as 0.1 wrote it at first
                return lines[at + 1 :]
        return lines


def _coded(parent: ET.Element, tag: str, code: str, meaning: str) -> None:
    attributes = {"csd-code": code, "codeSystemName": _DCM, "originalText": meaning}
    ET.SubElement(parent, tag, attributes)
