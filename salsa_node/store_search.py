"""What an admin asks of the whole record: studies by filter, everything about many at once, events, figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from salsa_node.store_queries import Queries
from salsa_node.store_rows import (
    DELIVERIES,
    EVENTS,
    INSTANCES,
    OBJECTS,
    QUARANTINE,
    RUNS,
    SERIES,
    STUDIES,
    Delivery,
    Event,
    Run,
    RunState,
    Series,
    Study,
)
from salsa_node.store_transaction import transaction

#: what studies may be sorted by -> the column, and whether the largest comes first
ORDERS: Mapping[str, tuple[sa.Column[object], bool]] = {
    "last": (STUDIES.c.last_at, True),
    "first": (STUDIES.c.first_at, True),
    "date": (STUDIES.c.study_date, True),
    "accession": (STUDIES.c.accession_number, False),
    "from": (STUDIES.c.calling_ae, False),
    "images": (STUDIES.c.instances, True),
}


@dataclass(frozen=True, slots=True)
class Sought:
    """Which studies are asked for; what is left out holds for every study.

    since, until: when the last image came. dates: first and last Study Date (YYYYMMDD), both included.
    sender, called: AE titles, the calling and ours. accession: a beginning of the accession number, in capitals or not.
    order: a key of `ORDERS`. images, results: only studies of which such files are kept.
    """

    since: datetime | None = None
    until: datetime | None = None
    dates: tuple[str, str] | None = None
    sender: str = ""
    called: str = ""
    accession: str = ""
    order: str = "last"
    reverse: bool = False
    images: bool = False
    results: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """Everything about one study that its standing is read from; runs and deliveries oldest first."""

    study: Study
    series: tuple[Series, ...]
    runs: tuple[Run, ...]
    deliveries: tuple[Delivery, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts over the whole record, and how long runs took that ended since the moment asked for.

    runs, deliveries: by state; outcomes: of results that ended since then; run_s: start to end of each such run, in
    seconds; waits_s: from its study's last image to its end; oldest_queued_at: since when the first in line waits.
    """

    studies: int
    instances: int
    instance_bytes: int
    quarantined: int
    runs: Mapping[str, int]
    deliveries: Mapping[str, int]
    outcomes: Mapping[str, int]
    run_s: tuple[float, ...]
    waits_s: tuple[float, ...]
    oldest_queued_at: datetime | None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that a row names.

    path: relative to the data folder. kind: "image", "quarantined", "result" or "masks". digest: XXH3 (128 bits) of
    the data set of an image, SHA-256 of the whole file of a result or of masks; "" where it is not known.
    """

    path: str
    kind: str
    digest: str
    study_uid: str


class Search(Queries):
    """The questions of an admin; each is answered from one moment of the store."""

    def find_studies(self, sought: Sought, limit: int = 50, skip: int = 0) -> tuple[Rows, ...]:
        """The studies sought with all their rows, in their order, at most `limit` after the first `skip`."""
        column, largest_first = ORDERS[sought.order]
        by = column.desc() if largest_first is not sought.reverse else column.asc()
        wanted = sa.select(STUDIES).where(*_conditions(sought)).order_by(by, STUDIES.c.study_uid)
        with transaction(self._engine) as t:
            studies = t.all(Study, wanted.limit(limit).offset(skip))
            uids = [study.study_uid for study in studies]
            series, runs, deliveries = defaultdict(list), defaultdict(list), defaultdict(list)
            order = (SERIES.c.series_number, SERIES.c.series_uid)
            for one in t.all(Series, sa.select(SERIES).where(SERIES.c.study_uid.in_(uids)).order_by(*order)):
                series[one.study_uid].append(one)
            of_run = {}
            for run in t.all(Run, sa.select(RUNS).where(RUNS.c.study_uid.in_(uids)).order_by(RUNS.c.id)):
                runs[run.study_uid].append(run)
                of_run[run.id] = run.study_uid
            counted = RUNS.c.study_uid.in_(uids)
            sent = sa.select(DELIVERIES).join(RUNS, RUNS.c.id == DELIVERIES.c.run_id).where(counted)
            for delivery in t.all(Delivery, sent.order_by(DELIVERIES.c.id)):
                deliveries[of_run[delivery.run_id]].append(delivery)
        return tuple(
            Rows(study, tuple(series[uid]), tuple(runs[uid]), tuple(deliveries[uid]))
            for study, uid in zip(studies, uids, strict=True)
        )

    def find_events(
        self,
        *,
        study_uid: str | None = None,
        name: str = "",
        subject: str = "",
        since: datetime | None = None,
        after: int = 0,
        limit: int = 100,
    ) -> tuple[Event, ...]:
        """The newest `limit` events, oldest first.

        name: a beginning, as in "run." or "run.failed". after: only events of a higher number.
        """
        wanted = sa.select(EVENTS).where(EVENTS.c.id > after)
        if study_uid is not None:
            wanted = wanted.where(EVENTS.c.study_uid == study_uid)
        if name:
            wanted = wanted.where(EVENTS.c.name.startswith(name, autoescape=True))
        if subject:
            wanted = wanted.where(EVENTS.c.subject == subject)
        if since is not None:
            wanted = wanted.where(EVENTS.c.at >= since)
        with transaction(self._engine) as t:
            return t.all(Event, wanted.order_by(EVENTS.c.id.desc()).limit(limit))[::-1]

    def events_after(self, number: int, limit: int = 1000) -> tuple[Event, ...]:
        """The events that follow that one, oldest first."""
        with transaction(self._engine) as t:
            return t.all(Event, sa.select(EVENTS).where(EVENTS.c.id > number).order_by(EVENTS.c.id).limit(limit))

    def figures(self, since: datetime) -> Figures:
        """Counts over the whole record; durations and outcomes of the runs that ended at `since` or later."""
        ended = sa.and_(RUNS.c.finished_at >= since, RUNS.c.started_at.is_not(None))
        times = (
            sa.select(RUNS.c.started_at, RUNS.c.finished_at, STUDIES.c.last_at, RUNS.c.outcome)
            .join(STUDIES, STUDIES.c.study_uid == RUNS.c.study_uid)
            .where(ended)
        )
        with transaction(self._engine) as t:
            rows = t.connection.execute(times).all()
            size = t.connection.execute(sa.select(sa.func.sum(INSTANCES.c.size_bytes))).scalar()
            done = [(row.started_at, row.finished_at, row.last_at) for row in rows]
            queued = sa.select(sa.func.min(RUNS.c.queued_at)).where(RUNS.c.state == RunState.QUEUED)
            return Figures(
                studies=_count(t.connection, STUDIES),
                instances=_count(t.connection, INSTANCES),
                instance_bytes=int(size or 0),
                quarantined=_count(t.connection, QUARANTINE),
                runs=_by(t.connection, RUNS.c.state),
                deliveries=_by(t.connection, DELIVERIES.c.state),
                outcomes=_tally([row.outcome for row in rows if row.outcome is not None]),
                run_s=tuple((end - start).total_seconds() for start, end, _ in done),
                waits_s=tuple((end - last).total_seconds() for _, end, last in done if end >= last),
                oldest_queued_at=t.connection.execute(queued).scalar(),
            )

    def files(self, study_uid: str | None = None) -> tuple[StoredFile, ...]:
        """Every file that a row names, of one study or of all; what was purged has none."""
        masks = RUNS.c.masks_path.is_not(None)
        asked = (
            (INSTANCES, "image", INSTANCES.c.path, INSTANCES.c.digest, INSTANCES.c.study_uid, sa.true()),
            (
                QUARANTINE,
                "quarantined",
                QUARANTINE.c.path,
                QUARANTINE.c.digest,
                QUARANTINE.c.study_uid,
                QUARANTINE.c.path != "",
            ),
            (OBJECTS.join(RUNS), "result", OBJECTS.c.path, OBJECTS.c.sha256, RUNS.c.study_uid, OBJECTS.c.path != ""),
            (RUNS, "masks", RUNS.c.masks_path, RUNS.c.masks_sha256, RUNS.c.study_uid, masks),
        )
        found: dict[str, StoredFile] = {}
        with transaction(self._engine) as t:
            for table, kind, path, digest, study, kept in asked:
                wanted = sa.select(path, digest, study).select_from(table).where(kept)
                if study_uid is not None:
                    wanted = wanted.where(study == study_uid)
                for row in t.connection.execute(wanted):
                    found.setdefault(row[0], StoredFile(row[0], kind, row[1], row[2]))
        return tuple(found.values())


def _conditions(sought: Sought) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if sought.since is not None:
        found.append(STUDIES.c.last_at >= sought.since)
    if sought.until is not None:
        found.append(STUDIES.c.last_at < sought.until)
    if sought.dates is not None:
        found.append(STUDIES.c.study_date.between(*sought.dates))
    if sought.sender:
        found.append(STUDIES.c.calling_ae == sought.sender)
    if sought.called:
        found.append(STUDIES.c.called_ae == sought.called)
    if sought.accession:
        found.append(STUDIES.c.accession_number.istartswith(sought.accession, autoescape=True))
    if sought.images:
        found.append(STUDIES.c.instances > 0)
    if sought.results:
        of_study = sa.and_(RUNS.c.study_uid == STUDIES.c.study_uid, OBJECTS.c.run_id == RUNS.c.id)
        found.append(sa.exists().where(of_study, OBJECTS.c.path != ""))
    return found


def _count(connection: sa.Connection, table: sa.Table) -> int:
    return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def _by(connection: sa.Connection, state: sa.Column[object]) -> dict[str, int]:
    """How many rows are in each state."""
    rows = connection.execute(sa.select(state, sa.func.count()).group_by(state).order_by(state))
    return {str(getattr(found, "value", found)): int(count) for found, count in rows}


def _tally(words: Sequence[str]) -> dict[str, int]:
    return {word: words.count(word) for word in sorted(set(words))}
