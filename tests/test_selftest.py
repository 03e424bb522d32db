"""The self-test passes where a node works, fails where it does not, and leaves the site alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from salsa_node import loopback
from salsa_node.store import DeliveryState, Store, StoreSettings


def selftest(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "salsa_node", "selftest", *words, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)


def test_a_phantom_goes_through_and_comes_back(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "node.lock").touch()  # a node has run here
    url = f"sqlite:///{tmp_path / 'data' / 'salsa_node.sqlite'}"
    Store.open(StoreSettings(url), create=True).close()
    config = tmp_path / "site.toml"
    config.write_text(
        f'[node]\ndata_dir = "{tmp_path / "data"}"\n[pipeline]\nname = "demo"\n[delivery]\nto = ["pacs"]\nhold = true\n'
        '[[destination]]\nname = "pacs"\nae_title = "PACS"\nhost = "192.0.2.1"\nport = 104\n'
    )
    told = selftest(config, "--json")
    assert told.returncode == 0, told.stdout + told.stderr
    outcome = json.loads(told.stdout)
    assert (outcome["passed"], outcome["pipeline"]) == (True, "demo")
    assert {"SR", "DOC", "OT"} <= set(outcome["objects"])
    with Store.open(StoreSettings(url)) as store:
        assert store.studies() == ()
        (event,) = store.find_events()
        assert event.detail.startswith("passed in ")


def test_it_fails_where_no_result_comes_in_time(tmp_path):
    config = tmp_path / "site.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n[pipeline]\nname = "demo"\n')
    told = selftest(config, "--limit", "1")
    assert told.returncode == 1, told.stdout + told.stderr
    assert told.stdout.startswith("FAILED after ")
    assert not (tmp_path / "data").exists()


def test_the_node_that_runs_is_tried_through_its_own_door_and_nothing_leaves(tmp_path, free_port):
    config = tmp_path / "site.toml"
    config.write_text(
        f'[node]\ndata_dir = "{tmp_path / "data"}"\n[listener]\nport = {free_port}\nmin_free_gib = 0.0\n'
        '[assembly]\nquiet_s = 3.0\npoll_s = 0.2\n[pipeline]\nname = "demo"\n'
        '[delivery]\nto = ["pacs"]\npoll_s = 0.2\n'
        '[[destination]]\nname = "pacs"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 1\n'
    )
    with loopback.node(config, tmp_path / "node.log", free_port):
        told = selftest(config, "--running", "--json")
    assert told.returncode == 0, told.stdout + told.stderr + (tmp_path / "node.log").read_text()
    outcome = json.loads(told.stdout)
    assert (outcome["passed"], outcome["standing"], outcome["pipeline"]) == (True, "held", "demo")
    assert {"SEG", "SR"} <= set(outcome["objects"])
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'data' / 'salsa_node.sqlite'}")) as store:
        (study,) = store.studies()
        assert (study.calling_ae, study.instances) == ("SELFTEST", 0)
        due = [item for run in store.runs_of(study.study_uid) for item in store.deliveries_of(run.id)]
        assert {(item.state, item.attempt, item.sent_at) for item in due} == {(DeliveryState.WITHDRAWN, 0, None)}
        assert len(due) >= 2
        assert [event.name for event in store.find_events(name="delivery.sent")] == []
    assert not list((tmp_path / "data").rglob("*.dcm"))


def test_where_no_node_runs_it_says_so(tmp_path, free_port):
    (tmp_path / "data").mkdir()
    Store.open(StoreSettings(f"sqlite:///{tmp_path / 'data' / 'salsa_node.sqlite'}"), create=True).close()
    config = tmp_path / "site.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n[listener]\nport = {free_port}\n')
    told = selftest(config, "--running")
    assert told.returncode == 6
    assert (
        "took no association from SELFTEST; does it run, and does listener.allowed have that AE title?" in told.stderr
    )
