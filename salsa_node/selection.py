"""Which series of a study to analyse: every series gets its score with its reasons, one is chosen.

A series can be analysed if it consists of axial CT images, enough of them for a volume. Of those, the one with the
most points goes first, then the one with the most slices, then the thinnest, then the lowest series number.
Only headers are read: `series.inspect` has the last word on a series' geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from salsa_node.candidate import Candidate
from salsa_node.errors import SeriesRejected
from salsa_node.selection_rules import SelectionRules
from salsa_node.series import Series, inspect
from salsa_node.series_score import Score, preference, score

DEFAULT_RULES = SelectionRules()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a series was chosen, passed over or ruled out.

    accepted: it could be analysed, whether or not it was the one chosen.
    rank: 1 for the one chosen; None where it was ruled out.
    """

    series_uid: str
    accepted: bool
    reason: str
    score: Score
    rank: int | None
    candidate: Candidate

    def as_json(self) -> dict[str, object]:
        """A line of the table of scores."""
        return {
            "series_uid": self.series_uid,
            "series_number": self.candidate.series_number,
            "images": len(self.candidate.paths),
            "rank": self.rank,
            "points": self.score.points if self.accepted else None,
            "reason": self.reason,
            "reasons": [{"criterion": r.criterion, "found": r.found, "points": r.points} for r in self.score.reasons]
            if self.accepted
            else [],
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """The series to analyse, or None, and a verdict on each candidate, in the order given."""

    chosen: Candidate | None
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class VolumeChoice:
    """The series to analyse and its geometry, or why there is none.

    chosen: the best candidate that is one volume, with its `series`; both None where none is.
    best_refused: the best candidate whose headers were fit but whose files are no volume, for a report
        that says so; None where every one that was looked at is a volume.
    verdicts: one on each candidate, in the order given.
    """

    chosen: Candidate | None
    series: Series | None
    best_refused: Candidate | None
    verdicts: tuple[Verdict, ...]


def choose(candidates: Sequence[Candidate], rules: SelectionRules = DEFAULT_RULES) -> Choice:
    """One series of those that can be analysed, and the reasons for each verdict."""
    scores = [score(candidate, rules) for candidate in candidates]
    usable = [n for n, found in enumerate(scores) if not found.faults]
    ranked = sorted(usable, key=lambda n: preference(candidates[n], scores[n]))
    best = ranked[0] if ranked else None
    ranks = {n: rank for rank, n in enumerate(ranked, start=1)}
    verdicts = []
    for n, (candidate, found) in enumerate(zip(candidates, scores, strict=True)):
        if found.faults or best is None:
            reason = "; ".join(found.faults)
        elif n == best:
            reason = f"chosen: {found}"
        else:
            reason = (
                f"passed over for {candidates[best].name}: {_worse(candidate, found, candidates[best], scores[best])}"
            )
        verdicts.append(Verdict(candidate.series_uid, n in ranks, reason, found, ranks.get(n), candidate))
    return Choice(None if best is None else candidates[best], tuple(verdicts))


def choose_volume(
    candidates: Sequence[Candidate],
    look: Callable[[tuple[Path, ...]], Series] = inspect,
    rules: SelectionRules = DEFAULT_RULES,
) -> VolumeChoice:
    """The best series that `look` accepts; those it refuses are ruled out for its reason, one after the other.

    look: gives the series that these files make, or raises SeriesRejected.
    """
    told = list(candidates)
    best_refused: Candidate | None = None
    while (choice := choose(told, rules)).chosen is not None:
        chosen = choice.chosen
        try:
            series = look(chosen.paths)
        except SeriesRejected as verdict:
            best_refused = best_refused or chosen
            told[told.index(chosen)] = replace(chosen, faults=(verdict.reason,))
        else:
            return VolumeChoice(chosen, series, best_refused, choice.verdicts)
    return VolumeChoice(None, None, best_refused, choice.verdicts)


def _worse(candidate: Candidate, found: Score, best: Candidate, best_score: Score) -> str:
    """Where it lost points against the best one, or which tie rule decided; whether both are of one acquisition."""
    lost = [
        f"{mine.found} {mine.points:+.4g}, not {other.found} {other.points:+.4g}"
        for mine, other in zip(found.reasons, best_score.reasons, strict=True)
        if mine.points < other.points
    ]
    twin = "the same acquisition; " if candidate.acquisition and candidate.acquisition == best.acquisition else ""
    if found.points < best_score.points:
        return f"{twin}{found.points:g} of its {best_score.points:g} points ({'; '.join(lost)})"
    if len(candidate.paths) != len(best.paths):
        tie = f"{len(candidate.paths)} slices, not {len(best.paths)}"
    elif candidate.slice_thickness_mm != best.slice_thickness_mm:
        tie = "its slices are declared thicker, or no thickness is declared"
    elif candidate.series_number != best.series_number:
        tie = "the lower series number goes first"
    else:
        tie = "the first Series Instance UID goes first"
    return f"{twin}as many points ({found.points:g}), and {tie}"
