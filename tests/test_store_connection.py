"""The database itself: an SQLite file that is private, durable and one node's; a PostgreSQL that nodes share."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from postgres import a_database
from test_store import T0, an_instance, arrived, looked_at

from salsa_node import loopback, store_prepared
from salsa_node.errors import ConfigError, StoreError
from salsa_node.store import RunState, SeriesState, Store, StoreSettings, hold
from salsa_node.store_connection import writer
from salsa_node.store_transaction import transaction


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'record.sqlite'}"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(StoreSettings(url_of(tmp_path)), create=True) as opened:
        yield opened


def test_the_file_is_durable_and_private(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "record.sqlite"
    assert file.stat().st_mode & 0o777 == 0o600
    with transaction(store._engine) as t:
        values = [
            t.connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert values == ["wal", 2, 1]


@pytest.mark.parametrize("url", ["", "mysql://db/salsa", "sqlite://", "sqlite:///:memory:", "no url"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected sqlite:////"):
        Store.open(StoreSettings(url))


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be kept in"):
        Store.open(StoreSettings(f"sqlite:///{tmp_path}/file/record.sqlite"), create=True)


def test_an_absent_store_is_not_made_by_asking(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        Store.open(StoreSettings(url_of(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["wrapped", "prepared"])
def test_a_full_disk_is_told_with_what_to_do(store: Store, way: str) -> None:
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 5000)"
    text = f"CREATE TABLE more AS {numbers} SELECT * FROM n"

    def fill(connection: sa.Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")  # no page more than there are
        if way == "prepared":
            store_prepared.execute(connection, text)
        else:
            connection.exec_driver_sql(text)

    with pytest.raises(StoreError, match="disk is full; make room"), transaction(store._writer) as t:
        fill(t.connection)


def test_a_broken_database_is_a_store_error_without_values(store: Store, tmp_path: Path) -> None:
    arrived(store)
    with sqlite3.connect(tmp_path / "record.sqlite") as raw:
        raw.execute("DROP TABLE instances")
    raw.close()
    with pytest.raises(StoreError, match="no such table") as caught:
        store.add_instance(an_instance(5), T0)
    assert "P7" not in f"{caught.value} {caught.value.__cause__}"


def test_a_store_is_held_for_one_node_by_whatever_name(store: Store, tmp_path: Path) -> None:
    settings = StoreSettings(url_of(tmp_path))
    alias = StoreSettings(f"sqlite:///{tmp_path / 'alias.sqlite'}")
    (tmp_path / "alias.sqlite").symlink_to(tmp_path / "record.sqlite")
    (tmp_path / "other").mkdir()
    with hold(settings):
        for again in (settings, alias):
            with pytest.raises(ConfigError, match=r"record\.sqlite is in use by another node"), hold(again):
                pytest.fail("held twice")
        with hold(StoreSettings(url_of(tmp_path / "other"))):
            arrived(store)
    with hold(settings):
        assert (tmp_path / "record.sqlite.lock").stat().st_mode & 0o777 == 0o600


def test_a_store_is_free_again_when_the_node_fails(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="its own"), hold(StoreSettings(url_of(tmp_path))):
        raise BlockingIOError("its own")
    with hold(StoreSettings(url_of(tmp_path))):
        pass


def test_a_store_in_a_folder_that_is_none_cannot_be_held(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"), hold(StoreSettings(url_of(tmp_path / "absent"))):
        pytest.fail("held")


# ---- PostgreSQL ---------------------------------------------------------------------------------


@pytest.fixture
def shared(request: pytest.FixtureRequest) -> str:
    return a_database(request)


def test_two_nodes_may_hold_a_shared_store_and_neither_frees_the_others_leases(shared: str) -> None:
    settings = StoreSettings(shared)
    assert settings.is_shared
    with hold(settings), hold(settings), Store.open(settings) as one, Store.open(settings) as other:
        for number in range(2):
            uid = f"7.{number}"
            one.add_instance(an_instance(number, sop_instance_uid=f"{uid}.2", series_uid=f"{uid}.1", study_uid=uid), T0)
            looked_at(one, uid)
            one.queue_run(uid, "demo", "d", T0)
        mine, theirs = one.claim_run("one", 60, T0), other.claim_run("other", 60, T0)
        assert {mine.study_uid, theirs.study_uid} == {"7.0", "7.1"}
        assert [run.lease_owner for run in other.runs_in(RunState.RUNNING)] == ["one", "other"]


def test_a_question_sees_one_moment_and_cannot_write(shared: str) -> None:
    with Store.open(StoreSettings(shared)) as store:
        with transaction(store._engine) as reading:
            before = reading.connection.exec_driver_sql("SELECT count(*) FROM studies").scalar()
            arrived(store)
            assert reading.connection.exec_driver_sql("SELECT count(*) FROM studies").scalar() == before
        with pytest.raises(StoreError, match="read-only"), transaction(store._engine) as reading:
            reading.connection.exec_driver_sql("DELETE FROM instances")


def test_writers_take_turns_and_wait_only_so_long(shared: str) -> None:
    with Store.open(StoreSettings(shared)) as first, Store.open(StoreSettings(shared, busy_timeout_s=0.2)) as second:
        with transaction(writer(first._engine)), pytest.raises(StoreError, match="lock timeout"):
            second.add_event("node", "x", "node.started", "", T0)
        second.add_event("node", "x", "node.started", "", T0)


def test_a_header_that_is_longer_than_the_standard_allows_is_kept_all_the_same(shared: str) -> None:
    with Store.open(StoreSettings(shared)) as store:
        long = "X" * 500
        store.add_instance(an_instance(modality=long, patient_id=long, size_bytes=3 << 31), T0)
        assert store.studies()[0].patient_id == long
        assert store.instances_of("1.2.3", None)[0].size_bytes == 3 << 31


def test_a_reason_that_quotes_a_zero_byte_is_kept(shared: str) -> None:
    with Store.open(StoreSettings(shared)) as store:
        arrived(store)
        looked_at(store, "1.2.3")
        (series,) = store.series_of("1.2.3")
        if series.state is not SeriesState.COMPLETE:
            store.complete_series(T0, T0)
        rejected = store.reject_series(series.series_uid, "modality 'C\0T' is none", T0)
        assert rejected.reason == "modality 'C T' is none"


def test_a_server_that_was_started_anew_is_found_again(shared: str) -> None:
    with Store.open(StoreSettings(shared)) as store:
        arrived(store)
        with transaction(store._engine) as t:
            mine = t.connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        with Store.open(StoreSettings(shared)) as admin, transaction(writer(admin._engine)) as t:
            t.connection.exec_driver_sql(f"SELECT pg_terminate_backend({mine})")
        assert len(store.studies()) == 1


def test_a_server_that_is_not_there_is_a_store_error_without_the_password() -> None:
    url = "postgresql://salsa:secret@127.0.0.1:1/salsa"
    with pytest.raises(StoreError, match="failed: Connection refused") as caught:
        Store.open(StoreSettings(url), create=True)
    assert "secret" not in str(caught.value)


def test_psycopg_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"salsa_node\[postgresql\]"):
        Store.open(StoreSettings("postgresql://db/salsa"))


def test_a_postgresql_that_cannot_be_reached_is_told_with_what_to_do(request: pytest.FixtureRequest) -> None:
    server, _, _ = a_database(request).rpartition("/")
    for url, words in (
        (f"{server}/nosuch", "createdb --owner=USER DATABASE"),
        (f"{server.replace('postgres@', 'nobody_here@')}/nosuch", "createuser USER"),
        (f"postgresql://postgres@127.0.0.1:{loopback.free_port()}/salsa", "is PostgreSQL up there"),
    ):
        with pytest.raises(StoreError, match=words):
            Store.open(StoreSettings(url))
