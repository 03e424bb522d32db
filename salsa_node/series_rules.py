"""What is done with a series whose slices do not make one regular grid: data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

REFUSE: Final = "refuse"
RESAMPLE: Final = "resample"
_EITHER: Final = {"choices": (REFUSE, RESAMPLE)}


@dataclass(frozen=True, slots=True)
class SeriesRules:
    """Whether a series is refused, or its slices resampled for the networks; its results lie on its own slices.

    tilt: of slices that a tilted gantry shears against each other.
    irregular: of slices at unequal distances, missing ones among them, none further apart than max_gap_mm.
    """

    tilt: str = field(default=REFUSE, metadata=_EITHER)
    irregular: str = field(default=REFUSE, metadata=_EITHER)
    max_gap_mm: float = field(default=10.0, metadata={"above": 0, "max": 100})
