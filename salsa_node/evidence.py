"""What speaks for a study's being whole when it is looked at, and what against, each with its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from salsa_node.candidate import Candidate
from salsa_node.pacs_count import Answer
from salsa_node.store import Event, Series, SeriesState, Study

_ENDS = ("study.released", "study.aborted")


class Weight(Enum):
    """What a piece of evidence is worth."""

    STRONG = "strong"  #: somebody who knows has counted
    WEAK = "weak"  #: nothing speaks against it
    AGAINST = "against"  #: something is missing
    UNKNOWN = "unknown"  #: nobody can tell


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing found. about: "study" or a Series Instance UID. kind: for machines, such as "quiet"."""

    about: str
    kind: str
    found: str
    weight: Weight

    def as_json(self) -> dict[str, object]:
        """As it is stored with the look."""
        return {"about": self.about, "kind": self.kind, "found": self.found, "weight": self.weight.value}


def of_study(
    study: Study,
    series: Sequence[Series],
    candidates: Mapping[str, Candidate],
    pacs: Answer,
    quiet_s: float,
    now: datetime,
) -> tuple[Evidence, ...]:
    """The evidence for a study and each of its series that has a candidate, by Series Instance UID.

    quiet_s: how long nothing must come for a series to be complete.
    """
    found = [_quiet("study", study.last_at, quiet_s, now)]
    if pacs.silence:
        found.append(Evidence("study", "pacs", f"the archive {pacs.silence}", Weight.UNKNOWN))
    for row in series:
        candidate = candidates.get(row.series_uid)
        if candidate is None:
            continue
        if row.state is SeriesState.RECEIVING:
            found.append(Evidence(row.series_uid, "quiet", "images are still arriving", Weight.AGAINST))
        else:
            found.append(_quiet(row.series_uid, row.last_instance_at, quiet_s, now))
        found += [_numbers(row, candidate), _positions(row, candidate)]
        if row.series_uid in pacs.images:
            found.append(_count(row, pacs.images[row.series_uid]))
    return tuple(found)


def of_association(study: Study, events: Sequence[Event]) -> Evidence:
    """Whether the sender ended its association after the last image, by the study's events."""
    ends = [event for event in events if event.name in _ENDS and event.at >= study.last_at]
    if not ends:
        return Evidence("study", "association", "nobody saw the sender end its association", Weight.UNKNOWN)
    if ends[-1].name == "study.aborted":
        return Evidence("study", "association", "the sender aborted its association", Weight.AGAINST)
    return Evidence("study", "association", "the sender released its association", Weight.WEAK)


def _quiet(about: str, last_at: datetime, quiet_s: float, now: datetime) -> Evidence:
    quiet = (now - last_at).total_seconds()
    if quiet >= quiet_s:
        return Evidence(about, "quiet", f"no image for {quiet:.0f} s", Weight.WEAK)
    return Evidence(about, "quiet", f"the last image came {quiet:.0f} s ago, less than {quiet_s:g} s", Weight.AGAINST)


def _numbers(row: Series, candidate: Candidate) -> Evidence:
    numbers = candidate.image_numbers
    if len(set(numbers)) < len(candidate.paths) or not numbers:
        return Evidence(row.series_uid, "numbers", "the images are not numbered one by one", Weight.UNKNOWN)
    holes = numbers[-1] - numbers[0] + 1 - len(numbers)
    words = f"images {numbers[0]} to {numbers[-1]}"
    if holes:
        return Evidence(row.series_uid, "numbers", f"{holes} of {words} missing", Weight.AGAINST)
    return Evidence(row.series_uid, "numbers", f"{words}, none missing", Weight.WEAK)


def _positions(row: Series, candidate: Candidate) -> Evidence:
    if candidate.step_mm is None:
        return Evidence(row.series_uid, "positions", "the images have no positions to compare", Weight.UNKNOWN)
    if candidate.gaps:
        words = f"{candidate.gaps} gaps between slices {candidate.step_mm:.4g} mm apart"
        return Evidence(row.series_uid, "positions", words, Weight.AGAINST)
    return Evidence(row.series_uid, "positions", f"no gap between slices {candidate.step_mm:.4g} mm apart", Weight.WEAK)


def _count(row: Series, images: int) -> Evidence:
    if images > row.instances:
        words = f"the archive holds {images} images, {row.instances} came"
        return Evidence(row.series_uid, "pacs", words, Weight.AGAINST)
    if images < row.instances:
        words = f"the archive holds only {images} images of {row.instances} that came"
        return Evidence(row.series_uid, "pacs", words, Weight.UNKNOWN)
    return Evidence(row.series_uid, "pacs", f"the archive holds {images} images too", Weight.STRONG)
