"""The worker process: started, watched and ended, with every way in which it can fail told apart.

A child that dies, hangs, takes too long or too much memory costs the run that it carried one attempt, and
nobody else's. What is measured here runs on a clock that nobody can set.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from salsa_node import failures
from salsa_node.config import Config
from salsa_node.errors import LeaseLost
from salsa_node.failures import Failure
from salsa_node.process_memory import held_bytes, killed_for_memory
from salsa_node.store import Run, Store

log = logging.getLogger(__name__)

RESTART_S = 1.0  # wait before a dead worker is started again, doubled each time ...
RESTART_MAX_S = 60.0  # ... up to this
STEADY_S = 30.0  # a worker that lived this long died by itself, not of its start: the wait begins anew
LOOK_S = 2.0  # how often memory is looked at
GIB = 1 << 30


@dataclass(slots=True)
class _Watched:
    """A run under way, as the supervisor saw it."""

    run_id: int
    attempt: int
    since_s: float
    lease_until: datetime | None
    renewed_s: float


class WorkerProcess:
    """The child that carries runs on one device.

    config_path: the settings that the child reads; None for the defaults. device: "" for pipeline.device.
    elapsed_s: a clock that only goes forward.
    failing: how the last child ended, where that was soon after its start; "" since one has lived longer.
    """

    def __init__(
        self,
        store: Store,
        config: Config,
        config_path: Path | None,
        device: str = "",
        elapsed_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._config = config
        self._command = [sys.executable, "-m", "salsa_node", "work"]
        if config_path is not None:
            self._command += ["--config", str(config_path)]
        if device:
            self._command += ["--device", device]
        self._elapsed_s = elapsed_s
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = ""
        self._started_s = self._looked_s = 0.0
        self._not_before = datetime.min.replace(tzinfo=UTC)
        self._wait_s = RESTART_S
        self._pulse = -1  # the end of a pipe into which the child writes whenever it looks for work
        self._heard_s = 0.0
        self._watched: _Watched | None = None
        self._killed: tuple[Failure, str] | None = None
        self._kernel_kills = 0
        self.failing = ""

    def step(self, now: datetime) -> str | None:
        """Start the child when there is none, end one that must not go on, settle what a dead one carried."""
        if self._child is None:
            if now < self._not_before <= now + timedelta(seconds=RESTART_MAX_S):  # else the clock was set back
                return None
            self._start()
            return "started"
        code = self._child.poll()
        if code is not None:
            self._ended(code, now)
            return "ended"
        if self._is_steady:
            self.failing = ""
        if self._killed is None:
            self._killed = self._verdict()
            if self._killed is not None:
                log.error("worker killed", extra={"event": "worker.killed", "reason": self._killed[1]})
                self._kill()
                return "killed"
        return None

    def stop(self) -> None:
        """Ask the child to give its run back and end; kill its process group when it does not."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(self._config.worker.stop_grace_s)
        except subprocess.TimeoutExpired:
            log.warning("worker did not stop in time and is killed", extra={"event": "worker.killed"})
            self._kill()
            self._child.wait()
        self._kill()  # whatever it had started
        self._let_go()
        for run in self._store.release_owner(self._owner, _now()):
            log.info("run returned", extra={"event": "run.returned", "run": run.id})

    @property
    def _is_steady(self) -> bool:
        return self._elapsed_s() - self._started_s > STEADY_S

    def _start(self) -> None:
        self._owner = f"{socket.gethostname()}:{uuid.uuid4().hex[:12]}"
        self._kernel_kills = killed_for_memory()
        self._pulse, childs_end = os.pipe()
        try:
            self._child = subprocess.Popen(
                [*self._command, "--owner", self._owner, "--pulse", str(childs_end)],
                stdin=subprocess.PIPE, start_new_session=True, pass_fds=[childs_end],
            )  # fmt: skip
        except OSError:  # tried again at the next step, which opens another
            os.close(self._pulse)
            self._pulse = -1
            raise
        finally:
            os.close(childs_end)
        os.set_blocking(self._pulse, False)
        self._started_s = self._heard_s = self._elapsed_s()
        self._watched = self._killed = None

    def _verdict(self) -> tuple[Failure, str] | None:
        """Why the child must not go on; None where it may."""
        run = self._store.run_leased_to(self._owner)
        at_s, settings = self._elapsed_s(), self._config.worker
        if run is not None or self._has_looked_for_work():
            self._heard_s = at_s
        if run is None:
            self._watched = None
            if at_s - self._heard_s > settings.run_limit_s:
                return Failure.HUNG, (
                    f"the worker carried nothing and looked for no work in {settings.run_limit_s:g} s "
                    "(worker.run_limit_s), and is killed"
                )
            return None
        seen = self._watched
        if seen is None or (seen.run_id, seen.attempt) != (run.id, run.attempt):
            seen = self._watched = _Watched(run.id, run.attempt, at_s, run.lease_until, at_s)
        if run.lease_until != seen.lease_until:
            seen.lease_until, seen.renewed_s = run.lease_until, at_s
        if at_s - seen.renewed_s > settings.lease_s:
            return (
                Failure.HUNG,
                f"the worker was not heard of for {settings.lease_s:g} s (worker.lease_s) and is killed",
            )
        if at_s - seen.since_s > settings.run_limit_s:
            return Failure.OVERDUE, (
                f"not done after {settings.run_limit_s:g} s (worker.run_limit_s); the worker is killed"
            )
        limit_gib = settings.memory_limit_gib
        if limit_gib and at_s - self._looked_s >= LOOK_S and self._child is not None:
            self._looked_s = at_s
            held_gib = held_bytes(self._child.pid) / GIB
            if held_gib > limit_gib:
                return Failure.MEMORY, (
                    f"the worker held {held_gib:.1f} GiB, {limit_gib:g} GiB are allowed (worker.memory_limit_gib)"
                )
        return None

    def _has_looked_for_work(self) -> bool:
        """Whether the child has said so since the last time."""
        try:
            return bool(os.read(self._pulse, 1 << 16))
        except BlockingIOError:
            return False

    def _kill(self) -> None:
        if self._child is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)

    def _ended(self, code: int, now: datetime) -> None:
        failure, told = self._killed or self._told_by(code)
        log.error("worker ended", extra={"event": "worker.ended", "code": told, "again_in_s": self._wait_s})
        self._store.add_event("node", self._owner, "worker.ended", told, now)
        self.failing = "" if self._is_steady else told
        if self._is_steady:
            self._wait_s = RESTART_S
        self._not_before = now + timedelta(seconds=self._wait_s)
        self._wait_s = min(2 * self._wait_s, RESTART_MAX_S)
        self._kill()  # whatever it had started
        self._let_go()
        run = self._store.run_leased_to(self._owner)
        if run is not None:
            self._settle(run, failure, told, now)
        self._store.release_owner(self._owner, now)

    def _told_by(self, code: int) -> tuple[Failure, str]:
        if code >= 0:
            return Failure.ENDED, f"the worker ended with exit code {code}"
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")  # or a real-time one
        if -code == signal.SIGKILL and killed_for_memory() > self._kernel_kills:
            return Failure.MEMORY, "the kernel killed the worker: the machine, or this service's share of it, is full"
        return Failure.CRASHED, f"the worker was ended by {name}"

    def _settle(self, run: Run, failure: Failure, told: str, now: datetime) -> None:
        settings = self._config.worker
        wait = failures.wait_s(failure, run.attempt, settings.max_attempts, settings.retry_s)
        text = f"attempt {run.attempt}: {told}"
        with suppress(LeaseLost):  # cancelled meanwhile
            if wait is None:
                self._store.fail_run(run.id, self._owner, text, now, failure.value)
                log.error("run failed", extra={"event": "run.failed", "run": run.id, "error": text})
            else:
                later = now + timedelta(seconds=wait)
                self._store.return_run(run.id, self._owner, text, later, now, failure=failure.value)
                log.info("run returned", extra={"event": "run.returned", "run": run.id})

    def _let_go(self) -> None:
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()
        if self._pulse >= 0:
            os.close(self._pulse)
        self._pulse = -1
        self._child = self._watched = None


def _now() -> datetime:
    return datetime.now(UTC)
