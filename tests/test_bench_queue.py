"""The bench of many studies runs, and finds the queue fair."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "scripts" / "bench_queue"


def test_ten_studies_go_through_the_node_in_a_fair_order():
    command = [sys.executable, str(BENCH), "--small", "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert told.returncode == 0, told.stderr[-3000:]
    result = json.loads(told.stdout)
    assert (result["studies"], result["objects"] % 10) == (10, 0)
    assert result["objects"] >= 20
    assert set(result["cpu_s_per_study"]) == {"node", "worker"}
    assert result["stages"]["last"]["writing"] > 0
    assert result["memory"]["last"]["worker_mib"] > 0


def test_who_goes_first_and_who_waits_for_the_night(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH.parent))
    sender_of = runpy.run_path(str(BENCH))["sender_of"]
    senders = [sender_of(number, 100) for number in range(100)]
    assert senders[-2:] == ["EMERGENCY"] * 2
    assert senders.count("ARCHIVE") == 10
    assert {"CT1", "CT2", "CT3"} < set(senders)
