"""What is read ahead is what would have been read, or nothing."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from salsa_node import ahead
from salsa_node.ahead import Ahead, as_they_lie, into_cache
from salsa_node.errors import SeriesRejected


def test_what_was_made_is_handed_over_once_and_only_under_its_key() -> None:
    held: Ahead[str] = Ahead()
    held.begin("study", lambda: "volume")
    assert held.take("another") is None
    assert held.take("study") == "volume"
    assert held.take("study") is None
    held.begin("study", lambda: "volume again")
    assert held.take("study") == "volume again"


def test_what_is_not_ready_is_waited_for() -> None:
    held: Ahead[str] = Ahead()
    go = threading.Event()
    held.begin("study", lambda: "volume" if go.wait(60) else "too early")
    threading.Timer(0.05, go.set).start()
    assert held.take("study") == "volume"


def test_the_same_is_not_made_twice_and_another_takes_its_place() -> None:
    held: Ahead[str] = Ahead()
    made: list[str] = []
    for key in ("study", "study", "next"):
        held.begin(key, lambda key=key: made.append(key) or key)
    assert held.take("study") is None
    assert held.take("next") == "next"
    assert sorted(made) == ["next", "study"]


@pytest.mark.parametrize("error", [SeriesRejected("of no use"), OSError(5, "gone"), MemoryError(), ValueError("odd")])
def test_what_cannot_be_made_is_nothing(error: Exception) -> None:
    def fail() -> str:
        raise error

    held: Ahead[str] = Ahead()
    held.begin("study", fail)
    assert held.take("study") is None


def test_files_are_told_apart_and_from_themselves_once_they_are_written(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(b"1234")
    before = as_they_lie(paths)
    assert before == as_they_lie(paths)
    assert before != as_they_lie(paths[:1])
    assert before != as_they_lie(paths[::-1])
    os.utime(paths[0], (1, 1))
    changed = as_they_lie(paths)
    assert changed != before
    paths[1].write_bytes(b"12345")
    os.utime(paths[1], ns=(before[1][3], before[1][3]))
    assert as_they_lie(paths) != changed
    again = as_they_lie(paths)
    (tmp_path / "another").write_bytes(b"4321")
    os.utime(tmp_path / "another", (1, 1))
    (tmp_path / "another").replace(paths[0])
    assert as_they_lie(paths) != again
    paths[0].unlink()
    assert as_they_lie(paths) == ()


def test_what_is_too_much_to_hold_is_not_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    monkeypatch.setattr(ahead, "READ_AHEAD_BYTES", 999)
    assert as_they_lie([tmp_path / "a"]) == ()


def test_reading_into_the_cache_has_a_bound_and_passes_over_what_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / str(n) for n in range(5)]
    for path in (paths[0], *paths[2:]):
        path.write_bytes(bytes(1000))
    assert into_cache(paths) == 4000
    monkeypatch.setattr(ahead, "READ_AHEAD_BYTES", 1500)
    assert into_cache(paths) == 2000
    monkeypatch.setattr(ahead, "READ_AHEAD_BYTES", 2000)
    assert into_cache(paths) == 2000
    monkeypatch.delattr(os, "posix_fadvise")
    assert into_cache(paths) == 0
