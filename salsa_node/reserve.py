"""Room on the disk that is laid by for the day when none is left, so that an admin can still let files go then.

A record cannot be opened for writing, nor an order noted, where a disk has not one block left: not even to remove
something. So a file without content holds some room, and `purge` gives it back first.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

NAME: Final = "reserve"  #: of the file, in the data folder
SIZE_BYTES: Final = 32 * 2**20
NOTHING_BYTES: Final = 50 * 2**20  #: with less left a disk counts as full, whatever the config allows
_TIGHT_BYTES: Final = 16 * 2**20  # with less left the reserve is needed
_AMPLE: Final = 16  # it is laid by where the disk has so many times its size


def is_laid_by(data_dir: Path) -> bool:
    """Whether there is a reserve."""
    return (data_dir / NAME).is_file()


def lay_by(data_dir: Path, size_bytes: int = SIZE_BYTES) -> bool:
    """Whether there is a reserve now: made where there was none and the disk has ample room, else left for later."""
    file = data_dir / NAME
    if file.is_file():
        return True
    try:
        if shutil.disk_usage(data_dir).free < _AMPLE * size_bytes:
            return False
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(handle, 0, size_bytes)
        finally:
            os.close(handle)
    except OSError:  # another was quicker, or the disk does not allow it: nobody needs it yet
        return file.is_file()
    return True


def give_back(data_dir: Path) -> bool:
    """Whether the reserve was given back, because next to nothing is left on the disk. Raises OSError."""
    if not is_laid_by(data_dir) or shutil.disk_usage(data_dir).free >= _TIGHT_BYTES:
        return False
    (data_dir / NAME).unlink(missing_ok=True)
    return True
