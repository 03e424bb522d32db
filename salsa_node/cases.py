"""Which scans a researcher means: files, folders, patterns and tables become cases, each with a place for its result.

A case is one CT: a NIfTI file, or the series of a DICOM study that can be analysed. What cannot be one is a case too,
with the reason, so that a batch tells of it and goes on. What an earlier batch wrote is left out of folders and
patterns, and refused where it is named outright.
"""

from __future__ import annotations

import csv
import errno
import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

from salsa_node import candidate, nifti, selection, series, stacks
from salsa_node.errors import ConfigError, SeriesRejected
from salsa_node.selection_rules import SelectionRules
from salsa_node.series_rules import SeriesRules
from salsa_node.volume import CtVolume

MARK: Final = "_SALSA"  #: ends the stem of everything that a batch writes
COLUMN: Final = "PATHS"
INTERMEDIATES: Final = (  #: what SALSA keeps of a case in the folder `<stem>_SALSA`, by its names
    "liver", "liver_resampled", "liver_postprocessed", "scan_resampled", "cropped/scan_0000", "cropped/mask_0000",
    "mask_resampled",
)  # fmt: skip
_NIFTI: Final = (".nii.gz", ".nii")
_LABEL_MAP: Final = re.compile(  # how people call what they drew
    r"(^|[-_. ])(gt|ground[-_ ]?truth|truth|seg|segmentation|masks?|labels?|labelmap)$", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Rules:
    """By what a series of a DICOM study is chosen, and what is done where its slices make no regular grid."""

    selection: SelectionRules = field(default_factory=SelectionRules)
    series: SeriesRules = field(default_factory=SeriesRules)


DEFAULT_RULES: Final = Rules()


@dataclass(frozen=True, slots=True)
class Case:
    """One scan to analyse.

    path: as people call it: the NIfTI file, or the folder where the series lies.
    files: its images; empty with a refusal.
    stem: the name of its result, without `MARK` and suffix. beside: the folder where the scan lies.
    refusal: why it cannot be analysed; "" where it can.
    left_out: a label map, by its name or its numbers, that was found in a folder or by a pattern; nobody asked for it.
    """

    path: Path
    files: tuple[Path, ...]
    stem: str
    beside: Path
    refusal: str = ""
    left_out: bool = False

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

    Columns may be parted by commas, semicolons or tabs.
    Raises ConfigError where the file cannot be read, has no such column, or names no scan.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            parted_by = next((mark for mark in ",;\t" if COLUMN in _columns(first, mark)), ",")
            rows = csv.DictReader(file, skipinitialspace=True, delimiter=parted_by)
            columns = [name.strip() for name in rows.fieldnames or ()]
            if COLUMN not in columns:
                raise ConfigError(
                    f"{table}: expected a column {COLUMN} in its first line, found {', '.join(columns) or 'nothing'}"
                )
            rows.fieldnames = columns
            wanted = [(row[COLUMN] or "").strip() for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"{table}: cannot be read as a CSV file ({type(exc).__name__})") from exc
    if not any(wanted):
        raise ConfigError(f"{table}: no scan is listed; expected a path in the column {COLUMN} of each row")
    found = []
    for name in filter(None, wanted):
        beside = table.parent / name
        found.append(str(beside) if not os.path.exists(name) and os.path.exists(beside) else name)  # noqa: PTH110
    return found


def _columns(line: str, parted_by: str) -> list[str]:
    return [name.strip() for row in csv.reader([line], delimiter=parted_by, skipinitialspace=True) for name in row]


def find(wanted: Iterable[str], rules: Rules = DEFAULT_RULES) -> list[Case]:
    """The cases that paths, folders and patterns name, each once, in their order.

    A path that cannot be looked at is a case with the reason. In folders, names that begin with a dot are left out.
    """
    cases: dict[tuple[Path, str], Case] = {}
    for name in wanted:
        for case in _named(name, rules):
            cases.setdefault((_real(case.path) / case.stem, case.refusal), case)
    return list(cases.values())


def placed(cases: Sequence[Case], output: Path | None) -> list[tuple[Case, Path]]:
    """Each case with the path of its label map: `<stem>_SALSA.nii.gz` beside the scan, or in `output`.

    In `output` scans of one name are told apart by their folder's: `<folder>_<stem>_SALSA.nii.gz`; `x.nii` beside
    `x.nii.gz` keeps its suffix: `x.nii_SALSA.nii.gz`. Where two would still go to one place, all but the first are
    refused.
    """
    if output is not None:
        stems = [case.stem for case in cases]
        cases = [
            replace(case, stem=f"{case.beside.absolute().name}_{case.stem}") if stems.count(case.stem) > 1 else case
            for case in cases
        ]
    packed = {(_real(case.beside), case.stem) for case in cases if case.path.name.lower().endswith(_NIFTI[0])}
    taken: dict[Path, Case] = {}
    result = []
    for case in cases:
        if case.path.name.lower().endswith(_NIFTI[1]) and (_real(case.beside), case.stem) in packed:
            case = replace(case, stem=case.stem + case.path.name[-len(_NIFTI[1]) :])  # noqa: PLW2901
        place = (output or case.beside) / f"{case.stem}{MARK}.nii.gz"
        if not case.refusal:
            first = taken.setdefault(_real(place), case)
            if first is not case:
                reason = f"its result would take the place of that of {first.path}; name it with another --output"
                case = replace(case, refusal=reason)  # noqa: PLW2901
        result.append((case, place))
    return result


def read(case: Case, rules: SeriesRules = DEFAULT_RULES.series) -> Scan:
    """The voxels of a case. Raises SeriesRejected with the reason where they are no CT volume."""
    if case.refusal:
        raise SeriesRejected(case.refusal)
    if case.is_nifti:
        return Scan(nifti.read_ct(case.path), case, None)
    found = series.inspect(case.files, rules)
    return Scan(series.read_volume(found), case, found)


def open_scan(path: Path | str, rules: Rules = DEFAULT_RULES) -> Scan:
    """The one CT at `path`, a NIfTI file or a DICOM folder. Raises SeriesRejected where there is none, or several."""
    one = replace(rules, selection=replace(rules.selection, best=1))
    cases = [case for case in find([str(path)], one) if not case.left_out]
    if len(cases) != 1:
        raise SeriesRejected(f"expected one scan at that path, found {len(cases)}")
    return read(cases[0], rules.series)


def _named(name: str, rules: Rules) -> list[Case]:
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~ with the name of nobody
        return [_refused(Path(name), f"there is no home folder for {Path(name).parts[0]}")]
    try:
        if path.exists() or not glob.has_magic(name):
            return _cases(path, rules)
    except OSError as error:
        return [_unreachable(path, error)]
    return _matching(path, rules)


def _matching(pattern: Path, rules: Rules) -> list[Case]:
    # Path.glob takes no absolute pattern.
    paths = [Path(found) for found in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207
    if not paths:
        return [_refused(pattern, "no such file or folder")]
    plain = next(n for n, part in enumerate(pattern.parts) if glob.has_magic(part))
    root = Path(*pattern.parts[:plain])
    cases: list[Case] = []
    for path in paths:
        try:
            found = [] if _is_result(path, root) else _cases(path, rules, root)
        except OSError as error:
            found = [_unreachable(path, error)]
        cases += [case for case in found if not (case.refusal and case.path == path and _lies_beside_result(path))]
    return cases or [_refused(pattern, "names nothing but what an earlier batch wrote")]


def _cases(path: Path, rules: Rules, root: Path | None = None) -> list[Case]:
    """What a path that exists, or is meant to, stands for; `root` as `_is_result` has it, by default the path itself.

    Raises OSError where it cannot be looked at.
    """
    if _is_nifti(path) and path.is_file():
        if _is_result(path, path.parent):
            return [_refused(path, "an earlier batch wrote this label map; name the scan itself")]
        return [_nifti_case(path) if root is None else _found_case(path)]
    if path.is_dir():
        files, locked = _walked(path, root or path)
        volumes = [file for file in files if _is_nifti(file)]
        images = [file for file in files if not _is_nifti(file)]
        unread = [file for file in images if not os.access(file, os.R_OK)]
        if unread:
            locked.append(
                _refused(path, f"this user may not read {len(unread)} of its files, such as {unread[0].name}")
            )
        found = [_found_case(file) for file in volumes] + _dicom_cases(path, images, rules) + locked
        return found or [_refused(path, "neither a NIfTI file nor a DICOM image lies in this folder")]
    if path.exists():
        return [_refused(path, "expected a .nii or .nii.gz file or a folder")]
    return [_refused(path, "no such file or folder")]


def _walked(folder: Path, root: Path) -> tuple[list[Path], list[Case]]:
    """The files below a folder, without results, and the folders below it that cannot be looked into."""
    errors: list[OSError] = []
    files = []
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    kept = sorted(file for file in files if not _is_result(file, root) and _is_file(file))
    return kept, [_unreachable(Path(error.filename), error) for error in errors]


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - False, not an error, where it cannot be looked at


def _dicom_cases(folder: Path, files: Sequence[Path], rules: Rules) -> list[Case]:
    studies: dict[str, list[candidate.Candidate]] = {}
    for paths in candidate.by_series(files).values():
        found = candidate.read_candidate(paths)
        studies.setdefault(found.study_uid, []).append(found)
    cases = []
    for study_uid, candidates in sorted(studies.items()):
        choice = selection.choose_volume(
            candidates,
            partial(series.inspect, rules=rules.series),
            rules.selection,
            partial(stacks.apart, rules=rules.series),
        )
        if not choice.volumes:
            reasons = "; ".join(dict.fromkeys(verdict.reason for verdict in choice.verdicts))
            which = f"the study {study_uid}" if len(studies) > 1 else "this study"
            cases.append(_refused(folder, f"no series of {which} can be analysed: {reasons}"))
        for volume in choice.volumes:
            place = volume.candidate.paths[0].parent
            whole = place.absolute()
            cases.append(Case(place, volume.candidate.paths, whole.name or "scan", whole.parent))
    return _told_apart(cases)


def _told_apart(cases: list[Case]) -> list[Case]:
    """Series that lie in one folder are numbered."""
    stems = [(case.stem, case.beside) for case in cases]
    seen: dict[tuple[str, Path], int] = {}
    result = []
    for case, stem in zip(cases, stems, strict=True):
        seen[stem] = seen.get(stem, 0) + 1
        result.append(replace(case, stem=f"{case.stem}-{seen[stem]}") if stems.count(stem) > 1 else case)
    return result


def _nifti_case(path: Path) -> Case:
    return Case(path, (path,), _stem(path), path.parent)


def _found_case(path: Path) -> Case:
    """A NIfTI file that a folder or a pattern led to: a scan, or a label map that lies beside scans."""
    if _LABEL_MAP.search(_without_suffix(path.name)) or nifti.holds_bytes(path):
        return replace(_refused(path, "a label map, by its name or its numbers: left out"), left_out=True)
    return _nifti_case(path)


def _real(path: Path) -> Path:
    """The one way to call a path; a link stays one, the folders above it do not."""
    whole = path.absolute()
    if whole.name == "..":
        return Path(os.path.realpath(whole))
    return Path(os.path.realpath(whole.parent)) / whole.name


def _refused(path: Path, reason: str) -> Case:
    return Case(path, (), _stem(path), path.parent, reason)


def _unreachable(path: Path, error: OSError) -> Case:
    if error.errno in (errno.EACCES, errno.EPERM):
        return _refused(path, "this user may not look there: ask for the right to read the folders that lead to it")
    return _refused(path, f"cannot be looked at ({error.strerror})")


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(_NIFTI)


def _stem(path: Path) -> str:
    """The name without .nii or .nii.gz: dots before that belong to the name."""
    return _without_suffix(path.absolute().name)


def _without_suffix(name: str) -> str:
    suffix = next((end for end in _NIFTI if name.lower().endswith(end)), "")
    return name[: len(name) - len(suffix)]


def _is_result(path: Path, root: Path) -> bool:
    """Whether an earlier batch wrote that NIfTI file, as what lies beside it tells; looks no higher than `root`.

    That is `x_SALSA.nii.gz` beside `x.nii`, `x.nii.gz`, the folder `x` or its own `x_SALSA.json`, and in the folder
    `x_SALSA` beside one of these what SALSA keeps there.
    """
    if not _is_nifti(path):
        return False
    stem = _without_suffix(path.name)
    if stem.endswith(MARK) and _has_source(path.parent, stem):
        return True
    inner = [parent for parent in path.parents if parent != root and parent.is_relative_to(root)]
    return any(
        parent.name.endswith(MARK)
        and _without_suffix(path.relative_to(parent).as_posix()) in INTERMEDIATES
        and _has_source(parent.parent, parent.name)
        for parent in inner
    )


def _lies_beside_result(path: Path) -> bool:
    """Whether the name is that of SALSA's folder of a scan, or of the record or picture of its result."""
    stem = path.stem if path.suffix in (".json", ".gif", ".png") else path.name
    return stem.endswith(MARK) and _has_source(path.parent, stem)


def _has_source(folder: Path, stem: str) -> bool:
    """Whether the scan of the result `x_SALSA` lies in that folder, or the batch's own record of it."""
    scan = stem.removesuffix(MARK)
    ends = (*_NIFTI, *(end.upper() for end in _NIFTI), "") if scan else ()
    beside = [f"{stem}.json", *(f"{scan}{end}" for end in ends)]
    return any(os.path.exists(folder / name) for name in beside)  # noqa: PTH110 - False where it may not look
