"""Many scans, one after the other: a label map beside each, its lesions as JSON and CSV; what is done stays done.

SALSA's own interface (radiomicsgroup/liver-SALSA), mended: one bad case is told and the rest go on, what a batch left
unfinished goes on where it stopped, and a result says what made it. The JSON beside a label map is written last: a
case without it was not finished.
"""

from __future__ import annotations

import csv
import glob
import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from salsa_node import cases, durable, film, guards, nifti, upright
from salsa_node.analysis import Analysis, Outcome, summary
from salsa_node.cases import DEFAULT_RULES, INTERMEDIATES, Case, Scan
from salsa_node.criteria import Criteria
from salsa_node.errors import ConfigError, SalsaNodeError, SeriesRejected
from salsa_node.findings import Disease, Findings, measure
from salsa_node.limits import Limits
from salsa_node.log import unforeseen
from salsa_node.models import sha256_of
from salsa_node.pipelines import Masks, Observer, Pipeline, once, unobserved
from salsa_node.series_rules import SeriesRules
from salsa_node.uids import digest
from salsa_node.volume import CtVolume, Grid, LabelVolume

OVERLAYS: Final = ("gif", "png")
_STALE_S: Final = 86_400.0
_WRITER: Final = "salsa_node batch, "


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is written for each case.

    recist: 1 measurable and 2 non-measurable; else 1 for every lesion. instances: one label per lesion instead.
    keep_intermediates: SALSA's folder of what lies between. overlay: "gif", "png" or "".
    again: also where a result is there already.
    """

    recist: bool = True
    instances: bool = False
    keep_intermediates: bool = False
    overlay: str = ""
    again: bool = False

    def __post_init__(self) -> None:
        if self.overlay not in ("", *OVERLAYS):
            raise ConfigError(f"--overlay: expected {' or '.join(OVERLAYS)}, found {self.overlay!r}")

    @property
    def labels(self) -> dict[str, str]:
        """What the values of the label map mean."""
        if self.instances:
            return {"n": "lesion n"}
        return {"1": "measurable", "2": "non-measurable"} if self.recist else {"1": "lesion"}


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one case.

    state: "done", "there" (finished before), "failed" or "left out". told: in words.
    record: the case's JSON; {} where there is no result.
    """

    case: Case
    place: Path
    state: str
    told: str
    record: Mapping[str, object]

    @property
    def lesions(self) -> Sequence[Mapping[str, object]]:
        """The rows of the findings table."""
        rows = self.record.get("lesions", [])
        return rows if isinstance(rows, list) else []

    def as_json(self) -> dict[str, object]:
        """The same for machines."""
        without = not self.record
        return {
            "scan": str(self.case.path),
            "state": self.state,
            "told": self.told,
            "result": None if without else str(self.place),
            "record": None if without else dict(self.record),
        }


def run(
    placed: Iterable[tuple[Case, Path]],
    pipeline: Pipeline,
    criteria: Criteria,
    limits: Limits,
    wanted: Wanted,
    rules: SeriesRules = DEFAULT_RULES.series,
) -> Iterator[Result]:
    """Analyse the cases of `cases.placed` one after the other; each result comes when it is written. Raises nothing.

    rules: what is done where the slices of a DICOM series make no regular grid.
    """
    for case, place in placed:
        if case.left_out:
            yield Result(case, place, "left out", case.refusal, {})
            continue
        try:
            yield _one(case, place, pipeline, criteria, limits, wanted, rules)
        except SalsaNodeError as error:
            yield _failed(case, place, str(error))
        except OSError as error:
            yield _failed(case, place, _cannot(error, case, place))
        except Exception as error:  # noqa: BLE001 - one bad case is told and the rest go on
            yield _failed(case, place, unforeseen(error))


def tables_folder(output: Path | None, table: Path | None) -> Path:
    """Where the tables can be written: `output`, else beside the table of paths, else here; made when absent.

    Raises ConfigError where none of these can be written.
    """
    beside = [table.parent] if table is not None and table.is_file() else []
    folders = [output] if output is not None else [*beside, Path()]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    told = " and ".join(str(folder.absolute()) for folder in folders)
    raise ConfigError(f"{told} cannot be written, where the tables go; give --output a folder that this user may write")


def write_tables(results: Sequence[Result], folder: Path) -> tuple[Path, ...]:
    """`salsa_lesions.csv` (a row for each lesion), `salsa_scans.csv` (a row for each scan), `salsa_batch.json` (all).

    Raises ConfigError where `folder` cannot be written.
    """
    lesions = [{"scan": str(result.case.path), **row} for result in results for row in result.lesions]
    scans = [_scan_row(result) for result in results]
    paths = folder / "salsa_lesions.csv", folder / "salsa_scans.csv", folder / "salsa_batch.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, (lesions, scans), strict=False):
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["scan"])
                writer.writeheader()
                writer.writerows(rows)
        paths[2].write_text(json.dumps([result.as_json() for result in results], indent=2) + "\n", encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"the tables cannot be written to {folder} ({exc.strerror}); see --output") from exc
    return paths


def marked(scan: Scan, pipeline: Pipeline, observer: Observer = unobserved) -> Masks:
    """The pipeline's masks on the scan's own grid, where need be by way of an upright one. Raises as `segment` does."""
    return upright.segment(pipeline, scan.ct, observer) if scan.series else pipeline.segment(scan.ct, observer)


def label_map(findings: Findings, wanted: Wanted, scan: Scan) -> LabelVolume:
    """The lesions as `wanted` asks for them: uint8 (uint16 for more than 255 lesions one by one), on the CT's grid.

    Of tilted or unevenly spaced slices: on the upright grid that `salsa-node export` writes their voxels on.
    """
    numbered = findings.lesion_labels.labels
    values = np.zeros(len(findings.lesions) + 1, dtype=np.uint8 if len(findings.lesions) < 256 else np.uint16)
    for lesion in findings.lesions:
        second = wanted.recist and lesion.disease is Disease.NON_MEASURABLE
        values[lesion.number] = lesion.number if wanted.instances else 2 if second else 1
    if not wanted.instances:
        values = values.astype(np.uint8)
    labels: npt.NDArray[np.unsignedinteger] = values[numbered]
    made = LabelVolume(labels, findings.lesion_labels.grid)
    return upright.upright_labels(made) if scan.series else made


def _one(
    case: Case,
    place: Path,
    pipeline: Pipeline,
    criteria: Criteria,
    limits: Limits,
    wanted: Wanted,
    rules: SeriesRules,
) -> Result:
    if case.refusal:
        raise SeriesRejected(case.refusal)
    key = _key(case, pipeline, criteria, limits, wanted)
    record_path = place.with_name(f"{_stem(place)}.json")
    if not wanted.again:
        there = _record(record_path)
        if there.get("key") == key and place.is_file() and there.get("labels_sha256") == sha256_of(place):
            return Result(case, place, "there", f"{_counted(there)} (finished before)", there)
        if place.exists() and not _is_ours(place, there):
            raise ConfigError(f"{place.name} is there and is not what a batch wrote; move it away, or add --again")
    place.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(place) as made:  # a folder that cannot be written is found before the work
        scan = cases.read(case, rules)
        ct = scan.ct
        like = case.path if case.is_nifti else None
        kept = made / _stem(place)
        masks = marked(
            scan,
            pipeline,
            _Keeper(kept, ct.grid, like, pipeline.provenance.mark) if wanted.keep_intermediates else unobserved,
        )
        findings = judged(ct, measure(ct, masks, criteria), limits)
        nifti.write_labels(label_map(findings, wanted, scan), made / place.name, description(findings, wanted), like)
        overlay = {"gif": film.gif, "png": film.png}.get(wanted.overlay)
        if overlay is not None:
            durable.write(made / f"{_stem(place)}.{wanted.overlay}", [overlay(ct, findings)])
        _clear(place)
        for file in [path for path in made.rglob("*") if path.is_file()]:
            to = place.parent / file.relative_to(made)
            to.parent.mkdir(parents=True, exist_ok=True)
            file.replace(to)
    outcome = Outcome.LESIONS if findings.lesions else Outcome.NO_CANDIDATE
    told = summary(Analysis(outcome, (), findings, ct, "", findings.run_digest))
    record = {"scan": case.path.name, "labels": wanted.labels, **told, "labels_sha256": sha256_of(place), "key": key}
    durable.write(record_path, [json.dumps(record, indent=2).encode() + b"\n"])
    return Result(case, place, "done", _counted(record), record)


class _Keeper:
    """Writes each intermediate volume where SALSA keeps it, `<stem>_SALSA/<name>.nii.gz`, where it really lies.

    grid: the scan's; labels on it are stored as `like`, the scan's file, is.
    mark: of demo models, for the headers of label maps.
    """

    def __init__(self, folder: Path, grid: Grid, like: Path | None, mark: str) -> None:
        self._folder, self._grid, self._like, self._mark = folder, grid, like, mark

    def __call__(self, name: str, volume: CtVolume | LabelVolume) -> None:
        file = self._folder / f"{name}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(volume, CtVolume):
            nifti.write_ct(volume, file)
        else:
            like = self._like if volume.grid.matches(self._grid) else None
            nifti.write_labels(volume, file, f"{_WRITER}{name}{self._mark}", like)


@contextmanager
def _unfinished(place: Path) -> Iterator[Path]:
    """A folder beside `place` for what is not whole yet; gone afterwards, and so are those of killed batches."""
    for left in place.parent.glob(f".*.{glob.escape(_stem(place))}"):
        if left.is_dir() and time.time() - left.stat().st_mtime > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)
    folder = place.with_name(f".{uuid.uuid4().hex}.{_stem(place)}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clear(place: Path) -> None:
    """Remove the record, the pictures and the intermediate volumes that an earlier run left beside that label map."""
    kept = place.with_name(_stem(place))
    for ending in ("json", *OVERLAYS):
        place.with_name(f"{_stem(place)}.{ending}").unlink(missing_ok=True)
    if not kept.is_dir():
        return
    for name in INTERMEDIATES:
        (kept / f"{name}.nii.gz").unlink(missing_ok=True)
    for folder in (kept / "cropped", kept):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _stem(place: Path) -> str:
    return place.name.removesuffix(".nii.gz")


def _key(case: Case, pipeline: Pipeline, criteria: Criteria, limits: Limits, wanted: Wanted) -> str:
    """Changes when anything changes that decides what is written."""
    images = sorted(sha256_of(file) for file in case.files)
    asked = replace(wanted, again=False)
    return digest(*images, pipeline.provenance.digest, repr(criteria), repr(limits), json.dumps(asdict(asked)))


def _record(path: Path) -> dict[str, object]:
    """The JSON of an earlier run; {} where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_ours(place: Path, record: Mapping[str, object]) -> bool:
    """Whether a batch wrote that label map, and nobody changed it since."""
    if record:
        return record.get("labels_sha256") == sha256_of(place)
    try:
        return nifti.read_description(place).startswith(_WRITER)  # a batch that was cut off before the JSON
    except SeriesRejected:
        return False


def judged(ct: CtVolume, findings: Findings, limits: Limits) -> Findings:
    """The findings with what the guards say of them before their own flags."""
    return replace(findings, flags=once(*guards.flags(ct, findings, limits), *findings.flags))


def description(findings: Findings, wanted: Wanted, writer: str = _WRITER) -> str:
    """What the header of a `label_map` says: who wrote it, what the labels mean, and the mark of demo models."""
    meaning = "n lesion n" if wanted.instances else "1 measurable 2 not" if wanted.recist else "1 lesion"
    return f"{writer}{findings.provenance.pipeline[:24]}: {meaning}{findings.provenance.mark}"


def _counted(record: Mapping[str, object]) -> str:
    lesions = record.get("lesions")
    count = len(lesions) if isinstance(lesions, list) else 0
    if not count:
        return "the algorithm found no candidate lesion"
    return f"{count} candidate lesion{'' if count == 1 else 's'}"


def _scan_row(result: Result) -> dict[str, object]:
    record, lesions = result.record, result.lesions
    pipeline = record.get("pipeline")
    flags = record.get("flags")
    return {
        "scan": str(result.case.path),
        "state": result.state,
        "told": result.told,
        "result": str(result.place) if record else "",
        "lesions": len(lesions) if record else "",
        "measurable": sum(row["disease"] == Disease.MEASURABLE.value for row in lesions) if record else "",
        "lesions_ml": round(sum(float(str(row["volume_ml"])) for row in lesions), 4) if record else "",
        "liver_ml": record.get("liver_ml", ""),
        "flags": " ".join(str(flag["name"]) for flag in flags) if isinstance(flags, list) else "",
        "pipeline": pipeline["name"] if isinstance(pipeline, dict) else "",
        "notice": pipeline["notice"] if isinstance(pipeline, dict) else "",
    }


def _cannot(error: OSError, case: Case, place: Path) -> str:
    if error.filename is not None and Path(error.filename) in case.files:
        return f"the scan cannot be read ({error.strerror})"
    where = f"; {place.parent} must be a folder that this user may write: see --output" if error.errno else ""
    return f"cannot be read or written ({error.strerror}){where}"


def _failed(case: Case, place: Path, told: str) -> Result:
    return Result(case, place, "failed", told, {})
