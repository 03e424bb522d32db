"""A file is there whole, or not at all."""

from __future__ import annotations

import pytest

from salsa_node import durable


def test_the_file_holds_the_chunks_and_no_part_is_left(tmp_path):
    path = tmp_path / "a" / "b" / "image.dcm"
    assert durable.write(path, [b"DI", b"CM"]) == 4
    assert path.read_bytes() == b"DICM"
    assert [p.name for p in path.parent.iterdir()] == ["image.dcm"]


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


def test_sweep_removes_only_parts(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / f"1{durable.PART}").write_bytes(b"half")
    (tmp_path / "x" / "whole.dcm").write_bytes(b"whole")
    assert durable.sweep(tmp_path) == 1
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["whole.dcm"]
