"""A disk without one block left: what is laid by for it lets an admin make room; a start and a stop do not break."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shown import salsa_node
from test_node_faults import a_disk
from test_retention import arrive, finish

from salsa_node import config, doctor, loopback, monitoring, reserve
from salsa_node.store import Store, StoreSettings

ROOM = 2**20
STUDY = "1.2"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with a_disk(tmp_path / "disk", 24) as folder:
        yield folder


@pytest.fixture
def site(disk: Path, tmp_path: Path) -> Path:
    """The config of a node that has stopped; a study of its record is done, and the disk is not yet full."""
    file, data_dir = tmp_path / "site.toml", disk / "data"
    data_dir.mkdir()
    file.write_text(
        f'[node]\ndata_dir = "{data_dir}"\n[listener]\nport = {loopback.free_port()}\nmin_free_gib = 0.0\n'
        '[pipeline]\nname = "demo"\n[delivery]\nto = []\n'
    )
    with Store.open(StoreSettings(config.load(file).store_url), create=True) as store:
        arrive(store, data_dir, STUDY)
        finish(store, data_dir, STUDY, "done")
    return file


def fill(disk: Path) -> None:
    """Not one block is left."""
    with (disk / "another").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(ROOM // 16))
        except OSError:
            pass
    assert os.statvfs(disk).f_bavail == 0


def test_nothing_can_be_purged_on_a_full_disk_without_it_and_with_it_the_images_go(site: Path, disk: Path) -> None:
    data_dir = disk / "data"
    assert reserve.lay_by(data_dir, ROOM)
    fill(disk)
    (data_dir / reserve.NAME).rename(disk / "elsewhere")
    assert salsa_node(site, "purge", "--yes", STUDY).returncode == 5, "the very thing it is for"
    (disk / "elsewhere").rename(data_dir / reserve.NAME)
    listed = salsa_node(site, "studies", "--state", "done", "--uids")
    assert (listed.returncode, listed.stdout.split()) == (0, [STUDY]), listed.stderr
    told = salsa_node(site, "purge", "--yes", STUDY)
    assert (told.returncode, "files removed" in told.stdout) == (0, True), told.stderr
    assert not reserve.is_laid_by(data_dir)
    assert not [path for path in (data_dir / "studies").rglob("*") if path.is_file()]
    assert "study.purged" in salsa_node(site, "logs", "--study", STUDY).stdout


def test_it_is_laid_by_where_there_is_ample_room_and_given_back_where_there_is_none(disk: Path) -> None:
    assert not reserve.lay_by(disk, 4 * ROOM), "that would be a sixth of the disk"
    assert reserve.lay_by(disk, ROOM)
    assert (disk / reserve.NAME).stat().st_blocks * 512 >= ROOM, "blocks are held, not just a length"
    assert reserve.lay_by(disk, ROOM)
    assert not reserve.give_back(disk)
    fill(disk)
    assert reserve.give_back(disk)
    assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize >= ROOM
    assert not reserve.give_back(disk)
    assert not reserve.lay_by(disk, ROOM), "what was given back is needed now"


def test_a_full_disk_is_told_whatever_is_asked_for_and_the_doctor_names_the_way_out(site: Path, disk: Path) -> None:
    settings, data_dir = config.load(site), disk / "data"
    with Store.open(StoreSettings(settings.store_url)) as store:
        assert reserve.lay_by(data_dir, ROOM)
        (fault,) = monitoring.examine(store, data_dir, 0.0, ()).faults
        assert "images are refused" in fault, "less than 50 MB"
    assert "room is laid by for salsa-node purge" in doctor._disk(settings, lambda _: 0).detail
    (data_dir / reserve.NAME).unlink()
    assert "make room outside the data folder" in doctor._disk(settings, lambda _: 0).detail


def test_a_node_does_not_start_on_a_full_disk_and_says_why(site: Path, disk: Path) -> None:
    fill(disk)
    command = [sys.executable, "-m", "salsa_node", "serve", "--config", str(site)]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (told.returncode in (3, 5), "Traceback" in told.stderr) == (True, False), told.stderr
    assert "disk" in told.stderr.splitlines()[-1]


def test_a_node_on_a_disk_that_filled_up_stops_as_ever(site: Path, disk: Path) -> None:
    port, log = config.load(site).listener.port, site.with_suffix(".log")
    with loopback.node(site, log, port) as process:
        fill(disk)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
