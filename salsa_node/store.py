"""The record: what arrived, what was made of it, where it went; the only truth of the node.

Each method is one transaction and returns frozen rows. Several processes may hold the same store
open: writers take turns, work is claimed by a lease that runs out, and every change of state writes
an Event in the same transaction.

States (a test holds this drawing against `store_rows.TRANSITIONS`)::

    Series    RECEIVING -> COMPLETE
              COMPLETE -> REJECTED | RECEIVING
              REJECTED -> RECEIVING
    Run       QUEUED -> RUNNING | CANCELLED
              RUNNING -> PRODUCED | QUEUED | FAILED | BLOCKED | CANCELLED
              PRODUCED -> SUPERSEDED
              FAILED -> QUEUED
    Delivery  PENDING -> SENT | PENDING | GAVE_UP | WITHDRAWN | LEFT_OUT | HELD
              SENT -> VERIFIED | PENDING
              VERIFIED -> PENDING
              GAVE_UP -> PENDING | WITHDRAWN
              WITHDRAWN -> PENDING
              LEFT_OUT -> PENDING
              HELD -> PENDING | WITHDRAWN

A study has one current result, or one for each of the series that were chosen together (`Run.beside`).
Queueing a newer run cancels the runs that it displaces and that wait or run; their worker hears LeaseLost
at the next heartbeat. The older result stays current until the newer one is PRODUCED; then it is
SUPERSEDED and what had not yet gone out of it is WITHDRAWN. A run whose pixels show that its series is
worse than the one with the current result yields: it is CANCELLED with its digest, and that result stays.
What a destination does not want, as it is configured when its turn comes, is LEFT_OUT, until a resend asks
again. What it took is SENT, and VERIFIED once it says that it holds it; what it took and lost is PENDING
again. What FAILED or was given up waits for a person, who may have it tried again.

Times are aware UTC datetimes and come in as `now`. Every method raises StoreError where the
database cannot be read or written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from types import TracebackType

import sqlalchemy as sa

from salsa_node import migrations
from salsa_node.store_arrivals import Arrivals, Verdict
from salsa_node.store_clock import Clock
from salsa_node.store_commitments import Commitment, Commitments
from salsa_node.store_connection import StoreSettings, connect, hold, writer
from salsa_node.store_deliveries import Deliveries
from salsa_node.store_forgetting import Forgetting
from salsa_node.store_interventions import Interventions
from salsa_node.store_looks import Looks
from salsa_node.store_phases import Phases
from salsa_node.store_proofs import Proofs
from salsa_node.store_quarantine import Quarantine
from salsa_node.store_queries import standing
from salsa_node.store_reviews import Reviews
from salsa_node.store_rows import (
    DELIVERIES,
    OBJECTS,
    RUNS,
    SERIES,
    STUDIES,
    Arrival,
    Delivery,
    DeliveryState,
    Event,
    Instance,
    Look,
    NewInstance,
    NewObject,
    Quarantined,
    ResultObject,
    Run,
    RunState,
    SeenPhase,
    Series,
    SeriesState,
    Study,
    place,
)
from salsa_node.store_search import ORDERS, Figures, Rows, Search, Sought, StoredFile
from salsa_node.store_switches import Pause, Switches, paused
from salsa_node.store_transaction import columns, transaction

__all__ = [
    "ORDERS",
    "Arrival",
    "Commitment",
    "Delivery",
    "DeliveryState",
    "Event",
    "Figures",
    "Instance",
    "Look",
    "NewInstance",
    "NewObject",
    "Pause",
    "Quarantined",
    "ResultObject",
    "Rows",
    "Run",
    "RunState",
    "SeenPhase",
    "Series",
    "SeriesState",
    "Sought",
    "Store",
    "StoreSettings",
    "StoredFile",
    "Study",
    "Verdict",
    "hold",
    "place",
    "standing",
]

KEPT = "images came after the person's masks; the masks stay, salsa-node rerun analyses again"
_UNDER_WAY = (RunState.QUEUED, RunState.RUNNING)


class Store(
    Arrivals,
    Clock,
    Commitments,
    Deliveries,
    Forgetting,
    Interventions,
    Looks,
    Phases,
    Proofs,
    Quarantine,
    Reviews,
    Search,
    Switches,
):
    """An open store; made by `Store.open`. Threads may share it, processes open their own."""

    @classmethod
    def open(cls, settings: StoreSettings, *, create: bool = False) -> Store:
        """The store behind those settings.

        create: make a store that is absent and bring an older one up to date; the node's start does
        so, everything else opens what is there. Raises ConfigError for an unusable url, StoreError
        where the store is absent, of another version, or no store.
        """
        engine = connect(settings, create=create)
        try:
            with transaction(writer(engine) if create else engine) as t:
                migrations.require(t.connection, upgrade_older=create)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- assembling -----------------------------------------------------------------------------

    def complete_series(self, quiet_since: datetime, now: datetime, but_of: Collection[str] = ()) -> Series | None:
        """The RECEIVING series that `quiet_series` names, now COMPLETE."""
        with transaction(self._writer) as t:
            series = t.one(Series, self._quiet(quiet_since, but_of))
            if series is None:
                return None
            return t.become_series(series, SeriesState.COMPLETE, now, f"{series.instances} instances")

    def reject_series(self, series_uid: str, reason: str, now: datetime) -> Series:
        """A COMPLETE series becomes REJECTED for that reason. Raises UnknownStudy, IllegalTransition."""
        with transaction(self._writer) as t:
            return t.become_series(t.series(series_uid), SeriesState.REJECTED, now, reason, reason=reason)

    def study_assembled(self, study: Study, detail: str, now: datetime) -> Study:
        """Note that `study`, as far as it had arrived in this row, has been looked at; an event says `detail`."""
        with transaction(self._writer) as t:
            t.execute(
                sa.update(STUDIES)
                .where(STUDIES.c.study_uid == study.study_uid)
                .values(assembled_instances=study.instances)
            )
            t.event(now, study.study_uid, "study", study.study_uid, "study.assembled", detail)
            return t.study(study.study_uid)

    # ---- running --------------------------------------------------------------------------------

    def queue_run(
        self,
        study_uid: str,
        pipeline: str,
        source_digest: str,
        now: datetime,
        *,
        series_uid: str | None = None,
        masks_path: str | None = None,
        masks_sha256: str | None = None,
        options: Mapping[str, object] | None = None,
        refusal: str | None = None,
        force: bool = False,
        part: str = "",
        images: Sequence[str] | None = None,
        beside: Sequence[str] = (),
    ) -> Run:
        """A QUEUED run, which cancels the runs of that study that are under way and that it displaces.

        part, images, beside: as in `Run`; without them it is about a whole series and its result stands alone.
        force: a person asks; always a new run. Otherwise, where the last unforced run that it would displace,
        and that has not yielded, has the same source digest, pipeline, options and masks digest, that one is
        returned in whatever state it is; and a run with a person's masks that waits, runs or is current is
        returned and stays (an event says so). Raises UnknownStudy.
        """
        here = place(series_uid, part)
        with transaction(self._writer) as t:
            t.study(study_uid)
            every = t.all(Run, sa.select(RUNS).where(RUNS.c.study_uid == study_uid).order_by(RUNS.c.id.desc()))
            runs = [run for run in every if run.place == here or run.place not in beside]
            asked = (source_digest, pipeline, dict(options or {}), masks_sha256)
            if not force:
                last = next((run for run in runs if not (run.forced or run.has_yielded)), None)
                if last and asked == (last.source_digest, last.pipeline, dict(last.options), last.masks_sha256):
                    t.execute(sa.update(RUNS).where(RUNS.c.id == last.id).values(beside=list(beside)))
                    return t.run(last.id)
                newest = next((run for run in runs if run.state in (*_UNDER_WAY, RunState.PRODUCED)), None)
                if newest and newest.masks_path is not None:
                    t.event(now, study_uid, "run", newest.id, "run.kept", KEPT)
                    return newest
            current = next((run for run in runs if run.state is RunState.PRODUCED), None)
            number = t.insert(
                RUNS,
                study_uid=study_uid,
                series_uid=series_uid,
                pipeline=pipeline,
                masks_path=masks_path,
                masks_sha256=masks_sha256,
                options=dict(options or {}),
                refusal=refusal,
                source_digest=source_digest,
                forced=force,
                state=RunState.QUEUED,
                attempt=0,
                queued_at=now,
                supersedes_id=None if current is None else current.id,
                part=part,
                images=None if images is None else list(images),
                beside=list(beside),
            )
            run = t.run(number)
            t.event(now, study_uid, "run", str(run.id), "run.queued", f"pipeline {pipeline}")
            for older in runs:
                if older.state in _UNDER_WAY:
                    t.become_run(older, RunState.CANCELLED, now, f"run {run.id} takes its place", finished_at=now)
            return run

    def claim_run(
        self,
        owner: str,
        lease_s: float,
        now: datetime,
        stat_ae_titles: Sequence[str] = (),
        later_ae_titles: Sequence[str] = (),
    ) -> Run | None:
        """The run that has waited longest, now RUNNING and leased to `owner`; a lease that ran out counts as waiting.

        No run, a forced one neither, is claimed while a series of its study is RECEIVING, or while images
        came after it that assembly has not looked at: an outdated refusal must not go out. One that is overdue
        waits for none of this. None while work is paused.

        owner: unique to this process. Counts an attempt; how many are allowed is the caller's to say.
        stat_ae_titles: runs of studies that one of these sent go before all others.
        later_ae_titles: runs of studies that one of these sent wait, except those that a person asked for.
        """
        waits = sa.and_(RUNS.c.state == RunState.QUEUED, sa.or_(RUNS.c.not_before.is_(None), RUNS.c.not_before <= now))
        left = sa.and_(RUNS.c.state == RunState.RUNNING, RUNS.c.lease_until <= now)
        receiving = sa.exists().where(SERIES.c.study_uid == RUNS.c.study_uid, SERIES.c.state == SeriesState.RECEIVING)
        not_looked_at = sa.exists().where(
            STUDIES.c.study_uid == RUNS.c.study_uid,
            STUDIES.c.instances > STUDIES.c.assembled_instances,
            STUDIES.c.last_at > RUNS.c.queued_at,
        )
        stat = sa.exists().where(STUDIES.c.study_uid == RUNS.c.study_uid, STUDIES.c.calling_ae.in_(stat_ae_titles))
        later = sa.exists().where(STUDIES.c.study_uid == RUNS.c.study_uid, STUDIES.c.calling_ae.in_(later_ae_titles))
        is_whole = sa.or_(RUNS.c.overdue, sa.and_(~receiving, ~not_looked_at))
        wanted = sa.select(RUNS).where(is_whole, sa.or_(~later, RUNS.c.forced))
        # one question each, so that the index answers it in the order of the queue and stops at the first
        order = wanted.order_by(RUNS.c.queued_at, RUNS.c.id).limit(1).with_for_update(skip_locked=True)
        with transaction(self._writer) as t:
            if paused(t) is not None:
                return None
            run = None
            for first in (stat, sa.true()) if stat_ae_titles else (sa.true(),):
                found = [t.one(Run, order.where(due, first)) for due in (waits, left)]
                run = min((one for one in found if one), key=lambda one: (one.queued_at, one.id), default=None)
                if run is not None:
                    break
            if run is None:
                return None
            if run.state is RunState.RUNNING:
                run = t.become_run(run, RunState.QUEUED, now, f"the lease of {run.lease_owner} ran out")
            return t.become_run(
                run,
                RunState.RUNNING,
                now,
                f"attempt {run.attempt + 1} by {owner}",
                attempt=run.attempt + 1,
                lease_owner=owner,
                lease_until=now + timedelta(seconds=lease_s),
                started_at=now,
            )

    def heartbeat(self, run_id: int, owner: str, lease_s: float, now: datetime) -> Run:
        """Prolong the lease. Raises LeaseLost where the run is no longer `owner`'s: stop, put nothing down."""
        with transaction(self._writer) as t:
            t.leased_run(run_id, owner)
            until = now + timedelta(seconds=lease_s)
            t.execute(sa.update(RUNS).where(RUNS.c.id == run_id).values(lease_until=until))
            return t.run(run_id)

    def produce(
        self,
        run_id: int,
        owner: str,
        objects: Sequence[NewObject],
        destinations: Sequence[str],
        outcome: str,
        findings: Mapping[str, object] | None,
        digest: str,
        now: datetime,
    ) -> Run:
        """The run is PRODUCED: its objects, one PENDING delivery of each to each destination, older results SUPERSEDED.

        Raises LeaseLost where the run is no longer `owner`'s; nothing is stored then.
        """
        with transaction(self._writer) as t:
            run = t.leased_run(run_id, owner)
            for item in objects:
                number = t.insert(OBJECTS, run_id=run_id, **columns(item))
                t.new_deliveries(run, number, destinations, now)
            older = sa.select(RUNS).where(RUNS.c.study_uid == run.study_uid, RUNS.c.state == RunState.PRODUCED)
            for past in filter(run.displaces, t.all(Run, older)):
                t.become_run(past, RunState.SUPERSEDED, now, f"by run {run_id}")
            t.withdraw_superseded(run.study_uid, now)
            detail = f"{outcome}: {len(objects)} objects to {len(destinations)} destinations"
            made = {"outcome": outcome, "findings": findings, "digest": digest, "finished_at": now}
            return t.become_run(run, RunState.PRODUCED, now, detail, error=None, failure=None, **made)

    def block_run(
        self,
        run_id: int,
        owner: str,
        objects: Sequence[NewObject],
        outcome: str,
        findings: Mapping[str, object] | None,
        digest: str,
        reason: str,
        now: datetime,
    ) -> Run:
        """The run is BLOCKED: its objects are kept and go nowhere; the older result stays current. Raises LeaseLost."""
        with transaction(self._writer) as t:
            run = t.leased_run(run_id, owner)
            for item in objects:
                t.insert(OBJECTS, run_id=run_id, **columns(item))
            made = {"outcome": outcome, "findings": findings, "digest": digest, "finished_at": now, "error": reason}
            return t.become_run(run, RunState.BLOCKED, now, reason, **made)

    def return_run(
        self,
        run_id: int,
        owner: str,
        error: str,
        not_before: datetime,
        now: datetime,
        *,
        counts: bool = True,
        failure: str | None = None,
    ) -> Run:
        """The run goes back to the queue, to be tried again from `not_before` on. Raises LeaseLost.

        counts: False where the attempt was not the run's fault; it is then taken back.
        failure: the class of the failure.
        """
        with transaction(self._writer) as t:
            run = t.leased_run(run_id, owner)
            attempt = run.attempt if counts else run.attempt - 1
            changes = {"error": error, "not_before": not_before, "attempt": attempt, "failure": failure}
            return t.become_run(run, RunState.QUEUED, now, error, **changes)

    def fail_run(self, run_id: int, owner: str, error: str, now: datetime, failure: str | None = None) -> Run:
        """The run FAILED; a person decides. Raises LeaseLost."""
        with transaction(self._writer) as t:
            run = t.leased_run(run_id, owner)
            return t.become_run(run, RunState.FAILED, now, error, error=error, failure=failure, finished_at=now)

    def run_leased_to(self, owner: str) -> Run | None:
        """The RUNNING run that `owner` holds, however late its lease."""
        held = sa.select(RUNS).where(RUNS.c.state == RunState.RUNNING, RUNS.c.lease_owner == owner)
        with transaction(self._engine) as t:
            return t.one(Run, held)

    def release_owner(self, owner: str | None, now: datetime) -> tuple[Run, ...]:
        """Whatever a dead `owner` had leased is free again at once; returns its runs, now QUEUED.

        None: everybody's leases, for a node that starts and knows that no other holds the store.
        """
        with transaction(self._writer) as t:
            held = sa.select(RUNS).where(RUNS.c.state == RunState.RUNNING)
            free = sa.update(DELIVERIES).values(lease_owner=None, lease_until=None)
            if owner is not None:
                held, free = held.where(RUNS.c.lease_owner == owner), free.where(DELIVERIES.c.lease_owner == owner)
            t.execute(free)
            return tuple(
                t.become_run(run, RunState.QUEUED, now, f"{run.lease_owner} ended") for run in t.all(Run, held)
            )

    def add_event(
        self, subject: str, subject_id: str, name: str, detail: str, now: datetime, study_uid: str | None = None
    ) -> Event:
        """Note something that changes no state; fields as in `Event`, without patient identity."""
        with transaction(self._writer) as t:
            return t.event(now, study_uid, subject, subject_id, name, detail)
