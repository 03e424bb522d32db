"""The door: C-ECHO and C-STORE in, and every image on disk and in the store before the sender hears Success.

The bytes are written as they came, undecoded, under `studies/<study>/<series>/<instance>.dcm`: file and
folder fsynced, row committed, status 0x0000. If anything fails the sender hears of it and keeps its copy.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from types import TracebackType

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode_file_meta
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.transport import ThreadedAssociationServer

from salsa_node import durable
from salsa_node.association import VERIFICATION, without_delay
from salsa_node.errors import ConfigError, ContentConflict, StoreError
from salsa_node.log import unforeseen
from salsa_node.settings import ListenerSettings, Peer, invalid_peer
from salsa_node.store import NewInstance, Store

log = logging.getLogger(__name__)

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700  # PS3.4 table B.2-1; the sender may try again
DOES_NOT_MATCH = 0xA900  # the data set is not the instance that the request named
CANNOT_UNDERSTAND = 0xC000
CONTENT_CONFLICT = 0xC001  # in the "cannot understand" range, which is the node's to use (PS3.4 B.2.3)
NODE_FAILED = 0xC0FF

REQUEST_S = 5.0  # how long a connection may stay without asking for an association
_CALLING_NOT_RECOGNISED = (0x01, 0x01, 0x03)  # rejected permanent, service user, PS3.8 table 9-21
_CALLED_NOT_RECOGNISED = (0x01, 0x01, 0x07)
_TOO_MANY = (0x02, 0x03, 0x02)  # rejected transient, local limit exceeded
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_LAST_TAG = 0x00200011  # Series Number: nothing behind it is read
_UNREADABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OSError)
_UNREADABLE_MORE = (NotImplementedError, RecursionError, OverflowError, struct.error, zlib.error)
_LOCKS = 64
_HOUR = timedelta(hours=1)
_NOTES_AN_HOUR = 500


class Refused(Exception):
    """An instance is not taken.

    status: the DIMSE status that says so; reason: at most 64 characters, without identity (PS3.7 C.4.2).
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True)
class _Header:
    """What the door reads of a data set."""

    study_uid: str
    series_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    modality: str
    series_number: int | None
    accession_number: str
    patient_id: str
    study_date: str


class _Notes:
    """What was noted lately, so that a peer that never tires cannot fill the store: the same once an hour.

    Of one name no more than `_NOTES_AN_HOUR` different ones are new.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._noted: dict[str, dict[str, datetime]] = {}

    def is_new(self, name: str, text: str, now: datetime) -> bool:
        """Whether to write this down; it then counts as noted."""
        with self._lock:
            lately = {old: at for old, at in self._noted.get(name, {}).items() if now - at < _HOUR}
            self._noted[name] = lately
            if text in lately or len(lately) >= _NOTES_AN_HOUR:
                return False
            lately[text] = now
            return True


class Listener:
    """A C-ECHO and C-STORE provider on one port; a context manager, or `start` and `stop`.

    data_dir: images go below its folder `studies`, made when absent.
    clock: the time that rows and events get.
    """

    def __init__(
        self,
        settings: ListenerSettings,
        store: Store,
        data_dir: Path,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._settings = settings
        self._store = store
        self._data_dir = data_dir
        self._clock = clock
        self._locks = tuple(threading.Lock() for _ in range(_LOCKS))
        self._ae: AE | None = None
        self._server: ThreadedAssociationServer | None = None
        self._notes = _Notes()
        if fault := invalid_peer(settings.allowed):
            raise ConfigError(fault)

    @property
    def port(self) -> int:
        """The TCP port that is listened on; where the settings say 0, the one that the system gave."""
        if self._server is None:
            raise ConfigError("the listener has no port before it is started")
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Listen. Raises ConfigError where the port is taken or the folder cannot be written."""
        self._prepare_folder()
        settings = self._settings
        ae = AE(settings.ae_title)
        ae.maximum_associations = settings.max_associations
        ae.maximum_pdu_size = settings.max_pdu_bytes
        ae.network_timeout = ae.dimse_timeout = settings.idle_timeout_s
        ae.acse_timeout = min(REQUEST_S, settings.idle_timeout_s)  # a bare connection holds a place no longer
        ae.add_supported_context(VERIFICATION)
        for context in AllStoragePresentationContexts:
            ae.add_supported_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES)
        handlers: list[evt.EventHandlerType] = [
            (evt.EVT_CONN_OPEN, without_delay),
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_C_STORE, self._on_store),
        ]
        try:
            self._server = ae.start_server((settings.host, settings.port), block=False, evt_handlers=handlers)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; stop the program "
                "that uses this port, or set listener.port (and listener.host) to a free one"
            ) from error
        self._ae = ae
        log.info("listening", extra={"event": "node.listening", "host": settings.host, "port": self.port})

    def stop(self) -> None:
        """Stop listening and end every association; what is being received is not acknowledged any more.

        An association is aborted; a connection that is none, not yet or no more, is closed: there is nothing to abort
        (PS3.8 9.2.3, states 2 and 13), and pynetdicom's thread would fail in the attempt.
        """
        if self._ae is not None and self._server is not None:
            self._server.shutdown()
            for association in self._ae.active_associations:
                if not association.is_established and association.dul.socket is not None:
                    association.dul.socket.close()
                    association.kill()
            self._ae.shutdown()
        self._ae = self._server = None

    def __enter__(self) -> Listener:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _prepare_folder(self) -> None:
        folder = self._data_dir / "studies"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"images cannot be kept in {folder}: {error.strerror}; set node.data_dir to a folder that this user "
                "can write to"
            ) from error

    # ---- associations ---------------------------------------------------------------------------

    def _on_requested(self, event: evt.Event) -> None:
        """Reject an association that the settings do not allow (pynetdicom lets EVT_REQUESTED do so)."""
        request, address = event.assoc.requestor.primitive, event.assoc.requestor.address
        assert isinstance(request, A_ASSOCIATE), "pynetdicom triggers EVT_REQUESTED with the request at hand"
        calling, called = request.calling_ae_title.strip(), request.called_ae_title.strip()
        if not any(_is_from(peer, calling, address) for peer in self._settings.allowed):
            answer, why = _CALLING_NOT_RECOGNISED, "not in listener.allowed"
        elif called != self._settings.ae_title.strip() and not self._settings.any_called_ae_title:
            answer, why = _CALLED_NOT_RECOGNISED, f"it called {called!r}, we are {self._settings.ae_title!r}"
        elif sum(assoc.is_acceptor for assoc in event.assoc.ae.active_associations) > self._settings.max_associations:
            answer, why = _TOO_MANY, f"more than {self._settings.max_associations} associations at once"
        else:
            return
        event.assoc.acse.send_reject(*answer)
        event.assoc.kill()
        self._note("node", calling, "node.association_rejected", f"{calling!r} from {address}: {why}")

    # ---- instances ------------------------------------------------------------------------------

    def _on_store(self, event: evt.Event) -> Dataset | int:
        """The status of one C-STORE; never raises, because pynetdicom would answer with a status of its own."""
        request = event.request
        assert isinstance(request, C_STORE), "pynetdicom triggers EVT_C_STORE for C-STORE requests alone"
        try:
            self._keep(event, request)
        except Refused as refused:
            status, reason = refused.status, refused.reason
        except ContentConflict as conflict:
            status, reason = CONTENT_CONFLICT, conflict.brief
        except OSError as error:
            status, reason = OUT_OF_RESOURCES, f"cannot write: {error.strerror}"
        except StoreError as error:
            log.error("instance failed", extra={"event": "instance.failed", "error": str(error)})
            status, reason = OUT_OF_RESOURCES, "the node's record cannot be written"
        except Exception as error:  # noqa: BLE001 - whatever happens, the sender must hear of it
            log.error("instance failed", extra={"event": "instance.failed", "error": unforeseen(error)})
            status, reason = NODE_FAILED, "unexpected failure, see the node's log"
        else:
            return SUCCESS
        uid = _uid_or_nothing(request.AffectedSOPInstanceUID)
        self._note("instance", uid, "instance.refused", f"0x{status:04X} {reason}, from {_sender(event)}")
        answer = Dataset()
        answer.Status = status
        answer.ErrorComment = reason[:64]
        return answer

    def _keep(self, event: evt.Event, request: C_STORE) -> None:
        content = event.encoded_dataset(include_meta=False)
        header = _read_header(content, event.context.transfer_syntax)
        if header.sop_instance_uid != request.AffectedSOPInstanceUID:
            raise Refused(DOES_NOT_MATCH, "SOP Instance UID differs between request and data set")
        if header.sop_class_uid != request.AffectedSOPClassUID:
            raise Refused(DOES_NOT_MATCH, "SOP Class UID differs between request and data set")
        if self._store.is_result(header.sop_instance_uid):
            detail = f"a result of this node came back from {_sender(event)}; not taken as input"
            self._note("instance", header.sop_instance_uid, "instance.own_result", detail, header.study_uid)
            return
        meta = b"\0" * 128 + b"DICM" + encode_file_meta(event.file_meta)
        path = f"studies/{header.study_uid}/{header.series_uid}/{header.sop_instance_uid}.dcm"
        new = NewInstance(
            sop_instance_uid=header.sop_instance_uid,
            series_uid=header.series_uid,
            study_uid=header.study_uid,
            sop_class_uid=header.sop_class_uid,
            transfer_syntax_uid=str(event.context.transfer_syntax),
            path=path,
            sha256=hashlib.sha256(content).hexdigest(),
            size_bytes=len(meta) + len(content),
            calling_ae=_sender(event),
            modality=header.modality,
            series_number=header.series_number,
            accession_number=header.accession_number,
            patient_id=header.patient_id,
            study_date=header.study_date,
        )
        with self._locks[hash(header.sop_instance_uid) % _LOCKS]:
            self._keep_once(new, (meta, content))

    def _keep_once(self, new: NewInstance, chunks: tuple[bytes, bytes]) -> None:
        """File, then row. A file that has a row is never overwritten with other content."""
        file = self._data_dir / new.path
        known = self._store.instance(new.sop_instance_uid)
        if known is None or (known.sha256 == new.sha256 and known.path == new.path and not file.exists()):
            durable.write(file, chunks)
        try:
            arrival = self._store.add_instance(new, self._clock())
        except ContentConflict:
            if known is None:
                file.unlink()
            raise
        log.debug(
            "instance stored",
            extra={"event": "instance.stored", "sop_instance_uid": new.sop_instance_uid, "is_new": arrival.is_new},
        )

    def _note(self, subject: str, subject_id: str, name: str, detail: str, study_uid: str | None = None) -> None:
        """An event in the store, and a line in the log even where the store cannot be written.

        What was noted within the hour is a line for debugging and no event.
        """
        now = self._clock()
        is_new = self._notes.is_new(name, f"{subject_id} {detail}", now)
        log.log(logging.WARNING if is_new else logging.DEBUG, detail, extra={"event": name, "subject_id": subject_id})
        if not is_new:
            return
        try:
            self._store.add_event(subject, subject_id, name, detail, now, study_uid)
        except StoreError as error:
            log.error("event not kept", extra={"event": name, "error": str(error)})


def _sender(event: evt.Event) -> str:
    return str(event.assoc.requestor.ae_title).strip()


def _is_from(peer: Peer, ae_title: str, address: str) -> bool:
    if peer.ae_title not in {"*", ae_title}:
        return False
    if peer.address == "*":
        return True
    caller = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(caller, ipaddress.IPv6Address) and caller.ipv4_mapped is not None:
        caller = caller.ipv4_mapped
    return caller in ipaddress.ip_network(peer.address, strict=False)


def _read_header(content: bytes, transfer_syntax: UID) -> _Header:
    """The identifiers of an encoded data set, read up to Series Number. Raises Refused."""
    try:
        if transfer_syntax.is_deflated:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, 1 << 20)
        ds = read_dataset(
            BytesIO(content),
            transfer_syntax.is_implicit_VR,
            transfer_syntax.is_little_endian,
            stop_when=lambda tag, _vr, _length: tag > _LAST_TAG,
        )
        number = _text(ds, 0x00200011)
        return _Header(
            study_uid=_uid(ds, 0x0020000D, "Study Instance UID"),
            series_uid=_uid(ds, 0x0020000E, "Series Instance UID"),
            sop_instance_uid=_uid(ds, 0x00080018, "SOP Instance UID"),
            sop_class_uid=_uid(ds, 0x00080016, "SOP Class UID"),
            modality=_text(ds, 0x00080060)[:16],
            series_number=int(number) if re.fullmatch(r"[+-]?[0-9]{1,9}", number) else None,
            accession_number=_text(ds, 0x00080050)[:64],
            patient_id=_text(ds, 0x00100020)[:64],
            study_date=_text(ds, 0x00080020)[:8],
        )
    except (*_UNREADABLE, *_UNREADABLE_MORE) as error:
        raise Refused(CANNOT_UNDERSTAND, f"the data set cannot be read ({type(error).__name__})") from error


def _text(ds: Dataset, tag: int) -> str:
    """An element's text without padding, "" where absent; read raw, so that odd values neither warn nor fail."""
    if tag not in ds:
        return ""
    value = ds.get_item(tag).value
    if not isinstance(value, bytes):
        return "" if value is None else str(value).strip()
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = value.decode("latin-1")
    return text.strip(" \0")


def _uid(ds: Dataset, tag: int, name: str) -> str:
    """A UID that may name a file. Raises Refused; the text of a bad one is not repeated."""
    text = _text(ds, tag)
    if not text:
        raise Refused(CANNOT_UNDERSTAND, f"{name} is missing")
    if not _uid_or_nothing(text):
        raise Refused(CANNOT_UNDERSTAND, f"{name} is not digits and dots, at most 64")
    return text


def _uid_or_nothing(text: str | None) -> str:
    return text if text and len(text) <= 64 and _UID.fullmatch(text) else ""
