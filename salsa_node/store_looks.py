"""What the record says of looks at a study: how its series scored, and what spoke for its being whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from salsa_node.errors import UnknownStudy
from salsa_node.store_queries import Queries
from salsa_node.store_rows import INSTANCES, LOOKS, SERIES, STUDIES, Look, Series, SeriesState, Study
from salsa_node.store_transaction import transaction, writer


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

    def quiet_series(self, quiet_since: datetime, overdue_since: datetime | None = None) -> Series | None:
        """The longest quiet RECEIVING series without an instance after `quiet_since`.

        overdue_since: one also counts whose study has new images from then or before that nobody has looked at.
        """
        with transaction(self._engine) as t:
            return t.one(Series, self._whole(quiet_since, overdue_since))

    def wait_for_series(self, series_uid: str, why: str, now: datetime) -> Series:
        """A RECEIVING series that is quiet, and not whole, is given as much time again; an event says why."""
        with transaction(self._writer) as t:
            series = t.series(series_uid)
            t.execute(sa.update(SERIES).where(SERIES.c.series_uid == series_uid).values(last_instance_at=now))
            t.event(now, series.study_uid, "series", series_uid, "series.waiting", why)
            return t.series(series_uid)

    def overdue(self, study_uid: str, since: datetime) -> bool:
        """Whether the study has new images from `since` or before that nobody has looked at."""
        with transaction(self._engine) as t:
            return t.one(Study, sa.select(STUDIES).where(STUDIES.c.study_uid == study_uid, _waiting(since))) is not None

    @staticmethod
    def _whole(quiet_since: datetime, overdue_since: datetime | None) -> sa.Select[Any]:
        due: sa.ColumnElement[bool] = SERIES.c.last_instance_at <= quiet_since
        if overdue_since is not None:
            due = sa.or_(due, sa.and_(STUDIES.c.study_uid == SERIES.c.study_uid, _waiting(overdue_since)))
        return (
            sa.select(SERIES)
            .join(STUDIES, STUDIES.c.study_uid == SERIES.c.study_uid)
            .where(SERIES.c.state == SeriesState.RECEIVING, due)
            .order_by(SERIES.c.last_instance_at, SERIES.c.series_uid)
            .limit(1)
        )

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
