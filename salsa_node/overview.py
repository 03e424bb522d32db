"""One study at a glance: where it stands, from the rows of the store, as values that JSON can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import Enum

from salsa_node.failures import POLICIES, Failure
from salsa_node.store import Delivery, DeliveryState, Run, RunState, Series, SeriesState, Store, Study


class Standing(Enum):
    """Where a study stands, in one word."""

    RECEIVING = "receiving"  #: a series is still arriving
    WAITING = "waiting"  #: complete, about to be looked at
    NOTHING = "nothing to analyse"  #: looked at, and no CT image among it
    QUEUED = "queued"
    RUNNING = "running"
    FAILED = "failed"  #: the last run failed; a person decides
    BLOCKED = "blocked"  #: a guard kept the last result here; a person decides
    SENDING = "sending"
    NOT_DELIVERED = "not delivered"  #: a delivery was given up; a person decides
    DONE = "done"  #: every object has reached every destination
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Glance:
    """A study and its latest run.

    current: the run whose result counts; latest: the newest one.
    """

    study: Study
    standing: Standing
    series: tuple[Series, ...]
    runs: tuple[Run, ...]
    current: Run | None
    latest: Run | None
    deliveries: tuple[Delivery, ...]


def glance(store: Store, study: Study) -> Glance:
    """The study as the store knows it now."""
    series = store.series_of(study.study_uid)
    runs = store.runs_of(study.study_uid)
    current = next((run for run in reversed(runs) if run.state is RunState.PRODUCED), None)
    latest = runs[-1] if runs else None
    deliveries = store.deliveries_of(current.id) if current else ()
    return Glance(study, _standing(study, series, latest, deliveries), series, runs, current, latest, deliveries)


def _standing(study: Study, series: Sequence[Series], latest: Run | None, deliveries: Sequence[Delivery]) -> Standing:
    if any(s.state is SeriesState.RECEIVING for s in series):
        return Standing.RECEIVING
    if study.assembled_instances < study.instances:
        return Standing.WAITING
    if latest is None:
        return Standing.NOTHING
    if latest.state is not RunState.PRODUCED:
        return Standing.CANCELLED if latest.state is RunState.SUPERSEDED else Standing[latest.state.name]
    states = {delivery.state for delivery in deliveries}
    if DeliveryState.GAVE_UP in states:
        return Standing.NOT_DELIVERED
    return Standing.SENDING if DeliveryState.PENDING in states else Standing.DONE


def row(seen: Glance) -> dict[str, object]:
    """What `studies` lists: no patient identity beyond the accession number."""
    run = seen.current or seen.latest
    return {
        "study_uid": seen.study.study_uid,
        "accession_number": seen.study.accession_number,
        "from": seen.study.calling_ae,
        "last_at": seen.study.last_at.isoformat(timespec="seconds"),
        "series": len(seen.series),
        "instances": seen.study.instances,
        "standing": seen.standing.value,
        "outcome": run.outcome if run else None,
        "error": seen.latest.error
        if seen.latest and seen.latest.state in (RunState.FAILED, RunState.BLOCKED)
        else None,
    }


def detail(store: Store, seen: Glance) -> dict[str, object]:
    """What `show` prints: series with reasons, runs with findings, objects, deliveries, quarantine, time line."""
    return {
        **row(seen),
        "series": [_plain(s) for s in seen.series],
        "runs": [
            {
                **_plain(run),
                "action": action(run),
                "objects": [_plain(item) for item in store.objects_of(run.id)],
                "deliveries": [_plain(item) for item in store.deliveries_of(run.id)],
            }
            for run in seen.runs
        ],
        "looks": [_plain(look) for look in store.looks_of(seen.study.study_uid)],
        "quarantine": [_plain(item) for item in store.quarantined_of(seen.study.study_uid)],
        "events": [_plain(event) for event in store.events_of(seen.study.study_uid)],
    }


def action(run: Run) -> str | None:
    """What a person does about a run that FAILED; None where nothing is to be done or nobody knows."""
    if run.state is not RunState.FAILED or run.failure is None:
        return None
    return POLICIES[Failure(run.failure)].action.replace("STUDY", run.study_uid)


def _plain(value: object) -> dict[str, object]:
    """A row as JSON-able values: times in ISO 8601, states by name."""
    fields: dict[str, object] = asdict(value)  # type: ignore[call-overload]
    return {
        name: item.isoformat(timespec="milliseconds")
        if isinstance(item, datetime)
        else item.value
        if isinstance(item, Enum)
        else item
        for name, item in fields.items()
    }
