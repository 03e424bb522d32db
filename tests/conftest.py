"""What several tests share: where the test data lies, free ports, and peers that end with the test."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import peer_programs
import postgres
import pytest

from salsa_node.store import Store, StoreSettings

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def testdata() -> Path:
    """The folder of public DICOM and NIfTI files beside the project."""
    folder = Path(os.environ.get("SALSA_NODE_TESTDATA", PROJECT.parent / "shared" / "testdata"))
    if not folder.is_dir():
        pytest.skip("the public test data is not beside the project (SALSA_NODE_TESTDATA names another place)")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store of the test's own, in SQLite."""
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True) as opened:
        yield opened


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Where images would be kept; not made yet."""
    return tmp_path / "data"


@pytest.fixture
def free_port() -> int:
    """A TCP port on the loopback that nobody listens on."""
    return unused_port()


def unused_port() -> int:
    """One that no other worker of this run is given either: each has a range, below what the kernel hands out."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8
    first = 12_000 + 2_000 * worker
    while True:
        port = first + secrets.randbelow(2_000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue  # somebody has it
        return port


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """The path of a program from Debian, or a skip that says what to install."""

    def find(name: str, package: str = "dcmtk") -> str:
        path = peer_programs.path_of(name)
        if path is None:
            pytest.skip(f"{name} is not installed (apt-get install {package})")
        return path

    return find


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The url of a PostgreSQL server on the loopback, made when first asked for."""
    if postgres.program("initdb") is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    with postgres.running(unused_port()) as server:
        postgres.make_template(server)
        yield server
