"""The way out: result objects to their destinations by C-STORE, one status for each, retried until it makes no sense.

A delivery that a crash interrupted is sent again under the same SOP Instance UID: the destination sees
one object, whatever happened here.
"""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path

import pydicom
from pydicom.uid import UID
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.status import STATUS_SUCCESS, STATUS_WARNING, code_to_category

from salsa_node.errors import DeliveryError, DestinationRefused, LeaseLost
from salsa_node.settings import DeliverySettings, Destination
from salsa_node.store import Delivery, ResultObject, Store

log = logging.getLogger(__name__)

SENDER = "sender"  # the destination whose AE title sent the study
_VERIFICATION = "1.2.840.10008.1.1"  # PS3.4 annex A
_SOP_CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 C.5.6: the same answer tomorrow
_ALREADY_THERE = 0x0111  # PS3.7 C.5.8, duplicate SOP instance: what an interrupted delivery meets the second time
_MAX_PDU_BYTES = 131072


def step(
    store: Store,
    settings: DeliverySettings,
    destinations: Sequence[Destination],
    data_dir: Path,
    owner: str,
    now: datetime,
) -> tuple[Delivery, ...] | None:
    """Send what is due of one result to one destination; the deliveries as they then are, or None when nothing is due.

    owner: the name on the leases. Failures are written against the deliveries; only StoreError is raised.
    """
    claimed = store.claim_deliveries(owner, settings.lease_s, now)
    if not claimed:
        return None
    outbox = _Outbox(store, settings, owner, now)
    made = {item.id: item for item in store.objects_of(claimed[0].run_id)}
    try:
        destination = resolve(store, claimed[0], destinations)
        files = [_read(data_dir, made[delivery.object_id]) for delivery in claimed]
        with _associated(destination, {_context(ds) for ds in files}, settings.timeout_s) as assoc:
            for delivery, ds in zip(claimed, files, strict=True):
                outbox.send(assoc, destination, delivery, ds)
    except DeliveryError as error:
        for delivery in claimed:
            outbox.failed(delivery, error)
    return tuple(outbox.done.values())


def echo(destination: Destination, settings: DeliverySettings) -> None:
    """C-ECHO. Raises DeliveryError that says how far it came."""
    with _associated(destination, {(_VERIFICATION, pydicom.uid.ImplicitVRLittleEndian)}, settings.timeout_s) as assoc:
        if not assoc.accepted_contexts:
            raise DestinationRefused(f"{destination.name}: accepts the association but not C-ECHO")
        status = assoc.send_c_echo().get("Status")
    if status != 0:
        answer = "no answer" if status is None else f"status 0x{status:04X}"
        raise DeliveryError(f"{destination.name}: {answer} to C-ECHO", status)


def resolve(store: Store, delivery: Delivery, destinations: Sequence[Destination]) -> Destination:
    """Where that delivery goes; "sender" is who sent the study. Raises DestinationRefused naming what to configure."""
    if delivery.destination == SENDER:
        calling = store.study(store.run(delivery.run_id).study_uid).calling_ae
        for destination in destinations:
            if destination.ae_title.strip() == calling:
                return destination
        raise DestinationRefused(
            f"the study came from AE title {calling!r} and no [[destination]] has this ae_title; add one with its host "
            "and port, then resend the study"
        )
    for destination in destinations:
        if destination.name == delivery.destination:
            return destination
    raise DestinationRefused(
        f"no [[destination]] is called {delivery.destination!r} any more; add it, then resend the study"
    )


class _Outbox:
    """Writes down what became of each claimed delivery, once, as soon as it is known."""

    def __init__(self, store: Store, settings: DeliverySettings, owner: str, now: datetime) -> None:
        self._store = store
        self._settings = settings
        self._owner = owner
        self._now = now
        self.done: dict[int, Delivery] = {}

    def send(self, assoc: Association, destination: Destination, delivery: Delivery, ds: pydicom.Dataset) -> None:
        """One C-STORE and its outcome; raises DeliveryError only when the association itself is gone."""
        try:
            status, note = _store_one(assoc, destination, ds)
        except DeliveryError as error:
            self.failed(delivery, error)
            if error.retryable and not assoc.is_established:
                raise
            return
        try:
            self.done[delivery.id] = self._store.delivered(delivery.id, self._owner, status, note, self._now)
        except LeaseLost:
            self._lost(delivery)
        log.info("object delivered", extra={"event": "delivery.sent", "delivery": delivery.id, "status": status})

    def failed(self, delivery: Delivery, error: DeliveryError) -> None:
        """Try again later, or give up where a retry is pointless or all were used; nothing where it is settled."""
        if delivery.id in self.done:
            return
        settings = self._settings
        final = not error.retryable or delivery.attempt >= settings.max_attempts
        level = logging.ERROR if final else logging.WARNING
        log.log(level, str(error), extra={"event": "delivery.failed", "delivery": delivery.id, "final": final})
        try:
            if final:
                row = self._store.give_up(delivery.id, self._owner, error.status, str(error), self._now)
            else:
                later = self._now + timedelta(seconds=_wait_s(settings, delivery.attempt))
                row = self._store.delivery_failed(delivery.id, self._owner, error.status, str(error), later, self._now)
        except LeaseLost:
            self._lost(delivery)
            return
        self.done[delivery.id] = row

    def _lost(self, delivery: Delivery) -> None:
        log.warning("delivery taken over", extra={"event": "delivery.lease_lost", "delivery": delivery.id})


def _wait_s(settings: DeliverySettings, attempt: int) -> float:
    """How long after the attempt of that number (1, 2, ...) the next one follows."""
    doublings = min(attempt - 1, 60)
    return float(min(settings.first_retry_s * 2**doublings, settings.max_retry_s))


def _read(data_dir: Path, item: ResultObject) -> pydicom.Dataset:
    """The object as it was produced. Raises DestinationRefused where the file is gone or not that any more."""
    try:
        content = (data_dir / item.path).read_bytes()
    except OSError as error:
        raise DestinationRefused(f"the {item.kind} of run {item.run_id} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != item.sha256:
        raise DestinationRefused(
            f"the {item.kind} of run {item.run_id} has changed on disk since it was made; not sent"
        )
    return pydicom.dcmread(BytesIO(content))


def _context(ds: pydicom.Dataset) -> tuple[str, UID]:
    """The presentation context that an object needs: its own SOP class in its own transfer syntax."""
    return str(ds.SOPClassUID), ds.file_meta.TransferSyntaxUID


def _store_one(assoc: Association, destination: Destination, ds: pydicom.Dataset) -> tuple[int, str | None]:
    """The status of one C-STORE, and the destination's warning if it gave one. Raises DeliveryError."""
    sop_class, syntax = _context(ds)
    if not any(
        context.abstract_syntax == sop_class and syntax in context.transfer_syntax
        for context in assoc.accepted_contexts
    ):
        raise DestinationRefused(
            f"{destination.name}: does not accept {UID(sop_class).name} as {syntax.name}; allow this SOP class there"
        )
    if not assoc.is_established:
        raise DeliveryError(f"{destination.name}: the association ended before the object was sent")
    try:
        answer = assoc.send_c_store(ds)
    except (RuntimeError, ValueError, OSError) as error:
        raise DeliveryError(f"{destination.name}: sending failed ({type(error).__name__}: {error})") from error
    status = answer.get("Status")
    if status is None:
        raise DeliveryError(f"{destination.name}: the association ended without an answer to C-STORE")
    told = f"{destination.name}: status 0x{status:04X}"  # the peer's comment may quote the patient
    category = code_to_category(status)
    if category == STATUS_SUCCESS:
        return status, None
    if category == STATUS_WARNING:
        return status, f"taken with a warning: {told}"
    if status == _ALREADY_THERE:
        return status, f"it was there already: {told}"
    refused = DestinationRefused if status == _SOP_CLASS_NOT_SUPPORTED else DeliveryError
    raise refused(told, status)


@contextmanager
def _associated(destination: Destination, contexts: set[tuple[str, UID]], timeout_s: float) -> Iterator[Association]:
    """An association with one presentation context for each pair; released at the end. Raises DeliveryError."""
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # it would log data sets
    ae = AE(destination.calling_ae_title)
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = timeout_s
    for sop_class, syntax in sorted(contexts):
        ae.add_requested_context(sop_class, syntax)
    where = f"{destination.name} ({destination.ae_title} at {destination.host}:{destination.port})"
    try:
        assoc = ae.associate(
            destination.host,
            destination.port,
            ae_title=destination.ae_title,
            max_pdu=_MAX_PDU_BYTES,
            evt_handlers=[(evt.EVT_CONN_OPEN, _without_delay)],
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise DeliveryError(f"{where}: cannot be reached ({type(error).__name__}: {error})") from error
    if not assoc.is_established and not assoc.rejected_contexts:
        raise DeliveryError(f"{where}: {_why_not(assoc)}")
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()


def _why_not(assoc: Association) -> str:
    answer = assoc.acceptor.primitive
    if assoc.is_rejected and isinstance(answer, A_ASSOCIATE):
        return f"rejected the association: {answer.result_str}, {answer.source_str}, {answer.reason_str}"
    return "no association: nobody listens there, or the peer aborted or did not answer in time"


def _without_delay(event: evt.Event) -> None:
    """Send at once: the end of an object must not wait for the peer's delayed acknowledgement (40 ms each)."""
    connection = event.assoc.dul.socket
    if connection is not None and connection.socket is not None:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
