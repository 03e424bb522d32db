"""What an admin has switched for the whole node and a restart does not change: whether work is paused."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from salsa_node.store_columns import METADATA, UtcDateTime
from salsa_node.store_connection import writer
from salsa_node.store_queries import Queries
from salsa_node.store_transaction import Transaction, transaction

SWITCHES = sa.Table(
    "switches",
    METADATA,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", UtcDateTime, nullable=False),
)

_PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class Pause:
    """Since when no run is begun, and why."""

    reason: str
    at: datetime


class Switches(Queries):
    """What holds for all studies alike."""

    def pause(self, reason: str, now: datetime) -> Pause:
        """Begin no run until `resume`; what runs goes on, images are taken and results sent as ever.

        Where work is paused already, that stays as it is.
        """
        with transaction(writer(self._engine)) as t:
            there = paused(t)
            if there is None:
                t.execute(sa.insert(SWITCHES).values(name=_PAUSED, reason=reason, at=now))
                t.event(now, None, "node", "queue", "queue.paused", reason)
            return there or Pause(reason, now)

    def resume(self, now: datetime) -> Pause | None:
        """Begin runs again; the pause that is over, None where there was none."""
        with transaction(writer(self._engine)) as t:
            there = paused(t)
            if there is not None:
                t.execute(sa.delete(SWITCHES).where(SWITCHES.c.name == _PAUSED))
                t.event(now, None, "node", "queue", "queue.resumed", "")
            return there

    def paused(self) -> Pause | None:
        """The pause that is on."""
        with transaction(self._engine) as t:
            return paused(t)


def paused(t: Transaction) -> Pause | None:
    """The pause that is on, as this transaction sees it."""
    return t.one(Pause, sa.select(SWITCHES.c.reason, SWITCHES.c.at).where(SWITCHES.c.name == _PAUSED))
