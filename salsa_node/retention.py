"""What is no longer kept: files of studies that are over, after the days that a site set or when the disk fills."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from salsa_node import durable, overview
from salsa_node.errors import IllegalTransition
from salsa_node.overview import Standing
from salsa_node.settings import RetentionSettings
from salsa_node.store import Sought, Store

log = logging.getLogger(__name__)

_GIB = 2**30
_TRIED = 50  # studies that are looked at for one whose files may go


def step(
    store: Store,
    data_dir: Path,
    settings: RetentionSettings,
    now: datetime,
    free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
) -> str | None:
    """Let the files of one study go, or its rows, where there is one whose time is over; its UID, else None.

    Raises StoreError, OSError where a file cannot be removed: the rows stay then, and the next step tries again.
    """
    for days, standing, results in (
        (settings.done_days, Standing.DONE, False),
        (settings.failed_days, Standing.FAILED, False),
        (settings.blocked_days, Standing.BLOCKED, False),
        (settings.nothing_days, Standing.NOTHING, False),
        (settings.cancelled_days, Standing.CANCELLED, False),
        (settings.results_days, Standing.DONE, True),
    ):
        if days > 0:
            sought = Sought(until=now - timedelta(days=days), reverse=True, images=not results, results=results)
            gone = _let_go(store, data_dir, sought, standing, f"{standing.value} for {days:g} days", now, results)
            if gone is not None:
                return gone
    if settings.record_days > 0:
        forgotten = _forget(store, data_dir, now - timedelta(days=settings.record_days), now)
        if forgotten is not None:
            return forgotten
    if settings.min_free_gib > 0 and free_bytes(data_dir) < settings.min_free_gib * _GIB:
        reason = f"less than {settings.min_free_gib:g} GiB left on the disk"
        return _let_go(store, data_dir, Sought(reverse=True, images=True), Standing.DONE, reason, now, False)
    return None


def remove_folders(data_dir: Path, study_uid: str) -> None:
    """Take the folders of a study away that is forgotten: their names tell which it was."""
    for kind in ("studies", "results"):
        durable.remove_empty(data_dir / kind / study_uid)


def _forget(store: Store, data_dir: Path, until: datetime, now: datetime) -> str | None:
    """Take the first study without files whose last image came before `until` out of the record; its UID.

    With it goes what the record tells of no study at all from that time.
    """
    for uid in store.without_files(until, _TRIED):
        try:
            store.forget(uid, now, lambda paths: durable.remove(data_dir, paths))
        except IllegalTransition:
            continue  # its images are expected, or something of it did not arrive
        remove_folders(data_dir, uid)
        log.info("study forgotten", extra={"event": "study.forgotten"})
        store.forget_own(until)
        return uid
    return None


def _let_go(
    store: Store, data_dir: Path, sought: Sought, standing: Standing, reason: str, now: datetime, results: bool
) -> str | None:
    """Purge the first study sought that may be purged; its UID."""

    def remove(paths: Sequence[str]) -> None:
        durable.remove(data_dir, paths)

    for seen in overview.search(store, sought, (standing,), _TRIED):
        uid = seen.study.study_uid
        try:
            files, size = store.purge(uid, reason, now, remove, results=results)
        except IllegalTransition:
            continue  # somebody still needs it: an older result, or images that came just now
        log.info("study purged", extra={"event": "study.purged", "study_uid": uid, "files": files, "bytes": size})
        return uid
    return None
