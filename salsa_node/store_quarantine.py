"""What was set aside because it contradicts what is stored: a row for each file, and a bound for all of them.

Who sent it was told so by a failure and has it still; what is here helps a person to say which one is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime

import sqlalchemy as sa

from salsa_node.store_connection import writer
from salsa_node.store_queries import Queries
from salsa_node.store_rows import QUARANTINE, NewInstance, Quarantined
from salsa_node.store_transaction import transaction

_KEPT = QUARANTINE.c.path != ""


class Quarantine(Queries):
    """The quarantine; each method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._writer = writer(engine)

    def quarantine(self, new: NewInstance, reason: str, now: datetime) -> Quarantined:
        """The row of a file in quarantine, `new.path`; the same content for the same reason again is only counted.

        reason: what it contradicts, without patient identity.
        """
        same = sa.and_(
            QUARANTINE.c.sop_instance_uid == new.sop_instance_uid,
            QUARANTINE.c.digest == new.digest,
            QUARANTINE.c.reason == reason,
        )
        with transaction(self._writer) as t:
            there = t.one(Quarantined, sa.select(QUARANTINE).where(same))
            if there is not None:
                changes = {"times": there.times + 1, "path": new.path}  # which it has lost where it was let go
                if not there.path:
                    changes["received_at"] = now
                t.execute(sa.update(QUARANTINE).where(QUARANTINE.c.id == there.id).values(changes))
                return replace(there, **changes)  # type: ignore[arg-type]
            values = {
                "study_uid": new.study_uid,
                "series_uid": new.series_uid,
                "sop_instance_uid": new.sop_instance_uid,
                "sop_class_uid": new.sop_class_uid,
                "transfer_syntax_uid": new.transfer_syntax_uid,
                "path": new.path,
                "digest": new.digest,
                "size_bytes": new.size_bytes,
                "calling_ae": new.calling_ae,
                "reason": reason,
                "times": 1,
                "received_at": now,
            }
            number = t.insert(QUARANTINE, **values)
            detail = f"{reason}; from {new.calling_ae}, kept as {new.path}"
            t.event(now, new.study_uid, "instance", new.sop_instance_uid, "instance.quarantined", detail)
            return Quarantined(id=number, **values)  # type: ignore[arg-type]

    def quarantined(self, limit: int = 100) -> tuple[Quarantined, ...]:
        """What was set aside, newest first; one whose file was let go has no path."""
        with transaction(self._engine) as t:
            newest = sa.select(QUARANTINE).order_by(QUARANTINE.c.received_at.desc(), QUARANTINE.c.id.desc())
            return t.all(Quarantined, newest.limit(limit))

    def bound_quarantine(
        self, most_files: int, most_bytes: float, now: datetime, remove: Callable[[Sequence[str]], None]
    ) -> tuple[Quarantined, ...]:
        """Let the files go that were set aside first, until no more than so many are kept; their rows as they were.

        The rows stay, without a path; an event says of each why. remove: called once with the paths, relative to the
        data folder, before the rows change; what it raises undoes everything here.
        """
        with transaction(self._writer) as t:
            kept = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(QUARANTINE.c.size_bytes), 0)).where(_KEPT)
            files, size = t.connection.execute(kept).one()
            if files <= most_files and size <= most_bytes:
                return ()
            gone = []
            oldest = sa.select(QUARANTINE).where(_KEPT).order_by(QUARANTINE.c.received_at, QUARANTINE.c.id)
            rows = t.all(Quarantined, oldest)
            for row in rows:
                if files <= most_files and size <= most_bytes:
                    break
                gone.append(row)
                files, size = files - 1, size - row.size_bytes
            held = {row.path for row in rows[len(gone) :]}  # one file may have been set aside for two reasons
            remove([row.path for row in gone if row.path not in held])
            for row in gone:
                t.execute(sa.update(QUARANTINE).where(QUARANTINE.c.id == row.id).values(path=""))
                detail = f"{row.reason}; let go, as the quarantine is full; {row.calling_ae} was refused it"
                t.event(now, row.study_uid, "instance", row.sop_instance_uid, "quarantine.let_go", detail)
            return tuple(gone)
