"""Debian's PostgreSQL as the store's database of a test: a cluster of its own on a free port of the loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from salsa_node.store import Store, StoreSettings

TEMPLATE = "today"
USER = "postgres"  # as root the server refuses to start


def program(name: str) -> str | None:
    """Where a program of the newest PostgreSQL lies; None where it is not installed."""
    newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    return str(newest[-1]) if newest else shutil.which(name)


def as_its_user(*words: str) -> None:
    command = ["runuser", "-u", USER, "--", *words] if os.getuid() == 0 else list(words)
    subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@contextmanager
def running(port: int) -> Iterator[str]:
    """A cluster on that port; yields the url of its server without a database, until the block ends."""
    initdb, pg_ctl = program("initdb"), program("pg_ctl")
    assert initdb is not None
    assert pg_ctl is not None
    # pytest keeps its own folders to this user, and the server's user must be able to come here
    folder = Path(tempfile.mkdtemp(prefix="salsa-node-postgresql-"))
    try:
        if os.getuid() == 0:
            shutil.chown(folder, USER, USER)
        data = str(folder / "data")
        as_its_user(initdb, "-D", data, "-U", USER, "--auth=trust", "--encoding=UTF8", "--locale=C")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        as_its_user(pg_ctl, "-D", data, "-w", "-t", "60", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://{USER}@127.0.0.1:{port}"
        finally:
            as_its_user(pg_ctl, "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def a_database(request: pytest.FixtureRequest) -> str:
    """The url of a database of its own with today's tables, dropped with the test; a skip where there is no server."""
    import psycopg

    server = request.getfixturevalue("postgresql")
    name = f"t_{uuid.uuid4().hex}"

    def run(statement: str) -> None:
        with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
            admin.execute(statement.encode())

    run(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    request.addfinalizer(lambda: run(f"DROP DATABASE {name} WITH (FORCE)"))
    return f"{server}/{name}"


def make_template(server: str) -> None:
    """The database that `a_database` copies: today's tables, empty."""
    import psycopg

    with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {TEMPLATE}".encode())
    Store.open(StoreSettings(f"{server}/{TEMPLATE}"), create=True).close()
