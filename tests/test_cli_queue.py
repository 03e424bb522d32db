"""`pause` and `resume` through the real process; what they say holds for every other process of the store."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from test_store import an_instance

from salsa_node.store import Store, StoreSettings

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def salsa_node(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "salsa_node", *words, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_a_pause_is_seen_by_every_worker_until_resume(tmp_path):
    config = tmp_path / "site.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path}"\n')
    assert salsa_node(config, "pause").returncode == 5, "no node has made a store yet"
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'salsa_node.sqlite'}"), create=True) as store:
        store.add_instance(an_instance(), T0)
        store.complete_series(T0, T0)
        store.study_assembled(store.study("1.2.3"), "looked at", T0)
        store.queue_run("1.2.3", "demo", "digest", T0)
        told = salsa_node(config, "pause", "--reason", "new driver", "--json")
        assert json.loads(told.stdout)["reason"] == "new driver"
        assert store.claim_run("worker", 60.0, T0) is None
        assert "paused since" in salsa_node(config, "pause").stdout
        assert json.loads(salsa_node(config, "resume", "--json").stdout) == {"paused": False, "was_paused": True}
        assert "not paused" in salsa_node(config, "resume").stdout
        assert store.claim_run("worker", 60.0, T0) is not None
