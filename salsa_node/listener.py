"""The door: C-ECHO and C-STORE in, and every image on disk and in the store before the sender hears Success.

The bytes are written as they came, undecoded, under `studies/<study>/<series>/<instance>.dcm`: file and
folder fsynced, row committed, status 0x0000. If anything fails the sender hears of it and keeps its copy.
"""

from __future__ import annotations

import ipaddress
import logging
import shutil
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from weakref import WeakKeyDictionary, WeakSet

from pydicom.dataset import Dataset
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE, N_ACTION
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.transport import ThreadedAssociationServer

from salsa_node import commitment, tls
from salsa_node.association import VERIFICATION, called_by, without_delay
from salsa_node.errors import ConfigError, DeliveryError, StoreError
from salsa_node.fast_receive import Connection, SharedContexts
from salsa_node.instance_header import SUCCESS
from salsa_node.intake import INCOMING, Bound, Intake, Request
from salsa_node.notes import Notes
from salsa_node.settings import ListenerSettings, Peer, invalid_peer
from salsa_node.storage_classes import UNLISTED
from salsa_node.store import Commitment, Store

__all__ = ["INCOMING", "Listener"]

log = logging.getLogger(__name__)

REQUEST_S = 5.0  # how long a connection may stay without asking for an association
_RETIRED = (*range(52, 57), *range(58, 67))  # JPEG processes (PS3.6 annex A)
#: Encodings of images that pynetdicom does not know: taken and kept, though few can read them.
_RARE_SYNTAXES = ("1.2.840.10008.1.2.1.98", *(f"1.2.840.10008.1.2.4.{number}" for number in _RETIRED))
_SYNTAXES = [*ALL_TRANSFER_SYNTAXES, *_RARE_SYNTAXES]
_CALLING_NOT_RECOGNISED = (0x01, 0x01, 0x03)  # rejected permanent, service user, PS3.8 table 9-21
_CALLED_NOT_RECOGNISED = (0x01, 0x01, 0x07)
_CONGESTED = (0x02, 0x03, 0x01)  # rejected transient, temporary congestion
_TOO_MANY = (0x02, 0x03, 0x02)  # rejected transient, local limit exceeded
_GIB = 1 << 30
# Connections that wait to be accepted. pynetdicom lets 5 wait, and a connection that finds no room tries again
# after a second: senders that open ten associations at once would lose that second on half of them.
_BACKLOG = 128


class Listener:
    """A C-ECHO, C-STORE and storage commitment provider on one port, or two; a context manager, or `start` and `stop`.

    data_dir: images go below its folder `studies`, made when absent.
    clock: the time that rows and events get.
    also_called: AE titles of ours beside the settings'; which one a sender calls is kept with the study.
    """

    def __init__(
        self,
        settings: ListenerSettings,
        store: Store,
        data_dir: Path,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        also_called: Iterable[str] = (),
    ) -> None:
        self._settings = settings
        self._data_dir = data_dir
        self._ae: AE | None = None
        self._servers: list[ThreadedAssociationServer] = []
        self._accepted_at: WeakKeyDictionary[Association, datetime] = WeakKeyDictionary()
        self._asked: WeakKeyDictionary[Association, Commitment] = WeakKeyDictionary()
        self._connections: WeakSet[Connection] = WeakSet()
        self._titles = {title.strip() for title in (settings.ae_title, *also_called)}
        self._store = store
        self._clock = clock
        self._notes = Notes(store, clock)
        bound = Bound(settings.quarantine_files, settings.quarantine_gib * _GIB)
        self._intake = Intake(store, data_dir, self._notes, clock, bound)
        if fault := invalid_peer(settings.allowed):
            raise ConfigError(fault)

    @property
    def port(self) -> int:
        """The TCP port that is listened on; where the settings say 0, the one that the system gave."""
        if not self._servers:
            raise ConfigError("the listener has no port before it is started")
        return int(self._servers[0].server_address[1])

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
        # Either role: an archive that reports to us on an association of its own is the SCP there (PS3.4 J.3.3).
        ae.add_supported_context(commitment.SOP_CLASS, scu_role=True, scp_role=True)
        for context in AllStoragePresentationContexts:
            ae.add_supported_context(str(context.abstract_syntax), _SYNTAXES)
        handlers: list[evt.EventHandlerType] = [
            (evt.EVT_CONN_OPEN, without_delay),
            (evt.EVT_CONN_OPEN, self._on_opened),
            (evt.EVT_CONN_CLOSE, self._on_closed),
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_ACCEPTED, self._on_accepted),
            (evt.EVT_RELEASED, self._on_ended),
            (evt.EVT_ABORTED, self._on_ended),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_N_ACTION, self._on_action),
            (evt.EVT_N_EVENT_REPORT, self._on_report),
            (evt.EVT_PDU_SENT, self._on_pdu_sent),
        ]
        self._ae = ae
        try:
            self._listen(ae, "listener", settings.host, settings.port, handlers)
            if settings.tls.port:
                secure = tls.server_context(settings.tls)
                self._listen(ae, "listener.tls", settings.tls.host, settings.tls.port, handlers, secure)
        except ConfigError:
            self.stop()
            raise

    def _listen(
        self,
        ae: AE,
        section: str,
        host: str,
        port: int,
        handlers: list[evt.EventHandlerType],
        secure: ssl.SSLContext | None = None,
    ) -> None:
        try:
            server = ae.start_server((host, port), block=False, ssl_context=secure, evt_handlers=handlers)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port}: {error.strerror or error}; stop the program that uses this "
                f"port, or set {section}.port (and {section}.host) to a free one"
            ) from error
        if server is None:
            raise ConfigError("pynetdicom gave no server, though it was asked not to wait for its end")
        server.contexts = SharedContexts(server.contexts)
        if server.socket is not None:
            server.socket.listen(_BACKLOG)  # again, with a longer queue
        self._servers.append(server)
        extra = {"event": "node.listening", "host": host, "port": server.server_address[1], "tls": secure is not None}
        log.info("listening", extra=extra)

    def stop(self) -> None:
        """Stop listening and end every association; what is being received is not acknowledged any more.

        An association is aborted; a connection that is none, not yet or no more, is closed: there is nothing to abort
        (PS3.8 9.2.3, states 2 and 13), and pynetdicom's thread would fail in the attempt.
        """
        if self._ae is not None:
            for server in self._servers:
                server.shutdown()
            for connection in list(self._connections):
                connection.interrupt()
            for association in self._ae.active_associations:
                if not association.is_established and association.dul.socket is not None:
                    association.dul.socket.close()
                    association.kill()
            self._ae.shutdown()
        self._ae = None
        self._servers.clear()
        self._intake.close()

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

    def _on_opened(self, event: evt.Event) -> None:
        if event.assoc.dul.socket is not None:
            intake = self._intake if self._settings.fast else None
            settings = self._settings
            connection = Connection(event.assoc, intake, settings.max_pdu_bytes, settings.idle_timeout_s)
            self._connections.add(connection)

    def _on_closed(self, event: evt.Event) -> None:
        for connection in [one for one in list(self._connections) if one.is_of(event.assoc)]:
            connection.close()
            self._connections.discard(connection)

    def _on_requested(self, event: evt.Event) -> None:
        """Reject an association that the settings do not allow, or add what its peer alone proposes.

        pynetdicom lets EVT_REQUESTED do both.
        """
        request, address = event.assoc.requestor.primitive, event.assoc.requestor.address
        assert isinstance(request, A_ASSOCIATE), "pynetdicom triggers EVT_REQUESTED with the request at hand"
        calling, called = request.calling_ae_title.strip(), request.called_ae_title.strip()
        if not any(_is_from(peer, calling, address) for peer in self._settings.allowed):
            answer, why = _CALLING_NOT_RECOGNISED, "not in listener.allowed"
        elif called not in self._titles and not self._settings.any_called_ae_title:
            answer, why = _CALLED_NOT_RECOGNISED, self._not_us(called)
        elif sum(assoc.is_acceptor for assoc in event.assoc.ae.active_associations) > self._settings.max_associations:
            answer, why = _TOO_MANY, f"more than {self._settings.max_associations} associations at once"
        elif (free := shutil.disk_usage(self._data_dir).free) < self._settings.min_free_gib * _GIB:
            answer, why = _CONGESTED, f"{free / _GIB:.1f} GiB are free, listener.min_free_gib is not"
        else:
            more = UNLISTED.contexts(request.presentation_context_definition_list, _SYNTAXES)
            if more:
                acceptor = event.assoc.acceptor
                acceptor.supported_contexts = [*acceptor.supported_contexts, *more]
            return
        event.assoc.acse.send_reject(*answer)
        event.assoc.kill()
        self._notes.note("node", calling, "node.association_rejected", f"{calling!r} from {address}: {why}")

    def _not_us(self, called: str) -> str:
        ours = " or ".join(repr(title) for title in sorted(self._titles))
        return f"it called {called!r}, we are {ours}; correct it there, or add a [[profile]] for it"

    def _on_accepted(self, event: evt.Event) -> None:
        self._accepted_at[event.assoc] = self._clock()

    def _on_ended(self, event: evt.Event) -> None:
        """Tell the record, where images came: a sender that releases its association has sent what it meant to."""
        since = self._accepted_at.pop(event.assoc, None)
        if since is None:
            return
        sender = str(event.assoc.requestor.ae_title).strip()
        try:
            self._store.association_ended(sender, since, self._clock(), released=event.event is evt.EVT_RELEASED)
        except StoreError as error:
            log.error("event not kept", extra={"event": "study.association", "error": str(error)})

    # ---- instances ------------------------------------------------------------------------------

    def _on_store(self, event: evt.Event) -> Dataset | int:
        """The status of one C-STORE; never raises, because pynetdicom would answer with a status of its own."""
        request = event.request
        assert isinstance(request, C_STORE), "pynetdicom triggers EVT_C_STORE for C-STORE requests alone"
        incoming = self._intake.begin(
            Request(
                sop_class_uid=str(request.AffectedSOPClassUID or ""),
                sop_instance_uid=str(request.AffectedSOPInstanceUID or ""),
                context_sop_class_uid=str(event.context.abstract_syntax),
                transfer_syntax=event.context.transfer_syntax,
                sender=str(event.assoc.requestor.ae_title).strip(),
                called=called_by(event.assoc),
            )
        )
        incoming.write([request.DataSet.getbuffer() if request.DataSet else b""])
        status, reason = self._intake.take(incoming)
        if status == SUCCESS:
            return SUCCESS
        answer = Dataset()
        answer.Status = status
        answer.ErrorComment = reason
        return answer

    # ---- storage commitment ---------------------------------------------------------------------

    def _on_action(self, event: evt.Event) -> tuple[int, None]:
        """The status of one N-ACTION: a request for storage commitment is a row when this returns Success."""
        request = event.request
        assert isinstance(request, N_ACTION), "pynetdicom triggers EVT_N_ACTION for N-ACTION requests alone"
        if request.RequestedSOPInstanceUID != commitment.SOP_INSTANCE:
            return commitment.NO_SUCH_INSTANCE, None
        if event.action_type != commitment.REQUEST:
            return commitment.NO_SUCH_ACTION, None
        calling, now = str(event.assoc.requestor.ae_title).strip(), self._clock()
        try:
            transaction_uid, references = commitment.requested(event.action_information)
        except Exception as error:  # noqa: BLE001 - pydicom raises many things for what cannot be read
            self._notes.note("node", calling, "commitment.refused", f"{type(error).__name__}, from {calling!r}")
            return commitment.INVALID_ARGUMENT, None
        due = now + timedelta(seconds=commitment.NEW_ASSOCIATION_S)
        try:
            self._asked[event.assoc] = self._store.ask_commitment(transaction_uid, calling, references, due, now)
        except StoreError as error:
            log.error("commitment not noted", extra={"event": "commitment.failed", "error": str(error)})
            return commitment.PROCESSING_FAILURE, None
        return commitment.SUCCESS, None

    def _on_report(self, event: evt.Event) -> tuple[int, None]:
        """The status of one N-EVENT-REPORT: what an archive says of results that we asked it to commit to."""
        try:
            return commitment.take_report(self._store, event.event_information, self._clock()), None
        except StoreError as error:
            log.error("report not noted", extra={"event": "commitment.failed", "error": str(error)})
            return commitment.PROCESSING_FAILURE, None

    def _on_pdu_sent(self, event: evt.Event) -> None:
        """The first PDU after the request is its answer; a moment later the report may follow."""
        asked = self._asked.pop(event.assoc, None)
        if asked is not None:
            timer = threading.Timer(commitment.SAME_ASSOCIATION_S, self._report, (event.assoc, asked))
            timer.daemon = True
            timer.start()

    def _report(self, assoc: Association, asked: Commitment) -> None:
        """On the association that asked; where that is gone a new one may report at once."""
        try:
            commitment.send(self._store, self._data_dir, asked, assoc, self._clock())
        except DeliveryError as error:
            now = self._clock()
            with suppress(StoreError):  # then it is due later
                self._store.commitment_failed(asked.id, str(error), now, now)
        except StoreError as error:
            log.error("commitment not noted", extra={"event": "commitment.failed", "error": str(error)})


def _is_from(peer: Peer, ae_title: str, address: str) -> bool:
    if peer.ae_title not in {"*", ae_title}:
        return False
    if peer.address == "*":
        return True
    caller = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(caller, ipaddress.IPv6Address) and caller.ipv4_mapped is not None:
        caller = caller.ipv4_mapped
    return caller in ipaddress.ip_network(peer.address, strict=False)
