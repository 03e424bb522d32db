"""What a person decided about a result before it leaves: a study is held back, or its current result released."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from salsa_node.errors import UnknownStudy
from salsa_node.store_connection import writer
from salsa_node.store_queries import Queries
from salsa_node.store_rows import DELIVERIES, EVENTS, METADATA, RUNS, Delivery, DeliveryState, Run, RunState
from salsa_node.store_transaction import Transaction, transaction

REVIEWS = sa.Table(
    "reviews",
    METADATA,
    sa.Column("study_uid", sa.String(64), primary_key=True),
    sa.Column("held", sa.Boolean, nullable=False),
    sa.Column("released_run_id", sa.Integer),
)


class Reviews(Queries):
    """The changes that people make to what may leave; each method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._writer = writer(engine)

    def hold_study(self, study_uid: str, now: datetime) -> tuple[Delivery, ...]:
        """No result of the study leaves until it is released, nor one that is yet to come; what is HELD of it now.

        What is on its way this moment, and what has arrived, is not called back. Raises UnknownStudy.
        """
        with transaction(self._writer) as t:
            t.study(study_uid)
            _write(t, study_uid, held=True, released_run_id=None)
            t.event(now, study_uid, "study", study_uid, "study.held", "")
            idle = sa.or_(DELIVERIES.c.lease_until.is_(None), DELIVERIES.c.lease_until <= now)
            for delivery in t.all(Delivery, _of_current(study_uid, DeliveryState.PENDING).where(idle)):
                t.become_delivery(delivery, DeliveryState.HELD, now, "held by a person")
            return t.all(Delivery, _of_current(study_uid, DeliveryState.HELD))

    def release_study(self, study_uid: str, now: datetime) -> tuple[Delivery, ...]:
        """The current results of the study may leave, and what is HELD of them is due; a later result is held anew.

        What `hold_study` said of results to come holds no longer. Raises UnknownStudy where the study has no result
        and nobody held it.
        """
        with transaction(self._writer) as t:
            t.study(study_uid)
            current = sa.select(RUNS).where(RUNS.c.study_uid == study_uid, RUNS.c.state == RunState.PRODUCED)
            run = t.one(Run, current.order_by(RUNS.c.finished_at.desc(), RUNS.c.id.desc()))
            if run is None and not _is_held_by_a_person(t, study_uid):
                raise UnknownStudy("this study has no result that could be released; wait for its run")
            _write(t, study_uid, held=False, released_run_id=run.id if run else None)
            told = f"run {run.id}" if run else "no result yet"
            t.event(now, study_uid, "study", study_uid, "study.released_result", told)
            held = t.all(Delivery, _of_current(study_uid, DeliveryState.HELD))
            again = {"attempt": 0, "not_before": None, "last_error": None}
            return tuple(t.become_delivery(one, DeliveryState.PENDING, now, "released", **again) for one in held)

    def is_held_by_a_person(self, study_uid: str) -> bool:
        """Whether somebody held the study, and nobody has released it since."""
        with transaction(self._engine) as t:
            return _is_held_by_a_person(t, study_uid)

    def withdraw_held(self, study_uid: str, now: datetime) -> tuple[Delivery, ...]:
        """What is HELD of the study's current result never leaves: WITHDRAWN."""
        with transaction(self._writer) as t:
            held = t.all(Delivery, _of_current(study_uid, DeliveryState.HELD))
            return tuple(t.become_delivery(one, DeliveryState.WITHDRAWN, now, "a self-test") for one in held)

    def is_held(self, run: Run, by_default: bool) -> bool:
        """Whether a result waits for a person; by_default: what holds where no person said anything."""
        with transaction(self._engine) as t:
            found = (
                t.connection.execute(sa.select(REVIEWS).where(REVIEWS.c.study_uid == run.study_uid)).mappings().first()
            )
            if found is None:
                return by_default
            return bool(found["held"]) or (by_default and not _is_released(t, run))

    def hold_back(self, delivery_ids: Sequence[int], owner: str, now: datetime) -> tuple[Delivery, ...]:
        """Those are HELD until a person releases the study; no attempt is counted. Raises LeaseLost."""
        with transaction(self._writer) as t:
            leased = [t.leased_delivery(one, owner) for one in delivery_ids]
            why = "held: it waits for a person"
            return tuple(
                t.become_delivery(one, DeliveryState.HELD, now, why, attempt=one.attempt - 1, last_error=why)
                for one in leased
            )


def _is_held_by_a_person(t: Transaction, study_uid: str) -> bool:
    return bool(t.connection.execute(sa.select(REVIEWS.c.held).where(REVIEWS.c.study_uid == study_uid)).scalar())


def _is_released(t: Transaction, run: Run) -> bool:
    """Whether a result was there when a person released the study's, by the order of events: a clock may be set."""
    if run.state is not RunState.PRODUCED:
        return False
    made, released = (
        t.connection.execute(
            sa.select(sa.func.max(EVENTS.c.id)).where(
                EVENTS.c.study_uid == run.study_uid, EVENTS.c.name == name, EVENTS.c.subject_id == subject_id
            )
        ).scalar()
        for name, subject_id in (("run.produced", str(run.id)), ("study.released_result", run.study_uid))
    )
    return made is not None and released is not None and bool(made < released)


def _of_current(study_uid: str, state: DeliveryState) -> sa.Select[*tuple[object, ...]]:
    """The deliveries of the study's current result that are in that state."""
    current = sa.select(RUNS.c.id).where(RUNS.c.study_uid == study_uid, RUNS.c.state == RunState.PRODUCED)
    return sa.select(DELIVERIES).where(DELIVERIES.c.run_id.in_(current), DELIVERIES.c.state == state)


def _write(t: Transaction, study_uid: str, **values: object) -> None:
    where = REVIEWS.c.study_uid == study_uid
    if t.execute(sa.update(REVIEWS).where(where).values(**values)).rowcount == 0:
        t.execute(sa.insert(REVIEWS).values(study_uid=study_uid, **values))
