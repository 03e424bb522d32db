"""The way out: result objects to their destinations by C-STORE, one status for each, retried until it makes no sense.

A delivery that a crash interrupted is sent again under the same SOP Instance UID: the destination sees
one object, whatever happened here.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

import pydicom
from pydicom.uid import UID
from pynetdicom.association import Association
from pynetdicom.status import STATUS_SUCCESS, STATUS_WARNING, code_to_category

from salsa_node.association import VERIFICATION
from salsa_node.destinations import resolve
from salsa_node.errors import DeliveryError, DestinationRefused, LeaseLost, SalsaNodeError
from salsa_node.log import unforeseen
from salsa_node.requestor import accepts, associated
from salsa_node.settings import SEG_KINDS, DeliverySettings, Destination
from salsa_node.store import Delivery, ResultObject, Store

log = logging.getLogger(__name__)

_SOP_CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 C.5.6: the same answer tomorrow
_ALREADY_THERE = 0x0111  # PS3.7 C.5.8, duplicate SOP instance: what an interrupted delivery meets the second time


def step(
    store: Store,
    settings: DeliverySettings,
    destinations: Sequence[Destination],
    data_dir: Path,
    owner: str,
    now: datetime,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> tuple[Delivery, ...] | None:
    """Send what is due of one result to one destination; the deliveries as they then are, or None when nothing is due.

    owner: the name on the leases. clock: the time when the network has answered, from which a retry waits.
    Failures, unforeseen ones too, are written against the deliveries; only StoreError is raised.
    """
    claimed = store.claim_deliveries(owner, settings.lease_s, now)
    if not claimed:
        return None
    outbox = _Outbox(store, settings, owner, claimed, clock)
    due = [delivery for delivery in claimed if outbox.may_try(delivery)]
    try:
        with _in_words("sending failed"):
            _send_out(store, settings, destinations, data_dir, outbox, due)
    except DeliveryError as error:
        for delivery in due:
            outbox.failed(delivery, error)
    return tuple(outbox.done.values())


def _send_out(
    store: Store,
    settings: DeliverySettings,
    destinations: Sequence[Destination],
    data_dir: Path,
    outbox: _Outbox,
    due: Sequence[Delivery],
) -> None:
    """One association for all that can be read. Raises DeliveryError for what hinders every object alike."""
    if not due:
        return
    destination = resolve(store, due[0], destinations)
    made = {item.id: item for item in store.objects_of(due[0].run_id)}
    kinds = {item.kind for item in made.values()}
    files: list[tuple[Delivery, pydicom.Dataset]] = []
    for delivery in due:
        unwanted = _unwanted(made[delivery.object_id].kind, kinds, destination)
        if unwanted:
            outbox.leave_out(delivery, unwanted)
            continue
        try:
            with _in_words("reading failed"):
                files.append((delivery, _read(data_dir, made[delivery.object_id])))
        except DeliveryError as error:
            outbox.failed(delivery, error)
    if not files:
        return
    with associated(destination, {_context(ds) for _, ds in files}, settings.timeout_s) as assoc:
        for delivery, ds in files:
            outbox.send(assoc, destination, delivery, ds)


def _unwanted(kind: str, kinds: Set[str], destination: Destination) -> str:
    """Why this destination does not get an object of that kind, of a result of those `kinds`; "" where it does."""
    wanted = SEG_KINDS[destination.seg]
    if kind not in SEG_KINDS.values() or kind == wanted or wanted not in kinds:
        return ""
    return f"not sent: {destination.name} gets {wanted} instead (its setting seg)"


def echo(destination: Destination, settings: DeliverySettings) -> None:
    """C-ECHO. Raises DeliveryError that says how far it came."""
    with associated(destination, {(VERIFICATION, pydicom.uid.ImplicitVRLittleEndian)}, settings.timeout_s) as assoc:
        if not assoc.accepted_contexts:
            raise DestinationRefused(f"{destination.name}: accepts the association but not C-ECHO")
        status = assoc.send_c_echo().get("Status")
    if status != 0:
        answer = "no answer" if status is None else f"status 0x{status:04X}"
        raise DeliveryError(f"{destination.name}: {answer} to C-ECHO", status)


class _Outbox:
    """Writes down what became of each claimed delivery, once, as soon as it is known."""

    def __init__(
        self,
        store: Store,
        settings: DeliverySettings,
        owner: str,
        claimed: Sequence[Delivery],
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._settings = settings
        self._owner = owner
        self._clock = clock
        self._open = {delivery.id for delivery in claimed}
        self.done: dict[int, Delivery] = {}

    def may_try(self, delivery: Delivery) -> bool:
        """Whether this attempt is one of those allowed; gives up a delivery whose last one came to no end."""
        if delivery.attempt <= self._settings.max_attempts:
            return True
        last = delivery.last_error or "the node ended while it was sending"
        text = f"given up after {self._settings.max_attempts} attempts; last: {last}"
        log.error(text, extra={"event": "delivery.failed", "delivery": delivery.id, "final": True})
        self._settle(
            delivery, lambda now: self._store.give_up(delivery.id, self._owner, delivery.last_status, text, now)
        )
        return False

    def send(self, assoc: Association, destination: Destination, delivery: Delivery, ds: pydicom.Dataset) -> None:
        """One C-STORE and its outcome; raises DeliveryError only when the association itself is gone."""
        try:
            with _in_words(f"{destination.name}: sending failed"):
                status, note = _store_one(assoc, destination, ds)
        except DeliveryError as error:
            self.failed(delivery, error)
            if error.retryable and not assoc.is_established:
                raise
            return
        wait = timedelta(seconds=self._settings.verify_after_s)

        def write(now: datetime) -> Delivery:
            check_at = None if destination.verify == "off" else now + wait
            return self._store.delivered(delivery.id, self._owner, status, note, now, check_at)

        if self._settle(delivery, write):
            log.info("object delivered", extra={"event": "delivery.sent", "delivery": delivery.id, "status": status})

    def leave_out(self, delivery: Delivery, why: str) -> None:
        """The destination does not want this object."""
        if self._settle(delivery, lambda now: self._store.leave_out(delivery.id, self._owner, why, now)):
            log.info(why, extra={"event": "delivery.left_out", "delivery": delivery.id})

    def failed(self, delivery: Delivery, error: DeliveryError) -> None:
        """Try again later, or give up where a retry is pointless or all were used; nothing where it is settled."""
        if delivery.id not in self._open:
            return
        settings, text = self._settings, str(error)
        final = not error.retryable or delivery.attempt >= settings.max_attempts
        level = logging.ERROR if final else logging.WARNING
        log.log(level, text, extra={"event": "delivery.failed", "delivery": delivery.id, "final": final})
        wait = timedelta(seconds=_wait_s(settings, delivery.attempt))

        def write(now: datetime) -> Delivery:
            if final:
                return self._store.give_up(delivery.id, self._owner, error.status, text, now)
            return self._store.delivery_failed(delivery.id, self._owner, error.status, text, now + wait, now)

        self._settle(delivery, write)

    def _settle(self, delivery: Delivery, write: Callable[[datetime], Delivery]) -> bool:
        """Write it down; False where somebody else has the delivery by now, whose word then counts."""
        try:
            self.done[delivery.id] = write(self._clock())
        except LeaseLost:
            log.warning("delivery taken over", extra={"event": "delivery.lease_lost", "delivery": delivery.id})
        self._open.discard(delivery.id)
        return delivery.id in self.done


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Make a DeliveryError of what nobody foresaw, so that it is held against the delivery it befell, and counted."""
    try:
        yield
    except SalsaNodeError:
        raise
    except Exception as error:  # one delivery that fails oddly must not hold up any other
        raise DeliveryError(f"{what}: {unforeseen(error)}") from error


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
    if not accepts(assoc, sop_class, syntax):
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
