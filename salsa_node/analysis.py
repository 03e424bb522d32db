"""From the files of one series to what is sent for it: the science wing end to end, without store or network.

The worker and `salsa-node run` both call `analyse`. A verdict on the input (not one regular volume, no
liver in it) is an outcome with a report of its own, not a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from enum import Enum
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError

from salsa_node import dicom_seg, dicom_sr
from salsa_node.criteria import Criteria
from salsa_node.dicom_result import Identity, caveat
from salsa_node.errors import OrganNotFound, SeriesRejected
from salsa_node.findings import Findings, measure, table
from salsa_node.pipelines import Pipeline, Provenance
from salsa_node.series import headers, inspect, read_volume
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

    seg: None where there is nothing to segment. report: always there.
    findings, ct: None where no analysis was possible; then `reason` says why, otherwise it is "".
    run_digest: what every UID of the results derives from.
    """

    outcome: Outcome
    seg: pydicom.Dataset | None
    report: pydicom.Dataset
    findings: Findings | None
    ct: CtVolume | None
    reason: str
    run_digest: str


def analyse(
    paths: Sequence[Path],
    pipeline: Pipeline,
    criteria: Criteria,
    identity: Identity,
    dated: Callable[[str], datetime],
    include_organ: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Analysis:
    """Everything that is sent for the series in `paths`.

    dated: told the run digest, says the aware time that the objects carry; the same answer gives the same bytes.
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
        return refuse(paths, str(verdict), identity, dated, pipeline.provenance)
    progress("measuring")
    findings = measure(ct, masks, criteria)
    # What else decides the bytes decides the UIDs too: other bytes never go out under a UID that was used before.
    signed = digest(findings.run_digest, repr(identity), repr(include_organ))
    findings = replace(findings, run_digest=signed)
    progress("writing")
    source, produced_at = headers(series), dated(signed)
    seg = dicom_seg.build(findings, source, identity, produced_at, include_organ=include_organ)
    report = dicom_sr.build(findings, seg, source, identity, produced_at)
    outcome = Outcome.LESIONS if findings.lesions else Outcome.NO_CANDIDATE
    return Analysis(outcome, seg, report, findings, ct, "", findings.run_digest)


def refuse(
    paths: Sequence[Path],
    reason: str,
    identity: Identity,
    dated: Callable[[str], datetime],
    provenance: Provenance | None = None,
) -> Analysis:
    """The report that says why nothing was analysed, for the study that `paths` belong to.

    Raises SeriesRejected where no file of the study can be read: then there is nobody to report on.
    """
    source = _any_header(paths)
    made_of = digest("not analysed", reason, repr(identity), *sorted(path.name for path in paths))
    run_digest = digest(made_of, provenance.digest) if provenance else made_of
    report = dicom_sr.build_not_analysed(reason, source, identity, dated(run_digest), run_digest, provenance)
    return Analysis(Outcome.NOT_ANALYSED, None, report, None, None, reason, run_digest)


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
