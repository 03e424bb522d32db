"""`salsa-node quarantine`: what came in and contradicts what is stored."""

from __future__ import annotations

from typing import Annotated

import typer

from salsa_node import config, console
from salsa_node.options import AsJson, ConfigFile


def quarantine(
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 50,
) -> None:
    """List the images that contradict what is stored, and why; their senders were refused and have them still."""
    from salsa_node import overview, store

    with store.Store.open(store.StoreSettings(config.load(config_file).store_url)) as record:
        rows = [overview.set_aside(row) for row in record.quarantined(limit)]
    if as_json:
        console.put_json(rows)
    elif not rows:
        console.put("nothing contradicts what is stored")
    else:
        console.put_quarantine(rows)
