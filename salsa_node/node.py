"""The long-running node: starts, watches and stops the listener, the loops and the worker processes.

The loops are threads that call a `step(...)` again and again and meet only in the store. Inference
runs in child processes, each in a process group of its own: they can be killed without harm, and end by
themselves when the node is gone (their standard input closes).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType

from salsa_node import (
    assembly,
    audit,
    audit_message,
    commitment,
    delivery,
    durable,
    failures,
    integrity,
    monitoring,
    node_lock,
    notification,
    preflight,
    reserve,
    retention,
    verification,
)
from salsa_node.config import Config
from salsa_node.disk_trouble import DiskTrouble
from salsa_node.errors import ConfigError, SalsaNodeError
from salsa_node.listener import INCOMING, Listener
from salsa_node.log import unforeseen
from salsa_node.pacs_count import Archive
from salsa_node.store import Store, StoreSettings, hold
from salsa_node.supervisor import WorkerProcess
from salsa_node.web import Web

log = logging.getLogger(__name__)

_SAY_AGAIN_S = 60.0
CLOCK_S = 30.0  # how often it is looked whether the clock was set back
SECOND_SIGNAL_S = 1.0  # signals closer together count as one: a terminal and a wrapper may both send it
SHARED_SWEEP_S = 86400.0  # another machine may be writing what is younger


def serve(config: Config, config_path: Path | None) -> None:
    """Run a node until SIGTERM or SIGINT, a second one ends it at once; what is unfinished goes on at the next start.

    config_path: the file that `config` came from; None for the defaults.
    Raises ConfigError where the node cannot start: folder not writable or in use, port taken, weights missing, its
    record lost.
    """
    stop = threading.Event()
    asked_s: list[float] = []

    def ask_to_stop(signum: int, _: FrameType | None) -> None:
        name = signal.Signals(signum).name
        asked_s.append(time.monotonic())
        if asked_s[-1] - asked_s[0] > SECOND_SIGNAL_S:
            log.warning("ended at once; what was under way goes on at the next start", extra={"event": "node.ended"})
            os._exit(128 + signum)
        told = f"stopping; what is being sent is finished first, {name} again ends it at once"
        log.info(told, extra={"event": "node.stopping", "signal": name})
        stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, ask_to_stop)
    with ExitStack() as stack:
        preflight.download(config, _now(), lambda line: log.info(line, extra={"event": "node.models"}))
        preflight.require(config)
        config = preflight.settled(config)
        store = stack.enter_context(_record(config))
        own_copy = _own_copy(config, config_path)
        devices = config.worker.devices or ("",)
        workers = [WorkerProcess(store, config, own_copy, device) for device in devices]
        loops = _loops(store, config, workers)
        host = socket.gethostname()
        titles = [profile.ae_title for profile in config.profile]
        with Listener(config.listener, store, config.node.data_dir, also_called=titles) as listener:
            for loop in loops:
                loop.start()
            if config.web.port:
                stack.enter_context(_web(store, config, loops, workers))
            store.add_event("node", host, "node.started", f"port {listener.port}", _now())
            log.info("ready", extra={"event": "node.ready", "port": listener.port, "pid": os.getpid()})
            stop.wait()
        for loop in loops:
            loop.ask_to_stop()
        for loop, worker in zip(loops, workers, strict=False):
            loop.join()  # before its worker goes, or it would be started again
            with _left_to_the_next_start("run not returned"):
                worker.stop()
        for loop in loops:
            loop.join(config.worker.stop_grace_s)  # a silent peer may hold a delivery longer; its lease runs out
        with _left_to_the_next_start("stop not noted"):
            store.add_event("node", host, "node.stopped", "", _now())
        with _left_to_the_next_start("audit trail not complete"):
            audit.Trail(config.node.data_dir).take(store, _now())
        log.info("stopped", extra={"event": "node.stopped"})


@contextmanager
def _left_to_the_next_start(what: str) -> Iterator[None]:
    """A record or a disk that cannot be written keeps no node from stopping."""
    try:
        yield
    except SalsaNodeError as error:
        log.error(what, extra={"event": "node.stop_failed", "error": str(error)})


@contextmanager
def _record(config: Config) -> Iterator[Store]:
    """The store, and what the dead left in it and in the data folder cleared away.

    A node alone holds both. Machines that share a store share the data folder too; there leases run out by
    themselves, and what another machine may be writing stays.
    """
    settings, data_dir = StoreSettings(config.store_url), config.node.data_dir
    with ExitStack() as stack:
        stack.enter_context(node_lock.only_node(config))
        if not settings.is_shared:
            stack.enter_context(hold(settings))
            _require_no_lost_record(settings, data_dir)
        store = stack.enter_context(Store.open(settings, create=True))
        if settings.is_shared:
            left = durable.sweep(data_dir, SHARED_SWEEP_S)
        else:
            store.release_owner(None, _now())
            left = durable.sweep(data_dir / INCOMING, older_than_s=0.0)  # the door's alone, and it is shut
            left += durable.sweep(data_dir)
        reserve.lay_by(data_dir)
        log.info("record open", extra={"event": "node.record", "interrupted_writes_removed": left})
        yield store


def _require_no_lost_record(settings: StoreSettings, data_dir: Path) -> None:
    """Raises ConfigError where images or results lie in the data folder and the record that would name them is gone."""
    file = settings.file
    if file.is_file() and file.stat().st_size:
        return
    kept = [name for name in ("studies", "results") if (data_dir / name).is_dir() and any((data_dir / name).iterdir())]
    if kept:
        found = "empty" if file.is_file() else "not there"
        raise ConfigError(
            f"the record {file} is {found}, and {' and '.join(kept)} in {data_dir} hold what it named: "
            "bring it back (salsa-node restore), correct node.store_url, or move them away to begin anew"
        )


def _own_copy(config: Config, config_path: Path | None) -> Path | None:
    """The config as it is now, for the worker process: an edit counts from the next start on, for both alike."""
    if config_path is None:
        return None
    data_dir = config.node.data_dir
    copy = data_dir / f"running-{config.listener.port}-{socket.gethostname()}.toml"
    try:
        durable.write(copy, [config_path.read_bytes()])
    except OSError as error:
        raise ConfigError(
            f"node.data_dir: {data_dir} cannot be written ({error.strerror}); is its disk full or read-only? "
            "salsa-node doctor tells, salsa-node purge makes room"
        ) from error
    return copy


def _loops(store: Store, config: Config, workers: Sequence[WorkerProcess]) -> tuple[Loop, ...]:
    """One for each worker, in their order, then the others."""
    data_dir = config.node.data_dir
    owner = f"{socket.gethostname()}:{uuid.uuid4().hex[:12]}"

    rules = assembly.Rules(config.selection, config.series, config.assembly, config.query)
    archive, trouble = Archive(config.query), DiskTrouble()

    def assemble(now: datetime) -> object | None:
        return assembly.step(store, data_dir, config.pipeline, now, rules, config.profile_pipelines, archive, trouble)

    def deliver(now: datetime) -> object | None:
        return delivery.step(store, config.delivery, config.destination, data_dir, owner, now)

    def verify(now: datetime) -> object | None:
        return verification.step(store, config.delivery, config.destination, data_dir, owner, now)

    def report(now: datetime) -> object | None:
        return commitment.step(store, config.delivery, config.destination, data_dir, now)

    def let_go(now: datetime) -> object | None:
        if config.retention.min_free_gib > 0 and reserve.give_back(data_dir):
            log.warning("the disk is full: the reserve is given back", extra={"event": "node.reserve"})
        reserve.lay_by(data_dir)
        return retention.step(store, data_dir, config.retention, now)

    def compare(now: datetime) -> object | None:
        return integrity.step(store, data_dir, timedelta(hours=config.retention.verify_hours), now)

    trail = audit.Trail(data_dir)
    collector = audit_message.Collector(config.audit, data_dir)
    notifier = notification.Notifier(config.notify, data_dir, socket.gethostname())

    def write_down(now: datetime) -> object | None:
        return trail.take(store, now) or collector.step(trail)

    def look_at_the_clock(now: datetime) -> object | None:
        told = store.catch_up(_longest_wait_s(config), now)
        if told:
            log.warning(told, extra={"event": "node.clock"})
        return told

    def tell(now: datetime) -> object | None:
        return notifier.step(store, now)

    return (
        *(Loop("worker", worker.step, config.worker.poll_s) for worker in workers),
        Loop("assembly", assemble, config.assembly.poll_s),
        Loop("delivery", deliver, config.delivery.poll_s),
        Loop("verification", verify, config.delivery.poll_s),
        Loop("commitment", report, config.delivery.poll_s),
        Loop("retention", let_go, config.retention.poll_s),
        Loop("integrity", compare, config.retention.poll_s),
        Loop("audit", write_down, config.audit.poll_s),
        Loop("notification", tell, config.notify.poll_s),
        Loop("clock", look_at_the_clock, CLOCK_S),
    )


def _longest_wait_s(config: Config) -> float:
    """Twice the longest that anything in the record is ever put off or leased for."""
    waits = config.delivery.first_retry_s, config.delivery.max_retry_s, config.delivery.verify_after_s
    leases = config.delivery.commitment_s, config.delivery.lease_s
    return 2 * max(*waits, *leases, failures.MAX_WAIT_S * (1 + failures.JITTER))


def _web(store: Store, config: Config, loops: Sequence[Loop], workers: Sequence[WorkerProcess]) -> Web:
    data_dir = config.node.data_dir
    return Web(
        config.web,
        lambda: monitoring.measure(store, data_dir, _now()),
        lambda: monitoring.examine(store, data_dir, config.listener.min_free_gib, loops, workers),
    )


class Loop(threading.Thread):
    """Calls `step(now)` until stopped: at once again while it finds something to do, else after `poll_s`.

    failing: why the last step came to nothing; "" where it did not fail. The log hears the same reason once a minute.
    """

    def __init__(self, name: str, step: Callable[[datetime], object | None], poll_s: float) -> None:
        super().__init__(name=name, daemon=True)
        self._step = step
        self._poll_s = poll_s
        self._over = threading.Event()
        self.failing = ""
        self._said_at = 0.0  # of time.monotonic()

    def run(self) -> None:
        """The loop."""
        wait_s = 0.0
        while not self._over.wait(wait_s):
            try:
                wait_s = self._poll_s if self._step(_now()) is None else 0.0
                self.failing = ""
            except SalsaNodeError as error:
                wait_s = self._failed(str(error))
            except Exception as error:  # noqa: BLE001 - a loop outlives what nobody foresaw
                wait_s = self._failed(unforeseen(error))

    def _failed(self, why: str) -> float:
        """Say so; how long to wait."""
        if why != self.failing or time.monotonic() - self._said_at >= _SAY_AGAIN_S:
            self._said_at = time.monotonic()
            log.error("step failed", extra={"event": "loop.failed", "loop": self.name, "error": why})
        self.failing = why
        return max(1.0, self._poll_s)

    def ask_to_stop(self) -> None:
        """End after the step under way."""
        self._over.set()


def _now() -> datetime:
    return datetime.now(UTC)
