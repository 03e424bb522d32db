"""The file that a node holds while it runs: it keeps a second one away and tells the commands beside it of the node.

A node alone holds its data folder. Machines that share a PostgreSQL share the folder too; there each node holds a
file of its own, by its machine and port.
"""

from __future__ import annotations

import fcntl
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from salsa_node.config import Config
from salsa_node.errors import ConfigError
from salsa_node.store import StoreSettings


def lock_file(config: Config) -> Path:
    """The file that a node with these settings holds on this machine; it stays when the node has ended."""
    shared = StoreSettings(config.store_url).is_shared
    name = f"node-{config.listener.port}-{socket.gethostname()}.lock" if shared else "node.lock"
    return config.node.data_dir / name


def is_running(config: Config) -> bool:
    """Whether a node with these settings runs, where the record is shared: on this machine."""
    try:
        with lock_file(config).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextmanager
def only_node(config: Config) -> Iterator[None]:
    """Hold that file for this node alone. Raises ConfigError where the data folder is not writable or it is held."""
    file = lock_file(config)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = file.open("a")
    except OSError as exc:
        raise ConfigError(
            f"node.data_dir: {file.parent} cannot be written ({exc.strerror}); choose a folder that this user may write"
        ) from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ConfigError(
                f"node.data_dir: {file.parent} is in use by another node; stop it or choose another folder"
            ) from exc
        yield
