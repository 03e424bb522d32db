"""Logs: a sentence for people, keys for machines, never patient identity.

`log.info("series complete", extra={"event": "series.complete", "series_uid": uid})`
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def start(level: str, form: str, stream: TextIO | None = None) -> None:
    """Send this package's logs to `stream` (standard error) as "text" or "json" lines from `level` on."""
    sink = logging.StreamHandler(stream or sys.stderr)
    sink.setFormatter(_JsonLines() if form == "json" else _Text())
    root = logging.getLogger("salsa_node")
    root.handlers[:] = [sink]
    root.setLevel(level.upper())
    root.propagate = False


def unforeseen(error: BaseException) -> str:
    """What an exception that nobody planned for is called and where it arose.

    Its own words are left out: a foreign library may quote the data set, and with it the patient. Those of the
    operating system's error number say what is to be mended, and name nobody.
    """
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).stem}:{frame.lineno} in {frame.name}" for frame in frames[-3:]]
    name = type(error).__name__
    told = f"{name} ({os.strerror(error.errno)})" if isinstance(error, OSError) and error.errno else name
    return f"unforeseen {told} at {' < '.join(reversed(places))}"


def _keys(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _OWN}


def _when(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        keys = " ".join(f"{key}={value}" for key, value in _keys(record).items() if key != "event")
        line = f"{_when(record)} {record.levelname.lower():7} {record.getMessage()}{'  ' + keys if keys else ''}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": _when(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_keys(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
