"""What each series of a study is worth for finding liver lesions: points, and the reason for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, inf, radians

from salsa_node.candidate import BodyPart, Candidate, Kernel
from salsa_node.contrast_phase import Phase
from salsa_node.selection_rules import SelectionRules


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing found, and the points that it is worth."""

    criterion: str
    found: str
    points: float

    def __str__(self) -> str:
        return f"{self.found} {self.points:+.4g}"


@dataclass(frozen=True, slots=True)
class Score:
    """What a series is worth. faults: what rules it out; its points then count for nothing."""

    reasons: tuple[Reason, ...]
    faults: tuple[str, ...] = ()

    @property
    def points(self) -> float:
        """The sum, to a hundredth of a point: nobody prefers a series for less."""
        return round(sum(reason.points for reason in self.reasons), 2)

    def of(self, criterion: str) -> Reason:
        """The reason under that criterion. Raises KeyError where there is none."""
        return {reason.criterion: reason for reason in self.reasons}[criterion]

    def __str__(self) -> str:
        return f"{self.points:g} points: {', '.join(map(str, self.reasons))}"


def score(candidate: Candidate, rules: SelectionRules) -> Score:
    """The points of one series by those rules, and what rules it out."""
    reasons = (
        _phase(candidate, rules),
        _kind(candidate, rules),
        _kernel(candidate, rules),
        _step(candidate, rules),
        _coverage(candidate, rules),
        _body_part(candidate, rules),
        Reason(
            "compression", "with loss" if candidate.lossy else "without loss", rules.lossy if candidate.lossy else 0
        ),
    )
    return Score(reasons, (*candidate.faults, *_faults(candidate, rules)))


def preference(candidate: Candidate, score: Score) -> tuple[float, int, float, float, str]:
    """Sorts the better series first: points; then the most slices, the thinnest, the lowest number, the first UID."""
    return (
        -score.points,
        -len(candidate.paths),
        inf if candidate.slice_thickness_mm is None else candidate.slice_thickness_mm,
        inf if candidate.series_number is None else candidate.series_number,
        candidate.series_uid,
    )


def _faults(candidate: Candidate, rules: SelectionRules) -> list[str]:
    faults = []
    never = {word.upper() for word in rules.never} & candidate.image_types
    named = not any("Image Type" in fault for fault in candidate.faults)
    if never and named:
        faults.append(f"Image Type {', '.join(sorted(never))}: no slices of a volume in Hounsfield units")
    normal = candidate.normal_lps
    if normal is not None and not candidate.faults and abs(normal[2]) < cos(radians(rules.max_tilt_degrees)):
        faults.append(
            f"not axial: the slices' normal is more than {rules.max_tilt_degrees:g} degrees from the patient's z axis"
        )
    return faults


def _phase(candidate: Candidate, rules: SelectionRules) -> Reason:
    points = {
        Phase.PORTAL_VENOUS: rules.portal_venous,
        Phase.DELAYED: rules.delayed,
        Phase.ARTERIAL: rules.arterial,
        Phase.NATIVE: rules.native,
        Phase.UNKNOWN: rules.unknown_phase,
    }
    tags, pixels = candidate.phase.phase, candidate.pixel_phase
    named = "phase unknown" if tags is Phase.UNKNOWN else tags.value
    if pixels is None:
        return Reason("phase", named, points[tags])
    told = f"pixels: {pixels.phase.value}, tags: {tags.value}"
    if pixels.phase is Phase.UNKNOWN or pixels.certainty < rules.pixel_certainty:
        return Reason("phase", f"{told}, which count: the pixels are not certain", points[tags])
    return Reason("phase", told, points[pixels.phase])


def _kind(candidate: Candidate, rules: SelectionRules) -> Reason:
    if "SECONDARY" in candidate.image_types:
        return Reason("image type", "secondary", 0)
    if "DERIVED" in candidate.image_types:
        return Reason("image type", "derived", rules.derived)
    return Reason("image type", "original", rules.original)


def _kernel(candidate: Candidate, rules: SelectionRules) -> Reason:
    points = {Kernel.SOFT: rules.soft_kernel, Kernel.UNKNOWN: rules.unknown_kernel, Kernel.SHARP: 0}
    return Reason("kernel", f"kernel {candidate.kernel.value}", points[candidate.kernel])


def _step(candidate: Candidate, rules: SelectionRules) -> Reason:
    if candidate.step_mm is None:
        return Reason("slice step", "slice step unknown", 0)
    thinness = (rules.thick_mm - candidate.step_mm) / max(rules.thick_mm - rules.thin_mm, 1e-6)
    return Reason(
        "slice step", f"{len(candidate.paths)} slices {candidate.step_mm:.4g} mm apart",
        round(rules.thin * min(max(thinness, 0), 1), 2),
    )  # fmt: skip


def _coverage(candidate: Candidate, rules: SelectionRules) -> Reason:
    if candidate.extent_mm is None:
        return Reason("coverage", "extent unknown", 0)
    reach_mm = candidate.extent_mm + (candidate.step_mm or 0)
    share = min(reach_mm / rules.liver_range_mm, 1)
    return Reason("coverage", f"{reach_mm:.0f} mm long", round(rules.coverage * share, 2))


def _body_part(candidate: Candidate, rules: SelectionRules) -> Reason:
    points = {
        BodyPart.ABDOMEN: rules.abdomen,
        BodyPart.NEAR: rules.elsewhere / 2,
        BodyPart.ELSEWHERE: rules.elsewhere,
        BodyPart.UNKNOWN: 0,
    }
    return Reason("body part", f"body part {candidate.body_part.value}", points[candidate.body_part])
