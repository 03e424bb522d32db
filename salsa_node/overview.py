"""One study at a glance: where it stands, from the rows of the store, as values that JSON can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import Enum
from typing import Final

from salsa_node.failures import POLICIES, Failure
from salsa_node.store import (
    Delivery,
    DeliveryState,
    Event,
    Figures,
    Quarantined,
    Rows,
    Run,
    RunState,
    Series,
    SeriesState,
    Sought,
    Store,
    Study,
    standing,
)

_AT_ONCE = 200  # studies that one question to the store is about


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
    HELD = "held"  #: the result waits for a person, who releases it
    NOT_DELIVERED = "not delivered"  #: a delivery was given up; a person decides
    DONE = "done"  #: every object has reached every destination
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Glance:
    """A study and its latest runs: one, or one for each series that is analysed.

    current: the runs whose results count; latest: those that no newer one displaces; oldest first.
    """

    study: Study
    standing: Standing
    series: tuple[Series, ...]
    runs: tuple[Run, ...]
    current: tuple[Run, ...]
    latest: tuple[Run, ...]
    deliveries: tuple[Delivery, ...]


#: of runs that are not PRODUCED: what a person must hear of first
_FIRST_TOLD: Final = (
    RunState.FAILED,
    RunState.BLOCKED,
    RunState.RUNNING,
    RunState.QUEUED,
    RunState.CANCELLED,
    RunState.SUPERSEDED,
)


def glance(store: Store, study: Study) -> Glance:
    """The study as the store knows it now."""
    runs = store.runs_of(study.study_uid)
    deliveries = tuple(item for run in runs for item in store.deliveries_of(run.id))
    return _glance(Rows(study, store.series_of(study.study_uid), runs, deliveries))


def search(store: Store, sought: Sought, standings: Sequence[Standing], limit: int) -> tuple[Glance, ...]:
    """The studies sought that stand as one of `standings` (none named: however they stand), at most `limit`."""
    found: list[Glance] = []
    skip = 0
    while len(found) < limit:
        count = _AT_ONCE if standings else min(_AT_ONCE, limit - len(found))
        rows = store.find_studies(sought, count, skip)
        seen = [_glance(one) for one in rows]
        found += [one for one in seen if not standings or one.standing in standings]
        if len(rows) < count:
            break
        skip += count
    return tuple(found[:limit])


def _glance(rows: Rows) -> Glance:
    current = tuple(run for run in rows.runs if run.state is RunState.PRODUCED)
    latest = standing(rows.runs)
    numbers = {run.id for run in current}
    deliveries = tuple(item for item in rows.deliveries if item.run_id in numbers)
    stands = _standing(rows.study, rows.series, latest, deliveries)
    return Glance(rows.study, stands, rows.series, rows.runs, current, latest, deliveries)


def _standing(
    study: Study, series: Sequence[Series], latest: Sequence[Run], deliveries: Sequence[Delivery]
) -> Standing:
    if any(s.state is SeriesState.RECEIVING for s in series):
        return Standing.RECEIVING
    if study.assembled_instances < study.instances:
        return Standing.WAITING
    if not latest:
        return Standing.NOTHING
    for state in _FIRST_TOLD:
        if state in {run.state for run in latest}:
            return Standing.CANCELLED if state is RunState.SUPERSEDED else Standing[state.name]
    states = {delivery.state for delivery in deliveries}
    if DeliveryState.GAVE_UP in states:
        return Standing.NOT_DELIVERED
    if DeliveryState.HELD in states:
        return Standing.HELD
    return Standing.SENDING if DeliveryState.PENDING in states else Standing.DONE


def row(seen: Glance) -> dict[str, object]:
    """What `studies` lists: no patient identity beyond the accession number."""
    outcomes = [run.outcome for run in seen.current or seen.latest if run.outcome]
    errors = [run.error for run in seen.latest if run.error and run.state in (RunState.FAILED, RunState.BLOCKED)]
    return {
        "study_uid": seen.study.study_uid,
        "accession_number": seen.study.accession_number,
        "study_date": seen.study.study_date,
        "from": seen.study.calling_ae,
        "called": seen.study.called_ae,
        "last_at": seen.study.last_at.isoformat(timespec="seconds"),
        "series": len(seen.series),
        "instances": seen.study.instances,
        "standing": seen.standing.value,
        "proof": _proof(seen.deliveries),
        "outcome": ", ".join(dict.fromkeys(outcomes)) or None,
        "error": "; ".join(errors) or None,
    }


def _proof(deliveries: Sequence[Delivery]) -> str | None:
    """Whether the destinations hold what they took of the current results; None where they took nothing."""
    taken = [delivery for delivery in deliveries if delivery.state in (DeliveryState.SENT, DeliveryState.VERIFIED)]
    verified = sum(delivery.state is DeliveryState.VERIFIED for delivery in taken)
    if verified == len(taken):
        return "verified" if taken else None
    if any(delivery.check_at is not None for delivery in taken):
        return "to be verified"
    return "partly verified" if verified else "unverified"


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
        "quarantine": [set_aside(item) for item in store.quarantined_of(seen.study.study_uid)],
        "events": [_plain(event) for event in store.events_of(seen.study.study_uid)],
    }


def action(run: Run) -> str | None:
    """What a person does about a run that FAILED; None where nothing is to be done or nobody knows."""
    if run.state is not RunState.FAILED or run.failure is None:
        return None
    return POLICIES[Failure(run.failure)].action.replace("STUDY", run.study_uid)


def event(happened: Event) -> dict[str, object]:
    """A line of `logs`."""
    return _plain(happened)


def statistics(figures: Figures) -> dict[str, object]:
    """What `stats` prints: counts, and the middle and the slow end of how long things took."""
    oldest = figures.oldest_queued_at
    return {
        "studies": figures.studies,
        "images": figures.instances,
        "image_gib": round(figures.instance_bytes / 2**30, 3),
        "quarantined": figures.quarantined,
        "runs": dict(figures.runs),
        "deliveries": dict(figures.deliveries),
        "outcomes": dict(figures.outcomes),
        "run_s": _spread(figures.run_s),
        "last_image_to_result_s": _spread(figures.waits_s),
        "oldest_queued_at": oldest.isoformat(timespec="seconds") if oldest else None,
    }


def _spread(seconds: Sequence[float]) -> dict[str, float | int | None]:
    """How many, the median, the value that 95 of 100 stay below, and the largest; None where there is none."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    picked = {"p50": last // 2, "p95": last * 95 // 100, "max": last}
    return {"count": len(ordered)} | {name: round(ordered[at], 1) if ordered else None for name, at in picked.items()}


def set_aside(item: Quarantined) -> dict[str, object]:
    """What `quarantine` and `show` say of a file in quarantine; kept: where it lies, or why it does not."""
    return {**_plain(item), "kept": item.path or "let go: the quarantine was full"}


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
