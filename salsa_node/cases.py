"""Which scans a researcher means: files, folders, patterns and tables become cases, each with a place for its result.

A case is one CT: a NIfTI file, or the series of a DICOM study that can be analysed. What cannot be one is a case too,
with the reason, so that a batch tells of it and goes on. Results of an earlier batch are never taken for scans.
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from salsa_node import candidate, nifti, selection, series
from salsa_node.errors import ConfigError, SeriesRejected
from salsa_node.volume import CtVolume

MARK: Final = "_SALSA"  #: ends the stem of everything that a batch writes
COLUMN: Final = "PATHS"
_NIFTI: Final = (".nii", ".nii.gz")


@dataclass(frozen=True, slots=True)
class Case:
    """One scan to analyse.

    path: as people call it: the NIfTI file, or the folder where the series lies.
    files: its images; empty with a refusal.
    stem: the name of its result, without `MARK` and suffix. beside: the folder where the scan lies.
    refusal: why it cannot be analysed; "" where it can.
    """

    path: Path
    files: tuple[Path, ...]
    stem: str
    beside: Path
    refusal: str = ""

    @property
    def is_nifti(self) -> bool:
        """Whether the scan is a NIfTI file."""
        return _is_nifti(self.path)


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """A CT in memory and where it came from.

    series: the DICOM series; None where it came from a NIfTI file.
    """

    ct: CtVolume
    case: Case
    series: series.Series | None


def listed(table: Path) -> list[str]:
    """The paths in the column PATHS of a CSV file; a relative one that does not exist is tried beside the file.

    Raises ConfigError where the file cannot be read or has no such column.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            columns = [name.strip() for name in rows.fieldnames or ()]
            if COLUMN not in columns:
                raise ConfigError(f"{table}: expected a column {COLUMN}, found {', '.join(columns) or 'nothing'}")
            rows.fieldnames = columns
            wanted = [(row[COLUMN] or "").strip() for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"{table}: cannot be read as a CSV file ({type(exc).__name__})") from exc
    found = []
    for name in filter(None, wanted):
        beside = table.parent / name
        found.append(str(beside) if not Path(name).exists() and beside.exists() else name)
    return found


def find(wanted: Iterable[str]) -> list[Case]:
    """The cases that paths, folders and patterns name, each once, in their order."""
    cases: dict[Path, Case] = {}
    for name in wanted:
        for path in _paths(name):
            for case in _cases(path):
                cases.setdefault(case.path.absolute() / case.stem, case)
    return list(cases.values())


def placed(cases: Sequence[Case], output: Path | None) -> list[tuple[Case, Path]]:
    """Each case with the path of its label map: `<stem>_SALSA.nii.gz` beside the scan, or in `output`.

    In `output` scans of one name are told apart by their folder's: `<folder>_<stem>_SALSA.nii.gz`. Where two would
    still go to one place, all but the first are refused.
    """
    if output is not None:
        stems = [case.stem for case in cases]
        cases = [
            replace(case, stem=f"{case.beside.absolute().name}_{case.stem}") if stems.count(case.stem) > 1 else case
            for case in cases
        ]
    taken: dict[Path, Case] = {}
    result = []
    for case in cases:
        place = (output or case.beside) / f"{case.stem}{MARK}.nii.gz"
        first = taken.setdefault(place.absolute(), case)
        if first is not case and not case.refusal:
            case = replace(case, refusal=f"its result would take the place of that of {first.path}")  # noqa: PLW2901
        result.append((case, place))
    return result


def read(case: Case) -> Scan:
    """The voxels of a case. Raises SeriesRejected with the reason where they are no CT volume."""
    if case.refusal:
        raise SeriesRejected(case.refusal)
    if case.is_nifti:
        return Scan(nifti.read_ct(case.path), case, None)
    found = series.inspect(case.files)
    return Scan(series.read_volume(found), case, found)


def open_scan(path: Path | str) -> Scan:
    """The one CT at `path`, a NIfTI file or a DICOM folder. Raises SeriesRejected where there is none, or several."""
    cases = find([str(path)])
    if len(cases) != 1:
        raise SeriesRejected(f"expected one scan at that path, found {len(cases)}")
    return read(cases[0])


def _paths(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.exists() or not glob.has_magic(name):
        return [path]
    # Path.glob takes no absolute pattern.
    return [Path(found) for found in sorted(glob.glob(str(path), recursive=True))] or [path]  # noqa: PTH207


def _cases(path: Path) -> list[Case]:
    if _is_nifti(path) and path.is_file():
        return [] if _is_result(path) else [_nifti_case(path)]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_result(file))
        volumes = [file for file in files if _is_nifti(file)]
        images = [file for file in files if not _is_nifti(file)]
        found = [_nifti_case(file) for file in volumes] + _dicom_cases(path, images)
        return found or [_refused(path, "neither a NIfTI file nor a DICOM image lies in this folder")]
    if path.exists():
        return [_refused(path, "expected a .nii or .nii.gz file or a folder")]
    return [_refused(path, "no such file or folder")]


def _dicom_cases(folder: Path, files: Sequence[Path]) -> list[Case]:
    studies: dict[str, list[candidate.Candidate]] = {}
    for paths in candidate.by_series(files).values():
        found = candidate.read_candidate(paths)
        studies.setdefault(found.study_uid, []).append(found)
    cases = []
    for _, candidates in sorted(studies.items()):
        choice = selection.choose_volume(candidates)
        if choice.chosen is None:
            reasons = "; ".join(dict.fromkeys(verdict.reason for verdict in choice.verdicts))
            cases.append(_refused(folder, f"no series of this study can be analysed: {reasons}"))
        else:
            place = choice.chosen.paths[0].parent
            whole = place.absolute()
            cases.append(Case(place, choice.chosen.paths, whole.name or "scan", whole.parent))
    return _told_apart(cases)


def _told_apart(cases: list[Case]) -> list[Case]:
    """Studies whose series lie in one folder are numbered."""
    stems = [(case.stem, case.beside) for case in cases]
    seen: dict[tuple[str, Path], int] = {}
    result = []
    for case, stem in zip(cases, stems, strict=True):
        seen[stem] = seen.get(stem, 0) + 1
        result.append(replace(case, stem=f"{case.stem}-{seen[stem]}") if stems.count(stem) > 1 else case)
    return result


def _nifti_case(path: Path) -> Case:
    return Case(path, (path,), _stem(path), path.parent)


def _refused(path: Path, reason: str) -> Case:
    return Case(path, (), _stem(path), path.parent, reason)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(_NIFTI)


def _stem(path: Path) -> str:
    """The name without .nii or .nii.gz: dots before that belong to the name."""
    name = path.absolute().name
    suffix = next((end for end in (".nii.gz", ".nii") if name.lower().endswith(end)), "")
    return name[: len(name) - len(suffix)]


def _is_result(path: Path) -> bool:
    """Whether an earlier batch wrote it: `x_SALSA.nii.gz`, what lies beside it, or in the folder `x_SALSA`."""
    return _stem(path).endswith(MARK) or any(parent.name.endswith(MARK) for parent in path.parents)
