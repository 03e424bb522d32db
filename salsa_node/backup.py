"""Backup: the record, the files it names and the audit trail, in one folder with a manifest of digests, and back.

The record is copied by SQLite's online backup, beside a running node; then the files that the copy names.
What a node purges or supersedes meanwhile is told, and is no fault.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from salsa_node import __version__, audit, durable, migrations
from salsa_node.errors import ConfigError, StoreError
from salsa_node.store import Store, StoreSettings, hold

MANIFEST = "manifest.json"
RECORD = "record.sqlite"
FILES = "files"
FORM = 1  #: of the manifest
_AUDIT = (audit.FILE.as_posix(), audit.SENT.as_posix())
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Backup:
    """What lies in a backup folder.

    digests: path below `folder` -> SHA-256. gone: files that were purged between the record's copy and their own.
    images: False where images were left out.
    """

    folder: Path
    made_at: str
    program: str
    images: bool
    digests: Mapping[str, str]
    gone: tuple[str, ...]
    size_bytes: int


def make(
    store_url: str,
    data_dir: Path,
    folder: Path,
    now: datetime,
    config: Path | None = None,
    *,
    images: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Backup:
    """Save the record, the files that it names, the audit trail and the config to `folder`, which must not be there.

    images: False leaves out the images that came; results and masks are always saved.
    Raises ConfigError where `folder` is there or cannot be written, StoreError where the record cannot be read.
    The folder gets its name when all of it is on disk.
    """
    if folder.exists():
        raise ConfigError(f"{folder} is there already; a backup makes a folder of its own: name another")
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}{durable.PART}")
    try:
        part.mkdir(parents=True, mode=0o700)
        trail = {  # before the record, which then knows every event that the trail tells of
            f"{FILES}/{path}": _copy(data_dir / path, part / FILES / path)
            for path in _AUDIT
            if (data_dir / path).exists()
        }
        _copy_record(file_of(store_url), part / RECORD)
        with Store.open(StoreSettings(f"sqlite:///{part / RECORD}")) as copy:
            named = [file for file in copy.files() if images or file.kind in ("result", "masks")]
        _finish(part / RECORD)
        digests, gone = {RECORD: _sha256(part / RECORD), **trail}, []
        size = sum((part / path).stat().st_size for path in digests)
        if config is not None:
            digests["config.toml"] = _copy(config, part / "config.toml")
        for number, file in enumerate(named):
            progress(f"{number + 1} of {len(named)} files")
            try:
                digests[f"{FILES}/{file.path}"] = _copy(data_dir / file.path, part / FILES / file.path)
            except FileNotFoundError:
                gone.append(file.path)
                continue
            size += (part / FILES / file.path).stat().st_size
        made = Backup(folder, now.isoformat(timespec="seconds"), __version__, images, digests, tuple(gone), size)
        durable.write(part / MANIFEST, [json.dumps(_as_json(made), indent=1).encode()])
        durable.publish([(part, folder)])
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ConfigError(f"the backup cannot be written to {folder.parent} ({error.strerror})") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return made


def check(folder: Path, progress: Callable[[str], None] = lambda _: None) -> Backup:
    """The backup in that folder, every byte compared. Raises ConfigError that names what is missing or changed."""
    try:
        told: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digests = {str(path): str(digest) for path, digest in told["sha256"].items()}
        made = Backup(folder, str(told["made_at"]), str(told["program"]), bool(told["images"]), digests,
                      tuple(map(str, told["gone"])), int(told["size_bytes"]))  # fmt: skip
        form = int(told["form"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder} is no backup: its {MANIFEST} cannot be read ({type(error).__name__})") from error
    if form > FORM:
        raise ConfigError(f"{folder} was made by a newer program ({made.program}); use that one")
    for number, (path, digest) in enumerate(digests.items()):
        progress(f"{number + 1} of {len(digests)} files")
        _require_below(folder, path)
        try:
            found = _sha256(folder / path)
        except OSError as error:
            raise ConfigError(f"{folder}: {path} cannot be read ({error.strerror}); use another backup") from error
        if found != digest:
            raise ConfigError(f"{folder}: {path} has changed since it was saved; use another backup")
    if RECORD not in digests:
        raise ConfigError(f"{folder} is no backup: it holds no {RECORD}")
    return made


def restore(folder: Path, store_url: str, data_dir: Path, now: datetime) -> tuple[Backup, Path | None]:
    """Bring a checked backup back; (it, where what stood there before lies now, if anything did).

    The node must not run. What stands in `data_dir` is moved aside first, never deleted; the record is brought to
    this program's version. Raises ConfigError where a node runs, the backup is not whole, or a disk refuses.
    """
    made = check(folder)
    record = file_of(store_url)
    aside = data_dir.with_name(f"{data_dir.name}.before-{now:%Y%m%dT%H%M%SZ}") if data_dir.exists() else None
    part = data_dir.with_name(f"{data_dir.name}.{uuid.uuid4().hex[:8]}{durable.PART}")
    with ExitStack() as held:
        held.enter_context(_stopped(data_dir))
        if record.parent.is_dir():
            held.enter_context(hold(StoreSettings(store_url)))
        _put_back(made, record, data_dir, part, aside, now)
    with hold(StoreSettings(store_url)), Store.open(StoreSettings(store_url), create=True) as store:
        store.add_event("node", "record", "node.restored", f"from a backup of {made.made_at}", now)
    return made, aside


def _put_back(made: Backup, record: Path, data_dir: Path, part: Path, aside: Path | None, now: datetime) -> None:
    """The files of a checked backup in their places, by way of `part`. Raises ConfigError where a disk refuses."""
    folder = made.folder
    try:
        part.mkdir(parents=True, mode=0o700)
        for path in made.digests:
            if path.startswith(f"{FILES}/"):
                _copy(folder / path, part / path.removeprefix(f"{FILES}/"))
        if aside is not None:
            _keep_models(data_dir, part)
            data_dir.rename(aside)
        durable.publish([(part, data_dir)])
        kept = f"{record.name}.before-{now:%Y%m%dT%H%M%SZ}"
        for beside in ("", "-wal", "-shm"):  # where it lies elsewhere; its log may hold what a crash left
            file = record.with_name(record.name + beside)
            if file.exists():
                file.rename(record.with_name(kept + beside))
        _copy(folder / RECORD, record)
    except OSError as error:
        raise ConfigError(f"{data_dir} cannot be restored ({error.strerror}); what stood there is kept") from error


def upgrade(store_url: str, now: datetime) -> tuple[str, Path | None]:
    """Bring the record to this program's version; (the version that it had, where a copy of it as it was lies).

    No copy where there was nothing to do. Raises StoreError where there is no record, or it is of a newer program,
    ConfigError where a node runs.
    """
    record = file_of(store_url)
    with hold(StoreSettings(store_url)):
        kept = record.with_name(f"{record.name}.before-{now:%Y%m%dT%H%M%SZ}")
        _copy_record(record, kept)
        with closing(sqlite3.connect(record)) as raw:
            tables = {name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            known = "alembic_version" in tables
            before = str(raw.execute("SELECT version_num FROM alembic_version").fetchone()[0]) if known else "none"
        if before == migrations.HEAD:
            kept.unlink()
            return before, None
        Store.open(StoreSettings(store_url), create=True).close()
    return before, kept


def file_of(store_url: str) -> Path:
    """The SQLite file behind that url. Raises ConfigError where it is another database."""
    url = sa.make_url(store_url)
    if url.get_backend_name() != "sqlite" or not url.database:
        raise ConfigError(
            "only a record in an SQLite file is saved or upgraded so; a PostgreSQL is saved by pg_dump, then a copy of "
            "node.data_dir, and a start of the node upgrades it"
        )
    return Path(url.database)


def _keep_models(old: Path, new: Path) -> None:
    """Installed models are no part of a backup: they stay where they are."""
    if (old / "models").is_dir():
        (old / "models").rename(new / "models")


@contextmanager
def _stopped(data_dir: Path) -> Iterator[None]:
    """Keep a node from starting on that folder. Raises ConfigError where one runs."""
    lock = data_dir / "node.lock"
    if not lock.exists():
        yield
        return
    with lock.open("rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"a node runs on {data_dir}; stop it first") from error
        yield


def _copy_record(source: Path, target: Path) -> None:
    """A copy of one moment, while others read and write. Raises StoreError."""
    if not source.is_file():
        raise StoreError(f"there is no store at {source}; start the node once to make it, or correct the store's url")
    try:
        with (
            closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=30)) as reading,
            closing(sqlite3.connect(target)) as writing,
        ):
            reading.backup(writing)
    except sqlite3.Error as error:
        raise StoreError(f"the record cannot be copied ({error})") from error


def _finish(record: Path) -> None:
    """Put the copy into one file that nothing stands beside, on disk."""
    with closing(sqlite3.connect(record)) as raw:
        raw.execute("PRAGMA journal_mode=DELETE")
    with record.open("rb") as file:
        os.fsync(file.fileno())


def _copy(source: Path, target: Path) -> str:
    """Copy a file durably; its SHA-256. Raises OSError."""
    hasher = hashlib.sha256()
    with source.open("rb") as file:

        def chunks() -> Any:
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
                yield chunk

        durable.write(target, chunks())
    return hasher.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_below(folder: Path, path: str) -> None:
    if folder.resolve() not in (folder / path).resolve().parents:
        raise ConfigError(f"{folder} is no backup of ours: it names {path}, beyond its own folder")


def _as_json(made: Backup) -> dict[str, object]:
    return {
        "form": FORM, "program": made.program, "made_at": made.made_at, "images": made.images,
        "size_bytes": made.size_bytes, "gone": list(made.gone), "sha256": dict(made.digests),
    }  # fmt: skip
