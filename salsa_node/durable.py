"""Bytes that survive a power cut: a temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

PART = ".part"  # what a file is called while it is written; such files mean nothing and may be removed


def write(path: Path, chunks: Iterable[bytes]) -> int:
    """Put `chunks` into the file `path`, whole or not at all; returns how many bytes.

    Folders are made as needed. When this returns, content and name are on disk; when it raises OSError,
    nothing of that name has changed.
    """
    made = _make_folder(path.parent)
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
    for folder in made:
        _sync_folder(folder.parent)
    return size


def sweep(folder: Path) -> int:
    """Remove what interrupted writes left below `folder`; returns how many files."""
    parts = list(folder.rglob(f"*{PART}"))
    for part in parts:
        part.unlink(missing_ok=True)
    return len(parts)


def _make_folder(folder: Path) -> list[Path]:
    """Make `folder` and its parents; returns those that were not there."""
    made = []
    for missing in (folder, *folder.parents):
        if missing.exists():
            break
        made.append(missing)
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
