"""Statements past SQLAlchemy write and read the rows that SQLAlchemy itself would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import psycopg

from salsa_node import store_prepared
from salsa_node.errors import StoreError
from salsa_node.store import Series, SeriesState, StoreSettings, Study
from salsa_node.store_columns import METADATA
from salsa_node.store_connection import connect
from salsa_node.store_prepared import Change, Lookup
from salsa_node.store_rows import SERIES, STUDIES
from salsa_node.store_transaction import columns

T0 = datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=UTC)
STUDY = Study(
    study_uid="2.25.1", calling_ae="CT'1", accession_number="", patient_id="Ä\\7", study_date="20260101", first_at=T0,
    last_at=T0 + timedelta(days=1), instances=3, assembled_instances=0, called_ae="US",
)  # fmt: skip
SERIES_1 = Series(
    series_uid="2.25.1.1", study_uid="2.25.1", modality="CT", series_number=None, state=SeriesState.REJECTED,
    reason="too few; ? :x %s", instances=3, duplicates=0, last_instance_at=T0,
)  # fmt: skip


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sa.Connection]:
    engine = connect(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True)
    with engine.begin() as connection:
        METADATA.create_all(connection)
        yield connection
    engine.dispose()


def test_rows_written_are_read_by_sqlalchemy_as_they_were(connection: sa.Connection) -> None:
    Change(sa.insert(STUDIES)).run(connection, [columns(STUDY)])
    Change(sa.insert(SERIES)).run(connection, [columns(SERIES_1), columns(replace(SERIES_1, series_uid="2.25.1.2"))])
    assert Study(**connection.execute(sa.select(STUDIES)).mappings().one()) == STUDY
    first, second = (Series(**row) for row in connection.execute(sa.select(SERIES)).mappings())
    assert (first, second.series_uid) == (SERIES_1, "2.25.1.2")


def test_rows_of_sqlalchemy_are_found_as_it_finds_them(connection: sa.Connection) -> None:
    connection.execute(sa.insert(STUDIES), [columns(STUDY)])
    connection.execute(sa.insert(SERIES), [columns(SERIES_1)])
    assert [Study(**row) for row in Lookup(STUDIES.c.study_uid).find(connection, ["2.25.1"])] == [STUDY]
    assert [Series(**row) for row in Lookup(SERIES.c.series_uid).find(connection, ["2.25.1.1"])] == [SERIES_1]
    assert Lookup(SERIES.c.series_uid, SERIES.c.state).find(connection, ["2.25.1.1"]) == [
        {"state": SeriesState.REJECTED}
    ]


def test_a_change_changes_the_named_row_alone(connection: sa.Connection) -> None:
    connection.execute(sa.insert(STUDIES), [columns(STUDY), columns(replace(STUDY, study_uid="2.25.2"))])
    change = sa.update(STUDIES).where(STUDIES.c.study_uid == sa.bindparam("uid"))
    later = T0 + timedelta(seconds=5)
    Change(change.values(last_at=sa.bindparam("new_last_at"))).run(
        connection, [{"uid": "2.25.2", "new_last_at": later}]
    )
    found = {
        row["study_uid"]: row["last_at"] for row in Lookup(STUDIES.c.study_uid).find(connection, ["2.25.1", "2.25.2"])
    }
    assert found == {"2.25.1": STUDY.last_at, "2.25.2": later}


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 64, 65, 150])
def test_as_many_are_found_as_are_there(connection: sa.Connection, count: int) -> None:
    uids = [f"2.25.{number}" for number in range(200)]
    connection.execute(sa.insert(STUDIES), [columns(replace(STUDY, study_uid=uid)) for uid in uids])
    wanted = [*uids[:count], "2.25.absent"] if count else []
    found = Lookup(STUDIES.c.study_uid).find(connection, wanted)
    assert sorted(row["study_uid"] for row in found) == sorted(uids[:count])


def test_what_the_database_refuses_is_a_store_error_without_the_values(connection: sa.Connection) -> None:
    insert = Change(sa.insert(STUDIES))
    insert.run(connection, [columns(STUDY)])
    with pytest.raises(StoreError, match="UNIQUE") as caught:
        insert.run(connection, [columns(STUDY)])
    assert STUDY.patient_id not in str(caught.value)
    with pytest.raises(StoreError, match="no such table"):
        store_prepared.execute(connection, "SELECT * FROM nowhere")


def test_a_parameter_without_a_value_is_not_taken_for_null(connection: sa.Connection) -> None:
    with pytest.raises(StoreError, match="patient_id"):
        Change(sa.insert(STUDIES)).run(connection, [{k: v for k, v in columns(STUDY).items() if k != "patient_id"}])


def test_another_dialect_gets_its_own_text_and_named_values() -> None:
    made = store_prepared._compiled(sa.insert(STUDIES), psycopg.dialect())
    assert "%(study_uid)s" in made.text
    values = made.values(columns(STUDY))
    assert isinstance(values, dict)
    assert values["study_uid"] == "2.25.1"
    assert values["last_at"] == STUDY.last_at.replace(tzinfo=None)
