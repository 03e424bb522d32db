"""Options, arguments and an exit code that several commands of `salsa-node` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from salsa_node import config

EXIT_NO = 1  #: done, and the answer is no

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help=f"Settings file; without it ${config.ENVIRONMENT} names one, else the defaults hold."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")]
StudyName = Annotated[
    str, typer.Argument(metavar="STUDY", help="Study Instance UID, a unique beginning of one, or an accession number.")
]
OrganLabels = Annotated[
    list[int] | None, typer.Option("--organ-label", help="A label of --masks that is liver; may be repeated.")
]
LesionLabels = Annotated[
    list[int] | None, typer.Option("--lesion-label", help="A label of --masks that is lesion; may be repeated.")
]
