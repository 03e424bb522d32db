"""The commands that keep a node sound: look at files, surroundings and record, save them, bring them back."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from salsa_node import config, console, errors
from salsa_node.options import EXIT_NO, AsJson, ConfigFile, Yes, ask

audit_app = typer.Typer(help="The audit trail.", no_args_is_help=True)
db_app = typer.Typer(help="The record.", no_args_is_help=True)


def verify(
    study: Annotated[str, typer.Argument(metavar="[STUDY]", help="As for show; without it everything.")] = "",
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    set_aside: Annotated[
        bool, typer.Option("--set-aside", help="Move files that have no row to set-aside in node.data_dir.")
    ] = False,
) -> None:
    """Compare every stored file with its digest; name files without rows and rows without files."""
    if study and set_aside:
        raise typer.BadParameter("--set-aside goes with all studies: name none")
    settings = config.load(config_file)
    from salsa_node import integrity
    from salsa_node.store import Store, StoreSettings

    data_dir = settings.node.data_dir
    with Store.open(StoreSettings(settings.store_url)) as record:
        verdict = integrity.verify(record, data_dir, record.study(study).study_uid if study else None)
    moved = integrity.set_aside(data_dir, verdict.faults) if set_aside else 0
    if as_json:
        console.put_json(verdict.as_json() | {"set_aside": moved})
    else:
        columns = {"kind": "fault", "path": "file, in node.data_dir", "detail": "detail", "study_uid": "study"}
        if verdict.faults:
            console.put_table(columns, verdict.as_json()["faults"])
        console.put(verdict.told)
        if moved:
            console.put(f"{moved} files lie in {data_dir / integrity.SET_ASIDE} now")
        elif any(fault.kind != "no row" for fault in verdict.faults):
            console.put("a file that is missing or changed: have its study sent again, or salsa-node restore")
    if verdict.faults:
        raise SystemExit(EXIT_NO)


def doctor(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Look at config, port, disk, record, weights, GPU, clock and peers; each finding with what to do."""
    settings = config.load(config_file)
    from salsa_node import doctor as surroundings

    checks = surroundings.examine(settings, datetime.now(UTC))
    console.put_checks(checks, as_json)
    if not all(check.ok for check in checks):
        raise SystemExit(EXIT_NO)


def backup(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder; made by this.")],
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    no_images: Annotated[bool, typer.Option("--no-images", help="Without the images that came.")] = False,
) -> None:
    """Save the record, results, masks and images with their digests; beside a running node."""
    settings = config.load(config_file)
    from salsa_node import audit
    from salsa_node import backup as saving

    file = config.source(config_file)
    made = saving.make(
        settings.store_url, settings.node.data_dir, folder, datetime.now(UTC), file, images=not no_images
    )
    told = {"folder": str(made.folder), "files": len(made.digests), "bytes": made.size_bytes, "gone": list(made.gone)}
    if as_json:
        console.put_json(told)
    else:
        console.put(f"{len(made.digests)} files ({made.size_bytes / 2**20:.1f} MiB) saved to {made.folder}")
        if made.gone:
            console.put(f"{len(made.gone)} files that the record names are not there: salsa-node verify says which")
    try:
        audit.Trail(settings.node.data_dir).accessed("backup", None, datetime.now(UTC), f"{len(made.digests)} files")
    except errors.ConfigError as error:  # a full disk is a reason to save what it holds
        console.note(f"this backup is not in the audit trail: {error}")


def restore(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What salsa-node backup made.")],
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    yes: Yes = False,
    check: Annotated[bool, typer.Option("--check", help="Only say whether the backup is whole.")] = False,
) -> None:
    """Bring a backup back, the node being stopped; what stood there is moved aside, never deleted."""
    settings = config.load(config_file)
    from salsa_node import backup as saving

    if check:
        made, aside = saving.check(folder), None
        said = f"{folder} is whole: {len(made.digests)} files of {made.made_at}"
    else:
        ask(yes, as_json, f"put {folder} in the place of {settings.node.data_dir}?")
        made, aside = saving.restore(folder, settings.store_url, settings.node.data_dir, datetime.now(UTC))
        said = f"{len(made.digests)} files of {made.made_at} are back in {settings.node.data_dir}"
    if as_json:
        console.put_json({"made_at": made.made_at, "files": len(made.digests), "aside": str(aside) if aside else None})
    else:
        console.put(f"{said}{f'; what stood there lies in {aside}' if aside else ''}")
        if not made.images:
            console.put("it holds no images: have studies sent again where they are to be analysed again")


def selftest(
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    pipeline: Annotated[str, typer.Option(help="Another pipeline than the configured one.")] = "",
    limit_s: Annotated[float, typer.Option("--limit", min=1, help="Seconds that it may take.")] = 1800.0,
    running: Annotated[
        bool, typer.Option("--running", help="Through the door of the node that runs; the result is held, then let go.")
    ] = False,
) -> None:
    """Send a phantom through a node with these settings and back; beside a running node, and no PACS sees it."""
    settings = config.load(config_file)
    if running and pipeline:
        raise typer.BadParameter("--pipeline: the node that runs has its own; name none with --running")
    from salsa_node import node_lock, preflight
    from salsa_node import selftest as trial
    from salsa_node.store import Store, StoreSettings

    told = (lambda _: None) if as_json else console.note
    if running:
        with Store.open(StoreSettings(settings.store_url)) as record:
            outcome = trial.through_the_door(settings, record, limit_s, lambda: datetime.now(UTC), told)
    else:
        outcome = trial.run(preflight.ready(settings, pipeline), limit_s, told)
    if node_lock.lock_file(settings).exists():  # a node has run here, so there is a record to tell
        with Store.open(StoreSettings(settings.store_url)) as record:
            record.add_event("node", "selftest", "node.selftest", outcome.told, datetime.now(UTC))
    if as_json:
        console.put_json(asdict(outcome))
    else:
        console.put(outcome.told)
    if not outcome.passed:
        raise SystemExit(EXIT_NO)


@db_app.command("upgrade")
def db_upgrade(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Bring the record to this program's version, the node being stopped; a copy of it is kept beside it."""
    settings = config.load(config_file)
    from salsa_node import backup as saving
    from salsa_node import migrations

    before, kept = saving.upgrade(settings.store_url, datetime.now(UTC))
    if as_json:
        console.put_json({"from": before, "to": migrations.HEAD, "kept": str(kept) if kept else None})
    elif kept is None:
        console.put(f"the record has version {before}, which is the newest")
    else:
        console.put(f"the record went from version {before} to {migrations.HEAD}; as it was it lies in {kept}")


@audit_app.command("verify")
def audit_verify(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Say whether the audit trail is whole, and tells what the record tells."""
    settings = config.load(config_file)
    from salsa_node import audit, node_lock
    from salsa_node.store import Store, StoreSettings

    trail = audit.Trail(settings.node.data_dir)
    try:
        with Store.open(StoreSettings(settings.store_url)) as record:
            chain = trail.verify(record, datetime.now(UTC))
    except errors.StoreError as error:
        console.note(f"the record cannot be asked what the trail should tell: {error}")
        chain = trail.verify()
    if as_json:
        console.put_json({"lines": chain.lines, "last": chain.last, "broken": chain.broken, "untold": chain.untold})
    elif chain.broken:
        console.put(f"broken after {chain.lines} lines: {chain.broken}")
    else:
        console.put(f"{chain.lines} lines hang together; the last has digest {chain.last}")
    if chain.untold and not as_json:
        console.put(
            f"{chain.untold} events of the record are missing at its end: lines were cut off, or the node has not run "
            "since, whose start writes them down"
        )
    if chain.broken or (chain.untold and node_lock.is_running(settings)):
        raise SystemExit(EXIT_NO)


@audit_app.command("show")
def audit_show(
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    study: Annotated[str, typer.Option(help="Only lines about this study; named as for show.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 100,
) -> None:
    """Print the audit trail, oldest first; with --json one object a line."""
    settings = config.load(config_file)
    from salsa_node import audit

    entries = list(audit.Trail(settings.node.data_dir).entries())
    if study and all(entry.study_uid != study for entry in entries):  # else the record need not be there
        from salsa_node.store import Store, StoreSettings

        with Store.open(StoreSettings(settings.store_url)) as record:
            study = record.study(study).study_uid
    found = [entry for entry in entries if not study or entry.study_uid == study][-limit:]
    if as_json:
        console.put_json_lines([asdict(entry) for entry in found])
        return
    for entry in found:
        console.put(
            f"{entry.number:6} {entry.at}  {entry.action:22} {entry.who:16} {entry.study_uid or ''}  {entry.detail}"
        )


COMMANDS: Final = (verify, doctor, backup, restore, selftest)
