"""Options, arguments and an exit code that several commands of `salsa-node` share."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from salsa_node import config

EXIT_NO = 1  #: done, and the answer is no

_AGO = {"m": "minutes", "h": "hours", "d": "days"}


def moment(text: str) -> datetime:
    """A point in time from the command line: "90m", "24h" or "7d" ago, or ISO 8601, UTC where no zone is named.

    Raises typer.BadParameter.
    """
    ago = re.fullmatch(r"(\d{1,5})([mhd])", text)
    if ago:
        return datetime.now(UTC) - timedelta(**{_AGO[ago[2]]: int(ago[1])})
    try:
        found = datetime.fromisoformat(text)
        found = found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):  # the latter: before the year 1, seen from Greenwich
        raise typer.BadParameter(
            f"expected 90m, 24h, 7d (ago), or a date such as 2026-01-31 or 2026-01-31T18:00 (UTC), found {text!r}"
        ) from None
    return found


def ask(yes: bool, as_json: bool, question: str) -> None:
    """Go on where `yes` was said beforehand or is answered now.

    Raises typer.Abort (exit code 1) where it is not, typer.BadParameter where a machine cannot answer.
    """
    if yes:
        return
    if as_json:
        raise typer.BadParameter("--json asks no questions: add --yes")
    typer.confirm(question, abort=True, err=True)


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
Since = Annotated[
    datetime | None,
    typer.Option(parser=moment, metavar="WHEN", help="From then on: 24h, 7d, or a date, with or without a time (UTC)."),
]
Until = Annotated[datetime | None, typer.Option(parser=moment, metavar="WHEN", help="Before then.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it without asking.")]
OrganLabels = Annotated[
    list[int] | None, typer.Option("--organ-label", help="A label of --masks that is liver; may be repeated.")
]
LesionLabels = Annotated[
    list[int] | None, typer.Option("--lesion-label", help="A label of --masks that is lesion; may be repeated.")
]
