"""The manifest of an installed model: what it is, whose, under which licence, and the SHA-256 of each file."""

from __future__ import annotations

import json
import shlex
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from salsa_node import durable
from salsa_node.errors import ConfigError, ModelRefused, WeightsMissing
from salsa_node.model_cards import Card, card, name_of_task
from salsa_node.models import (
    INCOMING,
    MANIFEST,
    SALSA,
    TOTALSEGMENTATOR,
    command,
    demo_models_dir,
    sha256_of,
    task_name,
)

FILE: Final = MANIFEST
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was installed.

    files: name within the model's folder -> SHA-256. size_bytes: of all of them.
    origin: what it was imported from, a file's or folder's name or an address; no path of this machine.
    tested_with: versions of the libraries that ran it when it was installed.
    """

    card: Card
    files: Mapping[str, str]
    size_bytes: int
    origin: str
    installed_at: datetime
    tested_with: Mapping[str, str]

    def as_json(self) -> dict[str, object]:
        """As it is written."""
        return {
            "format": _FORMAT,
            **asdict(self.card),
            "files": dict(self.files),
            "size_bytes": self.size_bytes,
            "origin": self.origin,
            "installed_at": self.installed_at.isoformat(),
            "tested_with": dict(self.tested_with),
        }


@dataclass(frozen=True, slots=True)
class Installed:
    """A model that lies in the models folder.

    manifest: None where somebody put the files there by hand.
    """

    name: str
    path: Path
    manifest: Manifest | None
    packaged: bool = False

    @property
    def card(self) -> Card:
        """What was written down when it was installed, else what is known of it."""
        return self.manifest.card if self.manifest else card(self.name)


def installed(models_dir: Path) -> list[Installed]:
    """Every model that is there, the packaged demo first. Raises ModelRefused for a manifest that cannot be read."""
    found = [Installed("demo", demo_models_dir(), None, packaged=True)]
    if (models_dir / SALSA).is_dir():
        found.append(Installed(SALSA, models_dir / SALSA, read(models_dir / SALSA)))
    for folder in sorted((models_dir / TOTALSEGMENTATOR).glob("Dataset*")):
        number = folder.name.removeprefix("Dataset").partition("_")[0]
        if folder.is_dir() and number.isdecimal() and _is_task(int(number), folder.name):
            found.append(Installed(name_of_task(int(number)), folder, read(folder)))
    return found


def find(name: str, models_dir: Path) -> Installed:
    """The installed model of that name. Raises WeightsMissing, ConfigError for no model's name."""
    there = installed(models_dir)
    for model in there:
        if model.name == name:
            return model
    card(name)
    names = ", ".join(model.name for model in there)
    raise WeightsMissing(f"the model {name} is not installed in {models_dir}; there are {names}")


def folder_of(name: str, models_dir: Path) -> Path:
    """Where the model of that name lies, or would lie."""
    if name == SALSA:
        return models_dir / SALSA
    return models_dir / TOTALSEGMENTATOR / task_name(int(name.removeprefix(f"{TOTALSEGMENTATOR}-")))


def write(manifest: Manifest, folder: Path) -> None:
    """Put the manifest into the model's folder."""
    durable.write(folder / FILE, [json.dumps(manifest.as_json(), indent=2).encode() + b"\n"])


def read(folder: Path) -> Manifest | None:
    """The manifest in a model's folder; None where there is none. Raises ModelRefused where it cannot be read."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        raise _unreadable(folder, exc) from exc
    try:
        found = json.loads(text)
        found.pop("format")
        mine = {name: found.pop(name) for name in ("files", "size_bytes", "origin", "tested_with")}
        when = datetime.fromisoformat(found.pop("installed_at"))
        files = {str(name): str(sha) for name, sha in mine["files"].items()}
        tested = {str(name): str(version) for name, version in mine["tested_with"].items()}
        return Manifest(Card(**found), files, int(mine["size_bytes"]), str(mine["origin"]), when, tested)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise _unreadable(folder, exc) from exc


def remove(model: Installed) -> None:
    """Take a model out of the models folder and delete its files.

    Raises ConfigError: where it cannot be taken out, nothing of it was touched.
    """
    gone = model.path.with_name(f"{INCOMING}{uuid.uuid4().hex}")
    try:
        model.path.rename(gone)
    except OSError as exc:
        raise ConfigError(
            f"{model.path} cannot be removed ({exc.strerror}); nothing of it was touched: {model.path.parent} must be "
            "a folder that this user may write"
        ) from exc
    try:
        shutil.rmtree(gone)
    except OSError as exc:
        raise ConfigError(
            f"{model.name} is no longer installed, but its files could not all be deleted ({exc.strerror}); "
            f"delete {gone} by hand"
        ) from exc


def verify(model: Installed) -> dict[str, str]:
    """File -> "ok", "changed", "missing", of every file in the manifest; reads each of them whole.

    Raises WeightsMissing where there is no manifest to hold the files against.
    """
    if model.manifest is None:
        raise WeightsMissing(
            f"{model.name} has no {FILE}: somebody put its files there by hand; "
            f"run: {_import_again(model.path)} to check and record them"
        )
    told = {}
    for name, sha256 in model.manifest.files.items():
        file = model.path / name
        told[name] = "missing" if not file.is_file() else "ok" if sha256_of(file) == sha256 else "changed"
    return told


def _is_task(number: int, folder: str) -> bool:
    try:
        return task_name(number) == folder
    except WeightsMissing:
        return False


def _unreadable(folder: Path, exc: Exception) -> ModelRefused:
    return ModelRefused(
        f"{folder / FILE} cannot be read ({type(exc).__name__}); remove that file and run: {_import_again(folder)}"
    )


def _import_again(folder: Path) -> str:
    models_dir = folder.parent if folder.name == SALSA else folder.parent.parent
    return command(f"import {shlex.quote(str(folder))}", models_dir)
