"""What a node says of itself to monitoring: figures of its record and disk, and whether it does its work."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from salsa_node import __version__, reserve
from salsa_node.errors import StoreError
from salsa_node.overview import statistics
from salsa_node.store import DeliveryState, RunState, Store
from salsa_node.web import Health, Metric

_GIB = 2**30
_LATELY = timedelta(hours=24)


class Worker(Protocol):
    """What carries runs.

    failing: how its last process ended, where that was soon after its start; "" where it did not.
    """

    failing: str


class Watched(Protocol):
    """A loop of the node.

    failing: why its last step came to nothing; "" where it did not fail.
    """

    name: str
    failing: str

    def is_alive(self) -> bool:
        """Whether it goes on."""


def measure(store: Store, data_dir: Path, now: datetime) -> tuple[Metric, ...]:
    """Every figure, of this moment. Raises StoreError."""
    figures = store.figures(now - _LATELY)
    waits = figures.oldest_queued_at
    disk = shutil.disk_usage(data_dir)
    spread = statistics(figures)
    return (
        Metric("info", "Version of the program.", [({"version": __version__}, 1)]),
        Metric("studies", "Studies in the record.", [({}, figures.studies)]),
        Metric("images", "Images that are kept.", [({}, figures.instances)]),
        Metric("image_bytes", "Bytes of images that are kept.", [({}, figures.instance_bytes)]),
        Metric("quarantined_images", "Images that contradict what is stored.", [({}, figures.quarantined)]),
        Metric("runs", "Runs by state.", [({"state": s.value}, figures.runs.get(s.value, 0)) for s in RunState]),
        Metric(
            "deliveries",
            "Deliveries by state.",
            [({"state": s.value}, figures.deliveries.get(s.value, 0)) for s in DeliveryState],
        ),
        Metric(
            "results_last_day",
            "Results of the last 24 hours by outcome.",
            [({"outcome": name}, count) for name, count in figures.outcomes.items()],
        ),
        _spread("run_seconds_last_day", "Duration of the runs of the last 24 hours.", spread["run_s"]),
        _spread(
            "turnaround_seconds_last_day",
            "Last image to result, of the results of the last 24 hours.",
            spread["last_image_to_result_s"],
        ),
        Metric(
            "queue_wait_seconds",
            "How long the first in line has waited.",
            [({}, max(0.0, (now - waits).total_seconds()) if waits else 0.0)],
        ),
        Metric("disk_free_bytes", "Bytes left on the disk of node.data_dir.", [({}, disk.free)]),
        Metric("disk_bytes", "Size of the disk of node.data_dir.", [({}, disk.total)]),
    )


def examine(
    store: Store, data_dir: Path, min_free_gib: float, loops: Sequence[Watched], workers: Sequence[Worker] = ()
) -> Health:
    """What keeps the node from its work."""
    faults = [f"the loop {loop.name} has ended; restart the node" for loop in loops if not loop.is_alive()]
    faults += [f"the loop {loop.name} fails: {loop.failing}; see salsa-node doctor" for loop in loops if loop.failing]
    faults += [f"no run is carried: {one.failing}; see the node's log" for one in workers if one.failing]
    try:
        store.studies(1)
    except StoreError as error:
        faults.append(f"the record cannot be read ({error}); see salsa-node doctor")
    try:
        free = shutil.disk_usage(data_dir).free
    except OSError as error:
        faults.append(f"node.data_dir cannot be read ({error.strerror}); is its disk mounted?")
        return Health(tuple(faults))
    if free < max(min_free_gib * _GIB, reserve.NOTHING_BYTES):
        faults.append(f"{free / _GIB:.1f} GiB left: images are refused; salsa-node purge, or see [retention]")
    return Health(tuple(faults))


def _spread(name: str, told: str, found: object) -> Metric:
    assert isinstance(found, dict)
    values = [({"quantile": word}, found[key]) for word, key in (("0.5", "p50"), ("0.95", "p95"), ("1", "max"))]
    return Metric(name, told, [(labels, value) for labels, value in values if value is not None])
