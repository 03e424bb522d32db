"""The bench of SALSA's chain: our way runs as it is measured; test_pipelines_salsa drives what upstream does."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import psutil
import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench_pipeline"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    loader = SourceFileLoader("bench_pipeline", str(BENCH))
    spec = importlib.util.spec_from_loader("bench_pipeline", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_our_way_is_measured_stage_by_stage(bench: ModuleType, tmp_path: Path) -> None:
    bench.prepare(tmp_path, (24, 48, 48), (5.4, 3.4, 3.4))  # the middle of a liver: little to do
    told = bench.in_a_process("ours", tmp_path, mirroring=False)
    assert list(told["stages"]) == ["read", "liver", "1 mm and crop", "networks", "back"]
    assert told["cold_s"] > told["warm_s"] > 0
    assert sum(told["stages"].values()) == pytest.approx(told["watched_s"], rel=0.1, abs=0.1)
    assert told["peak_mib"] > 300  # torch alone holds that much
    assert (tmp_path / "ours_warm" / "lesions.nii.gz").exists()
    # what the other way would have written, for the agreement of the two
    (tmp_path / "upstream_warm").mkdir()
    (tmp_path / "ours_cold" / "lesions.nii.gz").rename(tmp_path / "upstream_warm" / "scan_SALSA.nii.gz")
    assert bench.agreement(tmp_path) == 1.0


def test_what_is_measured_ends_with_an_interrupted_bench(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    @contextmanager
    def interrupted(pid: int) -> Iterator[list[float]]:
        started.append(pid)
        assert os.getpgid(pid) == pid, "its processes can be ended together, and an interrupt reaches it by the bench"
        raise KeyboardInterrupt
        yield [0.0]

    monkeypatch.setattr(bench.chain, "watched", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.in_a_process("ours", tmp_path, mirroring=False)
    assert not psutil.pid_exists(started[0])
