"""Events and log lines of a door that somebody may knock at without end: the same one is new once an hour."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta

from salsa_node.errors import StoreError
from salsa_node.store import Store

log = logging.getLogger(__name__)

_HOUR = timedelta(hours=1)
_NOTES_AN_HOUR = 500


class Notes:
    """What the door writes down beside the rows; of one name at most `_NOTES_AN_HOUR` different ones an hour."""

    def __init__(self, store: Store, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._noted: dict[str, dict[str, datetime]] = {}

    def note(self, subject: str, subject_id: str, name: str, detail: str, study_uid: str | None = None) -> None:
        """An event in the store, and a line in the log even where the store cannot be written.

        What was noted within the hour is a line for debugging and no event.
        """
        now = self._clock()
        is_new = self._is_new(name, f"{subject_id} {detail}", now)
        log.log(logging.WARNING if is_new else logging.DEBUG, detail, extra={"event": name, "subject_id": subject_id})
        if not is_new:
            return
        try:
            self._store.add_event(subject, subject_id, name, detail, now, study_uid)
        except StoreError as error:
            log.error("event not kept", extra={"event": name, "error": str(error)})

    def _is_new(self, name: str, text: str, now: datetime) -> bool:
        with self._lock:
            lately = {old: at for old, at in self._noted.get(name, {}).items() if now - at < _HOUR}
            self._noted[name] = lately
            if text in lately or len(lately) >= _NOTES_AN_HOUR:
                return False
            lately[text] = now
            return True
