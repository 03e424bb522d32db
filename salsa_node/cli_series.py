"""The commands about the series of a study: which one is analysed and why, and that one as a file for research."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salsa_node import config, console
from salsa_node.errors import ConfigError, SeriesRejected, UnknownStudy
from salsa_node.options import AsJson, ConfigFile, StudyName

if TYPE_CHECKING:
    from salsa_node.series import Series
    from salsa_node.series_rules import SeriesRules
    from salsa_node.store import Run, Store, Study


def select(
    study: StudyName,
    config_file: ConfigFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the scores; queue nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score the series of a study by the config's rules; queue the best ones where they are others than before."""
    settings = config.load(config_file)
    from salsa_node import assembly, preflight, store
    from salsa_node.audit import Trail

    data_dir = settings.node.data_dir
    rules = assembly.Rules(settings.selection, settings.series, settings.assembly, settings.query)
    with store.Store.open(store.StoreSettings(settings.store_url)) as record:
        wanted = record.study(study)
        runs: Sequence[Run] = ()
        if dry_run:
            found = assembly.examine(record, data_dir, wanted, rules)
        else:
            Trail(data_dir).ordered("select", [wanted.study_uid], datetime.now(UTC))
            ready = preflight.settled(settings)
            pipeline = ready.profile_pipelines.get(wanted.called_ae, ready.pipeline)
            found, runs = assembly.select(record, data_dir, wanted, pipeline, datetime.now(UTC), rules)
    scores = list(found.scores) if found else []
    if as_json:
        console.put_json(
            {
                "study_uid": wanted.study_uid,
                "runs": [run.id for run in runs],
                "run": runs[0].id if runs else None,
                "scores": scores,
            }
        )
    elif not scores:
        console.put(assembly.NO_CT)
    else:
        console.put_scores(scores)
        for run in runs:
            console.put(f"run {run.id} is {run.state.value}; follow it with: salsa-node show {run.study_uid}")


def export(
    study: StudyName,
    config_file: ConfigFile = None,
    which: Annotated[
        str | None, typer.Option("--series", help="Its number or UID; without it the series analysed last.")
    ] = None,
    stack: Annotated[
        int | None, typer.Option(min=1, help="Which one, of a series that holds several; else the one analysed.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write, .nii or .nii.gz; by default the series' UID.nii here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write one CT series of a study as NIfTI, in Hounsfield units, without patient identity."""
    settings = config.load(config_file)
    from salsa_node import nifti, series, store
    from salsa_node.audit import Trail
    from salsa_node.upright import upright

    with store.Store.open(store.StoreSettings(settings.store_url)) as record:
        wanted = record.study(study)
        chosen = series_uid(record, wanted, which)
        analysed = [] if stack else [run for run in record.runs_of(wanted.study_uid) if run.series_uid == chosen]
        images = analysed[-1].images if analysed else None
        paths = [
            settings.node.data_dir / image.path
            for image in record.instances_of(wanted.study_uid, chosen)
            if images is None or image.sop_instance_uid in images
        ]
    file = output or Path(f"{chosen}.nii")
    if not file.name.endswith((".nii", ".nii.gz")):
        raise ConfigError(f"--output: expected a name that ends in .nii or .nii.gz, found {file.name}")
    if file.exists() and not force:
        raise ConfigError(f"--output: {file} is there already; --force writes over it")
    Trail(settings.node.data_dir).accessed("export", wanted.study_uid, datetime.now(UTC), f"series {chosen}")
    ct = series.read_volume(_geometry(paths, settings.series, stack))
    resampled = not ct.grid.is_upright
    if resampled:
        ct = upright(ct)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        nifti.write_ct(ct, file)
    except OSError as exc:
        raise ConfigError(f"--output: {file} cannot be written ({exc.strerror})") from exc
    if as_json:
        told = {"file": str(file), "series_uid": chosen, "shape": ct.grid.shape, "spacing_mm": ct.grid.spacing_mm}
        console.put_json({**told, "resampled": resampled})
    else:
        console.put(f"{file}: {ct.grid}{', resampled: its slices make no regular grid' if resampled else ''}")


def _geometry(paths: Sequence[Path], rules: SeriesRules, stack: int | None) -> Series:
    """The volume that these files are, or that stack of them. Raises SeriesRejected."""
    from salsa_node import candidate, series, stacks

    try:
        return series.inspect(paths, rules)
    except SeriesRejected:
        parts = stacks.apart(candidate.read_candidate(paths), rules)
        if not parts:
            raise
    if stack is None or stack > len(parts):
        there = ", ".join(f"{n}: {len(part.paths)} images" for n, part in enumerate(parts, start=1))
        raise SeriesRejected(f"the series holds several stacks of images ({there}); name one with --stack")
    return series.inspect(parts[stack - 1].paths, rules)


def series_uid(record: Store, study: Study, which: str | None) -> str:
    """The series of that number or UID, or the one of the study's last run. Raises UnknownStudy."""
    rows = record.series_of(study.study_uid)
    if which is None:
        analysed = [run.series_uid for run in record.runs_of(study.study_uid) if run.series_uid]
        if analysed:
            return analysed[-1]
        raise UnknownStudy("no series of this study was analysed; name one with --series")
    found = [row.series_uid for row in rows if which in (row.series_uid, str(row.series_number))]
    if len(found) != 1:
        there = ", ".join(str(row.series_number or row.series_uid) for row in rows)
        raise UnknownStudy(f"{len(found)} series are called {which!r}; the study holds {there}; name one by its UID")
    return found[0]
