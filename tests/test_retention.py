"""Which studies' files go when, which never, and whether what is stored is what was stored."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import xxhash
from pydicom.uid import ExplicitVRLittleEndian

from salsa_node import integrity, retention
from salsa_node.errors import IllegalTransition
from salsa_node.instance_header import file_head
from salsa_node.settings import RetentionSettings
from salsa_node.store import NewInstance, NewObject, Store, StoreSettings

T0 = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
CT = "1.2.840.10008.5.1.4.1.1.2"
PIXELS = b"a data set, as far as its digest is concerned"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'salsa_node.sqlite'}"), create=True) as opened:
        yield opened


def an_image(uid: str) -> NewInstance:
    """The first of that study."""
    return NewInstance(
        f"{uid}.1.1", f"{uid}.1", uid, CT, ExplicitVRLittleEndian, f"studies/{uid}/{uid}.1/1.dcm",
        xxhash.xxh3_128(PIXELS).hexdigest(), 400, "CT1", "CT", 1,
    )  # fmt: skip


def arrive(store: Store, data_dir: Path, uid: str, then: datetime = T0) -> Path:
    new = an_image(uid)
    path = data_dir / new.path
    path.parent.mkdir(parents=True)
    path.write_bytes(file_head(CT, new.sop_instance_uid, ExplicitVRLittleEndian) + PIXELS)
    store.add_instance(new, then)
    store.complete_series(then, then)
    store.study_assembled(store.study(uid), "looked at", then)
    return path


def finish(store: Store, data_dir: Path, uid: str, how: str, then: datetime = T0) -> None:
    """Bring the study to that standing."""
    if how == "nothing":
        return
    run = store.queue_run(uid, "demo", "d", then)
    if how == "cancelled":
        store.cancel(uid, then)
        return
    assert store.claim_run("w", 60, then) is not None
    if how == "failed":
        store.fail_run(run.id, "w", "no memory", then)
        return
    item = NewObject("SEG", f"2.25.{uid}", "1.9.1", f"results/{uid}/seg.dcm", hashlib.sha256(b"seg").hexdigest())
    (data_dir / item.path).parent.mkdir(parents=True)
    (data_dir / item.path).write_bytes(b"seg")
    if how == "blocked":
        store.block_run(run.id, "w", [item], "lesions", {}, "d", "mirrored", then)
        return
    store.produce(run.id, "w", [item], ["pacs"], "lesions", {}, "d", then)
    if how == "held":
        store.hold_study(uid, then)
    if how in ("done", "not_delivered"):
        (delivery,) = store.claim_deliveries("s", 60, then)
        if how == "done":
            store.delivered(delivery.id, "s", 0, None, then)
        else:
            store.give_up(delivery.id, "s", None, "nobody listens", then)


ALL = RetentionSettings(done_days=1, failed_days=1, blocked_days=1, nothing_days=1, cancelled_days=1, results_days=3)
STANDINGS = ("done", "failed", "blocked", "nothing", "cancelled", "not_delivered", "sending", "held")


def days(count: float) -> datetime:
    return T0 + timedelta(days=count)


def test_the_default_keeps_everything(store, tmp_path):
    paths = [arrive(store, tmp_path, f"1.{n}") for n, _ in enumerate(STANDINGS)]
    for n, how in enumerate(STANDINGS):
        finish(store, tmp_path, f"1.{n}", how)
    assert retention.step(store, tmp_path, RetentionSettings(), days(10_000), lambda _: 0) is None
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize("how", STANDINGS)
def test_images_go_after_the_days_of_their_standing_and_never_what_has_not_arrived(store, tmp_path, how):
    path = arrive(store, tmp_path, "1.2")
    finish(store, tmp_path, "1.2", how)
    assert retention.step(store, tmp_path, ALL, days(0.9)) is None
    gone = retention.step(store, tmp_path, ALL, days(1.1))
    kept = how in ("not_delivered", "sending", "held")
    assert (gone, path.exists()) == ((None, True) if kept else ("1.2", False))
    assert retention.step(store, tmp_path, ALL, days(1.2)) is None
    result = tmp_path / "results" / "1.2" / "seg.dcm"
    assert retention.step(store, tmp_path, ALL, days(4)) == ("1.2" if how == "done" else None)
    assert result.exists() == (how in ("blocked", "not_delivered", "sending", "held"))
    assert retention.step(store, tmp_path, ALL, days(5)) is None


def late(store: Store, data_dir: Path) -> None:
    store.add_instance(replace(an_image("1.2"), sop_instance_uid="1.2.1.2", path="studies/late.dcm"), T0)


def looked_for(store: Store, data_dir: Path) -> None:
    late(store, data_dir)
    store.complete_series(T0, T0)


def running(store: Store, data_dir: Path) -> None:
    store.queue_run("1.2", "demo", "d", T0)
    assert store.claim_run("w", 60, T0) is not None


def on_its_way(store: Store, data_dir: Path) -> None:
    """Of a result that was superseded while it was being sent."""
    finish(store, data_dir, "1.2", "sending")
    store.claim_deliveries("s", 60, T0)
    run = store.queue_run("1.2", "demo", "e", T0, force=True)
    store.claim_run("w", 60, T0)
    store.produce(run.id, "w", [], [], "lesions", {}, "e", T0)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (late, "is still arriving"),
        (looked_for, "is still arriving"),
        (lambda store, _: store.queue_run("1.2", "demo", "d", T0), "is QUEUED"),
        (running, "is RUNNING"),
        (lambda store, data_dir: finish(store, data_dir, "1.2", "sending"), "is PENDING"),
        (lambda store, data_dir: finish(store, data_dir, "1.2", "held"), "is HELD"),
        (lambda store, data_dir: finish(store, data_dir, "1.2", "not_delivered"), "is GAVE_UP"),
        (on_its_way, "is PENDING"),
    ],
)
def test_nobody_purges_what_is_still_needed(store, tmp_path, state, told):
    arrive(store, tmp_path, "1.2")
    state(store, tmp_path)
    removed = []
    with pytest.raises(IllegalTransition, match=told):
        store.purge("1.2", "by hand", T0, removed.extend)
    assert removed == []


def test_result_files_stay_until_their_destination_was_asked_for_them(store, tmp_path):
    arrive(store, tmp_path, "1.2")
    finish(store, tmp_path, "1.2", "sending")
    (delivery,) = store.claim_deliveries("s", 60, T0)
    store.delivered(delivery.id, "s", 0, None, T0, check_at=days(1))
    with pytest.raises(IllegalTransition, match="is not verified yet"):
        store.purge("1.2", "by hand", T0, lambda paths: None, results=True)
    assert store.purge("1.2", "by hand", T0, lambda paths: None)[0] == 1, "images are not what goes out"
    store.claim_checks("s", 60, days(1))
    store.verified(delivery.id, "s", "C-FIND", days(1))
    assert store.purge("1.2", "by hand", T0, lambda paths: None, results=True)[0] == 1


def test_a_full_disk_takes_the_oldest_that_are_done_until_there_is_room(store, tmp_path):
    paths = {}
    for n, how in enumerate(("done", "failed", "done", "sending")):
        paths[n] = arrive(store, tmp_path, f"1.{n}", days(n))
        finish(store, tmp_path, f"1.{n}", how, days(n))
    settings = RetentionSettings(min_free_gib=1.0)
    assert retention.step(store, tmp_path, settings, days(9), lambda _: 2**30) is None
    assert retention.step(store, tmp_path, settings, days(9), lambda _: 2**29) == "1.0"
    assert retention.step(store, tmp_path, settings, days(9), lambda _: 2**29) == "1.2"
    assert retention.step(store, tmp_path, settings, days(9), lambda _: 2**29) is None
    assert [n for n, path in paths.items() if path.exists()] == [1, 3]


def test_a_file_that_cannot_be_removed_keeps_its_row(store, tmp_path, monkeypatch):
    arrive(store, tmp_path, "1.2")
    finish(store, tmp_path, "1.2", "failed")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(PermissionError):
        retention.step(store, tmp_path, ALL, days(2))
    assert len(store.instances_of("1.2")) == 1


def test_nothing_beyond_the_data_folder_is_removed(tmp_path):
    from salsa_node import durable

    outside = tmp_path / "outside"
    outside.write_text("not ours")
    (tmp_path / "data").mkdir()
    with pytest.raises(PermissionError):
        durable.remove(tmp_path / "data", ["../outside"])
    assert outside.exists()


# ---- integrity --------------------------------------------------------------------------------------


def kinds(verdict: integrity.Verdict) -> dict[str, str]:
    return {fault.path: fault.kind for fault in verdict.faults}


def test_what_is_as_it_was_stored_has_no_fault(store, tmp_path):
    arrive(store, tmp_path, "1.2")
    finish(store, tmp_path, "1.2", "done")
    verdict = integrity.verify(store, tmp_path)
    assert (verdict.checked, verdict.unknown, verdict.faults) == (2, 0, ())
    assert verdict.read_bytes == len(PIXELS) + 3


def test_each_fault_is_named(store, tmp_path):
    changed = arrive(store, tmp_path, "1.1")
    changed.write_bytes(changed.read_bytes()[:-1] + b"!")
    arrive(store, tmp_path, "1.2").unlink()
    arrive(store, tmp_path, "1.3").write_bytes(b"cut short")
    finish(store, tmp_path, "1.3", "done")
    (tmp_path / "results" / "1.3" / "seg.dcm").write_bytes(b"SEG")
    orphan, young = tmp_path / "results" / "x" / "seg.dcm", tmp_path / "studies" / "1.2" / "young.dcm"
    orphan.parent.mkdir()
    for file in (orphan, young):
        file.write_bytes(b"whose?")
    os.utime(orphan, (0, 0))
    verdict = integrity.verify(store, tmp_path)
    assert kinds(verdict) == {
        "studies/1.1/1.1.1/1.dcm": "changed",
        "studies/1.2/1.2.1/1.dcm": "missing",
        "studies/1.3/1.3.1/1.dcm": "unreadable",
        "results/1.3/seg.dcm": "changed",
        "results/x/seg.dcm": "no row",
    }
    assert kinds(integrity.verify(store, tmp_path, "1.2")) == {"studies/1.2/1.2.1/1.dcm": "missing"}
    assert integrity.set_aside(tmp_path, verdict.faults) == 1
    assert (tmp_path / "set-aside" / "results" / "x" / "seg.dcm").read_bytes() == b"whose?"
    assert young.exists()


def test_the_node_verifies_on_a_schedule_and_writes_down_what_it_finds(store, tmp_path):
    arrive(store, tmp_path, "1.2").unlink()
    assert integrity.step(store, tmp_path, timedelta(0), T0) is None
    assert integrity.step(store, tmp_path, timedelta(hours=24), T0) is not None
    assert integrity.step(store, tmp_path, timedelta(hours=24), T0 + timedelta(hours=23)) is None
    assert integrity.step(store, tmp_path, timedelta(hours=24), T0 + timedelta(hours=24)) is not None
    told = [event.detail for event in store.events_of("1.2") if event.name == "file.fault"]
    assert told == ["missing: studies/1.2/1.2.1/1.dcm; the image is not there"] * 2


def test_a_clock_that_is_set_back_puts_off_no_verification(store, tmp_path):
    assert integrity.step(store, tmp_path, timedelta(hours=1), T0) is not None
    assert integrity.step(store, tmp_path, timedelta(hours=1), T0 + timedelta(minutes=59)) is None
    assert integrity.step(store, tmp_path, timedelta(hours=1), T0 - timedelta(days=1)) is not None


def test_verify_through_the_real_process(store, tmp_path):
    path = arrive(store, tmp_path, "1.2")
    config = tmp_path / "site.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path}"\n')

    def verify(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salsa_node", "verify", *words, "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    told = verify("1.2")
    assert (told.returncode, told.stdout) == (0, "1 files (0 MiB): all as they were stored\n")
    path.write_bytes(b"")
    told = verify("--json")
    assert told.returncode == 1
    assert [fault["kind"] for fault in json.loads(told.stdout)["faults"]] == ["unreadable"]
    assert "have its study sent again" in verify("--set-aside").stdout
    assert verify("1.2", "--set-aside").returncode == 2
