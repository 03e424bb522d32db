"""What may be asked of the record: studies, series, instances, runs, objects, deliveries, events."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import sqlalchemy as sa

from salsa_node.errors import UnknownStudy
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
    Instance,
    Quarantined,
    ResultObject,
    Run,
    RunState,
    Series,
    SeriesState,
    Study,
)
from salsa_node.store_transaction import transaction


def standing(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Of the runs of one study, oldest first, those that no newer one displaces; none that has yielded."""
    runs = [run for run in runs if not run.has_yielded]
    newest_first: list[Run] = []
    for n, run in reversed(list(enumerate(runs))):
        if not any(newer.displaces(run) for newer in runs[n + 1 :]):
            newest_first.append(run)
    return tuple(reversed(newest_first))


class Queries:
    """The questions; each is answered from one moment of the store."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def studies(self, limit: int = 100) -> tuple[Study, ...]:
        """The studies, newest first."""
        with transaction(self._engine) as t:
            newest = sa.select(STUDIES).order_by(STUDIES.c.last_at.desc(), STUDIES.c.study_uid).limit(limit)
            return t.all(Study, newest)

    def study(self, name: str) -> Study:
        """The study of that Study Instance UID, unique beginning of one, or accession number. Raises UnknownStudy."""
        with transaction(self._engine) as t:
            exact = t.one(Study, sa.select(STUDIES).where(STUDIES.c.study_uid == name))
            if exact is not None:
                return exact
            alike = sa.or_(STUDIES.c.study_uid.startswith(name, autoescape=True), STUDIES.c.accession_number == name)
            found = t.all(Study, sa.select(STUDIES).where(alike).limit(2)) if name else ()
        if not found:
            raise UnknownStudy("no study goes by that UID, beginning of a UID, or accession number")
        if len(found) > 1:
            raise UnknownStudy("more than one study goes by that name; give the whole Study Instance UID")
        return found[0]

    def series_of(self, study_uid: str) -> tuple[Series, ...]:
        """The series of a study, by number."""
        with transaction(self._engine) as t:
            of_study = sa.select(SERIES).where(SERIES.c.study_uid == study_uid)
            return t.all(Series, of_study.order_by(SERIES.c.series_number, SERIES.c.series_uid))

    def instances_of(self, study_uid: str, series_uid: str | None = None) -> tuple[Instance, ...]:
        """The instances of a study, or of one series of it, by UID."""
        with transaction(self._engine) as t:
            wanted = sa.select(INSTANCES).where(INSTANCES.c.study_uid == study_uid)
            if series_uid is not None:
                wanted = wanted.where(INSTANCES.c.series_uid == series_uid)
            return t.all(Instance, wanted.order_by(INSTANCES.c.sop_instance_uid))

    def quarantined_of(self, study_uid: str) -> tuple[Quarantined, ...]:
        """What came for a study and contradicted what was stored, oldest first."""
        with transaction(self._engine) as t:
            of_study = sa.select(QUARANTINE).where(QUARANTINE.c.study_uid == study_uid)
            return t.all(Quarantined, of_study.order_by(QUARANTINE.c.id))

    def run(self, run_id: int) -> Run:
        """The run of that number. Raises UnknownStudy."""
        with transaction(self._engine) as t:
            return t.run(run_id)

    def runs_of(self, study_uid: str) -> tuple[Run, ...]:
        """The runs of a study, oldest first."""
        with transaction(self._engine) as t:
            return t.all(Run, sa.select(RUNS).where(RUNS.c.study_uid == study_uid).order_by(RUNS.c.id))

    def current_runs(self, study_uid: str) -> tuple[Run, ...]:
        """The runs whose results count, oldest first: one for each series that is analysed."""
        with transaction(self._engine) as t:
            current = sa.select(RUNS).where(RUNS.c.study_uid == study_uid, RUNS.c.state == RunState.PRODUCED)
            return t.all(Run, current.order_by(RUNS.c.id))

    def runs_in(self, *states: RunState) -> tuple[Run, ...]:
        """Every run in one of those states, oldest first."""
        with transaction(self._engine) as t:
            return t.all(Run, sa.select(RUNS).where(RUNS.c.state.in_(states)).order_by(RUNS.c.id))

    def next_in_line(self) -> Run | None:
        """The run that has been QUEUED longest: most likely the next one to be claimed."""
        with transaction(self._engine) as t:
            queued = sa.select(RUNS).where(RUNS.c.state == RunState.QUEUED)
            return t.one(Run, queued.order_by(RUNS.c.queued_at, RUNS.c.id).limit(1))

    def objects_of(self, run_id: int) -> tuple[ResultObject, ...]:
        """The objects of a run."""
        with transaction(self._engine) as t:
            return t.all(ResultObject, sa.select(OBJECTS).where(OBJECTS.c.run_id == run_id).order_by(OBJECTS.c.id))

    def deliveries_of(self, run_id: int) -> tuple[Delivery, ...]:
        """The deliveries of a run."""
        with transaction(self._engine) as t:
            of_run = sa.select(DELIVERIES).where(DELIVERIES.c.run_id == run_id)
            return t.all(Delivery, of_run.order_by(DELIVERIES.c.id))

    def events_of(self, study_uid: str) -> tuple[Event, ...]:
        """What happened to a study, oldest first."""
        with transaction(self._engine) as t:
            return t.all(Event, sa.select(EVENTS).where(EVENTS.c.study_uid == study_uid).order_by(EVENTS.c.id))

    def is_result(self, sop_instance_uid: str) -> bool:
        """Whether an object of that UID was made here."""
        with transaction(self._engine) as t:
            return (
                t.execute(sa.select(OBJECTS.c.id).where(OBJECTS.c.sop_instance_uid == sop_instance_uid)).first()
                is not None
            )

    def instance(self, sop_instance_uid: str) -> Instance | None:
        """The stored instance of that UID, if there is one."""
        with transaction(self._engine) as t:
            return t.one(Instance, sa.select(INSTANCES).where(INSTANCES.c.sop_instance_uid == sop_instance_uid))

    def study_to_assemble(self, but: Collection[str] = ()) -> Study | None:
        """The study, waiting longest, that has new instances and no series RECEIVING; none of `but`."""
        receiving = sa.exists().where(
            SERIES.c.study_uid == STUDIES.c.study_uid, SERIES.c.state == SeriesState.RECEIVING
        )
        wanted = sa.select(STUDIES).where(STUDIES.c.instances > STUDIES.c.assembled_instances, ~receiving)
        if but:
            wanted = wanted.where(STUDIES.c.study_uid.not_in(but))
        with transaction(self._engine) as t:
            return t.one(Study, wanted.order_by(STUDIES.c.last_at, STUDIES.c.study_uid).limit(1))
