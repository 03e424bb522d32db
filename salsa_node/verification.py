"""Proof of delivery: a destination is asked afterwards whether it holds what it took, and gets again what it lost.

By storage commitment (PS3.4 annex J) where it offers that: the report comes on the association that asked, or later
to our door. Else by a query (C-FIND, QIDO-RS) for the very SOP Instance UIDs. Where it offers neither, the object
stays sent, unverified.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pydicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import evt

from salsa_node import commitment, ways
from salsa_node.claimed import Claimed
from salsa_node.destinations import resolve
from salsa_node.errors import DeliveryError, DestinationRefused, LeaseLost, SalsaNodeError, StoreError
from salsa_node.log import unforeseen
from salsa_node.outgoing import Reference
from salsa_node.requestor import accepts, associated
from salsa_node.settings import DeliverySettings, Destination
from salsa_node.store import Delivery, Store

log = logging.getLogger(__name__)

ABSENT_CHECKS: Final = 3  # an archive may index a little later what it took; absent so often it is lost
_SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
_SAME_ASSOCIATION_S = 2.0  # how long a report may take on the association that asked


def step(
    store: Store,
    settings: DeliverySettings,
    destinations: Sequence[Destination],
    data_dir: Path,
    owner: str,
    now: datetime,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> tuple[Delivery, ...] | None:
    """Ask one destination for what is due of one result; the deliveries as they then are, or None when none is due.

    Arguments as those of `delivery.step`. Failures count as questions without an answer; only StoreError is raised.
    """
    claimed = store.claim_checks(owner, settings.lease_s, now)
    if not claimed:
        return None
    checks = _Checks(store, settings, owner, claimed, clock)
    try:
        destination = resolve(store, claimed[0], destinations)
        _look(store, settings, destination, data_dir, checks)
    except DestinationRefused as error:
        checks.never(str(error))
    except DeliveryError as error:
        checks.later(str(error))
    except SalsaNodeError:
        raise
    except Exception as error:  # noqa: BLE001 - one question that fails oddly must not hold up any other
        checks.later(unforeseen(error))
    return tuple(store.deliveries_of(claimed[0].run_id))


def _look(store: Store, settings: DeliverySettings, destination: Destination, data_dir: Path, checks: _Checks) -> None:
    """Find out about everything that is open. Raises DeliveryError where there is no answer."""
    references = checks.references(store, data_dir)
    if not references:
        return
    mode, timeout_s = destination.verify, settings.timeout_s
    if mode == "off":
        checks.never("verify is off for this destination")
    elif mode == "commitment" and checks.disowned:
        checks.lost(destination)
    elif destination.ae_title and (mode == "commitment" or (mode == "auto" and checks.first)):
        if _commit(destination, list(references.values()), checks.ask(store), timeout_s):
            checks.later("no report on storage commitment yet", settings.commitment_s)
        elif mode == "commitment":
            checks.never("it does not offer storage commitment")
    if mode not in ("auto", "query") or not checks.open:
        return
    held = ways.held(destination, list(references.values()), timeout_s)
    if held is None:
        checks.never("it offers neither storage commitment nor a query" if mode == "auto" else "it offers no query")
        return
    for delivery in checks.open:
        if references[delivery.id].sop_instance_uid in held:
            checks.verified(delivery, ways.proof(destination))
    checks.absent(destination)


class _Checks(Claimed):
    """What a destination says of objects that it took."""

    @property
    def first(self) -> bool:
        """Whether nothing of it was asked for yet."""
        return all(delivery.checks == 0 for delivery in self.open)

    @property
    def disowned(self) -> bool:
        """Whether a report said that it is not held."""
        return any(delivery.proof == "disowned" for delivery in self.open)

    def references(self, store: Store, data_dir: Path) -> dict[int, Reference]:
        """Delivery -> its object; what cannot be read here any more stays unverified."""
        made = {item.id: item for item in store.objects_of(self.open[0].run_id)}
        found = {}
        for delivery in self.open:
            try:
                tags = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"]
                ds = pydicom.dcmread(
                    data_dir / made[delivery.object_id].path, stop_before_pixels=True, specific_tags=tags
                )
                found[delivery.id] = Reference(*(str(ds.get(tag, "")) for tag in tags))
            except (OSError, ValueError) as error:
                self._never(delivery, f"its file here cannot be read ({type(error).__name__})")
        return found

    def ask(self, store: Store) -> _Request:
        """A new request for storage commitment to everything open, which the store knows before anybody is asked."""
        request = _Request(str(generate_uid(prefix=None)), store, self._clock)
        with suppress(LeaseLost):
            store.commitment_asked([delivery.id for delivery in self.open], self._owner, request.transaction_uid)
        return request

    def verified(self, delivery: Delivery, proof: str) -> None:
        """It is there."""
        self._settle(delivery, lambda now: self._store.verified(delivery.id, self._owner, proof, now))

    def absent(self, destination: Destination) -> None:
        """What is open is not there: asked for again, and sent again where it should be there by now."""
        for delivery in self.open:
            if delivery.checks + 1 >= ABSENT_CHECKS or delivery.proof == "disowned":
                self._lost(delivery, destination)
            else:
                self._later(delivery, "not there yet")

    def lost(self, destination: Destination) -> None:
        """What is open is not there, by the destination's own word."""
        for delivery in self.open:
            self._lost(delivery, destination)

    def later(self, why: str, wait_s: float | None = None) -> None:
        """What is open is asked for again, as often as the settings allow."""
        for delivery in self.open:
            self._later(delivery, why, wait_s)

    def never(self, why: str) -> None:
        """What is open stays unverified."""
        for delivery in self.open:
            self._never(delivery, why)

    def _later(self, delivery: Delivery, why: str, wait_s: float | None = None) -> None:
        settings = self._settings
        if delivery.checks + 1 >= settings.max_checks:
            self._never(delivery, f"{why}; asked {settings.max_checks} times")
            return
        doubled_s = settings.wait_s(delivery.checks + 2, settings.verify_after_s)
        wait = timedelta(seconds=doubled_s if wait_s is None else wait_s)
        self._settle(delivery, lambda now: self._store.check_later(delivery.id, self._owner, why, now + wait, now))

    def _never(self, delivery: Delivery, why: str) -> None:
        log.warning(why, extra={"event": "delivery.unverified", "delivery": delivery.id})
        self._settle(delivery, lambda now: self._store.check_later(delivery.id, self._owner, why, None, now))

    def _lost(self, delivery: Delivery, destination: Destination) -> None:
        why = f"{destination.name}: took it and does not hold it; it is sent again"
        log.error(why, extra={"event": "delivery.lost", "delivery": delivery.id})
        wait = timedelta(seconds=self._settings.wait_s(delivery.attempt + 1))
        self._settle(delivery, lambda now: self._store.lost(delivery.id, self._owner, why, now + wait, now))


# ---- storage commitment -----------------------------------------------------------------------------


class _Request:
    """A request for storage commitment, and the report that may come on the association that asked."""

    def __init__(self, transaction_uid: str, store: Store, clock: Callable[[], datetime]) -> None:
        self.transaction_uid = transaction_uid
        self.reported = threading.Event()
        self._store = store
        self._clock = clock

    def on_report(self, event: evt.Event) -> tuple[int, None]:
        """The status of one N-EVENT-REPORT."""
        try:
            return commitment.take_report(self._store, event.event_information, self._clock()), None
        except StoreError as error:
            log.error("report not noted", extra={"event": "commitment.failed", "error": str(error)})
            return commitment.PROCESSING_FAILURE, None
        finally:
            self.reported.set()


def _commit(destination: Destination, references: Sequence[Reference], request: _Request, timeout_s: float) -> bool:
    """Whether the destination takes the request. Raises DeliveryError where there is no association."""
    contexts = [(commitment.SOP_CLASS, syntax) for syntax in _SYNTAXES]
    handlers: list[evt.EventHandlerType] = [(evt.EVT_N_EVENT_REPORT, request.on_report)]
    with associated(destination, contexts, timeout_s, handlers=handlers) as assoc:
        if not accepts(assoc, commitment.SOP_CLASS):
            return False
        told = Dataset()
        told.TransactionUID = request.transaction_uid
        told.ReferencedSOPSequence = DicomSequence()
        for reference in references:
            item = Dataset()
            item.ReferencedSOPClassUID = reference.sop_class_uid
            item.ReferencedSOPInstanceUID = reference.sop_instance_uid
            told.ReferencedSOPSequence.append(item)
        try:
            answer, _ = assoc.send_n_action(told, commitment.REQUEST, commitment.SOP_CLASS, commitment.SOP_INSTANCE)
        except (RuntimeError, ValueError, OSError) as error:
            raise DeliveryError(f"{destination.name}: no storage commitment ({type(error).__name__})") from error
        if answer.get("Status") != commitment.SUCCESS:
            return False
        request.reported.wait(_SAME_ASSOCIATION_S)
    return True
