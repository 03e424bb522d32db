"""What a clock that was set back left in the future: work that would wait until a time that the clock has yet to reach.

Nothing that waits is ever due later than the longest wait from now, and nothing came later than now. Where a row
says otherwise, it was written before the clock was set back.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa

from salsa_node.store_connection import writer
from salsa_node.store_queries import Queries
from salsa_node.store_rows import DELIVERIES, RUNS, SERIES, DeliveryState, RunState, SeriesState
from salsa_node.store_transaction import transaction

_ADJUSTED = timedelta(minutes=1)  # what a clock may be put right by without anybody's notice

#: what waits -> the time that it waits for, whether that is when it came, and which rows wait
_WAITING: Final[Sequence[tuple[str, sa.Table, sa.Column[datetime], bool, sa.ColumnElement[bool]]]] = (
    ("series", SERIES, SERIES.c.last_instance_at, True, SERIES.c.state == SeriesState.RECEIVING),
    ("runs", RUNS, RUNS.c.not_before, False, RUNS.c.state == RunState.QUEUED),
    ("deliveries", DELIVERIES, DELIVERIES.c.not_before, False, DELIVERIES.c.state == DeliveryState.PENDING),
    ("leases", DELIVERIES, DELIVERIES.c.lease_until, False, DELIVERIES.c.state == DeliveryState.PENDING),
    ("checks", DELIVERIES, DELIVERIES.c.check_at, False, DELIVERIES.c.state == DeliveryState.SENT),
    (
        "leases of checks",
        DELIVERIES,
        DELIVERIES.c.lease_until,
        False,
        sa.and_(DELIVERIES.c.state == DeliveryState.SENT, DELIVERIES.c.check_at.is_not(None)),
    ),
)


class Clock(Queries):
    """The changes that a clock makes necessary which was set back."""

    def catch_up(self, longest_wait_s: float, now: datetime) -> str | None:
        """Whatever waits beyond `longest_wait_s` from now waits until now; an event tells how much of what.

        longest_wait_s: no wait and no lease is ever made longer. Returns the event's words, None where there was
        nothing: the usual case, which changes nothing.
        """
        future = [
            (words, table, when, state & (when > now + (_ADJUSTED if came else timedelta(seconds=longest_wait_s))))
            for words, table, when, came, state in _WAITING
        ]
        with transaction(self._engine) as t:
            asked = [sa.select(sa.exists().where(where)) for _, _, _, where in future]
            if not any(t.connection.execute(one).scalar() for one in asked):
                return None
        with transaction(writer(self._engine)) as t:
            told = []
            for words, table, when, where in future:
                count = t.execute(sa.update(table).where(where).values({when.name: now})).rowcount
                if count:
                    told.append(f"{count} {words}")
            if not told:
                return None
            detail = f"the clock was set back; what waited for a time to come goes on now: {', '.join(told)}"
            t.event(now, None, "node", "clock", "node.clock", detail)
            return detail
