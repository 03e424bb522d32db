"""From the files of one series to what is sent for it: the science wing end to end, without store or network.

The worker and `salsa-node run` both call `analyse`. A verdict on the input (not one regular volume, no
liver in it) is an outcome with a report of its own, not a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import Enum
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom

from salsa_node import (
    contrast_phase,
    dicom_ko,
    dicom_pdf,
    dicom_result,
    dicom_sc,
    dicom_seg,
    dicom_sr,
    dicom_viewer_sr,
    guards,
    page,
    picture,
    placement,
    upright,
)
from salsa_node.contrast_phase import PixelPhase
from salsa_node.criteria import Criteria
from salsa_node.dicom_result import Identity, Kind, Made, caveat
from salsa_node.errors import GuardFailed, OrganNotFound, SeriesRejected
from salsa_node.findings import Findings, measure, table
from salsa_node.limits import Limits
from salsa_node.pipelines import Flag, Pipeline, Provenance
from salsa_node.products import Products
from salsa_node.series import UNREADABLE, Series, headers, image_numbers, inspect, read_volume
from salsa_node.series_rules import SeriesRules
from salsa_node.uids import digest
from salsa_node.volume import CtVolume

_NAMED_BY = ("SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")  # an instance, to the world


class Outcome(Enum):
    """What became of an analysis."""

    LESIONS = "lesions"  #: candidate lesions were found
    NO_CANDIDATE = "no_candidate"  #: the algorithm ran and found no candidate
    NOT_ANALYSED = "not_analysed"  #: no analysis was possible; the report says why


Read = tuple[Series, CtVolume]


@dataclass(frozen=True, slots=True)
class Terms:
    """By what rules a series is analysed, and what is made of it: everything beside images and pipeline.

    label_map: some destination asks for the lesions by class as a label map, which is then made beside the SEG.
    series: what is done where slices make no regular grid.
    one_of_several: results of other series of the study stand beside this one, whose series is then named by number.
    stack: which one of a series that holds several is read, as "1 of 2"; "" for a whole series.
    """

    criteria: Criteria = field(default_factory=Criteria)
    limits: Limits = field(default_factory=Limits)
    products: Products = field(default_factory=Products)
    label_map: bool = False
    series: SeriesRules = field(default_factory=SeriesRules)
    one_of_several: bool = False
    stack: str = ""

    def identity(self, source: pydicom.Dataset) -> Identity:
        """How the results are signed that are made from images such as `source`."""
        number = source.get("SeriesNumber") if self.one_of_several else None
        return Identity(
            first_series_number=self.products.first_series_number,
            of_series="" if number is None else str(number),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Lineage:
    """Where a result stands among those of its study.

    produced_at: aware; the time that the objects carry; the same answer gives the same bytes.
    revision: 1 for the first result of its study, 2 for the one that takes its place, and so on.
    predecessors: the reports of the result that this one takes the place of, by kind.
    """

    produced_at: datetime
    revision: int = 1
    predecessors: Mapping[Kind, pydicom.Dataset] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """What is sent for one series, and what stands behind it.

    objects: in the order in which they are sent; a report is always among them.
    findings, ct: None where no analysis was possible; then `reason` says why, otherwise it is "".
    run_digest: what every UID of the results derives from.
    blocked: why the result must not leave; "" where it may.
    pixel_phase: the contrast phase that the pipeline saw, where it was asked to look.
    """

    outcome: Outcome
    objects: tuple[Made, ...]
    findings: Findings | None
    ct: CtVolume | None
    reason: str
    run_digest: str
    blocked: str = ""
    pixel_phase: PixelPhase | None = None

    def of(self, kind: Kind) -> tuple[pydicom.Dataset, ...]:
        """The objects of that kind."""
        return tuple(made.ds for made in self.objects if made.kind is kind)


def read(paths: Sequence[Path], rules: SeriesRules) -> Read:
    """The series in `paths` and its volume. Raises SeriesRejected."""
    series = inspect(paths, rules)
    return series, read_volume(series)


def analyse(
    paths: Sequence[Path],
    pipeline: Pipeline,
    terms: Terms,
    lineage: Callable[[str], Lineage],
    progress: Callable[[str], None] = lambda _: None,
    reading: Callable[[Sequence[Path], SeriesRules], Read] = read,
) -> Analysis:
    """Everything that is sent for the series in `paths`.

    lineage: told the run digest, says when the result was made and what it takes the place of.
    progress: told what begins ("reading", "segmenting", "measuring", "writing").
    reading: `read`, or what has at hand what that would give.
    Raises PipelineError and EncodingError; verdicts on the input become an outcome.
    """
    try:
        progress("reading")
        series, ct = reading(paths, terms.series)
        progress("segmenting")
        masks = upright.segment(pipeline, ct)
    except (SeriesRejected, OrganNotFound) as verdict:
        return refuse(paths, str(verdict), terms, lineage, pipeline.provenance)
    progress("measuring")
    findings = measure(ct, masks, terms.criteria)
    # What else decides the bytes decides the UIDs too: other bytes never go out under a UID that was used before.
    source = headers(series)
    identity = terms.identity(source[0])
    phase = contrast_phase.read(source[len(source) // 2])
    numbers = image_numbers(source)
    unspecified = sum(str(ds.get("RescaleType") or "HU").strip().upper() == "US" for ds in source)
    signed = digest(
        findings.run_digest,
        repr(phase),
        repr(numbers),
        dicom_result.whose_digest(source[0]),
        dicom_result.series_read(source),
        *map(repr, (identity, terms.products, terms.limits)),
        *(["label map"] if terms.label_map else []),
        *(["stack", terms.stack] if terms.stack else []),
        *(["unspecified", str(unspecified)] if unspecified else []),
    )
    found = (
        *findings.flags,
        *([Flag("phase_wrong", phase.wrong)] if phase.wrong else []),
        *([_one_stack(terms.stack, len(source))] if terms.stack else []),
        *([_no_unit(unspecified, len(source))] if unspecified else []),
        *guards.flags(ct, findings, terms.limits),
        *dicom_seg.flags(findings, include_organ=terms.products.include_liver),
    )
    odd = guards.gravest_first(found)
    findings = replace(findings, run_digest=signed, flags=odd, contrast_phase=phase, image_numbers=numbers)
    progress("writing")
    objects = _objects(ct, findings, source, terms, lineage(signed))
    outcome = Outcome.LESIONS if findings.lesions else Outcome.NO_CANDIDATE
    blocked = " ".join(flag.text for flag in findings.flags if flag.blocks)
    return Analysis(outcome, objects, findings, ct, "", signed, blocked, masks.pixel_phase)


def _one_stack(which: str, images: int) -> Flag:
    return Flag(
        "one_stack",
        "The series holds several stacks of images, of other acquisitions or directions: "
        f"this result is of stack {which} alone, {images} images.",
    )


def _no_unit(unspecified: int, images: int) -> Flag:
    return Flag(
        "no_unit",
        f"{unspecified} of {images} images give no unit of their values (Rescale Type US, unspecified): they were read "
        "as Hounsfield units.",
    )


def refuse(
    paths: Sequence[Path],
    reason: str,
    terms: Terms,
    lineage: Callable[[str], Lineage],
    provenance: Provenance | None = None,
) -> Analysis:
    """The report that says why nothing was analysed, for the study that `paths` belong to.

    Raises SeriesRejected where no file of the study can be read: then there is nobody to report on.
    """
    source = _any_header(paths)
    identity = terms.identity(source)
    made_of = digest("not analysed", reason, repr(identity), dicom_result.whose_digest(source), *_instances(paths))
    run_digest = digest(made_of, provenance.digest if provenance else "", repr(terms.products))
    born = lineage(run_digest)
    identity = replace(identity, revision=born.revision)
    report = dicom_sr.build_not_analysed(
        reason, source, identity, born.produced_at, run_digest, provenance, born.predecessors.get(Kind.SR)
    )
    objects = [Made(Kind.SR, "sr", report)]
    if terms.products.summary_page or terms.products.summary_pdf:
        about = (dicom_result.replaces(identity), "" if provenance else dicom_sr.nobody_looked(identity))
        sheet = page.of_refusal(reason, provenance, dicom_result.local(born.produced_at, source), about)
        signed = (source, identity, born.produced_at, run_digest, provenance)
        objects += _pages(sheet, (), terms.products, signed)
    return Analysis(Outcome.NOT_ANALYSED, tuple(objects), None, None, reason, run_digest)


def check(contents: Iterable[bytes], paths: Sequence[Path], result: Analysis) -> None:
    """Raises GuardFailed unless the objects, as written, belong to the images in `paths` and lie where those lie.

    What cannot be read cannot be checked, and is kept here as well. OSError where a file is gone.
    """
    try:
        objects = [pydicom.dcmread(BytesIO(content)) for content in contents]
        if result.findings is None:
            source = [_any_header(paths)]
        else:
            source = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    except OSError:
        raise
    except (SeriesRejected, *UNREADABLE) as exc:
        raise GuardFailed(f"an object of the result, or its source, cannot be read ({type(exc).__name__})") from exc
    placement.check(objects, source, result.findings)


def _objects(
    ct: CtVolume, findings: Findings, source: Sequence[pydicom.Dataset], terms: Terms, born: Lineage
) -> tuple[Made, ...]:
    products, when = terms.products, born.produced_at
    identity = replace(terms.identity(source[0]), revision=born.revision)
    by_class = dicom_seg.build(findings, source, identity, when, include_organ=products.include_liver)
    alone = dicom_seg.build_lesions(findings, source, identity, when) if products.per_lesion_seg else ()
    label_map = (
        dicom_seg.build_label_map(findings, source, identity, when, include_organ=products.include_liver)
        if terms.label_map
        else None
    )
    # Reports refer to what every destination gets: the SEG by class is none of it where a label map takes its place.
    segs = alone if label_map is not None and alone else [*by_class, *alone]
    report = dicom_sr.build(findings, segs, source, identity, when, born.predecessors.get(Kind.SR))
    objects = [Made(Kind.SEG, "seg" if n == 1 else f"seg_{n}", seg) for n, seg in enumerate(by_class, start=1)]
    objects.append(Made(Kind.SR, "sr", report))
    objects += [Made(Kind.LESION_SEG, f"lesion_seg_{n}", seg) for n, seg in enumerate(alone, start=1)]
    if products.viewer_sr:
        drawn = dicom_viewer_sr.build(findings, source, identity, when, born.predecessors.get(Kind.VIEWER_SR))
        objects += [Made(Kind.VIEWER_SR, "viewer_sr", drawn)] if drawn is not None else []
    if products.summary_page or products.summary_pdf or products.key_images:
        of_series = dicom_result.series_read(source)
        about = (of_series, dicom_result.replaces(identity))
        sheet = page.of_findings(ct, findings, dicom_result.local(when, source[0]), about)
        slices = picture.key_slices(findings, products.key_images)
        keys = [(np.asarray(picture.key_image(ct, findings, k, of_series)), source[k]) for k in slices]
        signed = (source[0], identity, when, findings.run_digest, findings.provenance)
        objects += _pages(sheet, keys, products, signed)
    if products.key_object_selection:
        selection = dicom_ko.build(findings, segs, source, identity, when)
        objects += [Made(Kind.KO, "ko", selection)] if selection is not None else []
    objects += [Made(Kind.LABELMAP, "labelmap", label_map)] if label_map is not None else []
    return tuple(objects)


def _pages(
    sheet: page.Page,
    keys: Sequence[tuple[dicom_sc.Pixels, pydicom.Dataset]],
    products: Products,
    signed: tuple[pydicom.Dataset, Identity, datetime, str, Provenance | None],
) -> list[Made]:
    """The summary page and the key images as Secondary Captures, and the page as PDF, as the site wants them."""
    pictures: list[tuple[dicom_sc.Pixels, pydicom.Dataset | None]] = []
    if products.summary_page:
        pictures += [(pixels, None) for pixels in sheet.pictures()]
    pictures += keys
    made = [Made(Kind.SC, f"sc_{n}", capture) for n, capture in enumerate(dicom_sc.build(pictures, *signed), start=1)]
    if products.summary_pdf:
        made.append(Made(Kind.PDF, "pdf", dicom_pdf.build(sheet.pdf, *signed)))
    return made


def _any_header(paths: Sequence[Path]) -> pydicom.Dataset:
    nameless: set[str] = set()
    for path in sorted(paths):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
            missing = [keyword for keyword in _NAMED_BY if not header.get(keyword)]
        except UNREADABLE:
            continue
        if not missing:
            return header
        nameless.update(missing)
    if nameless:
        empty = ", ".join(keyword for keyword in _NAMED_BY if keyword in nameless)
        raise SeriesRejected(
            f"none of the {len(paths)} files names its study, series and instance: without a value are {empty}"
        )
    raise SeriesRejected(f"none of the {len(paths)} files can be read as a DICOM instance of a study")


def _instances(paths: Sequence[Path]) -> list[str]:
    """Which instances these files are, as far as they can be read: the same wherever they lie and in any order."""
    found = []
    for path in paths:
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_NAMED_BY))
            found.append(" ".join(str(header.get(keyword) or "") for keyword in _NAMED_BY))
        except UNREADABLE:
            continue
    return sorted(found)


def summary(result: Analysis) -> dict[str, object]:
    """The numbers of an analysis as JSON-able values, for the store, `show` and `findings.json`."""
    numbers: dict[str, object] = {"outcome": result.outcome.value, "run_digest": result.run_digest}
    numbers["caveat"] = caveat(result.findings.provenance if result.findings else None)
    if result.findings is None:
        return numbers | {"reason": result.reason}
    findings = result.findings
    provenance = findings.provenance
    if result.pixel_phase is not None:
        numbers["contrast_phase_in_pixels"] = result.pixel_phase.phase.value
    organ_ml = None if findings.organ_volume_mm3 is None else round(findings.organ_volume_mm3 / 1000, 3)
    return numbers | {
        "lesions": table(findings),
        "liver_ml": organ_ml,
        "dropped_specks": findings.dropped_specks,
        "flags": [asdict(flag) for flag in findings.flags],
        "contrast_phase_in_headers": findings.contrast_phase.phase.value,
        "criteria": {**asdict(findings.criteria), "rule": findings.criteria.rule.value},
        "pipeline": {
            "name": provenance.pipeline,
            "version": provenance.version,
            "weights_sha256": dict(provenance.weights_sha256),
            "parameters": dict(provenance.parameters),
            "libraries": dict(provenance.libraries),
            "device": provenance.device,
            "notice": provenance.notice,
        },
    }
