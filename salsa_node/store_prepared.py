"""Statements that SQLAlchemy compiles once and that then run on the database's own cursor, in the open transaction.

SQLAlchemy takes ten times as long to look a statement up and to wrap its result as SQLite takes to run it; where
a statement runs for every image that arrives, that is most of the time. The text, the order of the parameters and
the conversion of values stay SQLAlchemy's, so that each dialect gets its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.compiler import SQLCompiler

from salsa_node.errors import StoreError

_REMEDIES = {  # words of SQLite and PostgreSQL: what a person does then
    "disk I/O error": "is the disk full, or failing? salsa-node doctor says how much is left",
    "database or disk is full": "make room on the disk",
    "readonly database": "its file and its folder must be writable for this user",
    "unable to open database": "its file must be readable and its folder writable for this user",
    "is malformed": "stop the node, then salsa-node restore",
    "not a database": "stop the node, then salsa-node restore",
    "Connection refused": "is PostgreSQL up there, and node.store_url right?",
    "failed to resolve host": "is node.store_url right, and its host known to the name server?",
    "timeout expired": "is PostgreSQL up there, and the port open from here?",
    "the database system is": "PostgreSQL is starting or stopping; it is tried again",
    "no pg_hba.conf entry": "allow this machine and user there, in pg_hba.conf",
    "password": "correct the password, in ~/.pgpass or PGPASSWORD, or let the user in there",
    'FATAL:  database "': "make it there (createdb --owner=USER DATABASE), or correct node.store_url",
    'FATAL:  role "': "make it there (createuser USER), or correct node.store_url",
}
_AT_ONCE = (1, 8, 64)  # how many keys one question asks for

Convert = Callable[[Any], Any] | None


@dataclass(frozen=True, slots=True)
class _Text:
    """A statement for one dialect.

    parameters: each with the conversion to what the driver takes; is_positional: whether it takes them in order.
    """

    text: str
    parameters: tuple[tuple[str, Convert], ...]
    is_positional: bool

    def values(self, named: Mapping[str, object]) -> tuple[object, ...] | dict[str, object]:
        """What the driver takes for those parameters. Raises StoreError where one is missing or cannot be kept."""
        try:
            made = [named[name] if convert is None else convert(named[name]) for name, convert in self.parameters]
        except (KeyError, ValueError) as error:
            raise StoreError(f"a row cannot be stored ({type(error).__name__}): {error}") from error
        return (
            tuple(made) if self.is_positional else dict(zip((name for name, _ in self.parameters), made, strict=True))
        )


class Change:
    """An INSERT or UPDATE whose every value is a parameter."""

    def __init__(self, statement: sa.Insert | sa.Update) -> None:
        self._text = lru_cache(maxsize=4)(lambda dialect: _compiled(statement, dialect))

    def run(self, connection: sa.Connection, rows: Iterable[Mapping[str, object]]) -> None:
        """Run it with each of `rows`, values by the parameters' names. Raises StoreError."""
        made = self._text(connection.dialect)
        execute(connection, made.text, [made.values(row) for row in rows], many=True)


class Lookup:
    """The rows of a table that have one of many keys.

    key: a column of it; wanted: the columns to return, all unless told.
    """

    def __init__(self, key: sa.Column[Any], *wanted: sa.Column[Any]) -> None:
        self._key = key
        self._wanted = wanted or tuple(key.table.columns)
        self._text = lru_cache(maxsize=16)(self._compiled)

    def find(self, connection: sa.Connection, keys: Sequence[object]) -> list[dict[str, Any]]:
        """What is found, by the columns' names, in no order. Raises StoreError."""
        found: list[dict[str, Any]] = []
        for begin in range(0, len(keys), _AT_ONCE[-1]):
            some = keys[begin : begin + _AT_ONCE[-1]]
            count = next(size for size in _AT_ONCE if size >= len(some))
            made, columns = self._text(connection.dialect, count)
            named = {f"key_{number}": some[min(number, len(some) - 1)] for number in range(count)}
            found += [
                {
                    name: value if convert is None else convert(value)
                    for (name, convert), value in zip(columns, row, strict=True)
                }
                for row in execute(connection, made.text, made.values(named))
            ]
        return found

    def _compiled(self, dialect: sa.Dialect, count: int) -> tuple[_Text, tuple[tuple[str, Convert], ...]]:
        keys = [sa.bindparam(f"key_{number}", type_=self._key.type) for number in range(count)]
        made = _compiled(sa.select(*self._wanted).where(self._key.in_(keys)), dialect)
        # None: the driver's own code for a type, which SQLAlchemy's types for SQLite and PostgreSQL do not look at
        return made, tuple(
            (each.name, each.type.dialect_impl(dialect).result_processor(dialect, None)) for each in self._wanted
        )


def _compiled(statement: sa.Insert | sa.Update | sa.Select[Any], dialect: sa.Dialect) -> _Text:
    made = statement.compile(dialect=dialect)
    assert isinstance(made, SQLCompiler), "neither INSERT, UPDATE nor SELECT is a change of the schema"
    names = made.positiontup if made.positiontup is not None else list(made.binds)
    convert = {name: each.type.dialect_impl(dialect).bind_processor(dialect) for name, each in made.binds.items()}
    return _Text(str(made), tuple((name, convert[name]) for name in names), is_positional=bool(made.positional))


def execute(connection: sa.Connection, text: str, values: Any = (), *, many: bool = False) -> Sequence[Sequence[Any]]:
    """Run a text in the dialect's own form, past SQLAlchemy; the rows it returns. Raises StoreError.

    values: what the driver takes; many: one such for each time that it is to run, it then returns nothing.
    """
    try:
        cursor = connection.connection.cursor()
        try:
            if many:
                cursor.executemany(text, values)
                return ()
            cursor.execute(text, values)
            return cursor.fetchall() if cursor.description else ()
        finally:
            cursor.close()
    except connection.dialect.loaded_dbapi.Error as error:
        raise refusal(error) from error


def refusal(error: BaseException) -> StoreError:
    """What the database said, and what to do about it where that is known."""
    first = (str(error).splitlines() or [""])[0]
    then = next((f"; {remedy}" for words, remedy in _REMEDIES.items() if words in first), "")
    return StoreError(f"the store answered {type(error).__name__}: {first}{then}")
