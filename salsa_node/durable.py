"""Bytes that survive a power cut: a temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import functools
import os
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

PART = ".part"  # what a file is called while it is written; such files mean nothing and may be removed

_on_disk: set[Path] = set()  # folders whose own names, and all above them, this process has seen on disk
_on_disk_lock = threading.Lock()
_REMEMBERED = 10_000
_PIECES = 512  # written at once; Linux takes 1024


def write(path: Path, chunks: Iterable[bytes]) -> int:
    """Put `chunks` into the file `path`, whole or not at all; returns how many bytes.

    Folders are made as needed. When this returns, content, name and the names of all folders above it are on
    disk. When it raises OSError, the name stands for what it stood for before or for all of `chunks`, never for
    a part of them; where it stood for nothing, a power cut decides between the two.
    """
    _make_folder(path.parent)
    part = path.with_name(f"{uuid.uuid4().hex}{PART}")
    try:
        with part.open("xb") as file:
            size = sum(file.write(chunk) for chunk in chunks)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return size


class Staged:
    """A file that is being written under a name that means nothing; `publish` gives it one that does.

    Raises OSError where the disk refuses; the caller then discards it.
    """

    def __init__(self, folder: Path) -> None:
        _make_folder(folder)
        self.path = folder / f"{uuid.uuid4().hex}{PART}"
        self.size = 0
        self._is_there = True
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Append them all, one after the other."""
        for begin in range(0, len(pieces), _PIECES):
            some = pieces[begin : begin + _PIECES]
            size = sum(map(len, some))
            done = os.writev(self._handle, some)
            rest = memoryview(b"".join(some))[done:] if done < size else memoryview(b"")
            while rest:
                rest = rest[os.write(self._handle, rest) :]
            self.size += size

    def settle(self, path: Path | None) -> bool:
        """The content is on disk when this returns, and where nothing had the name `path` the file has it, on disk too.

        False where the name is taken, or none is given; the file keeps the one that means nothing. Nobody else may be
        about to give a file that name. The name comes before the flush, so that one flush does for both where the disk
        allows it.
        """
        if path is not None:
            _make_folder(path.parent)
        free = None if path is None or path.exists() else path
        if free is not None:
            self.path.rename(free)
            self._is_there = False
        try:
            os.fsync(self._handle)
            if free is not None and not _names_follow_content(os.fstat(self._handle).st_dev):
                _sync_folder(free.parent)
        except OSError:
            if free is not None:
                free.unlink(missing_ok=True)
            raise
        self._close()
        return free is not None

    def discard(self) -> None:
        """Close the file and take its first name away; harmless after `settle` and after `publish`."""
        self._close()
        if self._is_there:
            self.path.unlink(missing_ok=True)
            self._is_there = False

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def publish(files: Iterable[tuple[Path, Path]]) -> None:
    """Rename synced files (from, to) and put the new names on disk, each folder once; folders are made as needed."""
    folders = set()
    for staged, path in files:
        if path.parent not in folders:
            _make_folder(path.parent)
            folders.add(path.parent)
        staged.replace(path)
    for folder in folders:
        _sync_folder(folder)


def remove(folder: Path, paths: Iterable[str]) -> None:
    """Take files below `folder` away; one that is gone already is no error. Raises OSError.

    A name comes back only by a power cut, and then stands for its content. Folders stay: another process may be
    about to put a file there.
    """
    root = folder.absolute().resolve()
    for path in paths:
        file = root / path
        if root not in file.resolve().parents:
            raise PermissionError(f"{path} does not lie in the folder whose files may be removed")
        file.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Take `folder` and what lies below it away, as far as that holds no file; none of it needs to be there.

    For a folder into which nobody is about to put a file: whoever does so hears that it is gone, and tries again.
    """
    for parent, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # it holds a file
            Path(parent).rmdir()


def sweep(folder: Path, older_than_s: float = 60.0) -> int:
    """Remove what interrupted writes left below `folder`; returns how many files.

    older_than_s: younger ones stay, because another process may be writing them.
    """
    removed = 0
    until = time.time() - older_than_s
    for parent, _, names in os.walk(folder):
        for part in (Path(parent, name) for name in names if name.endswith(PART)):
            try:
                if part.stat().st_mtime <= until:
                    part.unlink()
                    removed += 1
            except FileNotFoundError:
                continue  # its writer was quicker
    return removed


def _make_folder(folder: Path) -> None:
    """Make `folder` and its parents, their names on disk however they came to be there.

    A folder that is there may be one that another thread or process made a moment ago and has not yet synced.
    So each is synced here once; it counts as known only after that.
    """
    if folder in _on_disk and os.path.isdir(folder):  # noqa: PTH112 - for each image, and a third of Path's time
        return
    folder = folder.absolute()
    with _on_disk_lock:
        if len(_on_disk) > _REMEMBERED:
            _on_disk.clear()
        unsure: list[Path] = []
        for each in (folder, *folder.parents):
            if (each in _on_disk and each.is_dir()) or os.path.ismount(each) or not _may_be_ours(each):
                break
            unsure.append(each)
        for each in reversed(unsure):
            each.mkdir(exist_ok=True)
            _sync_folder(each.parent)
            _on_disk.add(each)


def _may_be_ours(folder: Path) -> bool:
    """Whether this user could have made it: no name was written in a folder where we may not write."""
    return not folder.exists() or os.access(folder.parent, os.R_OK | os.W_OK)


@functools.lru_cache(maxsize=64)
def _names_follow_content(device: int) -> bool:
    """Whether fsync of a file puts on disk the name that it got before: ext4 and XFS keep such changes in order.

    Their journal holds the rename and the file's own entry in one transaction, which fsync of the file commits.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    kinds = {line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == number}
    return bool(kinds) and kinds <= {"ext4", "xfs"}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
