"""`salsa-node models`: what is installed, whose it is, and how it gets here and goes."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from salsa_node import config, console, errors, model_cards, model_manifest, models
from salsa_node.options import EXIT_NO, AsJson, ConfigFile

app = typer.Typer(help="The installed models.", no_args_is_help=True)

ModelsFolder = Annotated[
    Path | None, typer.Option("--models-dir", help="The folder of all models, in place of the configured one.")
]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="salsa, totalsegmentator-NUMBER as `models list` shows it, or NUMBER.")
]


@app.command("list")
def list_models(config_file: ConfigFile = None, folder: ModelsFolder = None, as_json: AsJson = False) -> None:
    """List what is installed, and what a pipeline asks for that is not."""
    models_dir = folder or config.load(config_file).models_dir
    there = model_manifest.installed(models_dir)
    rows = [_row(model, models_dir) for model in there]
    names = {model.name for model in there}
    wanted = [models.SALSA, *(model_cards.name_of_task(n) for ns in models.PIPELINE_TASKS.values() for n in ns)]
    rows += [_absent(name, models_dir) for name in dict.fromkeys(wanted) if name not in names]
    if as_json:
        console.put_json(rows)
        return
    columns = {
        "name": "model",
        "state": "state",
        "commercial_use": "commercial use",
        "licence": "licence",
        "size_mb": ">MB",
        "task": "task",
    }
    console.put(f"models folder: {models_dir}")
    console.put_table(columns, [row | {"commercial_use": "yes" if row["commercial_use"] else "NO"} for row in rows])
    for row in rows:
        if row["mend"]:
            console.put(f"{row['name']}: {row['mend']}")


@app.command()
def show(
    model: ModelName, config_file: ConfigFile = None, folder: ModelsFolder = None, as_json: AsJson = False
) -> None:
    """Show one installed model: task, licence, citation, source, files."""
    found = model_manifest.find(_named(model), folder or config.load(config_file).models_dir)
    manifest = found.manifest
    if as_json:
        told = manifest.as_json() if manifest else {"name": found.name, "manifest": None}
        console.put_json(told | {"path": found.path, "terms": found.card.terms})
        return
    _put_card(found.card)
    console.put(f"folder:    {found.path}")
    if manifest is None:
        console.put("manifest:  none" if found.packaged else "manifest:  none; files put there by hand")
        return
    console.put(f"from:      {manifest.origin}, installed {manifest.installed_at:%Y-%m-%d %H:%M} UTC")
    tested = ", ".join(f"{name} {version}" for name, version in manifest.tested_with.items())
    console.put(f"ran with:  {tested}")
    for name, sha256 in manifest.files.items():
        console.put(f"sha256:    {sha256}  {name}")


@app.command("import")
def import_models(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder or zip, in any layout that is given out.")],
    config_file: ConfigFile = None,
    folder: ModelsFolder = None,
    replace: Annotated[bool, typer.Option("--replace", help="Also in place of another version.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check SALSA's or TotalSegmentator's models, run them on a phantom, and install them."""
    models_dir = folder or config.load(config_file).models_dir
    from salsa_node import model_import

    now = datetime.now(UTC)
    done = model_import.import_model(path, models_dir, now, replace=replace, progress=console.note)
    if as_json:
        console.put_json([manifest.as_json() for manifest in done])
        return
    for manifest in done:
        _put_card(manifest.card)
        name = manifest.card.name
        how = "is installed" if manifest.installed_at == now else "was there already, the same file for file,"
        console.put(f"{name} {how} in {model_manifest.folder_of(name, models_dir)}")


@app.command()
def fetch(
    what: Annotated[
        list[str],
        typer.Argument(metavar="WHAT…", help="A pipeline, a task by name (liver_lesions) or by number (591)."),
    ],
    config_file: ConfigFile = None,
    folder: ModelsFolder = None,
    as_json: AsJson = False,
) -> None:
    """Download TotalSegmentator's open tasks, check them and install them."""
    models_dir = folder or config.load(config_file).models_dir
    tasks = list(dict.fromkeys(task for word in what for task in model_cards.tasks_meant(word)))
    for task in tasks:
        models.task_name(task)
    from salsa_node import model_fetch

    told: dict[str, str] = {}
    for n, task in enumerate(tasks):
        try:
            manifest = model_fetch.fetch(task, models_dir, datetime.now(UTC), console.note)
        except errors.WeightsMissing as exc:
            rest = model_fetch.not_tried(tasks[n + 1 :], models_dir)
            raise errors.WeightsMissing(f"{exc}{rest}{_of_salsa(what, models_dir)}") from exc
        told[model_cards.name_of_task(task)] = "installed" if manifest else "was there"
        if not as_json:
            console.put(f"{model_cards.name_of_task(task)}: {told[model_cards.name_of_task(task)]}")
            console.put(f"  {model_cards.card(model_cards.name_of_task(task)).terms}")
    if as_json:
        console.put_json(told)
    if models.SALSA in what:
        models.folders_of(models.SALSA, models_dir)  # its own weights come by hand: says so where they are absent


@app.command()
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="One model; without it every installed one.")] = "",
    config_file: ConfigFile = None,
    folder: ModelsFolder = None,
    as_json: AsJson = False,
) -> None:
    """Hash the files again and hold them against the manifest."""
    models_dir = folder or config.load(config_file).models_dir
    there = [model_manifest.find(_named(model), models_dir)] if model else model_manifest.installed(models_dir)
    told: dict[str, dict[str, str]] = {}
    for found in there:
        if found.packaged and not model:
            continue
        if found.manifest is None:
            told[found.name] = {model_manifest.FILE: "missing"}
        else:
            told[found.name] = model_manifest.verify(found)
    if as_json:
        console.put_json(told)
    else:
        for name, files in told.items():
            for file, state in files.items():
                console.put(f"{'ok  ' if state == 'ok' else 'FAIL'}  {name}: {file} {'' if state == 'ok' else state}")
        if not told:
            console.put(f"no model is installed in {models_dir}")
    if any(state != "ok" for files in told.values() for state in files.values()):
        again = models.command("import PATH --replace", models_dir)
        console.note(f"mend with: {again}; or remove and fetch again")
        raise SystemExit(EXIT_NO)


@app.command()
def remove(
    model: ModelName,
    config_file: ConfigFile = None,
    folder: ModelsFolder = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove an installed model and its files."""
    found = model_manifest.find(_named(model), folder or config.load(config_file).models_dir)
    if found.packaged:
        raise errors.ConfigError("the demo models are part of the package and stay")
    if not yes and not typer.confirm(f"remove {found.name} and all files in {found.path}?", err=True):
        raise SystemExit(EXIT_NO)
    model_manifest.remove(found)
    console.put(f"{found.name} is removed")


def _named(model: str) -> str:
    """A model's name; a task's number is as good."""
    return model_cards.name_of_task(int(model)) if model.isdecimal() else model


def _of_salsa(what: list[str], models_dir: Path) -> str:
    """How SALSA's own weights come, where they were asked for and are not there."""
    try:
        if models.SALSA in what:
            models.folders_of(models.SALSA, models_dir)
    except errors.WeightsMissing as exc:
        return f". {exc}"
    return ""


def _row(model: model_manifest.Installed, models_dir: Path) -> dict[str, object]:
    state, mend = "installed", ""
    if not model.manifest and not model.packaged:
        state, mend = "no manifest", models.command(f"import {shlex.quote(str(model.path))}", models_dir)
    try:
        if model.name == models.SALSA:
            models.folders_of(models.SALSA, models_dir)
        elif not model.packaged:
            models.task_model(model_cards.task_of(model.name), models_dir)
    except errors.WeightsMissing as exc:
        state, mend = "INCOMPLETE", str(exc)
    size = sum(file.stat().st_size for file in model.path.rglob("*") if file.is_file())
    return _told(model.card) | {"state": state, "mend": mend, "size_mb": round(size / 1e6, 1), "path": model.path}


def _absent(name: str, models_dir: Path) -> dict[str, object]:
    words = "import FOLDER-OR-ZIP" if name == models.SALSA else f"fetch {model_cards.task_of(name)}"
    mend = models.command(words, models_dir)
    return _told(model_cards.card(name)) | {"state": "absent", "mend": mend, "size_mb": None, "path": None}


def _told(card: model_cards.Card) -> dict[str, object]:
    return {
        "name": card.name,
        "task": card.task,
        "licence": card.licence,
        "commercial_use": card.commercial_use,
    }


def _put_card(card: model_cards.Card) -> None:
    console.put(f"{card.name}: {card.title}")
    console.put(f"task:      {card.task}")
    console.put(f"licence:   {card.terms}")
    console.put(f"citation:  {card.citation}")
    console.put(f"source:    {card.source}")
    if card.note:
        console.put(f"note:      {card.note}")
