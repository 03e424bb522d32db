"""A model from elsewhere becomes an installed one: recognised, copied, run on a phantom, recorded, put into place.

What is in place is whole: files are gathered beside it and renamed. Whatever is refused leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Final

from salsa_node import model_manifest, model_source, model_trial, task_identity
from salsa_node.errors import ConfigError, ModelRefused, WeightsMissing
from salsa_node.model_cards import card, name_of_task, task_of
from salsa_node.model_manifest import Manifest
from salsa_node.models import CHECKPOINT, INCOMING, SALSA, SALSA_STAGES, TOTALSEGMENTATOR, ModelFolder, task_name

_STALE_S: Final = 86_400.0
_NEEDED: Final = ("dataset.json", "plans.json", f"fold_0/{CHECKPOINT}")
_TOLD: Final = 3  # folders that a refusal names at most
_LAYOUTS: Final = (
    "expected SALSA's nnUNetTrainer__nnUNetPlans__3d_lowres and ...__3d_cascade_fullres, at any depth, or "
    "TotalSegmentator's DatasetNNN_NAME/TRAINER__PLANS__CONFIGURATION"
)


@dataclass(frozen=True, slots=True)
class Recognised:
    """A model within a folder or zip.

    stages: stage -> the folder of its trained configuration, in the order in which they run.
    """

    name: str
    stages: dict[str, PurePosixPath]


def import_model(
    path: Path,
    models_dir: Path,
    now: datetime,
    *,
    origin: str = "",
    replace: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Manifest]:
    """Install every model in the folder or zip at `path`; what is already there, file for file, stays as it is.

    origin: where it comes from, for the manifest; by default the name of `path`.
    replace: also in place of another version.
    Raises ModelRefused for what is no sound model, ConfigError where `models_dir` cannot be written.
    """
    source = model_source.open_source(path)
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        _sweep(models_dir, now)
        return [
            _install(source, model, models_dir, now, origin or path.resolve().name, replace, progress)
            for model in recognise(source.names, source.links)
        ]
    except OSError as exc:
        raise ConfigError(
            f"the model could not be copied to {models_dir} ({exc.strerror}); choose a folder with room that this "
            "user may write: pipeline.models_dir"
        ) from exc


def recognise(names: Iterable[PurePosixPath], links: Iterable[PurePosixPath] = ()) -> list[Recognised]:
    """The models among these file names. Raises ModelRefused where there is none, or one is not whole.

    links: folders that are not looked into, for the refusal.
    """
    there = set(names)
    trained = sorted({folder for name in there for folder in name.parents if _is_trained(folder, name)})
    found: dict[str, list[tuple[str, PurePosixPath]]] = {}
    strange = []
    for folder in trained:
        task = _task_in(folder)
        stage = next((stage for stage, end in SALSA_STAGES.items() if folder.name.endswith(end)), None)
        if task is not None:
            found.setdefault(name_of_task(task), []).append(("task", folder))
        elif stage is not None:
            found.setdefault(SALSA, []).append((stage, folder))
        else:
            strange.append(folder)
    left_out = "".join(f"; {link} is a link to a folder and was not followed" for link in sorted(links)[:_TOLD])
    if not found:
        seen = ", ".join(map(str, strange[:_TOLD])) or (f"{len(there)} other files" if there else "no file")
        raise ModelRefused(f"no model was recognised: {_LAYOUTS}; found {seen}{left_out}")
    models = [Recognised(name, _stages(name, parts, left_out)) for name, parts in sorted(found.items())]
    for model in models:
        for folder in model.stages.values():
            lacking = [name for name in _NEEDED if folder / name not in there]
            if lacking:
                again = "copy or unpack the model again, whole"
                raise ModelRefused(f"{model.name}: {folder} lacks {', '.join(lacking)}{left_out}; {again}")
    return models


def _is_trained(folder: PurePosixPath, file: PurePosixPath) -> bool:
    """Whether a folder is a trained configuration by its name and by one of its files."""
    return folder.name.count("__") >= 2 and file.relative_to(folder).as_posix() in _NEEDED


def _stages(name: str, parts: list[tuple[str, PurePosixPath]], left_out: str) -> dict[str, PurePosixPath]:
    wanted = tuple(SALSA_STAGES) if name == SALSA else ("task",)
    stages = {}
    for stage in wanted:
        places = [folder for of, folder in parts if of == stage]
        if len(places) != 1:
            what = f"folders named ...{SALSA_STAGES[stage]}" if name == SALSA else "trained configurations"
            told = f" ({', '.join(map(str, places))})" if places else ""
            again = "give a folder that holds one of each" if places else "give the folder or zip that holds all of it"
            raise ModelRefused(f"{name}: found {len(places)} {what}{told}; expected one{left_out}; {again}")
        stages[stage] = places[0]
    return stages


def _task_in(folder: PurePosixPath) -> int | None:
    """The number of the TotalSegmentator task that a trained configuration belongs to, by the folder it lies in."""
    dataset = folder.parent.name
    number = dataset.removeprefix("Dataset").partition("_")[0]
    if not dataset.startswith("Dataset") or not number.isdecimal():
        return None
    try:
        expected = task_name(int(number))
    except WeightsMissing:
        return None
    if dataset != expected:
        raise ModelRefused(
            f"found {dataset}, but the installed TotalSegmentator's task {int(number)} is {expected}: another version "
            "of the weights"
        )
    return int(number)


def _install(
    source: model_source.Source,
    model: Recognised,
    models_dir: Path,
    now: datetime,
    origin: str,
    replace: bool,
    progress: Callable[[str], None],
) -> Manifest:
    place = model_manifest.folder_of(model.name, models_dir)
    incoming = models_dir / f"{INCOMING}{uuid.uuid4().hex}"
    try:
        progress(f"{model.name}: copying ...")
        folders = {}
        size = 0
        for stage, folder in model.stages.items():
            for name in _NEEDED:
                size += source.copy(folder / name, incoming / folder.name / name)
            folders[stage] = ModelFolder(incoming / folder.name)
        _check_identity(model, folders)
        files = {f"{f.path.name}/{name}": sha for f in folders.values() for name, sha in f.sha256().items()}
        there = _present(place)
        same = there is not None and there.files == files
        if there is not None and same and "changed" not in _states(model.name, place, there):
            return there
        if there is not None and not same and not replace:
            raise ModelRefused(
                f"{model.name} is installed in another version ({there.origin}, {there.installed_at:%Y-%m-%d}); "
                "add --replace to put this one in its place"
            )
        progress(f"{model.name}: its first run, on a phantom ...")
        tested_with = model_trial.run(folders)
        manifest = Manifest(card(model.name), files, size, origin, now, tested_with)
        model_manifest.write(manifest, incoming)
        _put_into_place(incoming, place)
    except WeightsMissing as exc:  # an empty file, or a plans file that is no JSON
        told = str(exc).replace(f"{incoming}/", "")
        raise ModelRefused(f"{model.name}: {told}; get the model again, whole") from exc
    else:
        return manifest
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _check_identity(model: Recognised, folders: Mapping[str, ModelFolder]) -> None:
    """Raises ModelRefused where a task's folder holds another task's network."""
    if model.name == SALSA:
        return
    (folder,) = folders.values()
    misfit = task_identity.misfit(task_of(model.name), folder.path.name, folder.dataset)
    if misfit:
        raise ModelRefused(
            f"{model.name}: {model.stages['task'].parent} holds another network than its name says: {misfit}; "
            "give the folder the name that it was handed out with"
        )


def _sweep(models_dir: Path, now: datetime) -> None:
    """Remove what an import that was killed left behind; a younger one may still be at work."""
    for folder in (*models_dir.glob(f"{INCOMING}*"), *models_dir.glob(f"{TOTALSEGMENTATOR}/{INCOMING}*")):
        if now.timestamp() - folder.stat().st_mtime > _STALE_S:
            shutil.rmtree(folder, ignore_errors=True)


def _present(place: Path) -> Manifest | None:
    """The manifest of what lies there; None also where it cannot be read: then it is replaced."""
    try:
        return model_manifest.read(place)
    except ModelRefused:
        return None


def _states(name: str, place: Path, manifest: Manifest) -> set[str]:
    states = set(model_manifest.verify(model_manifest.Installed(name, place, manifest)).values())
    return {"changed"} if states != {"ok"} else states


def _put_into_place(incoming: Path, place: Path) -> None:
    """Rename; what lay there before goes only after the new one is in its place."""
    place.parent.mkdir(parents=True, exist_ok=True)
    before = place.parent / f"{INCOMING}{uuid.uuid4().hex}"
    if place.exists():
        place.rename(before)
    try:
        incoming.rename(place)
    except OSError:
        if before.exists():
            before.rename(place)
        raise
    handle = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(before, ignore_errors=True)
