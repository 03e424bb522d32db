"""`salsa-node fetch`: studies back from an archive, for runs of what was purged and for priors."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from salsa_node import config, console
from salsa_node.config import Config
from salsa_node.errors import ConfigError, DeliveryError
from salsa_node.options import EXIT_NO, AsJson, ConfigFile, Yes, ask
from salsa_node.settings import Destination

if TYPE_CHECKING:
    from salsa_node.fetch import Brought
    from salsa_node.store import Store, Study

MANY = 10  # so many studies come without asking


def fetch(
    study: Annotated[str, typer.Option(help="Study Instance UID.")] = "",
    accession: Annotated[str, typer.Option(help="Accession number.")] = "",
    patient: Annotated[str, typer.Option(help="Patient ID.")] = "",
    date: Annotated[str, typer.Option(help="Study Date: 20260131, 20260101-20260131, or 20260101-.")] = "",
    source: Annotated[
        str, typer.Option("--from", help="A destination by name; without it the archive of \\[query], or the only one.")
    ] = "",
    by: Annotated[str, typer.Option(help="get, move (to our own door), or auto: the first that is offered.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what there is, and fetch nothing.")] = False,
    yes: Yes = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Bring studies from an archive into this node, where they are analysed as if they had been sent."""
    settings = config.load(config_file)
    if not (study or accession or patient):
        raise typer.BadParameter("name a --study, an --accession or a --patient")
    if by not in ("auto", "get", "move"):
        raise typer.BadParameter(f"--by: expected get, move or auto; found {by!r}")
    if study and not re.fullmatch(r"[0-9.]{1,64}", study):
        raise typer.BadParameter(f"--study: expected a whole Study Instance UID, found {study!r}")
    if date and not re.fullmatch(r"\d{8}|\d{8}-(\d{8})?|-\d{8}", date):
        raise typer.BadParameter(f"--date: expected 20260131, 20260101-20260131 or 20260101-, found {date!r}")
    from salsa_node import fetch as fetching
    from salsa_node.store import Store, StoreSettings

    archive = source_of(settings, source)
    wanted = fetching.Wanted(study, accession, patient, date)
    found = fetching.find(archive, wanted, settings.delivery.timeout_s)
    if len(found) > MANY and not dry_run:
        ask(yes, as_json, f"fetch {len(found)} studies from {archive.name}?")
    rows, faults = [], []
    with Store.open(StoreSettings(settings.store_url)) as record:
        for one in found:
            try:
                brought = None if dry_run else bring(settings, record, archive, one.study_uid, by)
            except DeliveryError as error:  # the other studies may come
                faults.append(error)
                continue
            rows.append({**asdict(one), **(asdict(brought) if brought else {})})
    if as_json:
        console.put_json(rows)
    elif rows:
        columns = {"study_uid": "study", "accession_number": "accession", "study_date": "date", "images": ">images"}
        console.put_table(columns | ({} if dry_run else {"by": "by", "taken": ">taken", "failed": ">failed"}), rows)
    elif not found:
        console.put(f"{archive.name} ({archive.where}) holds no such study")
    if faults:
        first = f"{len(faults)} of {len(found)} studies did not come; the first: " if len(found) > 1 else ""
        raise DeliveryError(f"{first}{faults[0]}", faults[0].status)
    if not rows or any(row.get("failed") for row in rows):
        raise SystemExit(EXIT_NO)


def source_of(settings: Config, named: str = "") -> Destination:
    """Where studies are fetched: that destination, else the archive of [query], else the only destination.

    Raises ConfigError where that is nobody.
    """
    if named:
        return settings.destination_named(named)
    query = settings.query
    if query.ae_title:
        return Destination("query", query.ae_title, query.host, query.port, query.calling_ae_title)
    archives = [one for one in settings.destination if not one.folder]
    if len(archives) != 1:
        raise ConfigError("no archive to fetch from: configure [query], or name a destination with --from")
    return archives[0]


def bring(settings: Config, record: Store, archive: Destination, study_uid: str, by: str = "auto") -> Brought:
    """One study into the record. Raises DeliveryError."""
    from salsa_node import fetch as fetching
    from salsa_node.audit import Trail
    from salsa_node.intake import Intake
    from salsa_node.notes import Notes

    clock: Callable[[], datetime] = lambda: datetime.now(UTC)  # noqa: E731
    Trail(settings.node.data_dir).ordered("fetch", [study_uid], clock(), f"from {archive.name}")
    intake = Intake(record, settings.node.data_dir, Notes(record, clock), clock)
    our_title = settings.listener.ae_title
    with closing(intake):
        brought = fetching.bring(archive, study_uid, intake, our_title, settings.delivery.timeout_s, by)
    detail = f"from {archive.name} by {brought.by}: {brought.taken} instances, {brought.failed} not taken"
    record.add_event("study", study_uid, "study.fetched", detail, clock(), study_uid)
    return brought


def brought_back(settings: Config, record: Store, study: Study) -> Study:
    """The study with its images; fetched, where they were purged or their files are gone and there is an archive.

    Raises ConfigError where they were purged and there is no archive to ask, DeliveryError where it does not give them.
    """
    images = record.instances_of(study.study_uid)
    if images and all((settings.node.data_dir / image.path).is_file() for image in images):
        return study
    try:
        archive = source_of(settings)
    except ConfigError as error:
        if images:
            return study  # what is left of it may do
        raise ConfigError(f"the images of this study were purged here; {error}") from error
    console.note(f"images of this study are gone here; they are fetched from {archive.name}")
    bring(settings, record, archive, study.study_uid)
    return record.study(study.study_uid)
