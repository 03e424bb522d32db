"""Short runs of the scripts that prove the door; the long ones stand in deploy/performance.md."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import door
import pytest
import raw_scu

from salsa_node import instance_header
from salsa_node.store import Store, StoreSettings

SCRIPTS = Path(__file__).parents[1] / "scripts"
FULL = 0xA700


def told(script: str, folder: Path, *options: str) -> dict[str, object]:
    command = [sys.executable, str(SCRIPTS / script), "--json", "--folder", str(folder), *options]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert isinstance(found, dict)
    return found


def loaded(script: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module."""
    loader = SourceFileLoader(script, str(SCRIPTS / script))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, loader.name, module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    return module


def test_what_was_answered_with_success_survives_a_kill(tmp_path: Path) -> None:
    figures = told("chaos_receive", tmp_path, "--kills", "2", "--longest-s", "0.5")
    assert (figures["kills"], figures["swept"], figures["cut_off"]) == (2, True, 20)
    assert figures["read"] >= figures["kept"] > 0  # type: ignore[operator]


def test_a_loss_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof looks at the files: one that is cut short, and one that was never stored, are found."""
    with door.running(tmp_path) as one, raw_scu.Association(one.port) as assoc:
        images = list(raw_scu.images(5, 3, 16))
        assert [assoc.store(image) for image in images[:2]] == [0, 0]
    file = next(tmp_path.rglob(f"{images[0].uid}.dcm"))
    file.write_bytes(file.read_bytes()[:-1])
    chaos = loaded("chaos_receive", monkeypatch)
    kept = chaos.Told({image.uid: image.content for image in images})
    assert sorted(chaos.missing(tmp_path, kept)) == [images[0].uid, images[2].uid]


def test_mutated_pdus_and_data_sets_neither_end_nor_stall_the_door(tmp_path: Path) -> None:
    figures = told("fuzz_receive", tmp_path, "--pdus", "60", "--data-sets", "60", "--seed", str(os.getpid()))
    assert set(figures) == {"fast PDUs", "fast data sets", "plain PDUs", "plain data sets"}
    for figure in figures.values():
        assert isinstance(figure, dict)
        assert figure["attacks"] >= 30


def test_fuzzing_by_coverage_finds_no_header_that_the_quick_way_reads_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    command = [sys.executable, str(SCRIPTS / "fuzz_header"), "--runs", "2000", "--folder", str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "Done 2000 runs" in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_is_read_otherwise_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz = loaded("fuzz_header", monkeypatch)
    for seed in fuzz.seeds():
        fuzz.attack(seed)
    monkeypatch.setattr(instance_header, "_plain_elements", lambda *_: {0x00080018: b"2.25.99"})
    with pytest.raises(AssertionError, match="pydicom: Header"):
        fuzz.attack(fuzz.seeds()[0])


def test_many_images_leave_the_door_as_large_as_it_was(tmp_path: Path) -> None:
    figures = told("soak_receive", tmp_path, "--images", "1000", "--grow", "24")  # what a start still loads is in it
    assert (figures["images"], figures["flat"]) == (1000, True)


# ---- a disk that is full ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB, in memory."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this root may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_refuses_cleanly_and_resumes_when_it_is_freed(small_disk: Path) -> None:
    """Nothing that was answered with Success is lost; what was refused leaves nothing, and comes in when sent again."""
    images = list(raw_scu.images(6, 80, 512))  # 40 MiB, twice what is free
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40 << 20))
    with door.running(small_disk, node=True) as one:
        with raw_scu.Association(one.port) as assoc:
            first = [assoc.store(image) for image in images]
            assert assoc.echo() == 0
        assert set(first) == {0, FULL}
        assert not list(small_disk.rglob("*.part"))
        ballast.unlink()
        with raw_scu.Association(one.port) as assoc:
            again = [assoc.store(image) for image, status in zip(images, first, strict=True) if status]
        assert set(again) == {0}
    with Store.open(StoreSettings(door.store_url(small_disk))) as store:
        rows = {row.sop_instance_uid: row for row in store.instances_of("2.25.6")}
    assert len(rows) == len(images)
    for image in images:
        assert (small_disk / rows[image.uid].path).read_bytes().endswith(image.content)
