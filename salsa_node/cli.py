"""The commands of `salsa-node`: each takes its settings from a file, asks one room, prints, and ends with a code.

Rooms that import arrays, networks or the DICOM protocol are imported inside the command that needs them,
so that asking for status stays quick.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from typer.main import get_command_name

from salsa_node import (
    __version__,
    cli_batch,
    cli_fetch,
    cli_models,
    cli_quarantine,
    cli_queue,
    cli_review,
    cli_series,
    cli_studies,
    cli_upkeep,
    config,
    console,
    errors,
)
from salsa_node.options import EXIT_NO, AsJson, ConfigFile, LesionLabels, OrganLabels, StudyName
from salsa_node.settings import SENDER

app = typer.Typer(
    help="A DICOM node that finds liver lesions on CT. Research software, not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="The settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(cli_models.app, name="models")
app.add_typer(cli_upkeep.db_app, name="db")
app.add_typer(cli_upkeep.audit_app, name="audit")
app.command()(cli_batch.batch)
app.command()(cli_quarantine.quarantine)
app.command()(cli_series.select)
app.command()(cli_series.export)
app.command()(cli_queue.pause)
app.command()(cli_fetch.fetch)
app.command()(cli_review.hold)
app.command()(cli_review.release)
app.command()(cli_queue.resume)
for _command in (*cli_studies.COMMANDS, *cli_upkeep.COMMANDS):
    app.command()(_command)

GIVEN_MASKS = "given_masks"
_EXIT_CODES = (
    (errors.ConfigError, 3),
    (errors.UnknownStudy, 4),
    (errors.IllegalTransition, 4),
    (errors.StoreError, 5),
    (errors.DeliveryError, 6),
    (errors.SalsaNodeError, 7),
)


def main() -> None:
    """The entry point: an error that we raise on purpose becomes one line and an exit code."""
    console.in_its_letters()
    try:
        _with_command(sys.argv[1:2])()
    except errors.SalsaNodeError as error:
        sys.stderr.write(f"salsa-node: {error}\n")
        raise SystemExit(next(code for kind, code in _EXIT_CODES if isinstance(error, kind))) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(EXIT_NO) from None


def _with_command(called: Sequence[str]) -> typer.Typer:
    """`app`, and where a command is called none but that: Typer would first read the signatures of all."""
    commands = [
        info
        for info in app.registered_commands
        if info.callback and [get_command_name(info.callback.__name__)] == called
    ]
    only = copy.copy(app)
    if commands:
        only.registered_commands, only.registered_groups = commands, []
    return only


def _version(wanted: bool) -> None:
    if wanted:
        console.put(f"salsa_node {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Say which.")] = False,
) -> None:
    del version


@app.command()
def serve(config_file: ConfigFile = None) -> None:
    """Run the node until SIGTERM or Ctrl-C."""
    settings = config.load(config_file)
    from salsa_node import log, node

    log.start(settings.node.log_level, settings.node.log_format)
    node.serve(settings, config.source(config_file))


@app.command(hidden=True)
def work(
    owner: Annotated[str, typer.Option()],
    config_file: ConfigFile = None,
    device: Annotated[str, typer.Option(help="Instead of pipeline.device.")] = "",
    pulse: Annotated[int, typer.Option(help="A file descriptor that hears of each look for work.")] = -1,
) -> None:
    """Carry runs until standard input closes; `serve` starts this."""
    from salsa_node import log, preflight, worker

    settings = preflight.settled(config.load(config_file))
    if device:
        settings = replace(settings, pipeline=replace(settings.pipeline, device=device))
    log.start(settings.node.log_level, settings.node.log_format)
    worker.work(settings, owner, pulse)


@app.command()
def rerun(
    study: StudyName,
    config_file: ConfigFile = None,
    pipeline: Annotated[str, typer.Option(help="Another pipeline than the configured one.")] = "",
    masks: Annotated[
        Path | None,
        typer.Option(help="A label map that a person made (NIfTI or DICOM SEG); supersedes the AI's result."),
    ] = None,
    organ_label: OrganLabels = None,
    lesion_label: LesionLabels = None,
    of_series: Annotated[
        str | None, typer.Option("--series", help="Only that one, by number or UID, where several are analysed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Analyse a study again; the node carries it out, and the new result supersedes the old one."""
    settings = config.load(config_file)
    from salsa_node import assembly, store
    from salsa_node.audit import Trail

    name = _pipeline(settings, pipeline, masks)
    options = _options(settings, name, organ_label, lesion_label)
    with store.Store.open(store.StoreSettings(settings.store_url)) as record:
        wanted = record.study(study)
        kept = _keep_masks(settings, masks) if masks else None
        wanted = cli_fetch.brought_back(settings, record, wanted)
        only = None if of_series is None else cli_series.series_uid(record, wanted, of_series)
        Trail(settings.node.data_dir).ordered("rerun", [wanted.study_uid], _now(), f"pipeline {name}")
        runs = assembly.queue_again(
            record,
            settings.node.data_dir,
            wanted,
            name,
            options,
            _now(),
            kept,
            assembly.Rules(settings.selection, settings.series, settings.assembly, settings.query),
            only,
        )
    if as_json:
        console.put_json(
            {"run": runs[0].id, "runs": [run.id for run in runs], "study_uid": wanted.study_uid, "pipeline": name}
        )
    else:
        for run in runs:
            console.put(f"run {run.id} is queued; follow it with: salsa-node show {run.study_uid}")


def _keep_masks(settings: config.Config, masks: Path) -> tuple[str, str]:
    """Copy a person's masks below the data folder; the path there and the SHA-256."""
    from salsa_node import durable

    try:
        content = masks.read_bytes()
    except OSError as exc:
        raise errors.ConfigError(f"--masks: {masks} cannot be read ({exc.strerror})") from exc
    if masks.name.endswith((".nii", ".nii.gz")):
        from salsa_node import nifti

        try:
            nifti.read_labels(masks)
        except errors.SeriesRejected as verdict:
            raise errors.ConfigError(f"--masks: {masks}: {verdict}") from verdict
    elif content[128:132] != b"DICM":
        raise errors.ConfigError(f"--masks: {masks} is neither NIfTI (.nii, .nii.gz) nor a DICOM Segmentation")
    sha256 = hashlib.sha256(content).hexdigest()
    suffix = next((known for known in (".nii.gz", ".nii") if masks.name.endswith(known)), ".dcm")
    kept = Path("masks") / f"{sha256}{suffix}"
    try:
        durable.write(settings.node.data_dir / kept, [content])
    except OSError as exc:
        raise errors.ConfigError(f"node.data_dir: {settings.node.data_dir} cannot be written ({exc.strerror})") from exc
    return kept.as_posix(), sha256


@app.command()
def resend(
    study: StudyName,
    config_file: ConfigFile = None,
    to: Annotated[str, typer.Option(help="A destination by name; without it all that the result went to.")] = "",
    as_json: AsJson = False,
) -> None:
    """Send the current results of a study again: the same objects."""
    settings = config.load(config_file)
    from salsa_node import store
    from salsa_node.audit import Trail

    if to and to != SENDER:
        settings.destination_named(to)
    with store.Store.open(store.StoreSettings(settings.store_url)) as record:
        wanted = record.study(study).study_uid
        Trail(settings.node.data_dir).ordered("resend", [wanted], _now(), f"to {to}" if to else "")
        due = record.resend(wanted, to or None, _now())
        latest = store.standing(record.runs_of(wanted))
    if as_json:
        console.put_json([{"delivery": item.id, "destination": item.destination} for item in due])
    elif due:
        sent = list(dict.fromkeys(item.run_id for item in due))
        named = " and ".join(f"run {number}" for number in sent)
        console.put(f"{len(due)} deliveries of {named} are due again; a running node sends them")
        for run in latest:
            if run.id not in sent:
                console.put(f"its result is the current one: run {run.id} after it is {run.state.value}")
    else:
        console.put("this result went nowhere yet: name a destination with --to, or in delivery.to before the next run")
    if not due:
        raise SystemExit(EXIT_NO)


@app.command()
def echo(
    destination: Annotated[str, typer.Argument(metavar="DESTINATION")],
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Knock at a destination of the config and send nothing: C-ECHO, a DICOMweb query, or a look for the folder."""
    settings = config.load(config_file)
    named = settings.destination_named(destination)
    from salsa_node import ways

    answer = ways.echo(named, settings.delivery.timeout_s)
    told = {
        "destination": named.name,
        "ae_title": named.ae_title,
        "host": named.host,
        "port": named.port,
        "where": named.where,
        "answer": answer,
    }
    if as_json:
        console.put_json(told)
    else:
        console.put(f"{named.name} ({named.where}) answered {answer}")


@config_app.command("check")
def config_check(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Say whether a node can start with these settings, and what to mend when not."""
    settings = config.load(config_file)
    from salsa_node import preflight

    checks = preflight.checks(settings)
    console.put_checks(checks, as_json)
    if not all(check.ok for check in checks):
        raise SystemExit(3)


@app.command()
def run(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH…", help="DICOM folders or NIfTI files.")],
    output: Annotated[Path, typer.Option(help="Folder for the results; made when absent.")] = Path("salsa-results"),
    config_file: ConfigFile = None,
    pipeline: Annotated[str, typer.Option(help="Another pipeline than the configured one.")] = "",
    masks: Annotated[Path | None, typer.Option(help="A label map that a person made, instead of a network.")] = None,
    organ_label: OrganLabels = None,
    lesion_label: LesionLabels = None,
    rule: Annotated[str, typer.Option(help="diameter or volume, instead of the configured rule.")] = "",
    as_json: AsJson = False,
) -> None:
    """Analyse a DICOM folder or a NIfTI file without any network."""
    settings = config.load(config_file)
    from salsa_node import offline, preflight

    if masks is None and pipeline in ("", settings.pipeline.name):
        preflight.download(settings, datetime.now(UTC), console.note)
    name = _pipeline(settings, pipeline, masks)
    options = _options(settings, name, organ_label, lesion_label)
    wanted = offline.Wanted(output, name, options, masks, rule or None)
    results = offline.run(paths, wanted, settings, progress=console.note)
    if as_json:
        console.put_json([result.as_json() for result in results])
    else:
        for result in results:
            console.put(f"{result.path}: {result.told}{f'; see {result.folder}' if result.written else ''}")
            if result.lesions:
                console.put_lesions(result.lesions)
            for flag in result.flags:
                console.put(f"note: {flag}")
    if not all(result.fit for result in results):
        raise SystemExit(EXIT_NO)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything that comes out; made when absent.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Which synthetic patient.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Send a phantom study through a real node and show what comes back beside the truth."""
    from salsa_node import demo as demonstration

    outcome = demonstration.run(output, seed, quiet=as_json)
    if as_json:
        console.put_json(outcome.as_json())
    if not outcome.passed:
        raise SystemExit(EXIT_NO)


def _pipeline(settings: config.Config, named: str, masks: Path | None) -> str:
    """The pipeline that the options ask for. Raises ConfigError where they contradict each other or name none."""
    if masks and named not in ("", GIVEN_MASKS):
        raise errors.ConfigError(f"--masks goes with the pipeline {GIVEN_MASKS}, not with {named}")
    from salsa_node import preflight

    settings = preflight.settled(settings)
    name = GIVEN_MASKS if masks else named or settings.pipeline.name
    if name == GIVEN_MASKS and not masks:
        raise errors.ConfigError(f"the pipeline {GIVEN_MASKS} needs a label map: add --masks FILE")
    preflight.require_pipeline(name, settings)
    return name


def _options(
    settings: config.Config, pipeline: str, organ_labels: list[int] | None, lesion_labels: list[int] | None
) -> dict[str, object]:
    """The pipeline's own settings: the config's where it is the configured one, and what the command line says."""
    from salsa_node import preflight

    options = dict(settings.pipeline.options) if pipeline == preflight.settled(settings).pipeline.name else {}
    named = {"organ_labels": organ_labels, "lesion_labels": lesion_labels}
    said = {key: labels for key, labels in named.items() if labels}
    if said and pipeline != GIVEN_MASKS:
        raise errors.ConfigError(
            "--organ-label and --lesion-label say what the labels of --masks mean; add --masks FILE"
        )
    return options | said


def _now() -> datetime:
    return datetime.now(UTC)
