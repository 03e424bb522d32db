"""What the record says of looks at a study: how its series scored, and what spoke for its being whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from salsa_node.errors import UnknownStudy
from salsa_node.store_connection import writer
from salsa_node.store_queries import Queries
from salsa_node.store_rows import INSTANCES, LOOKS, RUNS, SERIES, STUDIES, Look, Series, SeriesState, Study
from salsa_node.store_transaction import transaction


def _waiting(since: datetime) -> sa.ColumnElement[bool]:
    """Of a row of STUDIES: whether more images had come at `since` than have been looked at by now."""
    come = (
        sa.select(sa.func.count())
        .where(INSTANCES.c.study_uid == STUDIES.c.study_uid, INSTANCES.c.received_at <= since)
        .scalar_subquery()
    )
    return come > STUDIES.c.assembled_instances


class Looks(Queries):
    """The looks; each method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._writer = writer(engine)

    def note_look(
        self,
        study_uid: str,
        run_id: int | None,
        scores: Sequence[Mapping[str, object]],
        evidence: Sequence[Mapping[str, object]],
        now: datetime,
    ) -> Look:
        """Write down what a look at a study found; run_id: the run that it led to. Raises UnknownStudy."""
        values = {
            "study_uid": study_uid,
            "run_id": run_id,
            "at": now,
            "scores": list(scores),
            "evidence": list(evidence),
        }
        with transaction(self._writer) as t:
            t.study(study_uid)
            number = t.insert(LOOKS, **values)
            look = t.one(Look, sa.select(LOOKS).where(LOOKS.c.id == number))
        if look is None:
            raise UnknownStudy(f"the store holds no look {number}")
        return look

    def quiet_series(self, quiet_since: datetime, but_of: Collection[str] = ()) -> Series | None:
        """The longest quiet RECEIVING series without an instance after `quiet_since`, of no study in `but_of`."""
        with transaction(self._engine) as t:
            return t.one(Series, self._quiet(quiet_since, but_of))

    def wait_for_series(self, series_uid: str, why: str, now: datetime) -> Series:
        """A RECEIVING series that is quiet, and not whole, is given as much time again; an event says why."""
        with transaction(self._writer) as t:
            series = t.series(series_uid)
            t.execute(sa.update(SERIES).where(SERIES.c.series_uid == series_uid).values(last_instance_at=now))
            t.event(now, series.study_uid, "series", series_uid, "series.waiting", why)
            return t.series(series_uid)

    def overdue_study(self, since: datetime, but: Collection[str] = ()) -> Study | None:
        """The study, waiting longest, with new images from `since` or before that nobody looked at; none of `but`."""
        new = sa.select(STUDIES).where(STUDIES.c.instances > STUDIES.c.assembled_instances, _waiting(since))
        if but:
            new = new.where(STUDIES.c.study_uid.not_in(but))
        with transaction(self._engine) as t:
            return t.one(Study, new.order_by(STUDIES.c.first_at, STUDIES.c.study_uid).limit(1))

    def end_wait(self, study_uid: str, now: datetime) -> Study:
        """Whatever of a study is still RECEIVING is COMPLETE as it is; the study as it then is. Raises UnknownStudy."""
        with transaction(self._writer) as t:
            of_study = sa.select(SERIES).where(SERIES.c.study_uid == study_uid)
            for series in t.all(Series, of_study.where(SERIES.c.state == SeriesState.RECEIVING)):
                told = f"{series.instances} instances; it has been waited for long enough"
                t.become_series(series, SeriesState.COMPLETE, now, told)
            return t.study(study_uid)

    def wait_no_longer(self, run_id: int) -> None:
        """That run may be claimed though images of its study still come."""
        with transaction(self._writer) as t:
            t.execute(sa.update(RUNS).where(RUNS.c.id == run_id).values(overdue=True))

    @staticmethod
    def _quiet(quiet_since: datetime, but_of: Collection[str]) -> sa.Select[Any]:
        quiet = sa.select(SERIES).where(
            SERIES.c.state == SeriesState.RECEIVING, SERIES.c.last_instance_at <= quiet_since
        )
        if but_of:
            quiet = quiet.where(SERIES.c.study_uid.not_in(but_of))
        return quiet.order_by(SERIES.c.last_instance_at, SERIES.c.series_uid).limit(1)

    def association_ended(self, calling_ae: str, since: datetime, now: datetime, *, released: bool) -> tuple[str, ...]:
        """An event on every study that got images from that AE title since then: its association ended; their UIDs.

        released: it was released, not aborted.
        """
        name, words = ("study.released", "released") if released else ("study.aborted", "aborted")
        with transaction(self._writer) as t:
            fed = sa.select(STUDIES).where(STUDIES.c.calling_ae == calling_ae, STUDIES.c.last_at >= since)
            studies = t.all(Study, fed)
            for study in studies:
                t.event(now, study.study_uid, "study", study.study_uid, name, f"{calling_ae} {words} its association")
            return tuple(study.study_uid for study in studies)

    def looks_of(self, study_uid: str) -> tuple[Look, ...]:
        """The looks at a study, oldest first."""
        with transaction(self._engine) as t:
            return t.all(Look, sa.select(LOOKS).where(LOOKS.c.study_uid == study_uid).order_by(LOOKS.c.id))
