"""`salsa-node batch`: SALSA's own way to run, on many scans, with progress, tables and an exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from salsa_node import config, console, errors
from salsa_node.criteria import Rule
from salsa_node.options import EXIT_NO, AsJson, ConfigFile
from salsa_node.settings import AUTO

if TYPE_CHECKING:
    from salsa_node.batch import Result


def batch(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH…]", help="NIfTI files, DICOM folders, folders of either, or patterns."),
    ] = None,
    input_csv: Annotated[
        Path | None,
        typer.Option("--input-csv", "--input_csv", help="A table with one scan a row in the column PATHS."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; else beside each scan.")] = None,
    config_file: ConfigFile = None,
    pipeline: Annotated[str, typer.Option(help="Another pipeline than the configured one.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N, instead of the configured one.")] = "",
    recist: Annotated[
        bool, typer.Option("--recist/--no-recist", help="1 measurable and 2 non-measurable, or 1 for every lesion.")
    ] = True,
    instances: Annotated[bool, typer.Option("--instances", help="One label per lesion.")] = False,
    rule: Annotated[str, typer.Option(help="What is measurable: volume (SALSA) or diameter (RECIST 1.1).")] = "",
    keep_intermediates: Annotated[
        bool, typer.Option("--keep-intermediates", help="Also what lies between, in <stem>_SALSA/.")
    ] = False,
    overlay: Annotated[str, typer.Option(help="Also a picture of each scan: gif (every slice) or png.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Also scans that are finished.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find lesions in many scans: <stem>_SALSA.nii.gz for each, tables for all; what is finished is not done again."""
    if not paths and input_csv is None:
        raise typer.BadParameter("nothing to do: give PATHs or --input-csv FILE")
    from salsa_node import preflight

    asked = config.load(config_file)
    if pipeline in ("", asked.pipeline.name):
        preflight.download(asked, datetime.now(UTC), console.note)
    settings = preflight.ready(asked, pipeline, device)
    if (pipeline or asked.pipeline.name) == AUTO and settings.pipeline.name == "demo":
        console.note(preflight.instead_of_demo(settings))
    criteria = settings.criteria
    if rule:
        if rule not in [known.value for known in Rule]:
            expected = " or ".join(known.value for known in Rule)
            raise errors.ConfigError(f"--rule: expected {expected}, found {rule!r}")
        criteria = replace(criteria, rule=Rule(rule))
    from salsa_node import batch as batches
    from salsa_node import cases, pipelines

    wanted = batches.Wanted(recist, instances, keep_intermediates, overlay, again)
    rules = cases.Rules(settings.selection, settings.series)
    listed = cases.listed(input_csv) if input_csv else []
    placed = cases.placed(cases.find([*listed, *(paths or [])], rules), output)
    folder = batches.tables_folder(output, input_csv)  # before the work
    choice = settings.pipeline
    console.note(f"loading the pipeline {choice.name} ...")
    loaded = pipelines.load(
        choice.name, pipelines.PipelineSettings(choice.device, settings.models_dir, options=choice.options)
    )
    done: list[Result] = []
    tables: Sequence[Path] = ()
    try:
        with _progress(len(placed)) as bar:
            for result in batches.run(placed, loaded, criteria, settings.guards, wanted, rules.series):
                done.append(result)
                bar(_line(result))
    except KeyboardInterrupt:
        console.note(f"stopped after {len(done)} of {len(placed)} scans; the same command again goes on with the rest")
        raise
    finally:
        try:
            tables = batches.write_tables(done, folder)
        except errors.ConfigError as error:  # what ended the loop, if anything did, is told as well
            console.note(str(error))
    _tell(done, tables, as_json)
    if not tables or any(result.state == "failed" for result in done):
        raise SystemExit(EXIT_NO)


def _line(result: Result) -> str:
    """One scan on the screen; what is odd about its findings by the names of its flags."""
    flags = result.record.get("flags")
    names = ", ".join(str(flag["name"]) for flag in flags) if isinstance(flags, list) else ""
    failed = "FAILED: " if result.state == "failed" else ""
    return f"{result.case.path}: {failed}{result.told}{f'; flags: {names}' if names else ''}"


class _Bar(Protocol):
    def __call__(self, told: str) -> None:
        """One more is done."""


@contextmanager
def _progress(total: int) -> Iterator[_Bar]:
    """A line for each scan and, below them, how many are done and how long the rest will take; on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    screen = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("scans, elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=total)
        began = time.monotonic()
        done = 0

        def bar(told: str) -> None:
            nonlocal done
            done += 1
            left_s = (time.monotonic() - began) / done * (total - done)
            left = "" if done == total or sys.stderr.isatty() else f" (about {left_s / 60:.0f} min left)"
            screen.print(console.printable(f"[{done}/{total}] {told}{left}"))
            progress.advance(task)

        yield bar


def _tell(done: Sequence[Result], tables: Sequence[Path], as_json: bool) -> None:
    if as_json:
        console.put_json([result.as_json() for result in done])
        return
    counts = {state: sum(result.state == state for result in done) for state in ("done", "there", "failed")}
    lesions = sum(len(result.lesions) for result in done)
    console.put(
        f"{sum(counts.values())} scan{'' if sum(counts.values()) == 1 else 's'}: "
        f"{counts['done']} done, {counts['there']} finished before, {counts['failed']} failed; "
        f"{lesions} candidate lesion{'' if lesions == 1 else 's'}"
    )
    left_out = [result.case.path for result in done if result.state == "left out"]
    if left_out:
        console.put(f"left out {len(left_out)} that are no scans but label maps: {', '.join(map(str, left_out))}")
    console.put(f"tables: {', '.join(map(str, tables)) or 'none could be written'}")
    for result in done:
        if result.state == "failed":
            console.put(f"FAILED  {result.case.path}: {result.told}")
