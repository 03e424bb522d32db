"""The audit trail: who did what to which study, as lines that hang together by their digests.

Each line of `audit/audit.jsonl` in the data folder is a JSON object that holds the SHA-256 of the line before
it and its own: a line that is changed, left out or put in breaks the chain. Lines that are cut off at the end
are missed by a running node, and where they tell of what the record tells too; accesses at the very end only by who
wrote down the last digest (`salsa-node audit verify` prints it) or receives the lines elsewhere (`audit.syslog`).
No line holds patient identity.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from salsa_node.errors import ConfigError
from salsa_node.store import Event, Store

log = logging.getLogger(__name__)

FILE = Path("audit") / "audit.jsonl"
SENT = FILE.with_name("sent")  #: number and digest of the last line that a collector has
NOBODY_BEFORE = "0" * 64  #: what the first line holds in place of the digest before it
#: events of the record that are an access to a study, a transfer of one, or the node's own life
AUDITED: Final = (
    "study.new", "study.fetched", "study.purged", "study.held", "study.released_result", "run.queued", "run.cancelled",
    "delivery.pending", "delivery.sent", "delivery.verified", "delivery.gave_up", "delivery.held",
    "instance.quarantined", "node.association_rejected", "node.started", "node.stopped", "node.restored",
    "queue.paused", "queue.resumed", "audit.cut",
)  # fmt: skip
SETTLED: Final = timedelta(minutes=1)  #: a younger event of the record may be on its way into the trail
_TAIL_BYTES = 1 << 16
_Line = tuple[str, str, str, str | None, str, int | None]


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
    untold: how many events of the record should stand behind it, and do not: lines were cut off, or no node has run.
    """

    lines: int
    last: str
    broken: str | None
    untold: int = 0


class Trail:
    """The trail of one data folder; several processes may write to it, one after the other."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FILE
        self._taken = 0
        self._read_bytes = 0

    def accessed(self, command: str, study_uid: str | None, now: datetime, detail: str = "") -> None:
        """Note that the user of this process looked at a study, or (None) took all of them with him.

        Raises ConfigError where that cannot be written.
        """
        with self._writing() as file:
            _append(file, [(now.isoformat(), f"access.{command}", getpass.getuser(), study_uid, detail, None)])

    def ordered(self, command: str, study_uids: Iterable[str | None], now: datetime, detail: str = "") -> None:
        """Note that the user of this process has something done, to a study or (None) to the node.

        Raises ConfigError where that cannot be written: then nothing should be done.
        """
        who = getpass.getuser()
        with self._writing() as file:
            _append(file, [(now.isoformat(), f"command.{command}", who, uid, detail, None) for uid in study_uids])

    def take(self, store: Store, now: datetime) -> int | None:
        """Write down what the record tells and no line tells yet; how many lines, None where there was nothing.

        Where lines were cut off since the last time, the record hears of it, and what it tells is written again.
        Raises ConfigError where the trail cannot be written.
        """
        count = 0
        while True:
            with self._writing() as file:
                cut = self._read_bytes - os.fstat(file).st_size
                if cut > 0:
                    self._taken = self._read_bytes = 0
                self._catch_up()
                events = store.events_after(self._taken)
                lines = [_line(event) for event in events if event.name in AUDITED]
                _append(file, lines)
            if cut > 0:
                log.error("audit trail cut", extra={"event": "audit.cut", "bytes": cut})
                told = f"{cut} bytes were cut off the end of the trail while this node ran"
                store.add_event("node", "audit", "audit.cut", told, now)
            if not events:
                return count or None
            self._taken = max(self._taken, events[-1].id)
            count += len(lines)

    def _catch_up(self) -> None:
        """Learn which events others, and this process before it was started, have written down."""
        lines, self._read_bytes = self.read(self._read_bytes)
        self._taken = max([self._taken, *(entry.event for entry in lines if entry.event is not None)])

    @property
    def size_bytes(self) -> int:
        """Of the trail so far."""
        return self._path.stat().st_size if self._path.exists() else 0

    def read(self, from_byte: int = 0) -> tuple[tuple[Entry, ...], int]:
        """The whole lines from there on, as far as they can be read, and where the next one will begin."""
        if not self._path.exists():
            return (), 0
        found, at = [], from_byte
        with self._path.open("rb") as file:
            file.seek(from_byte)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # somebody is writing it
                at += len(line)
                entry = _read(line)
                if entry is not None:
                    found.append(entry)
        return tuple(found), at

    def entries(self) -> tuple[Entry, ...]:
        """Every line that can be read."""
        return self.read()[0]

    def verify(self, store: Store | None = None, now: datetime | None = None) -> Chain:
        """Read every line and compare, with the record too where there is one.

        now: events of the record that are younger than `SETTLED` may be missing yet. Raises ConfigError where the
        trail cannot be read.
        """
        before, count, last_event = NOBODY_BEFORE, 0, 0
        try:
            content = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read ({error.strerror})") from error
        for number, line in enumerate(content.split(b"\n")[:-1], 1):  # behind the last: what is being written
            entry = _read(line)
            if entry is None:
                return Chain(count, before, f"line {number} cannot be read")
            if entry.sha256 != _digest(entry):
                return Chain(count, before, f"line {number} has been changed")
            if entry.before != before or entry.number != number:
                return Chain(count, before, f"a line is missing or was put in before line {number}")
            before, count, last_event = entry.sha256, number, max(last_event, entry.event or 0)
        untold = _untold(store, last_event, now) if store is not None and now is not None else 0
        return Chain(count, before, None, untold)

    @contextmanager
    def _writing(self) -> Iterator[int]:
        """The file, for this process alone. Raises ConfigError where it cannot be written."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
            finally:
                os.close(file)
        except OSError as error:
            raise ConfigError(
                f"the audit trail {self._path} cannot be written ({error.strerror}); make it writable for this user"
            ) from error


def _append(file: int, lines: Sequence[_Line]) -> None:
    """All of the lines, or none: what a full disk took of them is taken back. Raises OSError."""
    if not lines:
        return
    number, before = _last(file)
    size = os.fstat(file).st_size
    told = []
    for at, action, who, study_uid, detail, event in lines:
        number += 1
        bare = Entry(number, at, action, who, study_uid, detail, event, before, "")
        before = _digest(bare)
        told.append(json.dumps(asdict(bare) | {"sha256": before}) + "\n")
    rest = memoryview("".join(told).encode())
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except OSError:
        os.ftruncate(file, size)
        raise


def _last(file: int) -> tuple[int, str]:
    """Number and digest of the last line that can be read; what a power cut left of a line behind it is cut off.

    A whole line that cannot be read stays where it is, for `Trail.verify` to name: the trail goes on behind it.
    """
    size, reach = os.fstat(file).st_size, _TAIL_BYTES
    while True:
        start = max(0, size - reach)
        tail = os.pread(file, size - start, start)
        whole = tail.rfind(b"\n") + 1
        if whole < len(tail) and (whole or not start):
            os.ftruncate(file, start + whole)
        lines = tail[:whole].splitlines()[1 if start else 0 :]  # the first may begin further ahead
        entry = next((entry for line in reversed(lines) if (entry := _read(line)) is not None), None)
        if entry is not None:
            return entry.number, entry.sha256
        if not start:
            return 0, NOBODY_BEFORE
        reach *= 4


def _read(line: bytes) -> Entry | None:
    """What stands in a line; None where it is none of ours."""
    try:
        entry = Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None
    return entry if isinstance(entry.number, int) and isinstance(entry.sha256, str) else None


def _untold(store: Store, after: int, now: datetime) -> int:
    """How many events of the record after that one should be in the trail by now."""
    count = 0
    while events := store.events_after(after):
        count += len([event for event in events if event.name in AUDITED and event.at <= now - SETTLED])
        after = events[-1].id
    return count


def _line(event: Event) -> _Line:
    return event.at.isoformat(), event.name, _who(event), event.study_uid, event.detail, event.id


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
