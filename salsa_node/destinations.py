"""Which configured destination a delivery goes to."""

from __future__ import annotations

from collections.abc import Sequence

from salsa_node.errors import DestinationRefused
from salsa_node.settings import SENDER, Destination
from salsa_node.store import Delivery, Store


def resolve(store: Store, delivery: Delivery, destinations: Sequence[Destination]) -> Destination:
    """Where that delivery goes; "sender" is who sent the study. Raises DestinationRefused naming what to configure."""
    if delivery.destination == SENDER:
        calling = store.study(store.run(delivery.run_id).study_uid).calling_ae
        for destination in destinations:
            if calling and destination.ae_title.strip() == calling:
                return destination
        raise DestinationRefused(
            f"the study came from AE title {calling!r} and no [[destination]] has this ae_title; add one with its host "
            "and port, then resend the study"
        )
    for destination in destinations:
        if destination.name == delivery.destination:
            return destination
    raise DestinationRefused(
        f"no [[destination]] is called {delivery.destination!r} any more; add it, then resend the study"
    )
