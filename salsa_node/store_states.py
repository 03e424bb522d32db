"""The states that a series, a run and a delivery may be in, and which lead to which."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final


class SeriesState(Enum):
    """Is a series still arriving?"""

    RECEIVING = "RECEIVING"
    COMPLETE = "COMPLETE"
    REJECTED = "REJECTED"


class RunState(Enum):
    """How far one pipeline is with one study."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    PRODUCED = "PRODUCED"
    FAILED = "FAILED"
    BLOCKED = "BLOCKED"
    CANCELLED = "CANCELLED"
    SUPERSEDED = "SUPERSEDED"


class DeliveryState(Enum):
    """How far one object is on its way to one destination."""

    PENDING = "PENDING"
    SENT = "SENT"
    VERIFIED = "VERIFIED"
    GAVE_UP = "GAVE_UP"
    WITHDRAWN = "WITHDRAWN"
    LEFT_OUT = "LEFT_OUT"
    HELD = "HELD"


State = SeriesState | RunState | DeliveryState

TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    SeriesState.RECEIVING: frozenset({SeriesState.COMPLETE}),
    SeriesState.COMPLETE: frozenset({SeriesState.REJECTED, SeriesState.RECEIVING}),
    SeriesState.REJECTED: frozenset({SeriesState.RECEIVING}),
    RunState.QUEUED: frozenset({RunState.RUNNING, RunState.CANCELLED}),
    RunState.RUNNING: frozenset(
        {RunState.PRODUCED, RunState.QUEUED, RunState.FAILED, RunState.BLOCKED, RunState.CANCELLED}
    ),
    RunState.PRODUCED: frozenset({RunState.SUPERSEDED}),
    RunState.FAILED: frozenset({RunState.QUEUED}),
    RunState.BLOCKED: frozenset(),
    RunState.CANCELLED: frozenset(),
    RunState.SUPERSEDED: frozenset(),
    DeliveryState.PENDING: frozenset(
        {
            DeliveryState.SENT,
            DeliveryState.PENDING,
            DeliveryState.GAVE_UP,
            DeliveryState.WITHDRAWN,
            DeliveryState.LEFT_OUT,
            DeliveryState.HELD,
        }
    ),
    DeliveryState.HELD: frozenset({DeliveryState.PENDING, DeliveryState.WITHDRAWN}),
    DeliveryState.SENT: frozenset({DeliveryState.VERIFIED, DeliveryState.PENDING}),
    DeliveryState.VERIFIED: frozenset({DeliveryState.PENDING}),
    DeliveryState.GAVE_UP: frozenset({DeliveryState.PENDING, DeliveryState.WITHDRAWN}),
    DeliveryState.WITHDRAWN: frozenset({DeliveryState.PENDING}),
    DeliveryState.LEFT_OUT: frozenset({DeliveryState.PENDING}),
}
