"""Deliveries under a lease of ours: what becomes of each is written down once, as soon as it is known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import datetime

from salsa_node.errors import LeaseLost
from salsa_node.settings import DeliverySettings
from salsa_node.store import Delivery, Store

log = logging.getLogger(__name__)


class Claimed:
    """The deliveries of one step, sent or asked about.

    owner: the name on their leases. clock: the time when the network has answered, which is when it is written down.
    done: delivery -> as it then is.
    """

    def __init__(
        self,
        store: Store,
        settings: DeliverySettings,
        owner: str,
        claimed: Sequence[Delivery],
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._settings = settings
        self._owner = owner
        self._clock = clock
        self._open = {delivery.id: delivery for delivery in claimed}
        self.done: dict[int, Delivery] = {}

    @property
    def open(self) -> tuple[Delivery, ...]:
        """What is not settled."""
        return tuple(self._open.values())

    def _settle(self, delivery: Delivery, write: Callable[[datetime], Delivery]) -> bool:
        """Write it down; False where it is settled by now, by a report or by another node: whose word then counts."""
        try:
            self.done[delivery.id] = write(self._clock())
        except LeaseLost:
            told = {"event": "delivery.lease_lost", "delivery": delivery.id}
            log.info("delivery settled meanwhile, by a report or by another node", extra=told)
        self._open.pop(delivery.id, None)
        return delivery.id in self.done
