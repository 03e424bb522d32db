"""Self-test: a phantom study through a real node with this site's settings and back, beside the node that runs.

The node of the test has ports and a data folder of its own, and one destination, in this process: nothing
reaches a PACS, nothing of the site's record changes but one event that tells the outcome.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from salsa_node import config, loopback, overview, phantom
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
from salsa_node.store import Store, StoreSettings

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
                    url = f"sqlite:///{folder / 'data' / 'salsa_node.sqlite'}"
                    seen = _wait(url, study.study_uid, begun + limit_s, progress)
                    seconds = time.monotonic() - begun
            except PipelineError as error:
                last = log.read_text(encoding="utf-8").splitlines()[-1:]
                raise PipelineError(f"the node of the self-test did not start: {' '.join(last)}") from error
            objects = _modalities(received)
    newest = seen.runs[-1] if seen.runs else None
    return Outcome(
        seen.standing is Standing.DONE and "SR" in objects,
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


def _wait(store_url: str, study_uid: str, deadline: float, progress: Callable[[str], None]) -> overview.Glance:
    told = ""
    with Store.open(StoreSettings(store_url)) as store:
        while True:
            seen = overview.glance(store, store.study(study_uid))
            if seen.standing.value != told:
                told = seen.standing.value
                progress(told)
            if seen.standing not in _GOING_ON or time.monotonic() > deadline:
                return seen
            time.sleep(0.2)


def _modalities(received: Sequence[Path]) -> tuple[str, ...]:
    return tuple(sorted({path.name.partition("-")[0] for path in received}))
