"""The database behind the store: an SQLite file of one node, or a PostgreSQL that several machines share.

Either way writers take turns, a commit survives a power cut and a row cannot point at one that is not there. A
question sees one moment of the store, whatever is written meanwhile.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import ConnectionPoolEntry

from salsa_node.errors import ConfigError, StoreError
from salsa_node.store_prepared import execute

EXPECTED: Final = "expected sqlite:////absolute/file.sqlite or postgresql://user@host/database"
_WRITERS_TURN: Final = zlib.crc32(b"salsa_node")  # PostgreSQL's advisory locks go by numbers


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Where the record is kept.

    url: "sqlite:////absolute/file.sqlite", or "postgresql://user@host/database" with the password in ~/.pgpass,
        PGPASSWORD or the url.
    busy_timeout_s: how long a writer waits for its turn.
    """

    url: str
    busy_timeout_s: float = 10.0

    @property
    def is_shared(self) -> bool:
        """Whether nodes on several machines may hold it at once; their leases then run out by themselves alone."""
        return _parsed(self.url).get_backend_name() == "postgresql"

    @property
    def file(self) -> Path:
        """Where a record in SQLite lies. Raises ConfigError where the url names no file."""
        return _file(self.url)


def connect(settings: StoreSettings, *, create: bool) -> sa.Engine:
    """The database behind those settings. Raises ConfigError for an unusable url, StoreError where no file is.

    create: make the file (readable by its owner alone) where it is absent; its folder must exist. A database of
    PostgreSQL is made by its administrator.
    """
    return _postgresql(settings) if settings.is_shared else _sqlite(settings, create=create)


def writer(engine: sa.Engine) -> sa.Engine:
    """The same database, each transaction of which takes the writer's turn when it begins."""
    return engine.execution_options(writes=True)


def _parsed(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"the store's url cannot be read; {EXPECTED}") from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(f"the store's url names {parsed.get_backend_name()!r}; {EXPECTED}")
    return parsed


# ---- SQLite ----------------------------------------------------------------------------------------


def _sqlite(settings: StoreSettings, *, create: bool) -> sa.Engine:
    file = _file(settings.url)
    if create:
        try:
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise ConfigError(
                f"the store cannot be kept in {file}: {error.strerror}; name a file in a folder that exists and that "
                "this user can write to"
            ) from error
    elif not file.is_file():
        raise StoreError(f"there is no store at {file}; start the node once to make it, or correct the store's url")
    engine = sa.create_engine(settings.url, connect_args={"timeout": settings.busy_timeout_s}, hide_parameters=True)
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    setattr(connection, "isolation_level", None)  # noqa: B010 - sqlite3's own name; transactions begin below alone
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    execute(connection, "BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


@contextmanager
def hold(settings: StoreSettings) -> Iterator[None]:
    """Hold the store for one node, whatever data folder it has: a node that starts frees every lease in the store.

    Only those who ask for it keep each other out; asking and reading stay free. Ends with the process, however
    that ends. Nothing is held where several nodes may share the store. Raises ConfigError where another node holds
    the store, or where its folder cannot be written.
    """
    if settings.is_shared:
        yield
        return
    file = _file(settings.url).resolve()
    try:
        lock = os.open(file.with_name(f"{file.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the store's folder {file.parent} cannot be written: {error.strerror}; name a file in a folder that "
            "exists and that this user can write to"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"the store {file} is in use by another node ({error.strerror}); stop it or give this node its own"
            ) from error
        yield
    finally:
        os.close(lock)


def _file(url: str) -> Path:
    parsed = _parsed(url)
    if parsed.database in {None, "", ":memory:"}:
        raise ConfigError(f"the store's url names no file; {EXPECTED}")
    return Path(str(parsed.database))


# ---- PostgreSQL ------------------------------------------------------------------------------------


def _postgresql(settings: StoreSettings) -> sa.Engine:
    if importlib.util.find_spec("psycopg") is None:
        raise ConfigError("a store in PostgreSQL needs psycopg; install salsa_node[postgresql]")
    options = f"-c lock_timeout={1000 * settings.busy_timeout_s:.0f} -c timezone=UTC -c synchronous_commit=on"
    engine = sa.create_engine(
        _parsed(settings.url).set(drivername="postgresql+psycopg"),
        connect_args={"options": options, "connect_timeout": 10, "application_name": "salsa_node"},
        hide_parameters=True,
        pool_pre_ping=True,  # the server may have been started anew
    )
    sa.event.listen(engine, "begin", _begin_postgresql)
    sa.event.listen(engine, "before_cursor_execute", _without_zero_bytes, retval=True)
    return engine


def _begin_postgresql(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("writes"):
        execute(connection, f"SELECT pg_advisory_xact_lock({_WRITERS_TURN})")
    else:
        execute(connection, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def _without_zero_bytes(
    _connection: sa.Connection, _cursor: object, statement: str, parameters: Any, _context: object, _many: bool
) -> tuple[str, Any]:
    """Text that PostgreSQL can keep: a reason may quote a header that holds a zero byte."""
    return statement, _cleaned(parameters)


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", " ")
    if isinstance(value, dict):
        return {name: _cleaned(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cleaned(one) for one in value)
    return value


@compiles(sa.String, "postgresql")
def _text(_type: sa.String, _compiler: Any, **_more: Any) -> str:
    """TEXT: a header may hold more than its value representation allows, and must be kept all the same."""
    return "TEXT"
