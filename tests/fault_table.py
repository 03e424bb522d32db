"""The table of deploy/faults.md, as tests hold it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FAULTS = Path(__file__).parents[1] / "deploy" / "faults.md"


@dataclass(frozen=True)
class Fault:
    """A line: what is wrong, where the study stands, what is on the screen, who does what, and the test."""

    name: str
    stands_at: str
    shown: str
    node: str
    admin: str
    test: str


def faults() -> list[Fault]:
    """Every line, in the order of the page."""
    lines = [line for line in FAULTS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Fault(*one) for one in cells if one[0] != "fault"]


def told(name: str, shown: str, next_step: str) -> None:
    """The line of that fault has those words for the screen, and that command or word as the remedy."""
    found = [fault for fault in faults() if fault.name == name]
    assert len(found) == 1, f"the table has no line for {name!r}"
    assert shown in found[0].shown.replace("`", ""), found[0].shown
    assert next_step in found[0].admin, found[0].admin
