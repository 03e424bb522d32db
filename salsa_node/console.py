"""What the command line prints: tables for people, one JSON document for machines."""

from __future__ import annotations

import codecs
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from salsa_node import table

_PIPED_WIDTH = 160
_PLAIN = {"─": "-", "–": "-", "…": "...", "×": "x"}
NEXT = {
    "failed": "salsa-node retry STUDY, once the cause is mended",
    "blocked": "look at the objects that salsa-node show STUDY names, then rerun with other settings or --masks",
    "held": "look at the objects that salsa-node show STUDY names, then salsa-node release STUDY",
    "not delivered": "do what the last error says (salsa-node echo NAME tries the way), then salsa-node retry STUDY",
}


def in_its_letters() -> None:
    """Have standard output print "?" or an ASCII likeness for what its encoding lacks, in place of ending there."""
    codecs.register_error("salsa_node.plain", _plain)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="salsa_node.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


def put_json(value: object) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def put_json_lines(values: Sequence[object]) -> None:
    """A JSON document a line on standard output, at once."""
    for value in values:
        sys.stdout.write(json.dumps(value, default=str) + "\n")
    sys.stdout.flush()


def clear() -> None:
    """Empty a terminal's screen; whatever else standard output is gets an empty line."""
    sys.stdout.write("\x1b[2J\x1b[H" if sys.stdout.isatty() else "\n")


def flush() -> None:
    """Let whoever reads standard output have it now."""
    sys.stdout.flush()


def printable(text: str) -> str:
    """`text` without control characters, which a data set from elsewhere could send to the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def put(text: str = "") -> None:
    """A line for people on standard output."""
    sys.stdout.write(printable(text) + "\n")


def note(text: str) -> None:
    """A line about progress on standard error, out of the way of what is piped."""
    sys.stderr.write(text + "\n")


def put_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, object]], title: str = "") -> None:
    """Rows under headings; columns: key -> heading, right-aligned where the heading starts with ">"."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPED_WIDTH
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    for line in (*([title] if title else []), *table.drawn(list(columns.values()), cells, width), ""):
        sys.stdout.write(line + "\n")


def put_studies(rows: Sequence[Mapping[str, object]], none: str = "no study has arrived yet") -> None:
    """The table of `studies`, and what to do about those that need a person; `none` where there are no rows."""
    if not rows:
        put(none)
        return
    columns = {
        "last_at": "last image",
        "study_uid": "study",
        "accession_number": "accession",
        "from": "from",
        "series": ">series",
        "instances": ">images",
        "standing": "standing",
        "proof": "proof",
        "outcome": "outcome",
    }
    put_table(columns, rows)
    for standing in sorted({str(row["standing"]) for row in rows} & set(NEXT)):
        put(f"{standing}: {NEXT[standing]}")


def put_lesions(lesions: Sequence[Mapping[str, object]], title: str = "") -> None:
    """A findings table."""
    columns = {
        "lesion": ">lesion",
        "disease": "RECIST 1.1",
        "volume_ml": ">volume ml",
        "long_axis_mm": ">long axis mm",
        "short_axis_mm": ">short axis mm",
        "mean_hu": ">mean HU",
    }
    if all(lesion.get("image_number") is not None for lesion in lesions):
        columns["image_number"] = ">image"
    else:
        columns["slice"] = ">slice"
    rows = [{**lesion, "slice": int(str(lesion["slice_index"])) + 1} for lesion in lesions]  # people count from 1
    put_table(columns, rows, title)


def put_scores(scores: Sequence[Mapping[str, object]]) -> None:
    """The table of scores: what each series is worth by each criterion, the best first, and why."""
    criteria = list(dict.fromkeys(str(r["criterion"]) for line in scores for r in _rows(line["reasons"])))
    rows = [
        {
            **line,
            "series_number": _called(line),
            **{str(r["criterion"]): f"{float(str(r['points'])):+.4g} {r['found']}" for r in _rows(line["reasons"])},
        }
        for line in scores
    ]
    columns = {"rank": ">rank", "series_number": ">series", "images": ">images", "points": ">points"}
    ranked = [row for row in rows if row["rank"]]
    if ranked:
        put_table(columns | {name: name for name in criteria}, ranked, "Scores")
    else:
        put("Scores: none; every series is ruled out")
    for row in rows:
        put(f"series {row['series_uid'] if row['series_number'] is None else row['series_number']}: {row['reason']}")


def _called(line: Mapping[str, object]) -> object:
    """The number of a series in the table of scores, and which stack of it."""
    part = line.get("part")
    return f"{line['series_number']}, stack {part}" if part else line["series_number"]


def put_detail(study: Mapping[str, object]) -> None:
    """The page of `show`."""
    put(f"study {study['study_uid']}: {study['standing']}")
    if str(study["standing"]) in NEXT:
        put(f"next: {NEXT[str(study['standing'])]}")
    put_table(
        {"series_number": ">number", "modality": "modality", "instances": ">images", "state": "state",
         "reason": "reason", "series_uid": "series"},
        _rows(study["series"]),
        "Series",
    )  # fmt: skip
    looks = _rows(study["looks"])
    if looks:
        put_scores(_rows(looks[-1]["scores"]))
        names = {s["series_uid"]: f"series {s['series_number']}" for s in _rows(study["series"])}
        told = [{**piece, "about": names.get(piece["about"], piece["about"])} for piece in _rows(looks[-1]["evidence"])]
        put_table({"about": "about", "weight": "weight", "found": "found"}, told, "Whole?")
    numbers = {s["series_uid"]: s["series_number"] for s in _rows(study["series"])}
    runs = [{**run, "of_series": _of_series(run, numbers)} for run in _rows(study["runs"])]
    put_table(
        {"id": ">run", "of_series": "series", "pipeline": "pipeline", "state": "state", "attempt": ">attempt",
         "outcome": "outcome", "failure": "failure", "error": "error", "finished_at": "finished"},
        runs,
        "Runs",
    )  # fmt: skip
    for run in runs:
        if run.get("action"):
            put(f"run {run['id']}, next: {run['action']}")
    for run in runs:
        findings = run.get("findings")
        if isinstance(findings, Mapping) and run["state"] in ("PRODUCED", "BLOCKED"):
            put_lesions(
                _rows(findings.get("lesions", [])),
                f"Run {run['id']}{_about(run)}: {findings.get('caveat', '')}",
            )
            for flag in _rows(findings.get("flags", [])):
                put(f"{'BLOCKED' if flag['blocks'] else 'note'}: {flag['text']}")
            if findings.get("reason"):
                put(f"not analysed: {findings['reason']}")
            if isinstance(findings.get("pipeline"), Mapping):
                _put_provenance(findings["pipeline"], str(run["source_digest"]))
    objects = [item for run in runs for item in _rows(run["objects"])]
    if objects:
        put_table(
            {"run_id": ">run", "id": ">object", "kind": "kind", "path": "kept as"}, objects, "Objects, in node.data_dir"
        )
    deliveries = [delivery for run in runs for delivery in _rows(run["deliveries"])]
    put_table(
        {"run_id": ">run", "object_id": ">object", "destination": "destination", "state": "state",
         "attempt": ">attempt", "last_error": "last error", "sent_at": "sent", "proof": "proof"},
        deliveries,
        "Deliveries",
    )  # fmt: skip
    if study["quarantine"]:
        put_quarantine(
            _rows(study["quarantine"]),
            "Quarantine: images that contradict what is stored; a person must say which is right",
        )
    put_table({"at": "at", "name": "event", "detail": "detail"}, _time_line(_rows(study["events"])), "Time line")


def _time_line(events: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """The events; what befell several objects one after the other, each once, as one line that counts them."""
    lines: list[dict[str, object]] = []
    name, details, objects = None, Counter[str](), set[object]()
    for event in events:
        is_of_object = event["subject"] == "delivery"
        if not is_of_object or event["name"] != name or event["subject_id"] in objects:
            lines.append(dict(event))
            details, objects = Counter(), set()
        name = event["name"] if is_of_object else None
        objects.add(event["subject_id"])
        details[str(event["detail"])] += 1
        told = (f"{text} ({count} objects)" if count > 1 else text for text, count in details.items())
        lines[-1]["detail"] = "; ".join(told)
    return lines


def put_quarantine(rows: Sequence[Mapping[str, object]], title: str = "") -> None:
    """A table of images that contradict what is stored."""
    columns = {
        "received_at": "at",
        "study_uid": "study",
        "sop_instance_uid": "instance",
        "reason": "reason",
        "calling_ae": "from",
        "times": ">times",
        "kept": "kept as",
    }
    put_table(columns, rows, title)


def _put_provenance(made_by: Mapping[str, object], source_digest: str) -> None:
    """What made a result: enough to make it again."""
    put(f"made by: {made_by['name']} {made_by['version']} on {made_by['device']}; of images {source_digest[:16]}")
    for title, key, length in (("weights", "weights_sha256", 16), ("parameters", "parameters", 200),
                               ("libraries", "libraries", 64)):  # fmt: skip
        values = made_by[key]
        assert isinstance(values, Mapping)
        if values:
            put(f"  {title}: {', '.join(f'{name} {str(value)[:length]}' for name, value in values.items())}")


class _Checked(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def ok(self) -> bool: ...
    @property
    def warns(self) -> bool: ...
    @property
    def detail(self) -> str: ...


def put_checks(checks: Sequence[_Checked], as_json: bool) -> None:
    """What was looked at, each with its verdict and what to do."""
    if as_json:
        put_json([{"check": c.name, "ok": c.ok, "warns": c.warns, "detail": c.detail} for c in checks])
        return
    for check in checks:
        verdict = "FAIL" if not check.ok else "warn" if check.warns else "ok  "
        put(f"{verdict}  {check.name}: {check.detail}")


def put_events(events: Sequence[Mapping[str, object]]) -> None:
    """Lines of `logs`: one for each event, as people read a log."""
    for event in events:
        about = event["study_uid"] or ""
        put(f"{event['at']}  {event['name']:22} {event['subject']} {event['subject_id']}  {event['detail']}"
            f"{f'  study={about}' if about and about != event['subject_id'] else ''}")  # fmt: skip
    sys.stdout.flush()


def put_statistics(figures: Mapping[str, object]) -> None:
    """The page of `stats`."""
    for title, key in (("Runs", "runs"), ("Results", "outcomes"), ("Deliveries", "deliveries")):
        counts = figures[key]
        assert isinstance(counts, Mapping)
        put(f"{title}: {', '.join(f'{name} {count}' for name, count in counts.items()) or 'none'}")
    put(f"Kept: {figures['studies']} studies, {figures['images']} images ({figures['image_gib']} GiB), "
        f"{figures['quarantined']} in quarantine")  # fmt: skip
    names = (("a run", "run_s"), ("last image to result", "last_image_to_result_s"))
    rows = [{"what": title, **spread} for title, key in names if isinstance(spread := figures[key], Mapping)]
    put_table({"what": "seconds", "count": ">count", "p50": ">median", "p95": ">95 %", "max": ">longest"}, rows)
    if figures["oldest_queued_at"]:
        put(f"waiting since {figures['oldest_queued_at']}")


def _of_series(run: Mapping[str, object], numbers: Mapping[object, object]) -> str:
    """Which series a run is about, by its number where it has one; "" where it is about the study."""
    number = numbers.get(run["series_uid"])
    return str(run["series_uid"] or "" if number is None else number)


def _about(run: Mapping[str, object]) -> str:
    return f", series {run['of_series']}" if run["of_series"] else ""


def _rows(value: object) -> Sequence[Mapping[str, object]]:
    assert isinstance(value, list | tuple)
    return value


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return printable(str(value))
