"""What a node asks for every study is answered by an index, in its order: what is over costs the next study nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from test_store import an_instance

from salsa_node.store import DeliveryState, NewObject, Store

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
PER_STUDY: dict[str, Callable[[Store], object]] = {
    "a series is complete": lambda store: store.complete_series(NOW, NOW),
    "a study is looked at": lambda store: store.study_to_assemble(),
    "a study is waited for": lambda store: store.overdue_study(NOW),
    "a run is claimed": lambda store: store.claim_run("w", 60, NOW, ("STAT",), ("NIGHT",)),
    "the next run is read ahead": lambda store: store.next_in_line(),
    "deliveries are claimed": lambda store: store.claim_deliveries("s", 60, NOW),
    "checks are claimed": lambda store: store.claim_checks("s", 60, NOW),
    "the rate is counted": lambda store: store.sent_between("pacs", NOW, NOW),
    "the newest study is asked for": lambda store: store.studies(1),
    "events are taken": lambda store: store.events_after(7),
}


@contextmanager
def plans(store: Store) -> Iterator[list[str]]:
    """How SQLite goes about every question that is asked within."""
    found: list[str] = []

    def explain(_c: object, cursor: object, statement: str, parameters: object, *_: object) -> None:
        if statement.startswith("SELECT"):
            cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)  # type: ignore[attr-defined]
            found.extend(row[3] for row in cursor.fetchall())  # type: ignore[attr-defined]

    sa.event.listen(store._engine, "before_cursor_execute", explain)
    try:
        yield found
    finally:
        sa.event.remove(store._engine, "before_cursor_execute", explain)


@pytest.mark.parametrize("what", PER_STUDY)
def test_no_question_of_a_study_reads_a_whole_table(store: Store, what: str) -> None:
    with plans(store) as found:
        PER_STUDY[what](store)
    assert found, "nothing was asked"
    assert not [line for line in found if line.startswith("SCAN") and "USING" not in line], found


@pytest.mark.parametrize(
    "what", ["a series is complete", "a study is looked at", "a run is claimed", "checks are claimed"]
)
def test_what_waits_is_found_in_its_order_without_sorting(store: Store, what: str) -> None:
    with plans(store) as found:
        PER_STUDY[what](store)
    assert not [line for line in found if "TEMP B-TREE" in line], found


def a_result(store: Store, uid: str) -> int:
    """A study of one image and its result of one object, due to the PACS; the run's number."""
    image = replace(an_instance(), study_uid=uid, series_uid=f"{uid}.1", sop_instance_uid=f"{uid}.1.1")
    store.add_instance(image, NOW)
    store.complete_series(NOW, NOW)
    store.study_assembled(store.study(uid), "looked at", NOW)
    run = store.queue_run(uid, "demo", "d", NOW, force=True)
    assert store.claim_run("w", 60, NOW) is not None
    store.produce(run.id, "w", [NewObject("SR", f"{uid}.{run.id}", "1.9", f"{run.id}", "0" * 64)], ["pacs"], "x", None, "d", NOW)  # fmt: skip # noqa: E501
    return run.id


def test_what_a_dead_node_was_sending_is_withdrawn_when_its_lease_is_over(store: Store) -> None:
    first = a_result(store, "1.2.3")
    assert len(store.claim_deliveries("dead", 60, NOW)) == 1
    second = store.queue_run("1.2.3", "demo", "e", NOW, force=True)
    store.claim_run("w", 60, NOW)
    store.produce(second.id, "w", [], ["pacs"], "x", None, "e", NOW)
    assert store.deliveries_of(first)[0].state is DeliveryState.PENDING, "it may be on its way"
    other = a_result(store, "1.2.4")
    claimed = store.claim_deliveries("n", 60, NOW + timedelta(seconds=61))
    assert [delivery.run_id for delivery in claimed] == [other]
    assert store.deliveries_of(first)[0].state is DeliveryState.WITHDRAWN


def test_what_is_held_while_its_place_is_taken_is_withdrawn(store: Store) -> None:
    first = a_result(store, "1.2.3")
    (delivery,) = store.claim_deliveries("n", 60, NOW)
    second = store.queue_run("1.2.3", "demo", "e", NOW, force=True)
    store.claim_run("w", 60, NOW)
    store.produce(second.id, "w", [], ["pacs"], "x", None, "e", NOW)
    store.hold_back([delivery.id], "n", NOW)
    assert store.deliveries_of(first)[0].state is DeliveryState.WITHDRAWN
