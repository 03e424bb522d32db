"""What the record says of storage commitment: who asked for which instances, and whether the answer has gone out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from salsa_node.errors import UnknownStudy
from salsa_node.store_columns import METADATA, UtcDateTime
from salsa_node.store_connection import writer
from salsa_node.store_queries import Queries
from salsa_node.store_transaction import Transaction, transaction

COMMITMENTS = sa.Table(
    "commitments",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("transaction_uid", sa.String(64), nullable=False),
    sa.Column("calling_ae", sa.String(16), nullable=False),
    sa.Column("requested", sa.JSON, nullable=False),
    sa.Column("asked_at", UtcDateTime, nullable=False),
    sa.Column("not_before", UtcDateTime),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("last_error", sa.Text, nullable=False),
    sa.Column("reported_at", UtcDateTime),
)


@dataclass(frozen=True, slots=True)
class Commitment:
    """A request for storage commitment.

    requested: SOP class and instance of each reference.
    not_before: when a new association reports; None once reported or given up.
    """

    id: int
    transaction_uid: str
    calling_ae: str
    requested: Sequence[Sequence[str]]
    asked_at: datetime
    not_before: datetime | None
    attempt: int
    last_error: str
    reported_at: datetime | None


class Commitments(Queries):
    """The requests for storage commitment; each method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._writer = writer(engine)

    def ask_commitment(
        self, transaction_uid: str, calling_ae: str, requested: Sequence[tuple[str, str]], due: datetime, now: datetime
    ) -> Commitment:
        """Note a request; requested: SOP class and instance of each. From `due` on a new association reports."""
        values = {
            "transaction_uid": transaction_uid,
            "calling_ae": calling_ae,
            "requested": [list(pair) for pair in requested],
            "asked_at": now,
            "not_before": due,
            "attempt": 0,
            "last_error": "",
        }
        with transaction(self._writer) as t:
            number = t.insert(COMMITMENTS, **values)
            t.event(now, None, "commitment", number, "commitment.asked", f"{len(requested)} instances, by {calling_ae}")
            return _commitment(t, number)

    def due_commitment(self, now: datetime) -> Commitment | None:
        """The request that has waited longest for its report by a new association."""
        with transaction(self._engine) as t:
            due = sa.select(COMMITMENTS).where(COMMITMENTS.c.reported_at.is_(None), COMMITMENTS.c.not_before <= now)
            return t.one(Commitment, due.order_by(COMMITMENTS.c.not_before, COMMITMENTS.c.id).limit(1))

    def commitment_reported(self, number: int, detail: str, now: datetime) -> Commitment:
        """The answer has gone out."""
        with transaction(self._writer) as t:
            where = COMMITMENTS.c.id == number
            t.execute(sa.update(COMMITMENTS).where(where).values(reported_at=now, not_before=None, last_error=""))
            t.event(now, None, "commitment", number, "commitment.reported", detail)
            return _commitment(t, number)

    def commitment_failed(self, number: int, error: str, due: datetime | None, now: datetime) -> Commitment:
        """The answer did not go out; due: when to try again, None to give up, with an event. Counts an attempt."""
        with transaction(self._writer) as t:
            attempt = _commitment(t, number).attempt + 1
            changes = {"attempt": attempt, "last_error": error, "not_before": due}
            t.execute(sa.update(COMMITMENTS).where(COMMITMENTS.c.id == number).values(**changes))
            if due is None:
                t.event(now, None, "commitment", number, "commitment.gave_up", error)
            return _commitment(t, number)


def _commitment(t: Transaction, number: int) -> Commitment:
    found = t.one(Commitment, sa.select(COMMITMENTS).where(COMMITMENTS.c.id == number))
    if found is None:
        raise UnknownStudy(f"the store holds no request for storage commitment {number}")
    return found
