"""A file is there whole, or not at all, and survives the power."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from salsa_node import durable


@pytest.fixture
def synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What os.fsync was called for, in order, relative to tmp_path; "+" where image.dcm had its name by then."""
    calls: list[str] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        here = [tmp_path, *tmp_path.rglob("*")]
        (path,) = (path for path in here if os.path.samestat(path.stat(), os.fstat(handle)))
        name = "part" if path.suffix == durable.PART else path.relative_to(tmp_path).as_posix()
        calls.append(name + "+" * any(other.name == "image.dcm" for other in here))
        fsync(handle)

    monkeypatch.setattr(durable, "_on_disk", {tmp_path})
    monkeypatch.setattr(os, "fsync", note)
    return calls


def test_the_file_holds_the_chunks_and_no_part_is_left(tmp_path):
    path = tmp_path / "a" / "b" / "image.dcm"
    assert durable.write(path, [b"DI", b"CM"]) == 4
    assert path.read_bytes() == b"DICM"
    assert [p.name for p in path.parent.iterdir()] == ["image.dcm"]


def test_folders_are_synced_outermost_first_then_the_content_then_its_name(tmp_path, synced):
    durable.write(tmp_path / "a" / "b" / "image.dcm", [b"DICM"])
    assert synced == [".", "a", "part", "a/b+"]


def test_a_folder_is_synced_once_by_this_process_and_the_file_each_time(tmp_path, synced):
    durable.write(tmp_path / "a" / "one.dcm", [b"1"])
    synced.clear()
    durable.write(tmp_path / "a" / "two.dcm", [b"2"])
    assert synced == ["part", "a"]


def test_folders_that_somebody_else_just_made_are_synced_too(tmp_path, synced):
    (tmp_path / "a" / "b").mkdir(parents=True)  # as by another thread that has not come to its fsync
    durable.write(tmp_path / "a" / "b" / "image.dcm", [b"DICM"])
    assert synced == [".", "a", "part", "a/b+"]


def test_a_folder_that_was_removed_and_made_again_is_synced_again(tmp_path, synced):
    durable.write(tmp_path / "a" / "image.dcm", [b"DICM"])
    (tmp_path / "a" / "image.dcm").unlink()
    (tmp_path / "a").rmdir()
    synced.clear()
    durable.write(tmp_path / "a" / "image.dcm", [b"DICM"])
    assert synced == [".", "part", "a+"]


def test_a_folder_whose_name_could_not_be_synced_is_not_taken_for_safe(tmp_path, synced, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("the disk is gone")))
        with pytest.raises(OSError, match="the disk is gone"):
            durable.write(tmp_path / "a" / "image.dcm", [b"DICM"])
    durable.write(tmp_path / "a" / "image.dcm", [b"DICM"])
    assert synced == [".", "part", "a+"]


def test_what_is_remembered_of_folders_is_bounded(tmp_path, synced, monkeypatch):
    monkeypatch.setattr(durable, "_REMEMBERED", 3)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    for name in "abcdefgh":
        durable.write(tmp_path / name / "image.dcm", [b"DICM"])
        assert len(durable._on_disk) <= 4


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "image.dcm"
    durable.write(path, [b"old"])

    def chunks():
        yield b"new"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        durable.write(path, chunks())
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["image.dcm"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="exists"):
        durable.write(tmp_path / "file" / "b" / "image.dcm", [b"DICM"])


def test_sweep_removes_only_parts_that_nobody_writes_any_more(tmp_path):
    (tmp_path / "x").mkdir()
    for name in (f"old{durable.PART}", "old.dcm", f"young{durable.PART}"):
        (tmp_path / "x" / name).write_bytes(b"half")
    for name in (f"old{durable.PART}", "old.dcm"):
        os.utime(tmp_path / "x" / name, (1.0, 1.0))
    assert durable.sweep(tmp_path) == 1
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["old.dcm", f"young{durable.PART}"]
    assert durable.sweep(tmp_path, older_than_s=-1.0) == 1
    assert durable.sweep(tmp_path / "absent") == 0


def test_only_folders_without_a_file_go(tmp_path):
    (tmp_path / "study" / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "study" / "series").mkdir()
    (tmp_path / "study" / "series" / "1.dcm").write_bytes(b"x")
    durable.remove_empty(tmp_path / "study")
    assert [path.name for path in tmp_path.rglob("*")] == ["study", "series", "1.dcm"]
    (tmp_path / "study" / "series" / "1.dcm").unlink()
    durable.remove_empty(tmp_path / "study")
    durable.remove_empty(tmp_path / "study")
    assert list(tmp_path.iterdir()) == []


def test_a_staged_file_gets_the_name_that_nothing_has(tmp_path: Path) -> None:
    first, second = durable.Staged(tmp_path / "in"), durable.Staged(tmp_path / "in")
    for staged, content in ((first, b"first"), (second, b"second")):
        staged.write([content])
    name = tmp_path / "new" / "folder" / "file"
    assert [first.settle(name), second.settle(name)] == [True, False]
    assert (name.read_bytes(), second.path.read_bytes()) == (b"first", b"second")
    first.discard()
    second.discard()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [name]


@pytest.mark.parametrize("keeps_order", [True, False])
def test_a_staged_name_is_on_disk_before_anyone_hears_of_it(keeps_order, tmp_path, synced, monkeypatch):
    monkeypatch.setattr(durable, "_names_follow_content", lambda _: keeps_order)
    staged = durable.Staged(tmp_path / "in")
    staged.write([b"DICM"])
    synced.clear()
    assert staged.settle(tmp_path / "new" / "image.dcm")
    assert synced == [".", "new/image.dcm+"] + ([] if keeps_order else ["new+"])


def test_renamed_files_are_on_disk_under_their_new_names(tmp_path, synced):
    durable.write(tmp_path / "in" / "file", [b"DICM"])
    synced.clear()
    durable.publish([(tmp_path / "in" / "file", tmp_path / "new" / "image.dcm")])
    assert synced == [".", "new+"]


def test_a_staged_file_without_a_name_keeps_its_own(tmp_path: Path) -> None:
    staged = durable.Staged(tmp_path / "in")
    staged.write([b"text"])
    assert staged.settle(None) is False
    assert staged.path.read_bytes() == b"text"
    staged.discard()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_staged_file_that_cannot_be_flushed_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    staged = durable.Staged(tmp_path / "in")
    staged.write([b"te", memoryview(b"xt")])
    (tmp_path / "new").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(durable, "_make_folder", lambda _: None)
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            staged.settle(tmp_path / "new" / "file")
    staged.discard()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_folders_are_flushed_where_the_disk_does_not_keep_names_in_order() -> None:
    assert durable._names_follow_content(os.makedev(0, 0)) is False, "no disk at all"
    memory = Path("/dev/shm")
    if memory.is_mount():
        assert durable._names_follow_content(memory.stat().st_dev) is False
