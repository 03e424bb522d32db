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
from salsa_node.store_rows import METADATA
from salsa_node.store_transaction import connect, transaction, writer


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
    with pytest.raises(StoreError, match=f"has version none, expected {migrations.HEAD}; start the node once"):
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
