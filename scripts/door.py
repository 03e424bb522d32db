"""A node, or its door alone, in a process of its own, as the scripts that prove it start, watch and kill it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import raw_scu


@dataclass(frozen=True)
class Size:
    """What a process holds."""

    rss_mib: float
    handles: int
    threads: int


class Door:
    """A running door: its port, and what can be seen of its process."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port

    def size(self) -> Size:
        """What its process holds now."""
        of_it = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":\t", 1) for line in (of_it / "status").read_text().splitlines() if ":\t" in line)
        handles = len(list((of_it / "fd").iterdir()))
        return Size(int(status["VmRSS"].split()[0]) / 1024, handles, int(status["Threads"]))

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


def store_url(folder: Path) -> str:
    """Where the record of a door lies that keeps its images below `folder`."""
    return f"sqlite:///{folder.absolute() / 'record.sqlite'}"


@contextmanager
def running(folder: Path, *, fast: bool = True, idle_timeout_s: float = 60.0, node: bool = False) -> Iterator[Door]:
    """A door that keeps everything below `folder`, until the block ends.

    node: `salsa-node serve`, with its loops and its worker process; studies wait longer there than anybody measures.
    """
    port = free_port()
    command = [sys.executable, __file__, str(port), str(folder), str(int(fast)), str(idle_timeout_s)]
    if node:
        config = folder / "node.toml"
        config.write_text(node_config(port, folder, fast=fast, idle_timeout_s=idle_timeout_s))
        command = [sys.executable, "-m", "salsa_node", "serve", "--config", str(config)]
    process = subprocess.Popen(command)
    try:
        wait_for(port, process)
        yield Door(process, port)
    finally:
        end(process)


def node_config(port: int, folder: Path, *, fast: bool, idle_timeout_s: float) -> str:
    """The settings of such a node, as TOML."""
    return f"""
[node]
data_dir = "{folder.absolute()}"
store_url = "{store_url(folder)}"
log_level = "error"
[listener]
port = {port}
fast = {str(fast).lower()}
min_free_gib = 0.0
max_associations = 20
idle_timeout_s = {idle_timeout_s}
[assembly]
quiet_s = 86400.0
max_wait_s = 604800.0
[pipeline]
name = "demo"
"""


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and after a while SIGKILL."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for(
    port: int, process: subprocess.Popen[bytes], called: tuple[str, ...] = ("SALSA_NODE",), patience_s: float = 60.0
) -> None:
    """Until C-ECHO is answered under one of those names."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        for name in called:
            if process.poll() is not None:
                raise SystemExit(f"a receiver ended with code {process.returncode}")
            try:
                with raw_scu.Association(port, name) as assoc:
                    assoc.echo()
            except (OSError, raw_scu.Refused):
                time.sleep(0.05)
            else:
                return
    raise SystemExit(f"a receiver did not answer within {patience_s:g} s")


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


def serve(port: int, folder: Path, *, fast: bool, idle_timeout_s: float) -> None:
    """The door as the node opens it, until SIGTERM."""
    from salsa_node import durable
    from salsa_node.listener import Listener
    from salsa_node.settings import ListenerSettings
    from salsa_node.store import Store, StoreSettings

    warnings.simplefilter("ignore")  # pydicom's, of what fuzzing sends
    logging.disable(logging.WARNING)
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    durable.sweep(folder, older_than_s=0)
    settings = ListenerSettings(
        port=port, fast=fast, min_free_gib=0.0, max_associations=20, idle_timeout_s=idle_timeout_s
    )
    with Store.open(StoreSettings(store_url(folder)), create=True) as store, Listener(settings, store, folder):
        over.wait()


if __name__ == "__main__":
    os.umask(0o077)
    serve(int(sys.argv[1]), Path(sys.argv[2]), fast=bool(int(sys.argv[3])), idle_timeout_s=float(sys.argv[4]))
