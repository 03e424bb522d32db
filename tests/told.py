"""Everything that a store was told, for tests that look for what must not be there."""

from __future__ import annotations

import sqlalchemy as sa

from salsa_node.store import Event, Store
from salsa_node.store_rows import EVENTS
from salsa_node.store_transaction import transaction


def events(store: Store) -> tuple[Event, ...]:
    """Every event, those of no study too, oldest first."""
    with transaction(store._engine) as t:
        return t.all(Event, sa.select(EVENTS).order_by(EVENTS.c.id))
