"""Everything that a store was told, for tests that look for what must not be there."""

from __future__ import annotations

import sqlalchemy as sa

from salsa_node.store import Event, Store
from salsa_node.store_rows import EVENTS
from salsa_node.store_transaction import transaction

LEFT = ("study.released", "study.aborted")  #: written whenever the sender's association happens to end


def events(store: Store) -> tuple[Event, ...]:
    """Every event but how senders left, those of no study too, oldest first."""
    with transaction(store._engine) as t:
        return t.all(Event, sa.select(EVENTS).where(EVENTS.c.name.not_in(LEFT)).order_by(EVENTS.c.id))
