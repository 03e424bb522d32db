"""The way out: result objects to their destinations, one status for each, retried until it makes no sense.

A delivery that a crash interrupted is sent again under the same SOP Instance UID: the destination sees
one object, whatever happened here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from salsa_node.claimed import Claimed
from salsa_node.destinations import resolve
from salsa_node.errors import (
    DeliveryError,
    DestinationRefused,
    FormRefused,
    IllegalTransition,
    SalsaNodeError,
)
from salsa_node.log import unforeseen
from salsa_node.outgoing import NEXT_FORM, REPORT_FORMS, Outgoing, Way, next_report, read
from salsa_node.settings import SEG_KINDS, DeliverySettings, Destination
from salsa_node.store import Delivery, DeliveryState, Store
from salsa_node.ways import opened

log = logging.getLogger(__name__)


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
    """One way for all that can be read. Raises DeliveryError for what hinders every object alike."""
    if not due:
        return
    if store.is_held(store.run(due[0].run_id), settings.hold):
        outbox.hold_back(due)
        return
    if settings.shadow and not _is_for_research(store, settings, destinations, due[0]):
        for delivery in due:
            outbox.leave_out(delivery, "not sent: the node works in the shadow (delivery.shadow)")
        return
    destination = resolve(store, due[0], destinations)
    made = {item.id: item for item in store.objects_of(due[0].run_id)}
    there = [row for row in store.deliveries_of(due[0].run_id) if row.destination == due[0].destination]
    states = {made[row.object_id].kind: row.state for row in there}
    files: list[tuple[Delivery, Outgoing]] = []
    for delivery in due:
        unwanted = _unwanted(made[delivery.object_id].kind, states, destination)
        if unwanted:
            outbox.leave_out(delivery, unwanted)
            continue
        try:
            with _in_words("reading failed"):
                files.append((delivery, read(data_dir, made[delivery.object_id])))
        except DeliveryError as error:
            outbox.failed(delivery, error)
    if not files:
        return
    if destination.per_minute:
        files = outbox.within_rate(destination, files)
    if not files:
        return
    with opened(destination, [outgoing for _, outgoing in files], settings.timeout_s) as way:
        for delivery, outgoing in files:
            outbox.send(way, destination, delivery, outgoing, data_dir)


def _is_for_research(
    store: Store, settings: DeliverySettings, destinations: Sequence[Destination], delivery: Delivery
) -> bool:
    """Whether it goes out though the node works in the shadow."""
    if delivery.destination in settings.research:
        return True
    try:
        return resolve(store, delivery, destinations).name in settings.research
    except DestinationRefused:
        return False  # nobody misses what would not be sent to a place that is known either


def _unwanted(kind: str, states: Mapping[str, DeliveryState], destination: Destination) -> str:
    """Why this destination does not get an object of that kind, beside those of the `states`; "" where it does."""
    wanted = SEG_KINDS[destination.seg]
    if kind in SEG_KINDS.values():
        better, because = wanted, " (its setting seg)"
    else:
        better, because = next((one for one, other in NEXT_FORM.items() if other == kind), kind), ""
    if better == kind or better not in states:
        return ""
    if states[better] is DeliveryState.LEFT_OUT and NEXT_FORM.get(better) == kind:
        return ""  # it was refused
    return f"not sent: {destination.name} gets {better} instead{because}"


class _Outbox(Claimed):
    """What becomes of objects on their way out."""

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

    def send(self, way: Way, destination: Destination, delivery: Delivery, outgoing: Outgoing, data_dir: Path) -> None:
        """One object and its outcome; raises DeliveryError only when the way itself is gone."""
        try:
            with _in_words(f"{destination.name}: sending failed"):
                status, note = way.send(outgoing)
        except FormRefused as refused:
            self._in_other_form(delivery, outgoing, refused, data_dir)
            return
        except DeliveryError as error:
            self.failed(delivery, error)
            if error.retryable and not way.is_open:
                raise
            return
        wait = timedelta(seconds=self._settings.verify_after_s)

        def write(now: datetime) -> Delivery:
            check_at = None if destination.verify == "off" else now + wait
            return self._store.delivered(delivery.id, self._owner, status, note, now, check_at)

        if self._settle(delivery, write):
            told = {"delivery": delivery.id, "destination": delivery.destination, "status": status}
            log.info("object delivered", extra={"event": "delivery.sent", **told})

    def hold_back(self, deliveries: Sequence[Delivery]) -> None:
        """They wait for a person."""
        for delivery in deliveries:
            self._settle(delivery, lambda now, it=delivery: self._store.hold_back([it.id], self._owner, now)[0])  # type: ignore[misc]

    def within_rate(
        self, destination: Destination, files: Sequence[tuple[Delivery, Outgoing]]
    ) -> list[tuple[Delivery, Outgoing]]:
        """As many of them as may go this minute; the others wait for the next, which is no attempt."""
        now, minute = self._clock(), timedelta(minutes=1)
        may_go = max(0, destination.per_minute - self._store.sent_between(files[0][0].destination, now - minute, now))
        why = f"{destination.name} gets {destination.per_minute} objects a minute"
        for delivery, _ in files[may_go:]:
            self._settle(delivery, lambda now, it=delivery: self._postponed(it, why, now + minute, now))  # type: ignore[misc]
        return list(files[:may_go])

    def _postponed(self, delivery: Delivery, why: str, not_before: datetime, now: datetime) -> Delivery:
        return self._store.postpone(delivery.id, self._owner, why, not_before, now)

    def _in_other_form(self, delivery: Delivery, outgoing: Outgoing, refused: FormRefused, data_dir: Path) -> None:
        """The next form of what was refused is due at once; where there is none, it is given up."""
        kind = NEXT_FORM.get(outgoing.kind)
        if kind is None:
            self.failed(delivery, refused)
            return
        why = f"{refused}; {kind} goes in its place"
        try:
            with _in_words("making another form failed"):
                form = next_report(outgoing, data_dir) if kind in REPORT_FORMS else None
                self._settle(delivery, lambda now: self._store.stand_in(delivery.id, self._owner, kind, form, why, now))
        except (DeliveryError, IllegalTransition) as error:
            self.failed(delivery, DestinationRefused(f"{refused}; and in no other form: {error}", refused.status))
            return
        log.warning(why, extra={"event": "delivery.other_form", "delivery": delivery.id})

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
        wait = timedelta(seconds=settings.wait_s(delivery.attempt))

        def write(now: datetime) -> Delivery:
            if final:
                return self._store.give_up(delivery.id, self._owner, error.status, text, now)
            return self._store.delivery_failed(delivery.id, self._owner, error.status, text, now + wait, now)

        self._settle(delivery, write)


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Make a DeliveryError of what nobody foresaw, so that it is held against the delivery it befell, and counted."""
    try:
        yield
    except SalsaNodeError:
        raise
    except Exception as error:  # one delivery that fails oddly must not hold up any other
        raise DeliveryError(f"{what}: {unforeseen(error)}") from error
