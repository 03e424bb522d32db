"""What the record says of contrast phases: what the pixels of a series said, and which runs yielded because of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import sqlalchemy as sa

from salsa_node.store_connection import writer
from salsa_node.store_queries import Queries
from salsa_node.store_rows import PIXEL_PHASES, RUNS, SERIES, STUDIES, Run, RunState, SeenPhase, SeriesState, Study
from salsa_node.store_transaction import columns, transaction


class Phases(Queries):
    """The contrast phases; each method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._writer = writer(engine)

    def note_phase(
        self, run: Run, phase: str, certainty: float, after_injection_s: float | None, now: datetime
    ) -> SeenPhase | None:
        """What the pixels of the series that `run` analyses said; the last word counts. None for a run of no series.

        phase: in the words of `contrast_phase.Phase`. A word that is new, or of other images than before, is to be
        considered: see `study_to_reconsider`.
        """
        if run.series_uid is None:
            return None
        mine = sa.and_(PIXEL_PHASES.c.series_uid == run.series_uid, PIXEL_PHASES.c.part == run.part)
        with transaction(self._writer) as t:
            there = t.one(SeenPhase, sa.select(PIXEL_PHASES).where(mine))
            said = SeenPhase(
                series_uid=run.series_uid,
                part=run.part,
                study_uid=run.study_uid,
                run_id=run.id,
                source_digest=run.source_digest,
                phase=phase,
                certainty=certainty,
                after_injection_s=after_injection_s,
                at=now,
                considered=False,
            )
            is_old = there is not None and there.considered and there.says_the_same(said)
            seen = replace(said, considered=is_old)
            t.execute(sa.delete(PIXEL_PHASES).where(mine))
            t.execute(sa.insert(PIXEL_PHASES).values(**columns(seen)))
            if there is None or not there.says_the_same(seen):
                told = f"{phase} by its pixels, certainty {certainty:g}"
                t.event(now, run.study_uid, "series", run.series_uid, "series.phase", told)
            return seen

    def phases_of(self, study_uid: str) -> tuple[SeenPhase, ...]:
        """What the pixels of the series of a study said, as far as they were asked."""
        with transaction(self._engine) as t:
            return t.all(SeenPhase, sa.select(PIXEL_PHASES).where(PIXEL_PHASES.c.study_uid == study_uid))

    def study_to_reconsider(self) -> Study | None:
        """The study, waiting longest, of which a phase is to be considered; none that still comes or is analysed."""
        news = sa.select(PIXEL_PHASES.c.study_uid).where(~PIXEL_PHASES.c.considered)
        of_study = RUNS.c.study_uid == STUDIES.c.study_uid
        under_way = sa.exists().where(of_study, RUNS.c.state.in_([RunState.QUEUED, RunState.RUNNING]))
        coming = sa.exists().where(SERIES.c.study_uid == STUDIES.c.study_uid, SERIES.c.state == SeriesState.RECEIVING)
        wanted = sa.select(STUDIES).where(STUDIES.c.study_uid.in_(news), ~under_way, ~coming)
        with transaction(self._engine) as t:
            return t.one(Study, wanted.order_by(STUDIES.c.last_at, STUDIES.c.study_uid).limit(1))

    def study_reconsidered(self, study_uid: str, detail: str, now: datetime) -> None:
        """What the pixels of a study said has been considered; an event says what came of it."""
        with transaction(self._writer) as t:
            of_study = PIXEL_PHASES.c.study_uid == study_uid
            t.execute(sa.update(PIXEL_PHASES).where(of_study).values(considered=True))
            t.event(now, study_uid, "study", study_uid, "study.reconsidered", detail)

    def yield_run(self, run_id: int, owner: str, outcome: str, digest: str, reason: str, now: datetime) -> Run:
        """The run is CANCELLED though it came to a result, which is let go: the one in force is of a better series.

        Results in force that were to make room for it stand beside one another again. Raises LeaseLost where the
        run is no longer `owner`'s.
        """
        with transaction(self._writer) as t:
            run = t.leased_run(run_id, owner)
            stay = t.all(
                Run, sa.select(RUNS).where(RUNS.c.study_uid == run.study_uid, RUNS.c.state == RunState.PRODUCED)
            )
            for one in stay:
                beside = {*one.beside, *(other.place for other in stay)} - {one.place}
                t.execute(sa.update(RUNS).where(RUNS.c.id == one.id).values(beside=sorted(beside)))
            made = {"outcome": outcome, "digest": digest, "finished_at": now, "error": reason, "failure": None}
            return t.become_run(run, RunState.CANCELLED, now, reason, **made)
