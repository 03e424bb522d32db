"""A model as somebody hands it over, a folder or a zip: listed and copied out without trusting it.

Nothing is ever unpacked by the names in an archive: files are copied one by one to places that we choose, up to a
limit that we set. An archive that would write outside of its folder if it were unpacked is refused as a whole.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Final, Protocol

from salsa_node.errors import ConfigError, ModelRefused

MAX_FILES: Final = 20_000
MAX_FILE_BYTES: Final = 4 << 30  # a checkpoint with its optimizer; today's are a tenth of that
MAX_JSON_BYTES: Final = 64 << 20
MAX_RATIO: Final = 200  # packed weights shrink by a tenth, plans by fifty
_CHUNK_BYTES: Final = 1 << 20


class Source(Protocol):
    """Files by name; every name begins with the name of the folder or archive itself."""

    @property
    def names(self) -> tuple[PurePosixPath, ...]:
        """All files, sorted."""
        ...

    @property
    def links(self) -> tuple[PurePosixPath, ...]:
        """Links to folders, which are not followed."""
        ...

    def copy(self, name: PurePosixPath, to: Path) -> int:
        """Write one file to `to`, which must not exist; returns its size in bytes. Raises ModelRefused, OSError."""
        ...


def open_source(path: Path) -> Source:
    """The files at `path`. Raises ConfigError where nothing is there, ModelRefused
    where it is neither a folder nor a sound zip."""
    if path.is_dir():
        return _Folder(path)
    if not path.is_file():
        raise ConfigError(f"there is no file or folder {path}")
    if path.stat().st_size == 0:
        raise ModelRefused(f"{path.name} is an empty file; copy or download it again")
    if not zipfile.is_zipfile(path):
        if path.suffix.lower() == ".zip" or _begins_as_zip(path):
            raise ModelRefused(
                f"{path.name} is no whole zip (its table of contents is not there): cut off or damaged; copy or "
                "download it again"
            )
        raise ModelRefused(f"{path.name} is neither a folder nor a zip; unpack it and import the folder")
    return _Zip(path)


class _Folder:
    def __init__(self, path: Path) -> None:
        root = path.resolve()
        found, links = [], []
        for parent, folders, files in os.walk(root):  # follows no link to another folder
            folders.sort()
            places = [Path(parent, name) for name in folders]
            links += [place.relative_to(root.parent) for place in places if place.is_symlink()]
            found += [Path(parent, name).relative_to(root.parent) for name in files]
            if len(found) > MAX_FILES:
                raise ModelRefused(f"{path} holds more than {MAX_FILES} files; give the model's own folder")
        self._parent = root.parent
        self.names = tuple(sorted(PurePosixPath(name.as_posix()) for name in found))
        self.links = tuple(PurePosixPath(link.as_posix()) for link in links)

    def copy(self, name: PurePosixPath, to: Path) -> int:
        file = self._parent / name
        if not file.is_file():
            raise ModelRefused(f"{name} is no plain file")
        with file.open("rb") as stream:
            return _copy(stream, to, str(name), _limit(name))


class _Zip:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, UnicodeDecodeError) as exc:
            raise _damaged(path, exc) from exc
        if len(entries) > MAX_FILES:
            raise ModelRefused(f"{path.name} holds {len(entries)} files; a model has a few, at most {MAX_FILES}")
        stem = PurePosixPath(path.name.removesuffix(".zip"))
        self._entries: dict[PurePosixPath, zipfile.ZipInfo] = {}
        for entry in entries:
            _check_entry(entry, path)
            if not entry.is_dir():
                name = stem / entry.filename
                if name in self._entries:
                    raise ModelRefused(f"{path.name} holds {entry.filename[:120]} twice")
                self._entries[name] = entry
        self.names = tuple(sorted(self._entries))
        self.links: tuple[PurePosixPath, ...] = ()

    def copy(self, name: PurePosixPath, to: Path) -> int:
        entry = self._entries[name]
        if entry.flag_bits & 1:
            raise ModelRefused(f"{self._path.name} is encrypted; unpack it and import the folder")
        if entry.file_size > MAX_RATIO * max(entry.compress_size, 1) or entry.file_size > _limit(name):
            raise ModelRefused(
                f"{name} would grow from {entry.compress_size} to {entry.file_size} bytes; "
                f"expected at most {MAX_RATIO} times as much and at most {_limit(name)} bytes"
            )
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(entry) as stream:
                return _copy(stream, to, str(name), entry.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as exc:
            raise _damaged(self._path, exc) from exc


def _begins_as_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _check_entry(entry: zipfile.ZipInfo, path: Path) -> None:
    """Raises ModelRefused for a name that leaves its folder, and for what is neither file nor folder."""
    name = entry.filename
    raw = entry.orig_filename
    parts = PurePosixPath(name).parts
    if "\0" in raw or "\\" in raw or name.startswith("/") or ".." in parts or (parts and parts[0][1:2] == ":"):
        raise ModelRefused(f"{path.name} would write outside of its folder ({name[:120]!r}); nothing of it is used")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ModelRefused(f"{path.name} holds a link or a device ({name[:120]!r}); nothing of it is used")


def _limit(name: PurePosixPath) -> int:
    return MAX_JSON_BYTES if name.suffix == ".json" else MAX_FILE_BYTES


def _copy(stream: IO[bytes], to: Path, name: str, limit: int) -> int:
    to.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with to.open("xb") as out:
        for chunk in _chunks(stream):
            size += len(chunk)
            if size > limit:
                raise ModelRefused(f"{name} holds more than {limit} bytes")
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return size


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _damaged(path: Path, exc: Exception) -> ModelRefused:
    return ModelRefused(
        f"{path.name} cannot be read as a zip ({type(exc).__name__}): damaged or of another kind; copy or download it "
        "again"
    )
