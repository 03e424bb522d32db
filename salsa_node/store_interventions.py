"""What a person does to the record's work: cancel it, have it tried again, let a study's files go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

import sqlalchemy as sa

from salsa_node.errors import IllegalTransition
from salsa_node.store_connection import writer
from salsa_node.store_queries import Queries, standing
from salsa_node.store_rows import (
    DELIVERIES,
    INSTANCES,
    OBJECTS,
    RUNS,
    SERIES,
    STUDIES,
    Delivery,
    DeliveryState,
    Instance,
    ResultObject,
    Run,
    RunState,
    Series,
    SeriesState,
)
from salsa_node.store_transaction import Transaction, transaction

_UNDER_WAY = (RunState.QUEUED, RunState.RUNNING)
#: a delivery in such a state has reached its destination, or was never wanted there
_OVER = (DeliveryState.SENT, DeliveryState.VERIFIED, DeliveryState.WITHDRAWN, DeliveryState.LEFT_OUT)


class Interventions(Queries):
    """What is done by hand, or by a rule that a person set; each method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._writer = writer(engine)

    def cancel(self, study_uid: str, now: datetime) -> tuple[Run, ...]:
        """The runs of the study that wait or run, now CANCELLED; a worker hears of it at its next heartbeat.

        Images that come later are looked at as ever. Raises UnknownStudy.
        """
        with transaction(self._writer) as t:
            t.study(study_uid)
            waiting = sa.select(RUNS).where(RUNS.c.study_uid == study_uid, RUNS.c.state.in_(_UNDER_WAY))
            return tuple(
                t.become_run(run, RunState.CANCELLED, now, "by hand", finished_at=now)
                for run in t.all(Run, waiting.order_by(RUNS.c.id))
            )

    def retry(self, study_uid: str, now: datetime) -> tuple[tuple[Run, ...], tuple[Delivery, ...]]:
        """The newest run of each series waits again as it was where it FAILED; what was given up is due again.

        Both with all their attempts. ((), ()) where neither is so. Raises UnknownStudy.
        """
        with transaction(self._writer) as t:
            t.study(study_uid)
            runs = t.all(Run, sa.select(RUNS).where(RUNS.c.study_uid == study_uid).order_by(RUNS.c.id))
            fresh = {"attempt": 0, "not_before": None, "finished_at": None, "error": None, "failure": None}
            again = tuple(
                t.become_run(newest, RunState.QUEUED, now, "by hand, as it was", **fresh)
                for newest in standing(runs)
                if newest.state is RunState.FAILED
            )
            given_up = t.all(Delivery, _given_up(study_uid))
            due = tuple(
                t.become_delivery(delivery, DeliveryState.PENDING, now, "by hand", attempt=0, not_before=None)
                for delivery in given_up
            )
            return again, due

    def give_up_for_good(self, study_uid: str, now: datetime) -> tuple[Delivery, ...]:
        """What was given up of the study's results is not wanted at its destination any more: WITHDRAWN, as it then is.

        Nothing of it keeps the study from being purged then. Raises UnknownStudy.
        """
        with transaction(self._writer) as t:
            t.study(study_uid)
            return tuple(
                t.become_delivery(delivery, DeliveryState.WITHDRAWN, now, "by hand; it was never taken there")
                for delivery in t.all(Delivery, _given_up(study_uid))
            )

    def purge(
        self,
        study_uid: str,
        reason: str,
        now: datetime,
        remove: Callable[[Sequence[str]], None],
        *,
        results: bool = False,
    ) -> tuple[int, int]:
        """Let the images of a study go, with `results` its result files too; (how many files, how many bytes).

        The study itself stays in the record: what came, what was found, where it went. Rows of instances go; rows
        of objects stay without a path, so that a result that comes back is still known for ours.

        remove: called once with the paths, relative to the data folder, before the rows go: whatever happens in
        between, purging again finishes it. Raises IllegalTransition, and changes nothing, where the study is
        still arriving, waits to be looked at, has a run under way, or a delivery of it has not reached its
        destination; with `results`, also where a destination is yet to be asked whether it holds what it took.
        Raises UnknownStudy.
        """
        with transaction(self._writer) as t:
            require_idle(t, study_uid, results)
            instances = t.all(Instance, sa.select(INSTANCES).where(INSTANCES.c.study_uid == study_uid))
            ours = sa.select(OBJECTS).join(RUNS, RUNS.c.id == OBJECTS.c.run_id)
            kept = ours.where(RUNS.c.study_uid == study_uid, OBJECTS.c.path != "")
            objects = t.all(ResultObject, kept) if results else ()
            paths = [item.path for item in instances] + [item.path for item in objects]
            remove(paths)
            if not paths:
                return 0, 0
            t.execute(sa.delete(INSTANCES).where(INSTANCES.c.study_uid == study_uid))
            t.execute(sa.update(SERIES).where(SERIES.c.study_uid == study_uid).values(instances=0))
            empty = {"instances": 0, "assembled_instances": 0}
            t.execute(sa.update(STUDIES).where(STUDIES.c.study_uid == study_uid).values(empty))
            if objects:
                gone = OBJECTS.c.id.in_([item.id for item in objects])
                t.execute(sa.update(OBJECTS).where(gone).values(path=""))
            size = sum(item.size_bytes for item in instances)
            detail = f"{reason}: {len(instances)} images ({size} bytes), {len(objects)} result files"
            t.event(now, study_uid, "study", study_uid, "study.purged", detail)
            return len(paths), size


def _given_up(study_uid: str) -> sa.Select[tuple[object, ...]]:
    """The deliveries of the study's current results that were tried as often as they may be."""
    return (
        sa.select(DELIVERIES)
        .join(RUNS, RUNS.c.id == DELIVERIES.c.run_id)
        .where(
            RUNS.c.study_uid == study_uid,
            RUNS.c.state == RunState.PRODUCED,
            DELIVERIES.c.state == DeliveryState.GAVE_UP,
        )
        .order_by(DELIVERIES.c.id)
    )


def require_idle(t: Transaction, study_uid: str, results: bool) -> None:
    """Raises IllegalTransition that says what still needs the study's files, UnknownStudy."""
    study = t.study(study_uid)
    series = t.all(Series, sa.select(SERIES).where(SERIES.c.study_uid == study_uid))
    if any(one.state is SeriesState.RECEIVING for one in series) or study.assembled_instances < study.instances:
        raise IllegalTransition(f"study {study_uid} is still arriving; wait until it has been looked at")
    runs = t.all(Run, sa.select(RUNS).where(RUNS.c.study_uid == study_uid))
    for run in runs:
        if run.state in _UNDER_WAY:
            raise IllegalTransition(f"run {run.id} of this study is {run.state.value}; wait for it, or cancel it")
    of_study = (
        sa.select(DELIVERIES).join(RUNS, RUNS.c.id == DELIVERIES.c.run_id).where(RUNS.c.study_uid == study_uid).limit(1)
    )
    needed = of_study.where(DELIVERIES.c.state.not_in(_OVER)).where(
        sa.or_(RUNS.c.state == RunState.PRODUCED, DELIVERIES.c.state == DeliveryState.PENDING)
    )
    unproven = of_study.where(DELIVERIES.c.state == DeliveryState.SENT, DELIVERIES.c.check_at.is_not(None))
    delivery = t.one(Delivery, unproven) if results else None
    if delivery is not None:
        raise IllegalTransition(
            f"delivery {delivery.id} to {delivery.destination} is not verified yet: what may have to be sent again is "
            "kept; wait for it, or purge without the results"
        )
    delivery = t.one(Delivery, needed)
    if delivery is not None:
        raise IllegalTransition(
            f"delivery {delivery.id} to {delivery.destination} is {delivery.state.value}: what has not reached its "
            "destination is kept; see salsa-node show"
        )
