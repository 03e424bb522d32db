"""What the record says of objects on their way: claimed, sent, failed, given up, asked for again."""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa

from salsa_node.errors import IllegalTransition, UnknownStudy
from salsa_node.store_connection import writer
from salsa_node.store_queries import Queries, standing
from salsa_node.store_rows import (
    DELIVERIES,
    OBJECTS,
    RUNS,
    Delivery,
    DeliveryState,
    NewObject,
    ResultObject,
    Run,
    RunState,
)
from salsa_node.store_transaction import Transaction, columns, transaction


class Deliveries(Queries):
    """The changes of deliveries; each method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._writer = writer(engine)

    def claim_deliveries(self, owner: str, lease_s: float, now: datetime) -> tuple[Delivery, ...]:
        """The due deliveries of one run to one destination, leased to `owner`; () when none is due. Counts attempts."""
        due = sa.and_(
            DELIVERIES.c.state == DeliveryState.PENDING,
            sa.or_(DELIVERIES.c.not_before.is_(None), DELIVERIES.c.not_before <= now),
            sa.or_(DELIVERIES.c.lease_until.is_(None), DELIVERIES.c.lease_until <= now),
        )
        order = DELIVERIES.c.not_before.nulls_first(), DELIVERIES.c.id  # as SQLite does; PostgreSQL does not
        oldest = sa.select(DELIVERIES).where(due).order_by(*order).limit(1)
        with transaction(self._writer) as t:
            first = t.one(Delivery, oldest)
            while first is not None and (run := t.run(first.run_id)).state is RunState.SUPERSEDED:
                t.withdraw_superseded(run.study_uid, now)  # a dead node was sending it when its place was taken
                first = t.one(Delivery, oldest)
            if first is None:
                return ()
            together = sa.and_(due, DELIVERIES.c.run_id == first.run_id, DELIVERIES.c.destination == first.destination)
            ids = t.execute(sa.select(DELIVERIES.c.id).where(together)).scalars().all()
            lease = {"lease_owner": owner, "lease_until": now + timedelta(seconds=lease_s)}
            mine = DELIVERIES.c.id.in_(ids)
            t.execute(sa.update(DELIVERIES).where(mine).values(attempt=DELIVERIES.c.attempt + 1, **lease))
            return t.all(Delivery, sa.select(DELIVERIES).where(mine).order_by(DELIVERIES.c.id))

    def delivered(
        self,
        delivery_id: int,
        owner: str,
        status: int,
        note: str | None,
        now: datetime,
        check_at: datetime | None = None,
    ) -> Delivery:
        """The destination took the object; `note` is its warning, if any. Raises LeaseLost.

        check_at: when it is asked whether it holds the object; None where nobody asks.
        """
        proof = {"check_at": check_at, "checks": 0, "proof": "" if check_at else "unverified", "transaction_uid": None}
        with transaction(self._writer) as t:
            delivery = t.leased_delivery(delivery_id, owner)
            changes = {"last_status": status, "last_error": note, "sent_at": now, **proof}
            return t.become_delivery(delivery, DeliveryState.SENT, now, note or "", **changes)

    def delivery_failed(
        self, delivery_id: int, owner: str, status: int | None, error: str, not_before: datetime, now: datetime
    ) -> Delivery:
        """The delivery stays PENDING, to be tried again from `not_before` on. Raises LeaseLost."""
        with transaction(self._writer) as t:
            delivery = t.leased_delivery(delivery_id, owner)
            changes = {"last_status": status, "last_error": error, "not_before": not_before}
            return t.become_delivery(delivery, DeliveryState.PENDING, now, error, **changes)

    def postpone(self, delivery_id: int, owner: str, why: str, not_before: datetime, now: datetime) -> Delivery:
        """It is not its time yet: PENDING until then, the attempt taken back. Raises LeaseLost.

        An event says so once, however often it is put off for the same reason.
        """
        with transaction(self._writer) as t:
            delivery = t.leased_delivery(delivery_id, owner)
            changes = {"attempt": delivery.attempt - 1, "last_error": why, "not_before": not_before}
            if delivery.last_error != why:
                return t.become_delivery(delivery, DeliveryState.PENDING, now, why, **changes)
            free = {"lease_owner": None, "lease_until": None}
            t.execute(sa.update(DELIVERIES).where(DELIVERIES.c.id == delivery_id).values(**changes, **free))
            return t.delivery(delivery_id)

    def sent_between(self, destination: str, since: datetime, until: datetime) -> int:
        """How many objects a destination has taken after the one time, and not after the other."""
        with transaction(self._engine) as t:
            sent = sa.select(sa.func.count()).where(
                DELIVERIES.c.destination == destination, DELIVERIES.c.sent_at > since, DELIVERIES.c.sent_at <= until
            )
            return int(t.connection.execute(sent).scalar_one())

    def give_up(self, delivery_id: int, owner: str, status: int | None, error: str, now: datetime) -> Delivery:
        """The delivery is not tried again until a person asks. Raises LeaseLost."""
        with transaction(self._writer) as t:
            delivery = t.leased_delivery(delivery_id, owner)
            return t.become_delivery(delivery, DeliveryState.GAVE_UP, now, error, last_status=status, last_error=error)

    def leave_out(self, delivery_id: int, owner: str, reason: str, now: datetime) -> Delivery:
        """The destination does not want this object, until a person asks again. Raises LeaseLost."""
        with transaction(self._writer) as t:
            delivery = t.leased_delivery(delivery_id, owner)
            changes = {"last_status": None, "last_error": reason}
            return t.become_delivery(delivery, DeliveryState.LEFT_OUT, now, reason, **changes)

    def stand_in(
        self, delivery_id: int, owner: str, kind: str, form: NewObject | None, reason: str, now: datetime
    ) -> Delivery:
        """The destination refuses the object: LEFT_OUT, and the one of that kind of the same run is due in its place.

        form: that object, where it may have been made just now. Raises LeaseLost; IllegalTransition where the run
        has none of that kind.
        """
        with transaction(self._writer) as t:
            delivery = t.leased_delivery(delivery_id, owner)
            run = t.run(delivery.run_id)
            wanted = sa.select(OBJECTS).where(OBJECTS.c.run_id == run.id, OBJECTS.c.kind == kind)
            item = t.one(ResultObject, wanted)
            if item is None and form is not None:
                t.insert(OBJECTS, run_id=run.id, **columns(form))
                item = t.one(ResultObject, wanted)
            if item is None:
                raise IllegalTransition(f"run {run.id} made no {kind} that could go in its place")
            of_item = sa.and_(DELIVERIES.c.object_id == item.id, DELIVERIES.c.destination == delivery.destination)
            there = t.one(Delivery, sa.select(DELIVERIES).where(of_item))
            if there is None:
                t.new_deliveries(run, item.id, [delivery.destination], now)
            elif there.state is DeliveryState.LEFT_OUT:
                again = {"attempt": 0, "not_before": None, "last_error": None}
                t.become_delivery(there, DeliveryState.PENDING, now, "in place of what was refused", **again)
            changes = {"last_status": None, "last_error": reason}
            return t.become_delivery(delivery, DeliveryState.LEFT_OUT, now, reason, **changes)

    def resend(self, study_uid: str, destination: str | None, now: datetime) -> tuple[Delivery, ...]:
        """The deliveries of the study's current results are due again, to one destination or to all they had.

        Those LEFT_OUT too: what a destination wants is asked when their turn comes.

        A destination that the result never went to gets deliveries of its own. Raises UnknownStudy where the
        study has no current result, or where a guard keeps its latest one here: then no older one takes its place;
        IllegalTransition where files of the result were purged.
        """
        with transaction(self._writer) as t:
            runs = t.all(Run, sa.select(RUNS).where(RUNS.c.study_uid == study_uid).order_by(RUNS.c.id))
            for latest in standing(runs):
                if latest.state is RunState.BLOCKED:
                    raise UnknownStudy(
                        f"the latest result of this study is kept here, and nothing was sent again: {latest.error} "
                        "Mend the cause and rerun the study, or rerun it with --masks"
                    )
            current = [run for run in runs if run.state is RunState.PRODUCED]
            if not current:
                raise UnknownStudy("this study has no result to send; wait for its run, or start one with rerun")
            made = sa.select(OBJECTS.c.id).where(OBJECTS.c.run_id.in_([run.id for run in current]))
            if t.execute(made.where(OBJECTS.c.path == "").limit(1)).first() is not None:
                raise IllegalTransition(
                    "the files of this result were purged, and nothing was sent again; "
                    f"salsa-node rerun {study_uid} fetches the images, makes the same objects again and sends them"
                )
            return tuple(item for run in current for item in self._due_again(t, run, destination, now))

    @staticmethod
    def _due_again(t: Transaction, run: Run, destination: str | None, now: datetime) -> tuple[Delivery, ...]:
        of_run = sa.select(DELIVERIES).where(DELIVERIES.c.run_id == run.id).order_by(DELIVERIES.c.id)
        if destination is not None:
            of_run = of_run.where(DELIVERIES.c.destination == destination)
        there = t.all(Delivery, of_run)
        for delivery in there:
            if delivery.state is not DeliveryState.PENDING:
                t.become_delivery(delivery, DeliveryState.PENDING, now, "asked for again", attempt=0, not_before=None)
            elif delivery.lease_until is None or delivery.lease_until <= now:
                mine = DELIVERIES.c.id == delivery.id
                t.execute(sa.update(DELIVERIES).where(mine).values(attempt=0, not_before=None))
        if destination is not None and not there:
            for item in t.all(ResultObject, sa.select(OBJECTS).where(OBJECTS.c.run_id == run.id)):
                t.new_deliveries(run, item.id, [destination], now)
        return t.all(Delivery, of_run)
