"""TotalSegmentator's open tasks from where it keeps them, by its own downloader, into the models folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Final

from salsa_node import model_manifest
from salsa_node.errors import ConfigError, ModelRefused, WeightsMissing
from salsa_node.model_cards import download_url
from salsa_node.model_import import import_model
from salsa_node.model_manifest import Manifest
from salsa_node.models import INCOMING, TOTALSEGMENTATOR, command, task_folder, task_model, task_name

_REACH_S: Final = 30.0
_ROOM_FOR: Final = 3  # times the download: packed, unpacked, and copied into place


def fetch(
    task_id: int, models_dir: Path, now: datetime, progress: Callable[[str], None] = lambda _: None
) -> Manifest | None:
    """Download, check and install a task; None where it was there. Bars of progress go to standard error.

    Raises WeightsMissing with the way to carry the file over by hand where it cannot be downloaded,
    ModelRefused where the task needs a licence number or what came is no sound model.
    """
    if _is_whole(task_id, models_dir):
        return None
    url = download_url(task_id)
    name = task_name(task_id)
    if not url:
        raise ModelRefused(
            f"TotalSegmentator gives out task {task_id} ({name}) by licence number only; get it with "
            "totalseg_set_license and totalseg_download_weights, then run: " + command("import FOLDER", models_dir)
        )
    import requests

    incoming = models_dir / f"{INCOMING}{uuid.uuid4().hex}"
    try:
        incoming.mkdir(parents=True)
        _check_room(url, incoming)
        progress(f"{TOTALSEGMENTATOR}-{task_id}: downloading {url}")
        _download(task_id, incoming)
        (manifest,) = import_model(incoming / name, models_dir, now, origin=url, replace=True, progress=progress)
    except (requests.RequestException, zipfile.BadZipFile) as exc:
        raise WeightsMissing(
            f"{url} could not be downloaded ({type(exc).__name__}). By hand: download it where there is a network, "
            f"carry {name}.zip over (the name as it is), then run: {command(f'import {name}.zip', models_dir)}"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"{models_dir} cannot take the model ({exc.strerror}); see pipeline.models_dir") from exc
    else:
        return manifest
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def not_tried(task_ids: Iterable[int], models_dir: Path) -> str:
    """What to say of further tasks where one could not be downloaded: their addresses; "" where they are all there."""
    urls = [download_url(task_id) for task_id in task_ids if not _is_whole(task_id, models_dir)]
    return f". Not tried; they come the same way: {', '.join(filter(None, urls))}" if any(urls) else ""


def _is_whole(task_id: int, models_dir: Path) -> bool:
    try:
        task_model(task_id, models_dir)
    except WeightsMissing:
        return False
    return (task_folder(task_id, models_dir) / model_manifest.FILE).is_file()


def _check_room(url: str, folder: Path) -> None:
    """One question with a time limit before the downloader, which has none, is started."""
    import requests

    answer = requests.head(url, allow_redirects=True, timeout=_REACH_S)
    answer.raise_for_status()
    needed = int(answer.headers.get("content-length", 0)) * _ROOM_FOR
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(f"pipeline.models_dir: {free} bytes are free, the download needs {needed}")


def _download(task_id: int, into: Path) -> None:
    with _totalsegmentator_at(into), contextlib.redirect_stdout(sys.stderr):
        from totalsegmentator.libs import download_pretrained_weights

        download_pretrained_weights(task_id)


@contextlib.contextmanager
def _totalsegmentator_at(folder: Path) -> Iterator[None]:
    """TotalSegmentator takes its places from the environment; afterwards they are what they were."""
    names = {"TOTALSEG_WEIGHTS_PATH": str(folder), "TOTALSEG_HOME_DIR": str(folder)}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
