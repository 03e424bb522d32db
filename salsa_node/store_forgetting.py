"""What leaves the record itself: studies of which no file is left here, and what the node once said of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

import sqlalchemy as sa

from salsa_node.errors import IllegalTransition
from salsa_node.store_commitments import COMMITMENTS
from salsa_node.store_connection import writer
from salsa_node.store_interventions import require_idle
from salsa_node.store_queries import Queries
from salsa_node.store_reviews import REVIEWS
from salsa_node.store_rows import (
    DELIVERIES,
    EVENTS,
    INSTANCES,
    LOOKS,
    OBJECTS,
    PIXEL_PHASES,
    QUARANTINE,
    RUNS,
    SERIES,
    STUDIES,
)
from salsa_node.store_transaction import Transaction, transaction


class Forgetting(Queries):
    """The end of a study's rows; each method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._writer = writer(engine)

    def without_files(self, until: datetime, limit: int) -> tuple[str, ...]:
        """The studies whose last image came before `until` and of which no image, result or quarantined file is kept.

        The oldest first. Whether a study may be forgotten, `forget` says.
        """
        uid = STUDIES.c.study_uid
        of_run = sa.select(OBJECTS.c.id).join(RUNS, RUNS.c.id == OBJECTS.c.run_id)
        wanted = (
            sa.select(uid)
            .where(
                STUDIES.c.last_at < until,
                ~sa.exists().where(INSTANCES.c.study_uid == uid),
                ~sa.exists().where(QUARANTINE.c.study_uid == uid, QUARANTINE.c.path != ""),
                ~of_run.where(RUNS.c.study_uid == uid, OBJECTS.c.path != "").exists(),
            )
            .order_by(STUDIES.c.last_at, uid)
        )
        with transaction(self._engine) as t:
            return tuple(t.connection.execute(wanted.limit(limit)).scalars())

    def forget(self, study_uid: str, now: datetime, remove: Callable[[Sequence[str]], None]) -> None:
        """Take everything that the record tells of a study out of it; of the study one event without its UID is left.

        If it comes again it is a new study. Its lines of the audit trail stay.

        remove: called once with the paths, relative to the data folder, of masks that no other study uses, before the
        rows go. Raises IllegalTransition, and changes nothing, where something of the study is under way or has not
        arrived, and where files of it are kept. Raises UnknownStudy. The number of its last run may be given again;
        that of an event is not.
        """
        with transaction(self._writer) as t:
            require_idle(t, study_uid, results=True)
            _require_no_files(t, study_uid)
            runs = sa.select(RUNS.c.id).where(RUNS.c.study_uid == study_uid)
            t.event(now, None, "node", "record", "node.forgot", "a study, with all that the record told of it")
            remove(_masks_of_it_alone(t, study_uid))
            for table, theirs in (
                (PIXEL_PHASES, PIXEL_PHASES.c.study_uid == study_uid),
                (LOOKS, LOOKS.c.study_uid == study_uid),
                (DELIVERIES, DELIVERIES.c.run_id.in_(runs)),
                (OBJECTS, OBJECTS.c.run_id.in_(runs)),
            ):
                t.execute(sa.delete(table).where(theirs))
            t.execute(sa.update(RUNS).where(RUNS.c.study_uid == study_uid).values(supersedes_id=None))
            for table in (RUNS, SERIES, QUARANTINE, REVIEWS, EVENTS, STUDIES):
                t.execute(sa.delete(table).where(table.c.study_uid == study_uid))

    def forget_own(self, until: datetime) -> int:
        """Let go what was said of no study, and what was asked and answered of storage commitment, before that moment.

        How many rows went.
        """
        newest = sa.select(sa.func.max(EVENTS.c.id)).scalar_subquery()
        own = sa.and_(EVENTS.c.study_uid.is_(None), EVENTS.c.at < until, EVENTS.c.id < newest)
        last_asked = sa.select(sa.func.max(COMMITMENTS.c.id)).scalar_subquery()
        answered = sa.and_(
            COMMITMENTS.c.asked_at < until, COMMITMENTS.c.not_before.is_(None), COMMITMENTS.c.id < last_asked
        )
        with transaction(self._writer) as t:
            return sum(
                t.connection.execute(sa.delete(table).where(which)).rowcount
                for table, which in ((EVENTS, own), (COMMITMENTS, answered))
            )


def _require_no_files(t: Transaction, study_uid: str) -> None:
    """Raises IllegalTransition where a row names a file of the study's images or results."""
    kept = (
        sa.select(INSTANCES.c.path).where(INSTANCES.c.study_uid == study_uid),
        sa.select(QUARANTINE.c.path).where(QUARANTINE.c.study_uid == study_uid, QUARANTINE.c.path != ""),
        sa.select(OBJECTS.c.path).join(RUNS).where(RUNS.c.study_uid == study_uid, OBJECTS.c.path != ""),
    )
    if any(t.connection.execute(one.limit(1)).first() for one in kept):
        raise IllegalTransition(
            f"files of study {study_uid} are kept here, and a record without them would make them nobody's; "
            "first: salsa-node purge --results, and see salsa-node quarantine"
        )


def _masks_of_it_alone(t: Transaction, study_uid: str) -> tuple[str, ...]:
    """The paths of the masks that its runs name and no run of another study does."""
    mine, others = RUNS.alias(), RUNS.alias()
    shared = sa.exists().where(others.c.masks_path == mine.c.masks_path, others.c.study_uid != study_uid)
    wanted = sa.select(mine.c.masks_path).where(mine.c.study_uid == study_uid, mine.c.masks_path.is_not(None), ~shared)
    return tuple(t.connection.execute(wanted.distinct()).scalars())
