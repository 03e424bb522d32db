"""The audit trail: who did what to which study, as lines that hang together by their digests.

Each line of `audit/audit.jsonl` in the data folder is a JSON object that holds the SHA-256 of the line before
it and its own: a line that is changed, left out or put in breaks the chain. Lines that are cut off at the end
are seen only by who wrote down the last digest (`salsa-node audit verify` prints it) or receives the lines
elsewhere (`audit.syslog`). No line holds patient identity.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from salsa_node.errors import ConfigError
from salsa_node.store import Event, Store

FILE = Path("audit") / "audit.jsonl"
NOBODY_BEFORE = "0" * 64  #: what the first line holds in place of the digest before it
#: events of the record that are an access to a study, a transfer of one, or the node's own life
AUDITED: Final = (
    "study.new", "study.fetched", "study.purged", "study.held", "study.released_result", "run.queued", "run.cancelled",
    "delivery.pending", "delivery.sent", "delivery.verified", "delivery.gave_up", "delivery.held",
    "instance.quarantined", "node.association_rejected", "node.started", "node.stopped", "node.restored",
    "queue.paused", "queue.resumed",
)  # fmt: skip
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One line.

    action: an event's name, "access." and the command that looked, or "command." and the one that changes something.
    who: a user of this machine, or an AE title. event: the number of the event that it tells of; None for a command.
    """

    number: int
    at: str
    action: str
    who: str
    study_uid: str | None
    detail: str
    event: int | None
    before: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Chain:
    """What came of reading the whole trail.

    broken: what is wrong with the first line that is wrong; None where none is. last: the digest of the last line.
    """

    lines: int
    last: str
    broken: str | None


class Trail:
    """The trail of one data folder; several processes may write to it, one after the other."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FILE
        self._taken: int | None = None

    def accessed(self, command: str, study_uid: str, now: datetime, detail: str = "") -> None:
        """Note that the user of this process looked at a study. Raises ConfigError where that cannot be written."""
        self._append([(now.isoformat(), f"access.{command}", getpass.getuser(), study_uid, detail, None)])

    def ordered(self, command: str, study_uids: Iterable[str | None], now: datetime, detail: str = "") -> None:
        """Note that the user of this process has something done, to a study or (None) to the node.

        Raises ConfigError where that cannot be written: then nothing should be done.
        """
        who = getpass.getuser()
        self._append([(now.isoformat(), f"command.{command}", who, uid, detail, None) for uid in study_uids])

    def take(self, store: Store) -> int | None:
        """Write down what the record tells since the last time; how many lines, None where there was nothing."""
        if self._taken is None:
            self._taken = max((entry.event for entry in self.entries() if entry.event is not None), default=0)
        count = 0
        while events := store.events_after(self._taken):
            lines = [
                (event.at.isoformat(), event.name, _who(event), event.study_uid, event.detail, event.id)
                for event in events
                if event.name in AUDITED
            ]
            self._append(lines)
            self._taken = events[-1].id
            count += len(lines)
        return count or None

    @property
    def size_bytes(self) -> int:
        """Of the trail so far."""
        return self._path.stat().st_size if self._path.exists() else 0

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """The lines of a higher number than `after`, as far as they can be read."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            for line in file:
                entry = _read(line)
                if entry is not None and entry.number > after:
                    yield entry

    def verify(self) -> Chain:
        """Read every line and compare. Raises ConfigError where it cannot be read."""
        before, count = NOBODY_BEFORE, 0
        try:
            content = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read ({error.strerror})") from error
        for number, line in enumerate(content.splitlines(), 1):
            entry = _read(line)
            if entry is None:
                return Chain(count, before, f"line {number} cannot be read")
            if entry.sha256 != _digest(entry):
                return Chain(count, before, f"line {number} has been changed")
            if entry.before != before or entry.number != number:
                return Chain(count, before, f"a line is missing or was put in before line {number}")
            before, count = entry.sha256, number
        return Chain(count, before, None)

    def _append(self, lines: Sequence[tuple[str, str, str, str | None, str, int | None]]) -> None:
        if not lines:
            return
        try:
            with self._locked() as file:
                number, before = _last(file)
                for at, action, who, study_uid, detail, event in lines:
                    number += 1
                    bare = Entry(number, at, action, who, study_uid, detail, event, before, "")
                    before = _digest(bare)
                    line = json.dumps(asdict(bare) | {"sha256": before}) + "\n"
                    os.write(file, line.encode())
                os.fsync(file)
        except OSError as error:
            raise ConfigError(
                f"the audit trail {self._path} cannot be written ({error.strerror}); make it writable for this user"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _last(file: int) -> tuple[int, str]:
    """Number and digest of the last line that can be read; what a power cut left of a line behind it is cut off.

    A whole line that cannot be read stays where it is, for `Trail.verify` to name: the trail goes on behind it.
    """
    size = os.fstat(file).st_size
    start = max(0, size - _TAIL_BYTES)
    tail = os.pread(file, size - start, start)
    whole = tail.rfind(b"\n") + 1
    if whole < len(tail):
        os.ftruncate(file, start + whole)
    readable = (entry for line in reversed(tail[:whole].splitlines()) if (entry := _read(line)) is not None)
    entry = next(readable, None)
    return (0, NOBODY_BEFORE) if entry is None else (entry.number, entry.sha256)


def _read(line: bytes) -> Entry | None:
    """What stands in a line; None where it is none of ours."""
    try:
        entry = Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None
    return entry if isinstance(entry.number, int) and isinstance(entry.sha256, str) else None


def _digest(entry: Entry) -> str:
    told = asdict(entry)
    del told["sha256"]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _who(event: Event) -> str:
    """The AE title that an event names, else the node."""
    words = event.detail.split()
    if event.name == "study.new" and words[:1] == ["from"]:
        return event.detail.removeprefix("from ").strip()
    if event.subject == "delivery":
        return words[0].rstrip(":") if words else "node"
    return "node"
