"""The quick way in for C-STORE, through pynetdicom's insides; only `association.taking_turns` reaches there too.

pynetdicom negotiates, answers C-ECHO, releases and aborts. The thread that it gives each connection reads
PDUs here, as many at once as have come: the fragments of a C-STORE request go straight from one buffer into
their file, and the response is packed as pynetdicom packs it. Whatever is not plainly that (another command,
a request in fragments, a name that is no UID, a PDU that is no P-DATA) is put back, and pynetdicom reads it
as if nothing were here.

The thread that pynetdicom lets ask every millisecond whether a message has come sleeps meanwhile.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import struct
import time
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Final

from pydicom.uid import UID
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import uid_to_service_class

from salsa_node.association import called_by
from salsa_node.instance_header import SUCCESS, uid_or_nothing
from salsa_node.intake import Incoming, Intake, Request

log = logging.getLogger(__name__)

_P_DATA, _ABORT = 0x04, 0x07  # PDU types; the latter is the highest (PS3.8 9.3)
_HEADER_BYTES = 6
_UL = struct.Struct(">L")
_PDU = struct.Struct(">BxL")  # type and length (PS3.8 9.3)
_PDV = struct.Struct(">LBB")  # length, context, message control header (PS3.8 9.3.5.1, E.2)
_COMMAND, _LAST = 0x01, 0x02  # bits of the message control header (PS3.8 E.2)
_AFFECTED_CLASS, _FIELD, _MESSAGE_ID = 0x0002, 0x0100, 0x0110  # elements of group 0000 (PS3.7 E.1)
_PRIORITY = 0x0700
_ANSWERED_ID, _DATA_SET_TYPE, _STATUS, _COMMENT, _AFFECTED_INSTANCE = 0x0120, 0x0800, 0x0900, 0x0902, 0x1000
_C_STORE_RQ, _C_STORE_RSP = 0x0001, 0x8001
_RESPONSE = 0x8000  # of a command field (PS3.7 E.1)
_NO_DATA_SET = 0x0101
_REQUEST_BYTES = 1 << 20  # of a request for an association, which has no limit of its own
_QUIET_S = 0.25  # how long a quiet connection is waited at before pynetdicom's own loop has a turn
_COMMAND_BYTES = 1 << 16  # of a command in fragments; a larger one is pynetdicom's for good
_BUFFER_BYTES = 1 << 20  # of an instance, gathered before they are written; a CT image of 512 x 512 fits
_PIECES = 512  # fragments gathered at most
_SMALLEST_PDU: Final = 1024  # a peer that takes no more gets no response from here: it might not fit


class Invalid(Exception):
    """The peer does not keep to PS3.8."""


class Connection:
    """One accepted connection: bounded for pynetdicom, and read here where it carries C-STORE requests.

    intake: where instances go; None leaves all reading to pynetdicom.
    max_pdu_bytes: a longer PDU ends the connection.
    stalled_s: so long a peer may leave a PDU unfinished, or not take what is sent.
    """

    def __init__(self, assoc: Association, intake: Intake | None, max_pdu_bytes: int, stalled_s: float) -> None:
        transport = assoc.dul.socket
        if transport is None or transport.socket is None:
            raise ValueError("pynetdicom opens a connection before it says so")
        self._assoc = assoc
        self._dul = assoc.dul
        self._max_pdu_bytes = max_pdu_bytes
        self._stalled_s = stalled_s
        self._socket: socket.socket = transport.socket
        self._is_tls = isinstance(self._socket, ssl.SSLSocket)
        self._at, self._came = 0, 0  # in the buffer: what has come and is not yet read lies between
        self._pieces: list[memoryview] = []  # of the instance, in the buffer, not yet written
        self._put_back = b""
        self._incoming: Incoming | None = None
        self._answer = b""
        self._context_id = 0
        self._is_quick = False
        self._command: bytearray | None = None  # of a message that pynetdicom reads, as far as it has come
        self._is_theirs = False  # within a message that pynetdicom reads
        self._is_response = False  # ... which answers a request of our own
        _limit_waiting(self._socket, stalled_s)
        self._plain_recv = transport.recv
        transport.recv = self._recv  # type: ignore[method-assign] # for this one connection
        self._intake = intake
        self._plain_event = self._dul._is_transport_event
        self._dul._is_transport_event = self._serve  # type: ignore[method-assign] # for this one connection

        self._plain_action = self._dul.state_machine.do_action
        self._dul.state_machine.do_action = self._act  # type: ignore[method-assign] # for this one connection

    def is_of(self, assoc: Association) -> bool:
        """Whether this is the connection of that association."""
        return self._assoc is assoc

    def interrupt(self) -> None:
        """Wait no longer for the rest of an instance: the connection ends where it has come in part."""
        if self._incoming is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close it in deed: where the peer went first pynetdicom lets go of the connection and leaves it open."""
        self._socket.close()
        self.__dict__.pop("_buffer", None)  # who else holds this connection holds it for long
        if self._assoc.requestor.primitive is None:  # nobody will ask any more: do not keep a place for it
            self._dul.to_user_queue.put(None)  # what a timeout looks like

    # ---- for pynetdicom -------------------------------------------------------------------------

    def _recv(self, nr_bytes: int) -> bytearray:
        """What `AssociationSocket.recv` returns, first of what was put back. Raises OSError beyond the limit."""
        if nr_bytes > max(self._max_pdu_bytes, _REQUEST_BYTES):
            raise OSError(f"a PDU of {nr_bytes} bytes is longer than any that is taken")
        taken, self._put_back = bytearray(self._put_back[:nr_bytes]), self._put_back[nr_bytes:]
        if ahead := min(nr_bytes - len(taken), self._came - self._at):
            taken += self._buffer[self._at : self._at + ahead]
            self._at += ahead
        return taken + self._plain_recv(nr_bytes - len(taken)) if len(taken) < nr_bytes else taken

    def _give(self, pdu: bytes) -> None:
        """Let pynetdicom read this PDU, and its thread look at what becomes of it, unless somebody waits for it."""
        self._dul._idle_timer.restart()
        if not self._is_response:
            self._assoc._reactor_checkpoint.set()
        self._put_back = pdu
        self._is_quick = False
        self._dul._read_pdu_data()

    def _act(self, event: str) -> None:
        """In place of `StateMachine.do_action`: what the peer does at the wrong moment ends its connection, cleanly.

        pynetdicom's thread would die of it with a traceback.
        """
        try:
            self._plain_action(event)
        except Exception as error:  # noqa: BLE001 - whatever a peer sends may end its own connection alone
            log.info("connection dropped", extra={"event": "connection.dropped", "error": type(error).__name__})
            self._drop()
            self.close()
            self._dul.kill_dul()
            self._assoc._reactor_checkpoint.set()

    def _end(self, event: str) -> None:
        """Let pynetdicom end the association: Evt17 the connection is gone, Evt19 the peer sent what is invalid."""
        self._drop()
        self._assoc._reactor_checkpoint.set()
        self._dul.event_queue.put(event)

    def _drop(self) -> None:
        self._pieces.clear()
        if self._incoming is not None:
            self._incoming.discard()
            self._incoming = None

    # ---- reading --------------------------------------------------------------------------------

    def _serve(self) -> bool:
        """In place of `DULServiceProvider._is_transport_event`: whether something has come."""
        state = self._dul.state_machine.current_state
        if state == "Sta13":  # all is said; pynetdicom would wait for the rest of whatever the peer began to send
            self._end("Evt17")
            return True
        if state != "Sta6" or self._assoc._kill or self._intake is None:
            self._drop()
            if self._came > self._at:  # the peer did not wait for an answer
                self._dul._read_pdu_data()
                return True
            return self._plain_event()
        if not self._assoc.is_established:
            return False  # accepted this moment; the other thread is about to say so
        try:
            return self._read_messages()
        except OSError:
            self._end("Evt17")
        except Invalid:
            self._end("Evt19")
        except BaseException:
            self._drop()
            self._assoc._reactor_checkpoint.set()
            raise
        return True

    def _read_messages(self) -> bool:
        """Read until the peer pauses between two messages, or pynetdicom has something to do."""
        came = False
        while True:
            if self._incoming is None and (self._dul.to_provider_queue.queue or self._dul._kill_thread):
                return came
            if self._incoming is None and not self._is_readable():
                if self._dul.idle_timer_expired():
                    self._assoc._reactor_checkpoint.set()
                return came
            came = True
            if not self._read_pdu():
                return True

    def _is_readable(self) -> bool:
        if self._came > self._at or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
            return True
        try:
            return bool(select.select([self._socket], [], [], _QUIET_S if self._is_quick else 0)[0])
        except ValueError as error:
            raise OSError("the connection is closed") from error

    def _read_pdu(self) -> bool:
        """Read one PDU; whether it was taken here. Raises OSError, Invalid."""
        self._need(_HEADER_BYTES)
        kind, length = _PDU.unpack_from(self._buffer, self._at)
        if length > self._max_pdu_bytes or not 1 <= kind <= _ABORT:
            raise Invalid
        self._need(_HEADER_BYTES + length)
        begin, self._at = self._at, self._at + _HEADER_BYTES + length
        if kind != _P_DATA or self._is_theirs:
            return self._pass_on(self._buffer[begin : self._at])
        return self._take(begin + _HEADER_BYTES, self._at)

    def _need(self, count: int) -> None:
        """Have `count` bytes at hand, and whatever else has come. Raises OSError where the peer stalls or leaves."""
        missing = count - (self._came - self._at)
        if missing <= 0:
            return
        if self._at + count > len(self._buffer) or self._at == self._came:
            self._make_room(count)
        if not self._is_tls and hasattr(socket, "TCP_QUICKACK"):  # not sticky: the kernel falls back to waiting 40 ms
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        got = self._socket.recv_into(self._buffer[self._came :])
        self._came += got
        if got >= missing:
            return
        until = time.monotonic() + self._stalled_s
        while True:
            missing -= got
            if not got or time.monotonic() > until:
                raise ConnectionError("the peer left, or left a PDU unfinished")
            if missing <= 0:
                return
            flags = 0 if self._is_tls else socket.MSG_WAITALL
            got = self._socket.recv_into(self._buffer[self._came : self._came + missing], missing, flags)
            self._came += got

    def _make_room(self, count: int) -> None:
        """Begin the buffer anew, where `count` bytes would not fit behind what is not yet read, or nothing is."""
        if self._at + count > len(self._buffer):
            self._write_pieces()
        if not self._pieces:
            rest = bytes(self._buffer[self._at : self._came])
            self._buffer[: len(rest)] = rest
            self._at, self._came = 0, len(rest)

    def _write_pieces(self) -> None:
        if self._incoming is not None:
            self._incoming.write(self._pieces)
        self._pieces = []

    def _take(self, at: int, end: int) -> bool:
        """Take the presentation data values of one P-DATA PDU, which lie there in the buffer."""
        buffer = self._buffer
        while at < end:
            if end - at < 6:
                raise Invalid
            length, context_id, control = _PDV.unpack_from(buffer, at)
            stop = at + 4 + length
            if not at + 6 <= stop <= end:
                raise Invalid
            if self._incoming is None:
                if not self._begin(context_id, control, buffer[at + 6 : stop]):
                    rest = buffer[at:end]
                    return self._pass_on(memoryview(b"\x04\x00" + _UL.pack(len(rest)) + rest))
            else:
                if control & _COMMAND or context_id != self._context_id:
                    raise Invalid
                self._pieces.append(buffer[at + 6 : stop])
                if control & _LAST:
                    self._finish()
                elif len(self._pieces) >= _PIECES:
                    self._write_pieces()
            at = stop
        return True

    def _begin(self, context_id: int, control: int, payload: memoryview) -> bool:
        """Whether this is a whole and plain C-STORE request, whose data set is then taken."""
        if control != _COMMAND | _LAST:
            return False
        command = _elements(payload)
        context = self._assoc._accepted_cx.get(context_id)
        if command is None or context is None or not context.as_scp:
            return False
        sop_class, instance = _uid(command, _AFFECTED_CLASS), _uid(command, _AFFECTED_INSTANCE)
        message_id = command.get(_MESSAGE_ID, b"")
        if (
            _number(command, _FIELD) != _C_STORE_RQ
            or _number(command, _DATA_SET_TYPE) in (None, _NO_DATA_SET)
            or _number(command, _PRIORITY) not in (0, 1, 2)
            or len(message_id) != 2
            or not (sop_class and instance)
            or sop_class != context.abstract_syntax
            or not _is_storage(sop_class)
            or 0 < (self._assoc.requestor.maximum_length or 0) < _SMALLEST_PDU
        ):
            return False
        self._assoc._reactor_checkpoint.clear()
        self._is_quick = True
        self._context_id = context_id
        self._answer = message_id
        assert self._intake is not None, "without it pynetdicom reads"
        self._incoming = self._intake.begin(
            Request(
                sop_class_uid=sop_class,
                sop_instance_uid=instance,
                context_sop_class_uid=sop_class,
                transfer_syntax=context.transfer_syntax[0],
                sender=self._titles[0],
                called=self._titles[1],
            )
        )
        return True

    @cached_property
    def _buffer(self) -> memoryview:
        """Where it is read into; made for the first message."""
        return memoryview(bytearray(max(_BUFFER_BYTES, _HEADER_BYTES + self._max_pdu_bytes)))

    @cached_property
    def _titles(self) -> tuple[str, str]:
        """The calling and called AE title of the association, once it is accepted."""
        return str(self._assoc.requestor.ae_title).strip(), called_by(self._assoc)

    def _finish(self) -> None:
        """The instance has come wholly: keep it, then answer."""
        self._write_pieces()
        incoming, self._incoming = self._incoming, None
        assert incoming is not None, "only what was begun is finished"
        assert self._intake is not None, "without it pynetdicom reads"
        status, reason = self._intake.take(incoming)
        self._socket.sendall(_response(self._context_id, self._answer, incoming.request, status, reason))
        self._dul._idle_timer.restart()

    def _pass_on(self, pdu: memoryview) -> bool:
        """Let pynetdicom read a PDU, and know whether the message that it belongs to goes on after it."""
        if self._incoming is not None and pdu[0] == _P_DATA:
            raise Invalid
        self._drop()
        if not self._is_theirs:
            self._is_response = False
        if pdu[0] == _P_DATA:
            self._follow(pdu)
        self._give(bytes(pdu))
        return False

    def _follow(self, pdu: memoryview) -> None:
        at = _HEADER_BYTES
        while at + 6 <= len(pdu):
            stop = at + 4 + int(_UL.unpack_from(pdu, at)[0])
            control = pdu[at + 5]
            if not control & _COMMAND:
                self._is_theirs = not control & _LAST
            else:
                self._command = (self._command or bytearray()) + pdu[at + 6 : stop]
                self._is_theirs = True
                if len(self._command) > _COMMAND_BYTES:
                    raise Invalid
                if control & _LAST:
                    command, self._command = _elements(memoryview(self._command)), None
                    self._is_theirs = command is None or _number(command, _DATA_SET_TYPE) != _NO_DATA_SET
                    self._is_response = command is not None and bool((_number(command, _FIELD) or 0) & _RESPONSE)
            at = max(stop, at + 6)


class SharedContexts(list[PresentationContext]):
    """The presentation contexts of a server, which pynetdicom would copy for each connection: 30 ms of it."""

    def __deepcopy__(self, memo: dict[int, object]) -> SharedContexts:
        return self  # nobody changes them


@lru_cache(maxsize=512)
def _is_storage(sop_class_uid: str) -> bool:
    return uid_to_service_class(UID(sop_class_uid)) is StorageServiceClass


def _limit_waiting(connection: socket.socket, seconds: float) -> None:
    """No single read or write of this connection waits longer."""
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(seconds)
        return
    timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def _elements(payload: memoryview) -> dict[int, bytes] | None:
    """The elements of a command set (implicit VR little endian, group 0000); None where it is no such thing."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(payload):
        if len(payload) - at < 8:
            return None
        group, element, length = struct.unpack_from("<HHL", payload, at)
        at += 8
        if group or at + length > len(payload):
            return None
        found[element] = bytes(payload[at : at + length])
        at += length
    return found


def _number(command: dict[int, bytes], element: int) -> int | None:
    value = command.get(element, b"")
    return int.from_bytes(value, "little") if len(value) == 2 else None


def _uid(command: dict[int, bytes], element: int) -> str:
    """A UID with the padding that the standard prescribes (PS3.5 9.1), or ""."""
    value = command.get(element, b"")
    text = value.removesuffix(b"\0").decode("latin-1")
    return uid_or_nothing(text)


def _response(context_id: int, message_id: bytes, request: Request, status: int, reason: str) -> bytes:
    """A C-STORE-RSP in one P-DATA PDU (PS3.7 9.3.1.2)."""
    elements = _element(_AFFECTED_CLASS, request.sop_class_uid.encode("ascii"), b"\0")
    elements += _element(_FIELD, _C_STORE_RSP.to_bytes(2, "little"))
    elements += _element(_ANSWERED_ID, message_id)
    elements += _element(_DATA_SET_TYPE, _NO_DATA_SET.to_bytes(2, "little"))
    elements += _element(_STATUS, status.to_bytes(2, "little"))
    if status != SUCCESS:
        elements += _element(_COMMENT, reason.encode("ascii", "replace"), b" ")
    elements += _element(_AFFECTED_INSTANCE, request.sop_instance_uid.encode("ascii"), b"\0")
    command = _element(0x0000, len(elements).to_bytes(4, "little")) + elements
    return (
        struct.pack(">BBLLBB", _P_DATA, 0, len(command) + 6, len(command) + 2, context_id, _COMMAND | _LAST) + command
    )


def _element(element: int, value: bytes, padding: bytes = b"") -> bytes:
    value += padding * (len(value) % 2)
    return struct.pack("<HHL", 0, element, len(value)) + value
