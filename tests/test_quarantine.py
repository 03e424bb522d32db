"""What contradicts what is stored is set aside, listed, and let go by rule when there is too much of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import raw_scu
from test_store import an_instance
from told import events
from typer.testing import CliRunner

from salsa_node import cli, overview
from salsa_node.errors import ContentConflict, PatientConflict
from salsa_node.instance_header import CONTENT_CONFLICT, PATIENT_CONFLICT
from salsa_node.listener import Listener
from salsa_node.settings import ListenerSettings
from salsa_node.store import Arrival, Store, StoreSettings

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
STUDY, SERIES = "2.25.4", "2.25.4.1"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'salsa_node.sqlite'}"), create=True) as opened:
        yield opened


def other(number: int, pixels: int = 8, patient_id: str = "MADE") -> raw_scu.Image:
    """The instance that is stored, with other pixels; or another one under another Patient ID."""
    uid = f"{SERIES}.1" if patient_id == "MADE" else f"{SERIES}.{number}"
    return raw_scu.image(STUDY, SERIES, uid, number, pixels, patient_id)


def kept(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in (folder / "quarantine").rglob("*.dcm"))


def test_a_flood_of_contradictions_is_refused_one_by_one_and_bounded(store, tmp_path):
    """Each gets its failure status; the last two are kept; what went is named, and nothing stored is touched."""
    clock = [T0]
    settings = ListenerSettings(port=0, min_free_gib=0.0, quarantine_files=2)
    with (
        Listener(settings, store, tmp_path, clock=lambda: clock[0]) as door,
        raw_scu.Association(door.port) as assoc,
    ):
        assert assoc.store(other(1)) == 0
        for number in (2, 3, 4):
            clock[0] += timedelta(seconds=1)
            assert assoc.store(other(number)) == CONTENT_CONFLICT
        clock[0] += timedelta(seconds=1)
        assert assoc.store(other(5, patient_id="ANOTHER")) == PATIENT_CONFLICT
        rows = store.quarantined()
        assert [bool(row.path) for row in rows] == [True, True, False, False], "newest first"
        assert kept(tmp_path) == sorted(row.path for row in rows if row.path)
        told = [event.detail for event in events(store) if event.name == "quarantine.let_go"]
        assert len(told) == 2
        assert "stored already under this UID with other content; let go" in told[0]
        [stored] = store.instances_of(STUDY)
        assert (tmp_path / stored.path).read_bytes().endswith(other(1).content)
        assert {item.path for item in store.files(STUDY)} == {stored.path, *kept(tmp_path)}, (
            "what is gone is not missed"
        )

        clock[0] += timedelta(seconds=1)
        assert assoc.store(other(2)) == CONTENT_CONFLICT  # once more: it is the newest now
    again = store.quarantined()[0]
    assert (again.times, again.received_at) == (2, clock[0])
    assert (tmp_path / again.path).read_bytes().endswith(other(2).content)
    assert len(kept(tmp_path)) == 2


def test_the_bound_is_in_bytes_too_and_leaves_all_where_a_file_cannot_go(store):
    for number in range(4):
        new = an_instance(path=f"quarantine/{number}.dcm")
        store.quarantine(replace(new, digest=f"{number}", size_bytes=100), "why", T0 + timedelta(seconds=number))
    gone: list[str] = []

    def cannot(paths: object) -> None:
        raise OSError(30, "Read-only file system")

    with pytest.raises(OSError, match="Read-only"):
        store.bound_quarantine(10, 250.0, T0, cannot)
    assert all(row.path for row in store.quarantined())
    assert store.bound_quarantine(10, 400.0, T0, gone.extend) == ()
    assert len(store.bound_quarantine(10, 399.0, T0, gone.extend)) == 1
    assert gone == ["quarantine/0.dcm"]
    assert len(store.bound_quarantine(0, 400.0, T0, gone.extend)) == 3
    assert len(gone) == 4


def test_a_file_set_aside_for_two_reasons_is_kept_for_the_second(store):
    for seconds, reason in enumerate(("another Patient ID", "other content")):
        new = an_instance(path="quarantine/1.dcm")
        store.quarantine(replace(new, size_bytes=100), reason, T0 + timedelta(seconds=seconds))
    gone: list[str] = []
    assert [row.reason for row in store.bound_quarantine(1, 1e9, T0, gone.extend)] == ["another Patient ID"]
    assert gone == []
    assert [row.path for row in store.quarantined()] == ["quarantine/1.dcm", ""]
    store.bound_quarantine(0, 1e9, T0, gone.extend)
    assert gone == ["quarantine/1.dcm"]


def test_what_contradicts_others_of_its_own_commit_is_set_aside_like_any_other(store):
    """Ten associations fill one commit, in which nothing of the study is in the store yet."""
    arrived = [
        an_instance(1, patient_id=""),
        an_instance(2),
        an_instance(3, patient_id="P8"),
        an_instance(4, study_uid="1.2.4"),
        an_instance(2),
        an_instance(2, digest="other"),
        an_instance(5, patient_id=""),
    ]
    named: list[str] = []
    verdicts = store.add_instances(arrived, T0, lambda new: named.extend(one.sop_instance_uid[-1] for one in new))
    assert [type(verdict) for verdict in verdicts] == [
        Arrival, Arrival, PatientConflict, ContentConflict, Arrival, ContentConflict, Arrival
    ]  # fmt: skip
    assert [verdict.is_new for verdict in verdicts if isinstance(verdict, Arrival)] == [True, True, False, True]
    assert named == ["1", "2", "5"]
    [study], [series] = store.studies(), store.series_of("1.2.3")
    assert (study.patient_id, study.instances, series.instances, series.duplicates) == ("P7", 3, 3, 1)


def test_an_admin_sees_what_is_there_and_what_was_let_go_and_why(store, tmp_path):
    first, second = (an_instance(path=f"quarantine/{number}.dcm") for number in (1, 2))
    store.add_instance(an_instance(), T0)
    store.quarantine(replace(first, digest="1"), "another Patient ID", T0)
    store.quarantine(replace(second, digest="2"), "other content", T0 + timedelta(seconds=1))
    store.bound_quarantine(1, 1e9, T0, lambda _: None)
    config = tmp_path / "site.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path}"\n')
    asked = CliRunner().invoke(cli.app, ["quarantine", "--json", "--config", str(config)])
    assert asked.exit_code == 0, asked.output
    assert [(row["reason"], row["kept"]) for row in json.loads(asked.output)] == [
        ("other content", "quarantine/2.dcm"),
        ("another Patient ID", "let go: the quarantine was full"),
    ]
    table = CliRunner().invoke(cli.app, ["quarantine", "--config", str(config)]).output
    assert "another Patient ID" in table
    assert "let go: the quarantine was full" in table
    page = overview.detail(store, overview.glance(store, store.study("1.2.3")))
    assert [row["kept"] for row in page["quarantine"]] == ["let go: the quarantine was full", "quarantine/2.dcm"]


def test_an_empty_quarantine_is_said_to_be_empty(store, tmp_path):
    config = tmp_path / "site.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path}"\n')
    asked = CliRunner().invoke(cli.app, ["quarantine", "--config", str(config)])
    assert (asked.exit_code, asked.output) == (0, "nothing contradicts what is stored\n")
