"""The commands about the series of a study: which one is analysed and why, and that one as a file for research."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from salsa_node import config, console
from salsa_node.options import AsJson, ConfigFile, StudyName


def select(
    study: StudyName,
    config_file: ConfigFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the scores; queue nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score the series of a study by the config's rules; queue the best one where it is another than before."""
    settings = config.load(config_file)
    from salsa_node import assembly, preflight, store

    data_dir = settings.node.data_dir
    rules = assembly.Rules(settings.selection, settings.series, settings.assembly, settings.query)
    with store.Store.open(store.StoreSettings(settings.store_url)) as record:
        wanted = record.study(study)
        if dry_run:
            found, run = assembly.examine(record, data_dir, wanted, rules), None
        else:
            pipeline = preflight.settled(settings).pipeline
            found, run = assembly.select(record, data_dir, wanted, pipeline, datetime.now(UTC), rules)
    scores = list(found.scores) if found else []
    if as_json:
        console.put_json({"study_uid": wanted.study_uid, "run": run.id if run else None, "scores": scores})
    elif not scores:
        console.put(assembly.NO_CT)
    else:
        console.put_scores(scores)
        if run:
            console.put(f"run {run.id} is {run.state.value}; follow it with: salsa-node show {run.study_uid}")
