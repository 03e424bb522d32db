"""The commands that keep a node sound: look at files, surroundings and record, save them, bring them back."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from salsa_node import config, console
from salsa_node.options import EXIT_NO, AsJson, ConfigFile
from salsa_node.store import Store, StoreSettings


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


COMMANDS: Final = (verify,)
