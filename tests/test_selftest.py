"""The self-test passes where a node works, fails where it does not, and leaves the site alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from salsa_node.store import Store, StoreSettings


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
