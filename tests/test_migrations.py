from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from salsa_node import migrations
from salsa_node.errors import StoreError
from salsa_node.store import Store, StoreSettings
from salsa_node.store_columns import METADATA
from salsa_node.store_connection import connect, writer
from salsa_node.store_transaction import transaction


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'record.sqlite'}"


def test_the_migrated_tables_are_those_of_the_rows(tmp_path: Path) -> None:
    with Store.open(StoreSettings(url_of(tmp_path)), create=True) as store, transaction(store._engine) as t:
        context = MigrationContext.configure(t.connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_a_missing_column_would_be_seen(tmp_path: Path) -> None:
    Store.open(StoreSettings(url_of(tmp_path)), create=True).close()
    with sqlite3.connect(tmp_path / "record.sqlite") as raw:
        raw.execute("ALTER TABLE runs DROP COLUMN outcome")
    raw.close()
    with Store.open(StoreSettings(url_of(tmp_path))) as store, transaction(store._engine) as t:
        context = MigrationContext.configure(t.connection)
        assert "add_column" in str(compare_metadata(context, METADATA))


def test_the_newest_revision_is_the_one_that_the_store_expects() -> None:
    script = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert script.get_heads() == [migrations.HEAD]


def test_opening_twice_changes_nothing(tmp_path: Path) -> None:
    Store.open(StoreSettings(url_of(tmp_path)), create=True).close()
    Store.open(StoreSettings(url_of(tmp_path)), create=True).close()
    Store.open(StoreSettings(url_of(tmp_path))).close()


def test_a_store_without_tables_is_made_by_the_node_alone(tmp_path: Path) -> None:
    (tmp_path / "record.sqlite").touch()
    with pytest.raises(
        StoreError, match=f"has version none, expected {migrations.HEAD}; start the node once .* db upgrade"
    ):
        Store.open(StoreSettings(url_of(tmp_path)))
    Store.open(StoreSettings(url_of(tmp_path)), create=True).close()


@pytest.mark.parametrize("create", [False, True])
def test_a_newer_store_is_refused(tmp_path: Path, create: bool) -> None:
    Store.open(StoreSettings(url_of(tmp_path)), create=True).close()
    with sqlite3.connect(tmp_path / "record.sqlite") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.close()
    with pytest.raises(StoreError, match="version 9999, this program knows up to"):
        Store.open(StoreSettings(url_of(tmp_path)), create=create)


def test_the_file_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "record.sqlite") as raw:
        raw.execute("CREATE TABLE studies (name TEXT)")
    raw.close()
    with pytest.raises(StoreError, match="tables of another program"):
        Store.open(StoreSettings(url_of(tmp_path)), create=True)


def test_what_is_no_database_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "record.sqlite").write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(StoreError, match="not a database"):
        Store.open(StoreSettings(url_of(tmp_path)), create=True)


def _make_the_last_table_first(engine: sa.Engine) -> None:
    with transaction(writer(engine)) as t:
        t.connection.exec_driver_sql("CREATE TABLE events (x TEXT)")
        migrations.upgrade(t.connection)


def test_a_migration_that_fails_leaves_no_half_of_itself(tmp_path: Path) -> None:
    engine = connect(StoreSettings(url_of(tmp_path)), create=True)
    with pytest.raises(StoreError, match="already exists"):
        _make_the_last_table_first(engine)
    with transaction(engine) as t:
        assert t.connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar() == 0
    engine.dispose()


REVISIONS = [revision.revision for revision in ScriptDirectory(str(Path(migrations.__file__).parent)).walk_revisions()][
    ::-1
]
AT = "2026-11-20 12:00:00.000000"
#: what a node of any version wrote: table -> the values of one row, by column
OLD_ROWS = {
    "studies": {"study_uid": "1.2", "calling_ae": "CT1", "accession_number": "A7", "patient_id": "P", "study_date": "",
                "first_at": AT, "last_at": AT, "instances": 1, "assembled_instances": 1},
    "series": {"series_uid": "1.2.1", "study_uid": "1.2", "modality": "CT", "series_number": 3, "state": "COMPLETE",
               "reason": "", "instances": 1, "duplicates": 0, "last_instance_at": AT},
    "instances": {"sop_instance_uid": "1.2.1.1", "series_uid": "1.2.1", "study_uid": "1.2", "sop_class_uid": "1.3",
                  "transfer_syntax_uid": "1.4", "path": "studies/1.dcm", "sha256": "a" * 64, "digest": "b" * 32,
                  "size_bytes": 5, "received_at": AT},
    "runs": {"id": 1, "study_uid": "1.2", "series_uid": "1.2.1", "pipeline": "demo", "options": "{}",
             "source_digest": "d", "forced": 0, "state": "PRODUCED", "attempt": 1, "queued_at": AT, "finished_at": AT,
             "outcome": "lesions", "findings": '{"lesions": []}', "digest": "r"},
    "objects": {"id": 1, "run_id": 1, "kind": "SEG", "sop_instance_uid": "2.25.1", "sop_class_uid": "1.5",
                "path": "results/seg.dcm", "sha256": "c" * 64},
    "deliveries": {"id": 1, "object_id": 1, "run_id": 1, "destination": "pacs", "state": "GAVE_UP", "attempt": 20,
                   "last_error": "nobody listens"},
    "events": {"id": 1, "at": AT, "study_uid": "1.2", "subject": "study", "subject_id": "1.2", "name": "study.new",
               "detail": "from CT1"},
    "looks": {"id": 1, "study_uid": "1.2", "run_id": 1, "at": AT, "scores": "[]", "evidence": "[]"},
    "quarantine": {"id": 1, "study_uid": "1.2", "series_uid": "1.2.1", "sop_instance_uid": "1.2.1.1",
                   "sop_class_uid": "1.3", "transfer_syntax_uid": "1.4", "path": "quarantine/1.dcm", "sha256": "e" * 64,
                   "digest": "f" * 32, "size_bytes": 5, "calling_ae": "CT1", "reason": "other content", "times": 1,
                   "received_at": AT},
    "commitments": {"id": 1, "transaction_uid": "2.25.9", "calling_ae": "CT1", "requested": '[["1.3", "1.2.1.1"]]',
                    "asked_at": AT, "not_before": AT, "attempt": 2, "last_error": "nobody listens"},
    "switches": {"name": "paused", "reason": "new driver", "at": AT},
    "reviews": {"study_uid": "1.2", "held": 1, "released_run_id": None},
    "pixel_phases": {"series_uid": "1.2.1", "part": "", "study_uid": "1.2", "run_id": 1, "source_digest": "d",
                     "phase": "arterial", "certainty": 0.9, "after_injection_s": 30.0, "at": AT, "considered": 1},
}  # fmt: skip


@pytest.mark.parametrize("released", REVISIONS[:-1])
def test_the_data_of_every_older_version_is_there_after_an_upgrade(tmp_path: Path, released: str) -> None:
    engine = connect(StoreSettings(url_of(tmp_path)), create=True)
    with transaction(writer(engine)) as t:
        migrations.upgrade(t.connection, released)
        tables = set(sa.inspect(t.connection).get_table_names())
        for table, row in OLD_ROWS.items():
            if table not in tables:
                continue
            there = {column["name"] for column in sa.inspect(t.connection).get_columns(table)}
            known = {name: value for name, value in row.items() if name in there}
            names = ", ".join(known)
            t.connection.execute(
                sa.text(f"INSERT INTO {table} ({names}) VALUES ({', '.join(f':{name}' for name in known)})"), known
            )
    engine.dispose()
    with Store.open(StoreSettings(url_of(tmp_path)), create=True) as store, transaction(store._engine) as t:
        assert compare_metadata(MigrationContext.configure(t.connection), METADATA) == []
        assert t.connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall() == []
        for table in tables - {"alembic_version"}:
            assert t.connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar() == 1, table
    with Store.open(StoreSettings(url_of(tmp_path))) as store:
        study = store.study("A7")
        assert (study.study_uid, study.instances, study.first_at.isoformat()) == ("1.2", 1, "2026-11-20T12:00:00+00:00")
        assert [(one.series_uid, one.state.value) for one in store.series_of("1.2")] == [("1.2.1", "COMPLETE")]
        assert [one.path for one in store.instances_of("1.2")] == ["studies/1.dcm"]
        (run,) = store.runs_of("1.2")
        assert (run.state.value, run.outcome, run.findings) == ("PRODUCED", "lesions", {"lesions": []})
        assert [item.path for item in store.objects_of(1)] == ["results/seg.dcm"]
        assert [(item.state.value, item.last_error) for item in store.deliveries_of(1)] == [
            ("GAVE_UP", "nobody listens")
        ]
        assert [event.name for event in store.events_of("1.2")] == ["study.new"]
        assert store.retry("1.2", study.last_at)[1][0].state.value == "PENDING"
