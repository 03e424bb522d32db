"""After a clock was set back everything that waits goes on at once; what waits no longer than it may is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from made_delivery import STUDY, T0, produce
from told import events

from salsa_node.store import NewInstance, Store, StoreSettings

NOW = T0 - timedelta(days=1)  # what the clock says since it was set back from T0
WAIT_S = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True) as opened:
        yield opened


def arriving(store: Store, _: Path) -> Callable[[], object]:
    store.add_instance(NewInstance("9.1.1", "9.1", "9", "1.5", "1.6", "p", "0" * 32, 9, "CT1"), T0)
    return lambda: store.complete_series(NOW, NOW)


def to_be_tried_again(store: Store, folder: Path) -> Callable[[], object]:
    produce(store, folder, ["pacs"])
    store.study_assembled(store.study(STUDY), "", T0)
    run = store.queue_run(STUDY, "demo", "e", T0, force=True)
    store.claim_run("w", 60, T0)
    store.return_run(run.id, "w", "no memory", T0 + timedelta(seconds=30), T0)
    for row in store.claim_deliveries("s", 60, T0):  # of the result before, which waits for nothing
        store.give_up(row.id, "s", None, "nobody listens", T0)
    return lambda: store.claim_run("w", 60, NOW)


def to_be_sent_again(store: Store, folder: Path) -> Callable[[], object]:
    produce(store, folder, ["pacs"])
    for row in store.claim_deliveries("s", 60, T0):
        store.delivery_failed(row.id, "s", None, "nobody listens", T0 + timedelta(seconds=30), T0)
    return lambda: store.claim_deliveries("s", 60, NOW)


def being_sent(store: Store, folder: Path) -> Callable[[], object]:
    produce(store, folder, ["pacs"])
    store.claim_deliveries("dead", 60, T0)
    return lambda: store.claim_deliveries("s", 60, NOW)


def to_be_asked_for(store: Store, folder: Path) -> Callable[[], object]:
    produce(store, folder, ["pacs"])
    for row in store.claim_deliveries("s", 60, T0):
        store.delivered(row.id, "s", 0, None, T0, T0 + timedelta(seconds=10))
    return lambda: store.claim_checks("s", 60, NOW)


def being_asked_for(store: Store, folder: Path) -> Callable[[], object]:
    to_be_asked_for(store, folder)
    store.claim_checks("dead", 60, T0 + timedelta(seconds=10))
    return lambda: store.claim_checks("s", 60, NOW)


@pytest.mark.parametrize(
    ("waiting", "told"),
    [
        (arriving, "1 series"),
        (to_be_tried_again, "1 runs"),
        (to_be_sent_again, "2 deliveries"),
        (being_sent, "2 leases"),
        (to_be_asked_for, "2 checks"),
        (being_asked_for, "2 checks, 2 leases of checks"),
    ],
)
def test_what_waits_for_a_time_that_has_gone_goes_on(
    store: Store, tmp_path: Path, waiting: Callable[[Store, Path], Callable[[], object]], told: str
) -> None:
    claim = waiting(store, tmp_path)
    assert not claim(), "it would stand still for a day"
    said = store.catch_up(WAIT_S, NOW)
    assert said == f"the clock was set back; what waited for a time to come goes on now: {told}"
    assert [event.detail for event in events(store) if event.name == "node.clock"] == [said]
    assert claim()
    assert store.catch_up(WAIT_S, NOW) is None


@pytest.mark.parametrize("waiting", [to_be_tried_again, to_be_sent_again, being_sent, being_asked_for])
def test_a_wait_that_may_be_is_left_alone(
    store: Store, tmp_path: Path, waiting: Callable[[Store, Path], Callable[[], object]]
) -> None:
    waiting(store, tmp_path)
    assert store.catch_up(WAIT_S, T0 - timedelta(minutes=50)) is None
    assert store.catch_up(WAIT_S, T0 - timedelta(minutes=70)) is not None
