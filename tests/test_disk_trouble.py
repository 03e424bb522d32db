"""A study whose files the disk does not give at the moment waits for them, and holds up nobody."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from test_assembly import STUDY, after, only_run
from test_assembly import ct as ct
from test_assembly import receive as receive

from salsa_node import assembly
from salsa_node.disk_trouble import FIRST_WAIT_S, TRIES, DiskTrouble
from salsa_node.overview import Standing, glance
from salsa_node.settings import PipelineChoice


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Parts of paths whose files the system cannot read."""
    parts: set[str] = set()
    read = os.read

    def refuse(handle: int, size: int) -> bytes:
        where = Path(f"/proc/self/fd/{handle}").readlink()
        if parts & set(where.parts):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(where))
        return read(handle, size)

    monkeypatch.setattr(os, "read", refuse)
    return parts


def work_through(store, data_dir: Path, trouble: DiskTrouble, now: datetime) -> None:
    while assembly.step(store, data_dir, PipelineChoice("demo"), now, trouble=trouble) is not None:
        pass


def test_it_is_tried_again_later_and_the_others_go_on(store, data_dir, ct, receive, broken):
    receive(ct())
    receive(ct(study="5.5"))
    broken.add(STUDY)
    trouble, now = DiskTrouble(), after(1000)
    work_through(store, data_dir, trouble, now)
    assert store.runs_of(STUDY) == ()
    assert only_run(store, "5.5").refusal is None
    assert glance(store, store.study(STUDY)).standing is Standing.WAITING
    (told,) = store.find_events(name="study.unreadable")
    assert told.detail.startswith("a file of it cannot be read now (EIO); it is tried again in 10 s, 8 times in all")
    broken.clear()
    work_through(store, data_dir, trouble, now + timedelta(seconds=FIRST_WAIT_S - 1))
    assert store.runs_of(STUDY) == ()
    work_through(store, data_dir, trouble, now + timedelta(seconds=FIRST_WAIT_S))
    assert only_run(store).refusal is None


def test_in_the_end_what_can_be_read_decides(store, data_dir, ct, receive, broken):
    receive(ct())
    broken.add(STUDY)
    trouble, now, waits = DiskTrouble(), after(1000), []
    while not store.runs_of(STUDY):
        assert len(waits) <= TRIES
        work_through(store, data_dir, trouble, now)
        waits.append(now)
        now += timedelta(seconds=FIRST_WAIT_S * 2 ** (len(waits) - 1))
    assert len(waits) == TRIES + 1
    assert len(store.find_events(name="study.unreadable")) == TRIES
    assert trouble.waiting(now) == frozenset()


def test_a_file_that_is_gone_is_not_waited_for(tmp_path: Path):
    assert DiskTrouble().hinders("1.2", [tmp_path / "gone.dcm"], after(0)) == ""


def test_a_clock_that_is_set_back_prolongs_no_wait(tmp_path: Path, broken: set[str], a_file: Callable[[], Path]):
    trouble = DiskTrouble()
    broken.add(tmp_path.name)
    assert "EIO" in trouble.hinders("1.2", [a_file()], after(0))
    assert trouble.waiting(after(1)) == {"1.2"}
    assert trouble.waiting(after(-86400)) == frozenset()


@pytest.fixture
def a_file(tmp_path: Path) -> Callable[[], Path]:
    def make() -> Path:
        path = tmp_path / "image.dcm"
        path.write_bytes(b"x")
        return path

    return make
