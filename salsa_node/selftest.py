"""Self-test: a phantom study through a real node with this site's settings and back; no PACS ever sees it.

Either through a node of the test's own, with ports and a data folder of its own and one destination, in this
process: nothing of the site's record changes but one event that tells the outcome. Or through the door of the node
that runs: from its first image on the study is held, so that its result stays; when it was seen it is let go.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from salsa_node import config, durable, loopback, overview, phantom
from salsa_node.config import Config
from salsa_node.errors import PipelineError
from salsa_node.overview import Standing
from salsa_node.settings import (
    AssemblySettings,
    AuditSettings,
    DeliverySettings,
    Destination,
    ListenerSettings,
    NodeSettings,
    NotifySettings,
    QuerySettings,
    RetentionSettings,
    WebSettings,
)
from salsa_node.store import DeliveryState, Store, StoreSettings

Clock = Callable[[], datetime]
SENDER_AE = "SELFTEST"  #: who sends to the node that runs
_RECIPE = phantom.Recipe(5, shape=(48, 96, 96), spacing_mm=(5.0, 3.2, 3.2))
_GOING_ON = (Standing.RECEIVING, Standing.WAITING, Standing.QUEUED, Standing.RUNNING, Standing.SENDING)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    passed: the study was analysed and a report came back by C-STORE. standing: where the study stood at the end.
    objects: modalities of what came back. seconds: from the first image sent to the last object received.
    """

    passed: bool
    standing: str
    pipeline: str
    objects: tuple[str, ...]
    seconds: float
    error: str

    @property
    def told(self) -> str:
        """One line for people."""
        if self.passed:
            return f"passed in {self.seconds:.0f} s: {self.pipeline} answered with {', '.join(self.objects)}"
        why = f"the study stands at {self.standing}{': ' if self.error else ''}{self.error}"
        return f"FAILED after {self.seconds:.0f} s: {why}"


def run(settings: Config, limit_s: float, progress: Callable[[str], None] = lambda _: None) -> Outcome:
    """Send the phantom, wait for its results. Raises PipelineError where the node of the test does not start."""
    with tempfile.TemporaryDirectory(prefix="salsa-selftest-") as name:
        folder = Path(name)
        port, back = loopback.free_port(), loopback.free_port()
        file = folder / "selftest.toml"
        file.write_text(config.dump(_alone(settings, folder, port, back)), encoding="utf-8")
        study = phantom.write_study(phantom.make(_RECIPE), folder / "study", study=str(time.time_ns()))
        log = folder / "node.log"
        with loopback.receiver(back, folder / "back") as received:
            try:
                with loopback.node(file, log, port):
                    begun = time.monotonic()
                    loopback.send([*study.localizer, *study.axial], port)
                    with Store.open(StoreSettings(f"sqlite:///{folder / 'data' / 'salsa_node.sqlite'}")) as record:
                        seen = _wait(record, study.study_uid, begun + limit_s, progress)
                    seconds = time.monotonic() - begun
            except PipelineError as error:
                last = log.read_text(encoding="utf-8").splitlines()[-1:]
                raise PipelineError(f"the node of the self-test did not start: {' '.join(last)}") from error
            objects = _modalities(received)
    return _outcome(seen, seen.standing is Standing.DONE, objects, seconds)


def through_the_door(
    settings: Config, record: Store, limit_s: float, clock: Clock, progress: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Send the phantom to the node that runs with these settings, wait for its result, and let both go again.

    objects: the kinds that lie whole in the data folder. Where it fails the study stays, and stays held.
    Raises DeliveryError where no node takes it.
    """
    door = settings.listener
    host = "127.0.0.1" if door.host in ("0.0.0.0", "::", "127.0.0.1", "localhost") else door.host  # noqa: S104 - compared

    def send(paths: Sequence[Path]) -> None:
        loopback.send(paths, door.port, host=host, called=door.ae_title, calling=SENDER_AE)

    with tempfile.TemporaryDirectory(prefix="salsa-selftest-") as name:
        study = phantom.write_study(phantom.make(_RECIPE), Path(name), study=str(time.time_ns()))
        first, *others = [*study.localizer, *study.axial]
        begun = time.monotonic()
        send([first])
        record.hold_study(study.study_uid, clock())
        send(others)
    seen = _wait(record, study.study_uid, begun + limit_s, progress)
    made = [item for run in seen.current for item in record.objects_of(run.id)]
    whole = [item.kind for item in made if _is_whole(settings.node.data_dir / item.path, item.sha256)]
    as_expected = seen.standing in (Standing.HELD, Standing.DONE) and len(whole) == len(made)
    outcome = _outcome(seen, as_expected, tuple(sorted(set(whole))), time.monotonic() - begun)
    if outcome.passed:
        record.withdraw_held(study.study_uid, clock())
        record.purge(
            study.study_uid, "a self-test", clock(),
            lambda paths: durable.remove(settings.node.data_dir, paths), results=True,
        )  # fmt: skip
    return outcome


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _outcome(seen: overview.Glance, as_expected: bool, objects: tuple[str, ...], seconds: float) -> Outcome:
    newest = seen.runs[-1] if seen.runs else None
    return Outcome(
        as_expected and "SR" in objects,
        seen.standing.value,
        newest.pipeline if newest else "",
        objects,
        seconds,
        (newest.error or "") if newest else "",
    )


def _alone(settings: Config, folder: Path, port: int, back: int) -> Config:
    """The site's settings, cut off from everything but this test."""
    models = settings.models_dir.absolute()
    return replace(
        settings,
        node=NodeSettings(data_dir=folder / "data", log_level=settings.node.log_level),
        listener=ListenerSettings(port=port, min_free_gib=0.0, fast=settings.listener.fast),
        assembly=AssemblySettings(quiet_s=1.0, poll_s=0.2),
        query=QuerySettings(),
        pipeline=replace(settings.pipeline, models_dir=str(models) if models.is_dir() else "", may_download=False),
        delivery=DeliverySettings(to=("selftest",), max_attempts=3, poll_s=0.2),
        retention=RetentionSettings(),
        web=WebSettings(),
        audit=AuditSettings(),
        notify=NotifySettings(),
        destination=(Destination("selftest", loopback.RECEIVER_AE, "127.0.0.1", back, verify="off"),),
        profile=(),
    )


def _wait(record: Store, study_uid: str, deadline: float, progress: Callable[[str], None]) -> overview.Glance:
    told = ""
    while True:
        seen = overview.glance(record, record.study(study_uid))
        if seen.standing.value != told:
            told = seen.standing.value
            progress(told)
        waits = seen.standing in _GOING_ON or any(item.state is DeliveryState.PENDING for item in seen.deliveries)
        if not waits or time.monotonic() > deadline:
            return seen
        time.sleep(0.2)


def _modalities(received: Sequence[Path]) -> tuple[str, ...]:
    return tuple(sorted({path.name.partition("-")[0] for path in received}))
