"""`salsa-node pause` and `resume`: whether the node begins runs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from salsa_node import config, console
from salsa_node.options import AsJson, ConfigFile


def pause(
    reason: Annotated[str, typer.Option(help="Why; shown to everybody, so name no patient.")] = "",
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Begin no run until `resume`, restarts included; images are taken and results sent as ever."""
    settings = config.load(config_file)
    from salsa_node import store
    from salsa_node.audit import Trail

    with store.Store.open(store.StoreSettings(settings.store_url)) as record:
        Trail(settings.node.data_dir).ordered("pause", [None], datetime.now(UTC))
        on = record.pause(reason, datetime.now(UTC))
    if as_json:
        console.put_json({"paused": True, "reason": on.reason, "since": on.at.isoformat()})
    else:
        console.put(f"paused since {on.at:%Y-%m-%d %H:%M:%S} UTC; the run under way goes on; then: salsa-node resume")


def resume(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Begin runs again."""
    settings = config.load(config_file)
    from salsa_node import store
    from salsa_node.audit import Trail

    with store.Store.open(store.StoreSettings(settings.store_url)) as record:
        Trail(settings.node.data_dir).ordered("resume", [None], datetime.now(UTC))
        was = record.resume(datetime.now(UTC))
    if as_json:
        console.put_json({"paused": False, "was_paused": was is not None})
    else:
        console.put("runs begin again" if was else "work was not paused")
