"""Which lesions RECIST can measure: the rule and its numbers, data only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import pi

MEASURABLE_MM3 = 4 / 3 * pi * 5.0**3  # the 10 mm sphere that SALSA puts in place of RECIST's 10 mm long axis


class Rule(Enum):
    """How measurability is decided."""

    DIAMETER = "diameter"  #: longest axial diameter >= 10 mm, or >= 2 x slice spacing where that exceeds 5 mm
    VOLUME = "volume"  #: volume >= 523.6 mm3 (SALSA)


@dataclass(frozen=True, slots=True)
class Criteria:
    """The rule and its numbers; written into every result (RECIST 1.1 section 3.1, Eisenhauer 2009).

    min_lesion_mm3: smaller components are counted as specks, not reported as lesions.
    """

    rule: Rule = Rule.DIAMETER
    min_diameter_mm: float = 10.0
    thick_slice_mm: float = 5.0
    thick_slice_factor: float = 2.0
    min_volume_mm3: float = MEASURABLE_MM3
    min_lesion_mm3: float = 0.0

    def min_long_axis_mm(self, slice_spacing_mm: float) -> float:
        """The smallest long axis that counts as measurable at this slice spacing.

        >>> Criteria().min_long_axis_mm(2.5), Criteria().min_long_axis_mm(7.0)
        (10.0, 14.0)
        """
        if slice_spacing_mm > self.thick_slice_mm:
            return max(self.min_diameter_mm, self.thick_slice_factor * slice_spacing_mm)
        return self.min_diameter_mm
