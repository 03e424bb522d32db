"""The commands about studies: list, look into, stop, try again, let go; and what happened in the node."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from datetime import date as day
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from salsa_node import config, console, durable, reserve
from salsa_node.errors import ConfigError, IllegalTransition, StoreError
from salsa_node.options import EXIT_NO, AsJson, ConfigFile, Since, StudyName, Until, Yes, ask, moment

_GIVEN_BACK = "the disk is full: the room that was laid by for this is given back; make more by salsa-node purge"

if TYPE_CHECKING:  # the record's rooms take longer to import than most commands to answer
    from salsa_node.audit import Trail
    from salsa_node.overview import Standing
    from salsa_node.store import Event, Store


def studies(
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 50,
    state: Annotated[
        list[str] | None, typer.Option("--state", help="Only studies that stand so, such as failed; may be repeated.")
    ] = None,
    since: Since = None,
    until: Until = None,
    date: Annotated[str, typer.Option(help="Study Date: 20260131, or 20260101-20260131.")] = "",
    ae: Annotated[str, typer.Option("--ae", help="The AE title that sent it.")] = "",
    called: Annotated[str, typer.Option(help="The AE title of ours that it was sent to.")] = "",
    accession: Annotated[str, typer.Option(help="A beginning of the accession number.")] = "",
    sort: Annotated[str, typer.Option(help="By last, first, date, accession, from or images.")] = "last",
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round.")] = False,
    uids: Annotated[bool, typer.Option("--uids", help="Only Study Instance UIDs, a line each, for other programs.")] = (
        False
    ),
    watch: Annotated[bool, typer.Option("--watch", help="Go on, and print again what changed, until Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option("--every", min=0.1, help="With --watch: seconds between looks.")] = 2.0,
) -> None:
    """List the studies, newest first."""
    from salsa_node import overview
    from salsa_node.store import Sought

    sought = Sought(since, until, _dates(date), ae, called, accession, _order(sort), reverse)
    standings = [_standing(word) for word in state or ()]
    with _store(config_file) as record:
        rows = [overview.row(seen) for seen in overview.search(record, sought, standings, limit)]
        any_at_all = bool(rows) or bool(record.studies(1))
        _put_studies(rows, as_json, uids, any_at_all)
        if len(rows) == limit:
            console.note(f"there may be more than these {limit}: --limit")
        with suppress(KeyboardInterrupt):
            while watch:
                console.flush()
                time.sleep(every_s)
                now = [overview.row(seen) for seen in overview.search(record, sought, standings, limit)]
                if now != rows:
                    rows = now
                    console.clear()
                    _put_studies(rows, as_json, uids, True)


def _put_studies(rows: Sequence[dict[str, object]], as_json: bool, uids: bool, any_at_all: bool) -> None:
    if as_json:
        console.put_json(rows)
    elif uids:
        for row in rows:
            console.put(str(row["study_uid"]))
    else:
        console.put_studies(rows, "no such study" if any_at_all else "no study has arrived yet")


def show(study: StudyName, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show one study: series, scores, runs, findings, deliveries, provenance, time line."""
    from salsa_node import overview

    with _store(config_file) as record:
        page = overview.detail(record, overview.glance(record, record.study(study)))
    if as_json:
        console.put_json(page)
    else:
        console.put_detail(page)
    try:
        _trail(config_file).accessed("show", str(page["study_uid"]), datetime.now(UTC))
    except ConfigError as error:  # a full disk must not blind who comes to see why
        console.note(f"this look is not in the audit trail: {error}")


def cancel(
    study: StudyName,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    yes: Yes = False,
    deliveries: Annotated[
        bool, typer.Option("--deliveries", help="Also what was given up: its destination is not to get it any more.")
    ] = False,
) -> None:
    """Stop the runs of a study that wait or run; the result that it has stays."""
    from salsa_node.store import DeliveryState

    with _store(config_file) as record:
        wanted = record.study(study).study_uid
        what = "what is under way for" + (", and what was never taken of," if deliveries else "")
        ask(yes, as_json, f"cancel {what} study {wanted}?")
        _trail(config_file).ordered("cancel", [wanted], datetime.now(UTC), "deliveries" if deliveries else "")
        runs = record.cancel(wanted, datetime.now(UTC))
        withdrawn = record.give_up_for_good(wanted, datetime.now(UTC)) if deliveries else ()
        going = sum(
            due.state is DeliveryState.PENDING for run in record.runs_of(wanted) for due in record.deliveries_of(run.id)
        )
    if as_json:
        told = [{"run": run.id, "state": run.state.value} for run in runs]
        console.put_json([*told, *({"delivery": one.id, "state": one.state.value} for one in withdrawn)])
    else:
        if runs:
            numbers = ", ".join(str(run.id) for run in runs)
            console.put(f"cancelled: run {numbers}; salsa-node rerun {wanted} starts another")
        for one in withdrawn:
            console.put(f"delivery {one.id} to {one.destination} is withdrawn")
        if not runs and not withdrawn and going:
            console.put(f"no run is under way; {going} deliveries go on: salsa-node hold {wanted} keeps them here")
        elif not runs and not withdrawn:
            console.put("nothing is under way" + (", and nothing was given up" if deliveries else ""))
    if not runs and not withdrawn:
        raise SystemExit(EXIT_NO)


def retry(
    study: Annotated[str, typer.Argument(metavar="[STUDY]", help="As for show; or --all.")] = "",
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    every: Annotated[bool, typer.Option("--all", help="Every study that failed or was not delivered.")] = False,
    since: Since = None,
) -> None:
    """Try again what failed: a run as it was, a delivery that was given up; with all their attempts."""
    if bool(study) == every:
        raise typer.BadParameter("name a STUDY, or say --all")
    from salsa_node import overview
    from salsa_node.store import Sought

    with _store(config_file) as record:
        if every:
            waiting = (overview.Standing.FAILED, overview.Standing.NOT_DELIVERED)
            found = overview.search(record, Sought(since=since), waiting, 1_000_000)
            wanted = [seen.study.study_uid for seen in found]
        else:
            wanted = [record.study(study).study_uid]
        _trail(config_file).ordered("retry", wanted, datetime.now(UTC))
        done = [(uid, *record.retry(uid, datetime.now(UTC))) for uid in wanted]
    done = [(uid, runs, due) for uid, runs, due in done if runs or due]
    if as_json:
        console.put_json(
            [
                {
                    "study_uid": uid,
                    "run": runs[0].id if runs else None,
                    "runs": [run.id for run in runs],
                    "deliveries": [item.id for item in due],
                }
                for uid, runs, due in done
            ]
        )
    else:
        for uid, runs, due in done:
            what = " and ".join(f"run {run.id}" for run in runs) or f"{len(due)} deliveries"
            console.put(f"study {uid}: {what} will be tried again by a running node")
        if not done:
            console.put("nothing there has failed or was given up")
    if not done:
        raise SystemExit(EXIT_NO)


def stats(
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    since: Annotated[
        datetime, typer.Option(parser=moment, metavar="WHEN", help="Durations and results from then on.")
    ] = "7d",  # type: ignore[assignment]
) -> None:
    """Count studies, runs, results and deliveries, and say how long they took."""
    from salsa_node import overview

    with _store(config_file) as record:
        figures = overview.statistics(record.figures(since))
    if as_json:
        console.put_json(figures)
    else:
        console.put_statistics(figures)


def logs(
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    study: Annotated[str, typer.Option(help="Only of this study.")] = "",
    event: Annotated[str, typer.Option(help="Only events whose name begins so: run, delivery.gave_up.")] = "",
    subject: Annotated[str, typer.Option(help="Only about: study, series, run, delivery, instance, node.")] = "",
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens next, until Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option("--every", min=0.1, help="With --follow: seconds between looks.")] = 1.0,
) -> None:
    """Print what happened, oldest first; with --json one object a line."""
    with _store(config_file) as record:
        uid = record.study(study).study_uid if study else None
        found = record.find_events(study_uid=uid, name=event, subject=subject, since=since, limit=limit)
        last = _put_events(found, as_json, 0)
        with suppress(KeyboardInterrupt):
            while follow:
                time.sleep(every_s)
                found = record.find_events(study_uid=uid, name=event, subject=subject, after=last, limit=10_000)
                last = _put_events(found, as_json, last)


def _put_events(found: Sequence[Event], as_json: bool, last: int) -> int:
    """Print them; the highest number of them and `last`."""
    from salsa_node import overview

    lines = [overview.event(one) for one in found]
    if as_json:
        console.put_json_lines(lines)
    else:
        console.put_events(lines)
    return max([last, *(one.id for one in found)])


def purge(
    study: Annotated[list[str], typer.Argument(metavar="STUDY…", help="As for show.")],
    config_file: ConfigFile = None,
    as_json: AsJson = False,
    yes: Yes = False,
    results: Annotated[bool, typer.Option("--results", help="The result files too.")] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="The result files and the record of them too; the audit trail stays.")
    ] = False,
) -> None:
    """Let the images of studies go; what came and what was found stays in the record."""
    data_dir = config.load(config_file).node.data_dir

    def let_go(paths: Sequence[str]) -> None:
        durable.remove(data_dir, paths)

    if reserve.give_back(data_dir):
        console.note(_GIVEN_BACK)
    with _store(config_file) as record:
        wanted = list(dict.fromkeys(record.study(name).study_uid for name in study))  # one may go by several names
        aside = [uid for uid in wanted if forget and any(row.path for row in record.quarantined_of(uid))]
        if aside:  # a purge leaves them: the study would lose the rest and could not be forgotten
            raise IllegalTransition(
                f"images of study {aside[0]} are in quarantine, and a record without them would make them nobody's; "
                "nothing was removed: see salsa-node quarantine, or purge without --forget"
            )
        what = "images, results and record" if forget else "images and results" if results else "images"
        ask(yes, as_json, f"remove the {what} of {len(wanted)} studies from this machine for good?")
        _trail(config_file).ordered("purge", wanted, datetime.now(UTC), what)
        told: list[dict[str, object]] = []
        try:
            for uid in wanted:
                files, size = record.purge(uid, "by hand", datetime.now(UTC), let_go, results=results or forget)
                if forget:
                    from salsa_node import retention

                    record.forget(uid, datetime.now(UTC), let_go)
                    retention.remove_folders(data_dir, uid)
                told.append({"study_uid": uid, "files": files, "image_bytes": size})
        finally:  # what is gone is told, though another study of them may not go
            _put_purged(told, as_json)


def _put_purged(told: Sequence[dict[str, object]], as_json: bool) -> None:
    if as_json:
        console.put_json(told)
    else:
        for line in told:
            console.put(f"study {line['study_uid']}: {line['files']} files removed ({line['image_bytes']} image bytes)")


def _store(config_file: Path | None) -> Store:
    from salsa_node.store import Store, StoreSettings

    loaded = config.load(config_file)
    settings = StoreSettings(loaded.store_url)
    try:
        return Store.open(settings)
    except StoreError:  # on a full disk SQLite cannot even be read where no node runs
        if not reserve.give_back(loaded.node.data_dir):
            raise
        console.note(_GIVEN_BACK)
        return Store.open(settings)


def _trail(config_file: Path | None) -> Trail:
    from salsa_node import audit

    return audit.Trail(config.load(config_file).node.data_dir)


def _standing(word: str) -> Standing:
    from salsa_node.overview import Standing

    wanted = word.lower().replace("-", " ").replace("_", " ")
    for standing in Standing:
        if wanted in (standing.value, standing.name.lower().replace("_", " ")):
            return standing
    raise typer.BadParameter(f"--state: expected {', '.join(one.value for one in Standing)}; found {word!r}")


def _order(word: str) -> str:
    from salsa_node.store import ORDERS

    if word not in ORDERS:
        raise typer.BadParameter(f"--sort: expected {', '.join(ORDERS)}; found {word!r}")
    return word


def _dates(text: str) -> tuple[str, str] | None:
    """First and last day of `text`, one day or two with a "-" between them."""
    if not text:
        return None
    first, _, last = text.partition("-")
    last = last or first
    if not (_is_day(first) and _is_day(last) and first <= last):
        raise typer.BadParameter(f"--date: expected 20260131 or 20260101-20260131, found {text!r}")
    return first, last


def _is_day(text: str) -> bool:
    try:
        return bool(re.fullmatch(r"\d{8}", text, re.ASCII)) and day.fromisoformat(text) is not None
    except ValueError:
        return False


COMMANDS: Final = (studies, show, cancel, retry, stats, logs, purge)
