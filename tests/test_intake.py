"""Instances that come together are committed together, and none waits for a commit that it has no part in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import raw_scu
from pydicom.uid import ExplicitVRLittleEndian

from salsa_node import intake
from salsa_node.instance_header import OUT_OF_RESOURCES, SUCCESS
from salsa_node.intake import Intake, Request
from salsa_node.notes import Notes
from salsa_node.store import NewInstance, Store, StoreSettings, Verdict

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
IMAGES = list(raw_scu.images(7, 8, 16))


class Slow:
    """A store whose commits wait until they are let go, one by one."""

    def __init__(self, store: Store) -> None:
        self._add = store.add_instances
        self.batches: list[list[str]] = []
        self.began, self.may_go = threading.Semaphore(0), threading.Semaphore(0)

    def add(
        self, arrived: Sequence[NewInstance], now: datetime, publish: Callable[[Sequence[NewInstance]], None]
    ) -> tuple[Verdict, ...]:
        self.batches.append([new.sop_instance_uid for new in arrived])
        self.began.release()
        assert self.may_go.acquire(timeout=60)
        return self._add(arrived, now, publish)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True) as store:
        yield store


@pytest.fixture
def slow(store: Store, monkeypatch: pytest.MonkeyPatch) -> Slow:
    slow = Slow(store)
    monkeypatch.setattr(store, "add_instances", slow.add)
    return slow


@pytest.fixture
def come(store: Store, tmp_path: Path) -> Iterator[Callable[[int], Future[tuple[int, str]]]]:
    """Let an image come, by a receiver of its own; returns when it waits for its row, with its answer to be."""
    taking = Intake(store, tmp_path / "data", Notes(store, lambda: T0), lambda: T0)

    def take(number: int) -> tuple[int, str]:
        image = IMAGES[number]
        request = Request(raw_scu.CT, image.uid, raw_scu.CT, ExplicitVRLittleEndian, "CT", "NODE")
        incoming = taking.begin(request)
        incoming.write([image.content[:100], memoryview(image.content)[100:]])
        return taking.take(incoming)

    with ThreadPoolExecutor(len(IMAGES)) as pool:
        yield lambda number: pool.submit(take, number)


def gathered(taking: Callable[[], int], count: int) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if taking() == count:
            return
        pause.wait(0.01)
    pytest.fail(f"{taking()} wait instead of {count}")


def test_what_comes_during_a_commit_is_committed_together_and_no_answer_waits_for_the_next(
    come: Callable[[int], Future[tuple[int, str]]], slow: Slow, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[object] = []
    made = intake._Waiting.__init__

    def noted(self: intake._Waiting, *values: object) -> None:
        made(self, *values)  # type: ignore[arg-type]
        waiting.append(self)

    monkeypatch.setattr(intake._Waiting, "__init__", noted)
    first = come(0)
    assert slow.began.acquire(timeout=60)
    others = [come(number) for number in range(1, 6)]
    gathered(lambda: len(waiting), 6)
    threading.Event().wait(0.2)  # between that moment and standing in the queue
    slow.may_go.release()
    assert first.result(60) == (SUCCESS, "")
    assert slow.began.acquire(timeout=60), "the next commit has begun"
    last = come(6)
    assert not any(other.done() for other in others)
    slow.may_go.release(2)
    assert [other.result(60) for other in [*others, last]] == [(SUCCESS, "")] * 6
    assert slow.batches[0] == [IMAGES[0].uid]
    assert sorted(slow.batches[1]) == [IMAGES[number].uid for number in range(1, 6)]
    assert len(store.instances_of("2.25.7")) == 7


def test_who_waits_in_vain_is_refused_and_holds_up_nobody(
    come: Callable[[int], Future[tuple[int, str]]],
    slow: Slow,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = come(0)
    assert slow.began.acquire(timeout=60)
    monkeypatch.setattr(intake, "_COMMIT_S", 0.05)
    assert come(1).result(60)[0] == OUT_OF_RESOURCES
    assert not list((tmp_path / "data").rglob(f"{IMAGES[1].uid}*")), "no row will ever come for its file"
    monkeypatch.setattr(intake, "_COMMIT_S", 60.0)
    third = come(2)
    slow.may_go.release(2)
    assert first.result(60)[0] == third.result(60)[0] == SUCCESS
    again = come(1)
    slow.may_go.release()
    assert again.result(60)[0] == SUCCESS
    assert {row.sop_instance_uid for row in store.instances_of("2.25.7")} == {image.uid for image in IMAGES[:3]}
