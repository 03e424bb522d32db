"""Two nodes share a PostgreSQL and a data folder: what one of them leaves behind, the other carries on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from postgres import a_database

from salsa_node import loopback, overview, phantom
from salsa_node.overview import Standing
from salsa_node.store import RunState, Store, StoreSettings

WAIT_S = 240.0


def test_the_work_of_a_dead_machine_goes_on_at_the_other(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = a_database(request)
    recipe = phantom.Recipe(11, shape=(24, 64, 64), spacing_mm=(8.0, 4.5, 4.5))
    study = phantom.write_study(phantom.make(recipe), tmp_path / "study")
    viewer = loopback.free_port()
    configs = {}
    for name in ("one", "other"):
        port = loopback.free_port()
        configs[port] = tmp_path / f"{name}.toml"
        configs[port].write_text(
            f"""
[node]
data_dir = "{tmp_path / "data"}"
store_url = "{url}"
[listener]
port = {port}
[assembly]
quiet_s = 1.0
[worker]
lease_s = 4.0
heartbeat_s = 1.0
[delivery]
to = ["viewer"]
[[destination]]
name = "viewer"
ae_title = "VIEWER"
host = "127.0.0.1"
port = {viewer}
"""
        )
    (first, config), (second, other) = configs.items()
    with (
        loopback.receiver(viewer, tmp_path / "results") as received,
        Store.open(StoreSettings(url)) as store,
        loopback.node(config, tmp_path / "one.log", first) as node,
    ):
        loopback.send(study.axial, first)
        until(lambda: store.runs_in(RunState.RUNNING))
        node.send_signal(signal.SIGKILL)
        node.wait()
        with loopback.node(other, tmp_path / "other.log", second):
            done = (Standing.DONE, Standing.FAILED)
            until(lambda: overview.glance(store, store.study(study.study_uid)).standing in done)
        (run,) = store.runs_of(study.study_uid)
        assert (run.state, run.attempt) == (RunState.PRODUCED, 2), run.error
        assert sorted(path.name.split("-")[0] for path in received).count("SEG") == len(
            [item for item in store.objects_of(run.id) if item.kind in ("SEG", "LESION_SEG")]
        )
        command = [sys.executable, "-m", "salsa_node", "studies", "--json", "--config", str(other)]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        assert [row["study_uid"] for row in json.loads(told.stdout)] == [study.study_uid]


def until(what: object) -> None:
    assert callable(what)
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
