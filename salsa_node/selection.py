"""Which series of a study to analyse: every series gets its score with its reasons, one is chosen.

A series can be analysed if it consists of axial CT images, enough of them for a volume. Of those, the one with the
most points goes first, then the one with the most slices, then the thinnest, then the lowest series number. Where the
rules ask for several, the next ones follow, but never two reconstructions of one acquisition.
Only headers are read: `series.inspect` has the last word on a series' geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from salsa_node import stacks
from salsa_node.candidate import Candidate
from salsa_node.errors import SeriesRejected
from salsa_node.selection_rules import SelectionRules
from salsa_node.series import Series, inspect
from salsa_node.series_score import Score, preference, score

DEFAULT_RULES = SelectionRules()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a series was chosen, passed over or ruled out.

    accepted: it could be analysed, whether or not it was chosen.
    rank: 1 for the best; None where it was ruled out. chosen: it is analysed.
    """

    series_uid: str
    accepted: bool
    reason: str
    score: Score
    rank: int | None
    candidate: Candidate
    chosen: bool = False

    def as_json(self) -> dict[str, object]:
        """A line of the table of scores."""
        return {
            "series_uid": self.series_uid,
            "series_number": self.candidate.series_number,
            "part": self.candidate.part,
            "images": len(self.candidate.paths),
            "rank": self.rank,
            "chosen": self.chosen,
            "points": self.score.points if self.accepted else None,
            "reason": self.reason,
            "reasons": [{"criterion": r.criterion, "found": r.found, "points": r.points} for r in self.score.reasons]
            if self.accepted
            else [],
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """The series to analyse, and a verdict on each candidate, in the order given.

    chosen: the best one; None where there is none. picked: all that the rules ask for, the best first.
    """

    chosen: Candidate | None
    verdicts: tuple[Verdict, ...]
    picked: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """A candidate that is one volume."""

    candidate: Candidate
    series: Series


@dataclass(frozen=True, slots=True)
class VolumeChoice:
    """The series to analyse and their geometry, or why there is none.

    volumes: as many of the best candidates as the rules ask for; empty where none is one volume.
    best_refused: the best candidate whose headers were fit but whose files are no volume, for a report
        that says so; None where every one that was looked at is a volume.
    verdicts: one on each candidate, or on each stack of it, in the order given.
    """

    volumes: tuple[Volume, ...]
    best_refused: Candidate | None
    verdicts: tuple[Verdict, ...]

    @property
    def chosen(self) -> Candidate | None:
        """The best candidate that is one volume."""
        return self.volumes[0].candidate if self.volumes else None

    @property
    def series(self) -> Series | None:
        """The geometry of the best one."""
        return self.volumes[0].series if self.volumes else None


def choose(candidates: Sequence[Candidate], rules: SelectionRules = DEFAULT_RULES) -> Choice:
    """The best series of those that can be analysed, or as many as the rules ask for, and each verdict's reasons."""
    scores = [score(candidate, rules) for candidate in candidates]
    usable = [n for n, found in enumerate(scores) if not found.faults]
    ranked = sorted(usable, key=lambda n: preference(candidates[n], scores[n]))
    best = ranked[0] if ranked else None
    picked = _picked(ranked, candidates, rules.best)
    ranks = {n: rank for rank, n in enumerate(ranked, start=1)}
    verdicts = []
    for n, (candidate, found) in enumerate(zip(candidates, scores, strict=True)):
        if found.faults or best is None:
            reason = "; ".join(found.faults)
        elif n in picked:
            reason = f"chosen{'' if n == best else ' too'}: {found}"
        else:
            reason = (
                f"passed over for {candidates[best].name}: {_worse(candidate, found, candidates[best], scores[best])}"
            )
        verdicts.append(Verdict(candidate.series_uid, n in ranks, reason, found, ranks.get(n), candidate, n in picked))
    return Choice(None if best is None else candidates[best], tuple(verdicts), tuple(candidates[n] for n in picked))


def _picked(ranked: Sequence[int], candidates: Sequence[Candidate], wanted: int) -> list[int]:
    """The first so many of the ranking, of each acquisition the best reconstruction alone."""
    picked: list[int] = []
    for n in ranked:
        twins = candidates[n].acquisition and any(
            candidates[n].acquisition == candidates[p].acquisition for p in picked
        )
        if len(picked) < wanted and not twins:
            picked.append(n)
    return picked


def choose_volume(
    candidates: Sequence[Candidate],
    look: Callable[[tuple[Path, ...]], Series] = inspect,
    rules: SelectionRules = DEFAULT_RULES,
    apart: Callable[[Candidate], Sequence[Candidate]] = stacks.apart,
) -> VolumeChoice:
    """The best series that `look` accepts, as many as the rules ask for; what it refuses is ruled out for its reason.

    look: gives the series that these files make, or raises SeriesRejected.
    apart: the stacks of a series that is refused, which take its place; none where it holds no several.
    """
    told = [
        part
        for one in candidates
        for part in ((apart(one) if one.mixed and score(one, rules).faults else ()) or (one,))
    ]
    best_refused: Candidate | None = None
    seen: dict[int, Volume] = {}
    while True:
        choice = choose(told, rules)
        unseen = next((one for one in choice.picked if id(one) not in seen), None)
        if unseen is None:
            return VolumeChoice(tuple(seen[id(one)] for one in choice.picked), best_refused, choice.verdicts)
        try:
            seen[id(unseen)] = Volume(unseen, look(unseen.paths))
        except SeriesRejected as verdict:
            best_refused = best_refused or unseen
            at = [one is unseen for one in told].index(True)
            parts = () if unseen.part else apart(unseen)
            told[at : at + 1] = parts or [replace(unseen, faults=(verdict.reason,))]


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
    elif candidate.series_uid != best.series_uid:
        tie = "the first Series Instance UID goes first"
    else:
        tie = "the stack whose images come first goes first"
    return f"{twin}as many points ({found.points:g}), and {tie}"
