"""Integrity: whether every stored file is there and unchanged, and every file has its row."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import xxhash

from salsa_node import durable
from salsa_node.store import Store, StoredFile

log = logging.getLogger(__name__)

FOLDERS = ("studies", "quarantine", "results", "masks")  #: below the data folder: every file there needs a row
SET_ASIDE = "set-aside"  #: where `set_aside` puts files without a row, under their own paths
SETTLED_S = 3600.0  #: a younger file may be on its way to its row
_CHUNK_BYTES = 1 << 20
_PREAMBLE_BYTES = 132


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that is not as its row says, or has none.

    kind: "missing", "changed", "unreadable" or "no row". path: relative to the data folder.
    study_uid: "" where no row names it. detail: what was found and what was expected.
    """

    kind: str
    path: str
    study_uid: str
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of looking at files.

    checked: how many files were read; unknown: how many of them have no digest to compare with.
    """

    checked: int
    read_bytes: int
    unknown: int
    faults: tuple[Fault, ...]

    @property
    def told(self) -> str:
        """One line for people."""
        kinds = Counter(fault.kind for fault in self.faults)
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "all as they were stored"
        unknown = f", {self.unknown} without a digest" if self.unknown else ""
        return f"{self.checked} files ({self.read_bytes / 2**20:.0f} MiB){unknown}: {found}"

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "checked": self.checked,
            "read_bytes": self.read_bytes,
            "unknown": self.unknown,
            "faults": [asdict(fault) for fault in self.faults],
        }


def verify(
    store: Store, data_dir: Path, study_uid: str | None = None, progress: Callable[[int], None] = lambda _: None
) -> Verdict:
    """Read every file that a row names, of one study or of all; for all, look for files without a row too.

    progress: hears the number of files read. Changes nothing; beside a running node, files that come or go
    meanwhile are no fault. Raises StoreError.
    """
    known = store.files(study_uid)
    faults, size, unknown = [], 0, 0
    for number, file in enumerate(known):
        progress(number)
        fault, read = _check(data_dir, file)
        size += read
        unknown += not file.digest
        if fault is not None and file in store.files(file.study_uid):  # else it was purged meanwhile
            faults.append(fault)
    if study_uid is None:
        named = {file.path for file in known}
        faults += [Fault("no row", path, "", "no row names this file") for path in _unnamed(data_dir, named)]
    return Verdict(len(known), size, unknown, tuple(faults))


def set_aside(data_dir: Path, faults: tuple[Fault, ...]) -> int:
    """Move the files without a row to `SET_ASIDE`, for a person to look at; how many."""
    unnamed = [fault.path for fault in faults if fault.kind == "no row"]
    durable.publish([(data_dir / path, data_dir / SET_ASIDE / path) for path in unnamed])
    return len(unnamed)


def step(store: Store, data_dir: Path, every: timedelta, now: datetime) -> Verdict | None:
    """Verify everything where that was not done for so long, with an event for each fault; None where it was."""
    if not every:
        return None
    last = store.find_events(name="node.verified", limit=1)
    if last and timedelta() <= now - last[0].at < every:  # else the clock was set back
        return None
    verdict = verify(store, data_dir)
    for fault in verdict.faults:
        detail = f"{fault.kind}: {fault.path}; {fault.detail}"
        store.add_event("study" if fault.study_uid else "node", fault.study_uid or "files", "file.fault", detail, now,
                        fault.study_uid or None)  # fmt: skip
    if verdict.faults:
        log.error(verdict.told, extra={"event": "node.verified", "faults": len(verdict.faults)})
    store.add_event("node", "files", "node.verified", verdict.told, now)
    return verdict


def _check(data_dir: Path, file: StoredFile) -> tuple[Fault | None, int]:
    """What is wrong with that file, if anything is, and how many bytes were read."""
    hasher = hashlib.sha256() if file.kind in ("result", "masks") else xxhash.xxh3_128()
    size = 0
    try:
        with (data_dir / file.path).open("rb") as stream:
            if file.kind not in ("result", "masks"):
                stream.seek(_data_set_at(stream.read(_PREAMBLE_BYTES + 12)))
            while chunk := stream.read(_CHUNK_BYTES):
                hasher.update(chunk)
                size += len(chunk)
    except FileNotFoundError:
        return Fault("missing", file.path, file.study_uid, f"the {file.kind} is not there"), 0
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else str(error)
        return Fault("unreadable", file.path, file.study_uid, f"{told}"), size
    found = hasher.hexdigest()
    if file.digest and found != file.digest:
        detail = f"digest {found[:12]}…, expected {file.digest[:12]}…"
        return Fault("changed", file.path, file.study_uid, detail), size
    return None, size


def _data_set_at(head: bytes) -> int:
    """Where the data set of a file begins that opens so (PS3.10 7.1: File Meta Information Group Length comes first).

    Raises ValueError where it is no such file.
    """
    if head[128:138] != b"DICM\x02\x00\x00\x00UL" or len(head) < _PREAMBLE_BYTES + 12:
        raise ValueError("it does not open as a DICOM file does")
    return _PREAMBLE_BYTES + 12 + int.from_bytes(head[140:144], "little")


def _unnamed(data_dir: Path, named: set[str]) -> Iterator[str]:
    """Paths of settled files that nobody named."""
    before = time.time() - SETTLED_S
    for folder in FOLDERS:
        for parent, _, names in os.walk(data_dir / folder):
            for name in sorted(names):
                file = Path(parent, name)
                path = file.relative_to(data_dir).as_posix()
                if path in named or name.endswith(durable.PART):
                    continue
                with suppress(FileNotFoundError):  # it went meanwhile
                    if file.stat().st_mtime <= before:
                        yield path
