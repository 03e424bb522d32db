"""Text in columns for a terminal: aligned, and folded where the terminal is narrower than the text.

Drawn here and not by `rich.table`, which takes longer for fifty studies, its import included, than asking the record
for them does. How many cells a character takes is still rich's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rich.cells import cell_len, chop_cells

_BETWEEN = "  "


def drawn(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The lines of a table at most `width` cells wide, or two cells a column (as wide as a character can be) and what
    stands between them.

    A heading that starts with ">" aligns its column to the right. A cell too wide for its column goes on below,
    broken between words where that can be.
    """
    names = [heading.lstrip(">") for heading in headings]
    wanted = [
        max(cell_len(line) for text in column for line in text.split("\n")) for column in zip(names, *rows, strict=True)
    ]
    widths = _narrowed(wanted, width - len(_BETWEEN) * (len(names) - 1))
    rule = ["─" * cells for cells in widths]
    is_right = [heading.startswith(">") for heading in headings]
    return [line for row in (names, rule, *rows) for line in _placed(row, widths, is_right)]


def _narrowed(widths: Sequence[int], room: int) -> list[int]:
    """`widths` with the widest taken down, and none below two cells, until together they fit into `room`."""
    narrow, wide = 2, max(2, *widths)
    while narrow < wide:
        middle = (narrow + wide + 1) // 2
        narrow, wide = (middle, wide) if sum(min(w, middle) for w in widths) <= room else (narrow, middle - 1)
    fitted = [min(w, narrow) for w in widths]
    for column, wanted in enumerate(widths):  # what an even cap leaves over
        if fitted[column] < wanted and sum(fitted) < room:
            fitted[column] += 1
    return fitted


def _placed(row: Sequence[str], widths: Sequence[int], is_right: Sequence[bool]) -> list[str]:
    """The lines that one row takes."""
    cells = [_folded(text, width) for text, width in zip(row, widths, strict=True)]
    lines = []
    for parts in zip_longest(*cells, fillvalue=""):
        placed = []
        for part, width, right in zip(parts, widths, is_right, strict=True):
            blank = " " * (width - cell_len(part))
            placed.append(blank + part if right else part + blank)
        lines.append(_BETWEEN.join(placed).rstrip())
    return lines


def _folded(text: str, width: int) -> list[str]:
    """`text` in pieces of at most `width` cells."""
    if cell_len(text) <= width and "\n" not in text:
        return [text]
    pieces: list[str] = []
    for line in text.split("\n"):
        pieces.append("")
        for word in line.split(" "):
            joined = f"{pieces[-1]} {word}" if pieces[-1] else word
            if cell_len(joined) <= width:
                pieces[-1] = joined
                continue
            chopped = chop_cells(word, width) if word else []
            pieces[-1:] = chopped if not pieces[-1] else [pieces[-1], *chopped]
    return pieces
