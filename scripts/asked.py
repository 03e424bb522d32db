"""What a bench may be asked for: counts that are counts, and names that it knows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number above 0 is expected; found {text!r}")
    return int(text)


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Names with commas between them, for argparse: one that is not known would be measured as something else."""

    def named(text: str) -> list[str]:
        names = text.split(",")
        strange = [name for name in names if name not in known]
        if strange:
            raise argparse.ArgumentTypeError(f"{', '.join(known)} are known; found {strange[0]!r}")
        return list(dict.fromkeys(names))

    return named
