"""Files that are there and cannot be read at the moment: their study waits a while, and no verdict is made of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

FIRST_WAIT_S: Final = 10.0  #: doubled each time ...
TRIES: Final = 8  #: ... so often: some 20 minutes; then what can be read decides
_PERMANENT: Final = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}  # gone: waiting brings nothing back


class DiskTrouble:
    """Which studies wait for the disk, in the memory of this process: a new start asks the disk anew."""

    def __init__(self) -> None:
        self._met: dict[str, tuple[int, datetime]] = {}  # study -> how often, and until when it is left alone

    def waiting(self, now: datetime) -> frozenset[str]:
        """The studies that are left alone now; none for longer than a clock that was set back would make of it."""
        longest = timedelta(seconds=FIRST_WAIT_S * 2**TRIES)
        return frozenset(uid for uid, (_, until) in self._met.items() if now < until <= now + longest)

    def hinders(self, study_uid: str, paths: Iterable[Path], now: datetime) -> str:
        """Why that study is left alone for a while; "" where its files can be read, are gone, or were tried enough."""
        name = _first_unreadable(paths)
        tries = self._met.get(study_uid, (0, now))[0] + 1
        if not name or tries > TRIES:
            self._met.pop(study_uid, None)
            return ""
        wait_s = FIRST_WAIT_S * 2 ** (tries - 1)
        self._met[study_uid] = tries, now + timedelta(seconds=wait_s)
        return f"a file of it cannot be read now ({name}); it is tried again in {wait_s:g} s, {TRIES} times in all"


def _first_unreadable(paths: Iterable[Path]) -> str:
    """What the system says of the first file that is there and whose beginning it does not give; "" for none."""
    for path in paths:
        try:
            with path.open("rb", buffering=0) as file:
                os.read(file.fileno(), 1)
        except OSError as error:
            if error.errno not in _PERMANENT:
                return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return ""
