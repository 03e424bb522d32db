"""From the files of one series to what is sent for it: the science wing end to end, without store or network.

The worker and `salsa-node run` both call `analyse`. A verdict on the input (not one regular volume, no
liver in it) is an outcome with a report of its own, not a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError

from salsa_node import dicom_seg, dicom_sr
from salsa_node.criteria import Criteria
from salsa_node.dicom_result import SERIES_NUMBERS, Identity, Issue, Kind, caveat
from salsa_node.errors import OrganNotFound, SeriesRejected
from salsa_node.findings import Findings, measure, table
from salsa_node.pipelines import Pipeline, Provenance
from salsa_node.series import headers, inspect, read_volume
from salsa_node.settings import ResultSettings
from salsa_node.uids import digest
from salsa_node.volume import CtVolume


class Outcome(Enum):
    """What became of an analysis."""

    LESIONS = "lesions"  #: candidate lesions were found
    NO_CANDIDATE = "no_candidate"  #: the algorithm ran and found no candidate
    NOT_ANALYSED = "not_analysed"  #: no analysis was possible; the report says why


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """What is sent for one series, and what stands behind it.

    objects: what is sent, in the order it is sent, each with its kind; a kind may stand there several times.
    findings, ct: None where no analysis was possible; then `reason` says why, otherwise it is "".
    run_digest: what every UID of the results derives from.
    """

    outcome: Outcome
    objects: tuple[tuple[Kind, pydicom.Dataset], ...]
    findings: Findings | None
    ct: CtVolume | None
    reason: str
    run_digest: str

    def named(self) -> Iterator[tuple[str, Kind, pydicom.Dataset]]:
        """File name, kind and data set of every object: "sr.dcm", or "sr-1.dcm", "sr-2.dcm" where there are several."""
        kinds = [kind for kind, _ in self.objects]
        for n, (kind, ds) in enumerate(self.objects):
            number = f"-{kinds[:n].count(kind) + 1}" if kinds.count(kind) > 1 else ""
            yield f"{kind.stem}{number}.dcm", kind, ds


def analyse(
    paths: Sequence[Path],
    pipeline: Pipeline,
    criteria: Criteria,
    results: ResultSettings,
    issued: Callable[[str], Issue],
    progress: Callable[[str], None] = lambda _: None,
) -> Analysis:
    """Everything that is sent for the series in `paths`.

    issued: told the run digest, says when the objects were made and what they replace; the same answer gives the
        same bytes.
    progress: told what begins ("reading", "segmenting", "measuring", "writing").
    Raises PipelineError and EncodingError; verdicts on the input become an outcome.
    """
    try:
        progress("reading")
        series = inspect(paths)
        ct = read_volume(series)
        progress("segmenting")
        masks = pipeline.segment(ct)
    except (SeriesRejected, OrganNotFound) as verdict:
        return refuse(paths, str(verdict), results, issued, pipeline.provenance)
    progress("measuring")
    findings = measure(ct, masks, criteria)
    # What else decides the bytes decides the UIDs too: other bytes never go out under a UID that was used before.
    identity = _identity(results)
    signed = digest(findings.run_digest, repr(identity), repr(results))
    findings = replace(findings, run_digest=signed)
    progress("writing")
    outcome = Outcome.LESIONS if findings.lesions else Outcome.NO_CANDIDATE
    objects = tuple(_objects(findings, headers(series), identity, results, issued(signed)))
    return Analysis(outcome, objects, findings, ct, "", findings.run_digest)


def _objects(
    findings: Findings, source: Sequence[pydicom.Dataset], identity: Identity, results: ResultSettings, issue: Issue
) -> Iterator[tuple[Kind, pydicom.Dataset]]:
    """Everything that is sent for these findings, in the order it is sent."""
    seg = dicom_seg.build(findings, source, identity, issue.produced_at, include_organ=results.include_liver)
    if seg is not None:
        yield Kind.SEG, seg
    yield Kind.SR, dicom_sr.build(findings, seg, source, identity, issue.produced_at)


def _identity(results: ResultSettings) -> Identity:
    return Identity(**{name: getattr(results, name) for name in SERIES_NUMBERS})


def refuse(
    paths: Sequence[Path],
    reason: str,
    results: ResultSettings,
    issued: Callable[[str], Issue],
    provenance: Provenance | None = None,
) -> Analysis:
    """The report that says why nothing was analysed, for the study that `paths` belong to.

    Raises SeriesRejected where no file of the study can be read: then there is nobody to report on.
    """
    source, identity = _any_header(paths), _identity(results)
    made_of = digest("not analysed", reason, repr(identity), *sorted(path.name for path in paths))
    run_digest = digest(made_of, provenance.digest) if provenance else made_of
    issue = issued(run_digest)
    report = dicom_sr.build_not_analysed(reason, source, identity, issue.produced_at, run_digest, provenance)
    return Analysis(Outcome.NOT_ANALYSED, ((Kind.SR, report),), None, None, reason, run_digest)


def _any_header(paths: Sequence[Path]) -> pydicom.Dataset:
    for path in sorted(paths):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except (InvalidDicomError, OSError, EOFError, ValueError, AttributeError, KeyError):
            continue
        if all(header.get(f"{of}UID") for of in ("SOPClass", "SOPInstance", "StudyInstance", "SeriesInstance")):
            return header
    raise SeriesRejected(f"none of the {len(paths)} files can be read as a DICOM instance of a study")


def summary(result: Analysis) -> dict[str, object]:
    """The numbers of an analysis as JSON-able values, for the store, `show` and `findings.json`."""
    numbers: dict[str, object] = {"outcome": result.outcome.value, "run_digest": result.run_digest}
    numbers["caveat"] = caveat(result.findings.provenance if result.findings else None)
    if result.findings is None:
        return numbers | {"reason": result.reason}
    findings = result.findings
    provenance = findings.provenance
    organ_ml = None if findings.organ_volume_mm3 is None else round(findings.organ_volume_mm3 / 1000, 3)
    return numbers | {
        "lesions": table(findings),
        "liver_ml": organ_ml,
        "dropped_specks": findings.dropped_specks,
        "criteria": {**asdict(findings.criteria), "rule": findings.criteria.rule.value},
        "pipeline": {
            "name": provenance.pipeline,
            "version": provenance.version,
            "weights_sha256": dict(provenance.weights_sha256),
            "parameters": dict(provenance.parameters),
            "device": provenance.device,
            "notice": provenance.notice,
        },
    }
