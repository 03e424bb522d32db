"""What the next study needs, read while this one is computed: its files by the system, or its volume by a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from salsa_node.errors import SalsaNodeError

Made = TypeVar("Made")
READ_AHEAD_BYTES = 2 << 30  #: of the next study; 4,000 slices of 512 x 512
_HINDERED = (SalsaNodeError, MemoryError, OSError, RuntimeError, ValueError)


def into_cache(paths: Iterable[Path]) -> int:
    """Has the system read these files into its cache while something else is computed, up to READ_AHEAD_BYTES.

    Returns how many bytes were asked for; none where the system cannot do it. Holds no memory of this process, waits
    for nothing, and passes over what is not there: whoever reads it next will say so.
    """
    asked = 0
    if not hasattr(os, "posix_fadvise"):
        return asked
    for path in paths:
        if asked >= READ_AHEAD_BYTES:
            break
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_WILLNEED)
        except OSError:
            continue
        asked += size
    return asked


def as_they_lie(paths: Sequence[Path]) -> tuple[tuple[Path, int, int, int], ...]:
    """What tells these files from others, and from themselves once somebody wrote them; empty where one is gone.

    Path, number, bytes and time of the last change of each. Empty too where they are more than READ_AHEAD_BYTES.
    """
    try:
        told = [(path, path.stat()) for path in paths]
    except OSError:
        return ()
    if sum(stat.st_size for _, stat in told) > READ_AHEAD_BYTES:
        return ()
    return tuple((path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in told)


class Ahead(Generic[Made]):
    """Holds at most one thing; what it was made of is its key, and under another key nobody gets it.

    To be asked by one thread.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._made: list[Made] = []
        self._thread: threading.Thread | None = None

    def begin(self, key: Hashable, make: Callable[[], Made]) -> None:
        """Make it in a thread of its own, and let go of what was made before; what it raises is told to nobody.

        Whoever needs it makes it again then, and meets the same.
        """
        if self._key == key:
            return
        self.forget()
        made: list[Made] = []

        def run() -> None:
            try:
                made.append(make())
            except _HINDERED:
                return

        self._key, self._made = key, made
        self._thread = threading.Thread(target=run, name="ahead", daemon=True)
        self._thread.start()

    def take(self, key: Hashable) -> Made | None:
        """What was made under this key, waited for where it is not ready; None where nothing was. It is let go of."""
        if self._key != key or self._thread is None:
            return None
        self._thread.join()
        made = self._made
        self.forget()
        return made.pop() if made else None

    def forget(self) -> None:
        """Let go of what was made, or is being made."""
        self._key, self._made, self._thread = None, [], None
