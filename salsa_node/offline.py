"""The same analysis on files: a DICOM folder or a NIfTI in, a folder of results out, no network and no store.

Nothing remembers an earlier run here, so results are dated as their images: the same files give the same bytes.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from salsa_node import candidate, dicom_ct, nifti, picture, pipelines, selection, stacks
from salsa_node.analysis import Analysis, Lineage, Outcome, Terms, analyse, check, refuse, summary
from salsa_node.config import Config
from salsa_node.criteria import Criteria, Rule
from salsa_node.dicom_result import AS_ITS_IMAGES, Kind
from salsa_node.errors import ConfigError, GuardFailed, PipelineError, SalsaNodeError, SeriesRejected
from salsa_node.findings import Findings, table
from salsa_node.log import unforeseen
from salsa_node.pipelines import Pipeline, PipelineSettings
from salsa_node.series import inspect
from salsa_node.uids import derive
from salsa_node.upright import upright_labels
from salsa_node.volume import LabelVolume

_NAMES = ("labels.nii.gz", "findings.csv", "findings.json", "overlay.png")
_OBJECT = re.compile(rf"({'|'.join(kind.value.lower() for kind in Kind)})(_\d+)?\.dcm")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for on the command line.

    rule: None for the configured one. masks: None for the pipeline's own eyes.
    options: the pipeline's own settings.
    """

    output: Path
    pipeline: str
    options: Mapping[str, object]
    masks: Path | None = None
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """The images of one study: those of a series to analyse, or, with a refusal, all of them.

    folder: where its results go. of_several: other series of the study are analysed too.
    stack: which one of its series, as in `Terms`.
    """

    paths: tuple[Path, ...]
    folder: Path
    refusal: str = ""
    of_several: bool = False
    stack: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one path, or of one study below it.

    analysed: false where a verdict or an error stood in the way; `told` says which.
    folder: where the results lie, if any were `written`.
    blocked: why the guards would keep this result from leaving; "" where they would not.
    flags: what a reader should know, in words.
    """

    path: Path
    folder: Path
    analysed: bool
    told: str
    lesions: Sequence[Mapping[str, object]] = ()
    written: bool = False
    blocked: str = ""
    flags: Sequence[str] = ()

    @property
    def fit(self) -> bool:
        """Whether there is a result that may be handed on."""
        return self.analysed and not self.blocked

    def as_json(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "path": str(self.path),
            "folder": str(self.folder) if self.written else None,
            "analysed": self.analysed,
            "told": self.told,
            "blocked": self.blocked,
            "flags": list(self.flags),
            "lesions": list(self.lesions),
        }


def run(
    paths: Sequence[Path], wanted: Wanted, config: Config, progress: Callable[[str], None] = lambda _: None
) -> list[Result]:
    """Analyse each path; a bad one is told in its result and the rest go on.

    Raises ConfigError and WeightsMissing where none could succeed.
    """
    criteria = _criteria(config.criteria, wanted.rule)
    progress(f"loading the pipeline {wanted.pipeline} ...")
    pipeline = _pipeline(wanted, config)
    results = []
    for number, path in enumerate(paths, start=1):
        told = f"[{number}/{len(paths)}] {path}"
        folder = wanted.output if len(paths) == 1 else wanted.output / f"{number:03d}-{_stem(path)}"
        try:
            cases = _cases(path, folder, config)
        except Exception as error:  # noqa: BLE001 - one bad path is told and the rest go on
            results.append(Result(path, folder, analysed=False, told=_fault(error)))
            continue
        for case in cases:
            progress(f"{told}: {len(case.paths)} images ...")
            try:
                results.append(_one(path, case, pipeline, criteria, config))
            except Exception as error:  # noqa: BLE001 - one bad study is told and the rest go on
                results.append(Result(path, case.folder, analysed=False, told=_fault(error)))
    return results


def _fault(error: Exception) -> str:
    if isinstance(error, SalsaNodeError):
        return str(error)
    if isinstance(error, OSError):
        return f"cannot be read or written ({error.strerror})"
    return unforeseen(error)


def _pipeline(wanted: Wanted, config: Config) -> Pipeline:
    settings = PipelineSettings(
        device=config.pipeline.device,
        models_dir=config.models_dir,
        masks_path=wanted.masks,
        options=wanted.options,
    )
    if wanted.masks is None:
        return pipelines.load(wanted.pipeline, settings)
    try:
        return pipelines.load(wanted.pipeline, settings)
    except PipelineError as exc:
        raise ConfigError(f"--masks: {exc}") from exc


def _cases(path: Path, folder: Path, config: Config) -> list[Case]:
    """The studies at `path`. Raises SeriesRejected where there is none."""
    if path.is_dir():
        return _dicom_cases(path, folder, config)
    if not path.is_file():
        raise SeriesRejected("no such file or folder")
    if path.name.endswith((".nii", ".nii.gz")):
        return [Case(_as_series(path, folder), folder)]
    raise SeriesRejected("expected a DICOM folder or a .nii or .nii.gz file")


def _dicom_cases(path: Path, folder: Path, config: Config) -> list[Case]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    studies: dict[str, list[candidate.Candidate]] = {}
    for paths in candidate.by_series(files).values():
        found = candidate.read_candidate(paths)
        studies.setdefault(found.study_uid, []).append(found)
    if not studies:
        raise SeriesRejected("no DICOM file lies in this folder")
    places = [folder] if len(studies) == 1 else [folder / f"study-{n}" for n in range(1, len(studies) + 1)]
    every = zip(sorted(studies.items()), places, strict=True)
    return [case for (_, found), place in every for case in _of_study(found, place, config)]


def _of_study(candidates: Sequence[candidate.Candidate], place: Path, config: Config) -> list[Case]:
    """The best series, as many as the rules ask for, the best first; or all images and why there is none."""
    choice = selection.choose_volume(
        candidates,
        partial(inspect, rules=config.series),
        config.selection,
        partial(stacks.apart, rules=config.series),
    )
    if choice.volumes:
        fit = [volume.candidate for volume in choice.volumes]
        folders = [place] if len(fit) == 1 else [place / f"series-{n}" for n in range(1, len(fit) + 1)]
        return [
            Case(one.paths, folder, of_several=len(fit) > 1, stack=one.part)
            for one, folder in zip(fit, folders, strict=True)
        ]
    reasons = "; ".join(verdict.reason for verdict in choice.verdicts)
    everything = tuple(path for one in candidates for path in one.paths)
    return [Case(everything, place, f"no series of this study can be analysed: {reasons}")]


def _as_series(path: Path, folder: Path) -> tuple[Path, ...]:
    """A NIfTI as a CT series of its own, for the SEG to refer to: no patient, a study named after the voxels."""
    ct = nifti.read_ct(path)
    if ct.voxels_hu.dtype != np.int16:
        ct = replace(ct, voxels_hu=np.clip(np.rint(ct.voxels_hu), -32768, 32767).astype(np.int16))
    study_uid = derive("nifti", ct.source_digest)
    header = dicom_ct.CtHeader(
        study_uid=study_uid,
        series_uid=derive(study_uid, "series"),
        patient_name="",
        patient_id="",
        acquired=datetime(1970, 1, 1, tzinfo=UTC),
        series_description="from a NIfTI file",
    )
    return dicom_ct.write(ct, folder / "ct", header)


def _one(path: Path, case: Case, pipeline: Pipeline, criteria: Criteria, config: Config) -> Result:
    terms = Terms(
        criteria, config.guards, config.results, series=config.series, one_of_several=case.of_several, stack=case.stack
    )
    born = Lineage(AS_ITS_IMAGES)
    if case.refusal:
        analysis = refuse(case.paths, case.refusal, terms, lambda _: born)
    else:
        analysis = analyse(case.paths, pipeline, terms, lambda _: born)
    try:
        case.folder.mkdir(parents=True, exist_ok=True)
        for other in sorted(case.folder.iterdir()):
            if other.name in _NAMES or _OBJECT.fullmatch(other.name):
                other.unlink()  # nothing of another case stays beside this one
        _write(analysis, case.folder)
    except OSError as exc:
        raise ConfigError(f"--output: {case.folder} cannot be written ({exc.strerror})") from exc
    blocked = analysis.blocked or _guard(analysis, case)
    told = f"BLOCKED, do not hand this on: {blocked} ({_told(analysis)})" if blocked else _told(analysis)
    lesions = table(analysis.findings) if analysis.findings else []
    flags = [flag.text for flag in analysis.findings.flags] if analysis.findings else []
    analysed = analysis.outcome is not Outcome.NOT_ANALYSED
    return Result(path, case.folder, analysed, told, lesions, written=True, blocked=blocked, flags=flags)


def _guard(analysis: Analysis, case: Case) -> str:
    """What the guards say against the objects as they lie in the folder; "" where they may leave."""
    try:
        check([(case.folder / f"{made.name}.dcm").read_bytes() for made in analysis.objects], case.paths, analysis)
    except GuardFailed as failed:
        return str(failed)
    return ""


def _told(analysis: Analysis) -> str:
    if analysis.findings is None:
        return f"not analysed: {analysis.reason}"
    count = len(analysis.findings.lesions)
    plural = "" if count == 1 else "s"
    if analysis.findings.provenance.by_person:
        return f"{count} lesion{plural} marked by a person"
    return f"{count} candidate lesion{plural}" if count else "the algorithm found no candidate lesion"


def _write(analysis: Analysis, folder: Path) -> None:
    for made in analysis.objects:
        made.ds.save_as(folder / f"{made.name}.dcm", enforce_file_format=True)
    (folder / "findings.json").write_text(json.dumps(summary(analysis), indent=2) + "\n")
    if analysis.findings is None or analysis.ct is None:
        return
    rows = table(analysis.findings)
    with (folder / "findings.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["lesion"])
        writer.writeheader()
        writer.writerows(rows)
    nifti.write_labels(
        upright_labels(label_map(analysis.findings)),
        folder / "labels.nii.gz",
        f"{nifti.LABEL_MAP}{analysis.findings.provenance.mark}",
    )
    picture.overlay(analysis.ct, analysis.findings, folder / "overlay.png")


def label_map(findings: Findings) -> LabelVolume:
    """1 = liver, n + 1 = lesion n, on the CT's grid: `given_masks` takes a corrected copy as it is."""
    lesions = findings.lesion_labels.labels
    labels = np.zeros(lesions.shape, dtype=np.uint8 if len(findings.lesions) < 255 else np.uint16)
    if findings.organ is not None:
        labels[findings.organ.labels == 1] = 1
    np.add(lesions, 1, out=labels, where=lesions > 0, casting="unsafe")
    return LabelVolume(labels, findings.lesion_labels.grid)


def _criteria(configured: Criteria, rule: str | None) -> Criteria:
    if rule is None:
        return configured
    try:
        return replace(configured, rule=Rule(rule))
    except ValueError:
        raise ConfigError(f"--rule: expected {' or '.join(r.value for r in Rule)}, found {rule!r}") from None


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii") or "scan"
