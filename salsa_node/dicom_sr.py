"""Findings -> the report: a TID 1500 Comprehensive 3D SR with one TID 1411 group per lesion.

Also the reports with nothing to measure: no candidate found, or no analysis possible. The code
tree is written for machines; a container of plain sentences says the same to a person.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr import RelationshipTypeValues as Relationship
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from salsa_node import codes, uids
from salsa_node.criteria import Criteria, Rule
from salsa_node.dicom_result import (
    Identity,
    caveat,
    check_source,
    line,
    named,
    plain,
    same_patient_and_study,
    sign,
    titled,
    weights,
)
from salsa_node.dicom_seg import instance_uid, label_of, segment_numbers
from salsa_node.errors import EncodingError
from salsa_node.findings import Disease, Findings, Lesion
from salsa_node.pipelines import Provenance

NOTHING_FOUND: Final = "The algorithm found no candidate lesion."
NOTHING_MARKED: Final = "The person's mask marks no lesion."
NOT_ANALYSED: Final = "No analysis was possible."
_DECIMALS: Final = 6  # of every measured number: finer than any voxel

_MEASURABILITY: Final = {Disease.MEASURABLE: codes.MEASURABLE, Disease.NON_MEASURABLE: codes.NON_MEASURABLE}
_METHOD: Final = {Rule.DIAMETER: codes.RECIST_1_1, Rule.VOLUME: codes.VOLUME_RULE}


def build(
    findings: Findings, seg: Dataset | None, source: Sequence[Dataset], identity: Identity, produced_at: datetime
) -> Dataset:
    """A valid report on these findings.

    seg: the segmentation that `dicom_seg.build` made of the same findings; None where there is no lesion.
    source: the headers of the images the findings were made from, in slice order along the grid.
    produced_at: aware; becomes the object's dates.
    Raises EncodingError where findings, segmentation and source do not belong together.
    """
    check_source(source, findings.lesion_labels.grid)
    _check_segmentation(findings, seg)
    if seg is not None:
        same_patient_and_study(seg, source[0])
    groups = [_lesion_group(lesion, findings, seg, source) for lesion in findings.lesions if seg is not None]
    sentences = [_outcome(findings), *_remarks(findings)]
    content = _report(identity, groups, sentences, findings.provenance, findings.criteria)
    evidence = [*(named(ds) for ds in source), *([seg] if seg is not None else [])]
    return _document(
        content, evidence, source[0], identity, produced_at, (findings.run_digest, "SR"), findings.provenance
    )


def build_not_analysed(
    reason: str,
    source: Dataset,
    identity: Identity,
    produced_at: datetime,
    run_digest: str,
    provenance: Provenance | None = None,
) -> Dataset:
    """A valid report that says no analysis was possible, and why.

    reason: one sentence without patient identity, as `SeriesRejected.reason` holds it.
    source: the header of any instance of the study.
    run_digest: the UIDs derive from it.
    provenance: of the pipeline that gave up, where one had been chosen.
    """
    content = _report(identity, [], [f"{NOT_ANALYSED} Reason: {reason}"], provenance, None)
    parts = (run_digest, "SR", "not analysed")
    return _document(content, [named(source)], source, identity, produced_at, parts, provenance)


def rule_text(criteria: Criteria) -> str:
    """The rule of measurability in words, with its numbers."""
    if criteria.rule is Rule.VOLUME:
        return f"SALSA volume rule: measurable when the volume is at least {criteria.min_volume_mm3:.1f} mm3."
    return (
        f"RECIST 1.1: measurable when the longest diameter in the acquisition plane is at least "
        f"{criteria.min_diameter_mm:g} mm, and where the slice spacing exceeds {criteria.thick_slice_mm:g} mm "
        f"also at least {criteria.thick_slice_factor:g} x that spacing."
    )


def _outcome(findings: Findings) -> str:
    total = len(findings.lesions)
    by_person = findings.provenance.by_person
    if total == 0:
        return NOTHING_MARKED if by_person else NOTHING_FOUND
    measurable = sum(lesion.disease is Disease.MEASURABLE for lesion in findings.lesions)
    noun = "lesion" if total == 1 else "lesions"
    who = f"A person marked {total} {noun}" if by_person else f"The algorithm found {total} candidate {noun}"
    return f"{who}: {measurable} measurable, {total - measurable} non-measurable."


def _remarks(findings: Findings) -> Iterable[str]:
    """What a reader should know besides the numbers of each lesion."""
    if findings.organ_volume_mm3 is not None:
        yield f"Liver volume as segmented: {findings.organ_volume_mm3 / 1000:.1f} cm3."
    if findings.dropped_specks:
        yield (
            f"Left out and not measured, because smaller than {findings.criteria.min_lesion_mm3:g} mm3: "
            f"{findings.dropped_specks}."
        )
    for lesion in findings.lesions:
        if lesion.touches_volume_edge:
            yield f"{_name(lesion)} touches the edge of the scanned volume and may be larger than measured."


def _name(lesion: Lesion) -> str:
    return f"Lesion {lesion.number}"


def _lesion_group(
    lesion: Lesion, findings: Findings, seg: Dataset, source: Sequence[Dataset]
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    """TID 1411: one lesion, its segment, its class and its numbers."""
    image = source[lesion.slice_index]
    slice_seen = [sr.SourceImageForMeasurement(image.SOPClassUID, image.SOPInstanceUID)]
    algorithm = sr.AlgorithmIdentification(line(findings.provenance.pipeline), line(findings.provenance.version))
    measured = [
        sr.Measurement(
            codes.VOLUME,
            round(lesion.volume_mm3 / 1000, _DECIMALS),
            codes.CUBIC_CENTIMETER,
            method=codes.SUM_OF_VOXELS,
            algorithm_id=algorithm,
        ),
        *(
            sr.Measurement(
                name,
                round(axis.length_mm, _DECIMALS),
                codes.MILLIMETER,
                referenced_images=slice_seen,
                algorithm_id=algorithm,
            )
            for name, axis in ((codes.LONG_AXIS, lesion.long_axis), (codes.SHORT_AXIS, lesion.short_axis))
        ),
        *(
            sr.Measurement(
                codes.ATTENUATION,
                round(value, _DECIMALS),
                codes.HOUNSFIELD_UNIT,
                derivation=derivation,
                algorithm_id=algorithm,
            )
            for derivation, value in ((codes.MEAN, lesion.mean_hu), (codes.STANDARD_DEVIATION, lesion.sd_hu))
        ),
    ]
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=lesion.tracking_uid, identifier=_name(lesion)),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=segment_numbers(seg)[label_of(lesion.disease)],
            source_series=sr.SourceSeriesForSegmentation(image.SeriesInstanceUID),
        ),
        finding_type=codes.LESION,
        finding_sites=[sr.FindingSite(codes.LIVER)],
        measurements=measured,
        qualitative_evaluations=[
            sr.QualitativeEvaluation(codes.MEASURABILITY, _MEASURABILITY[lesion.disease]),
            sr.QualitativeEvaluation(codes.RESPONSE_EVALUATION_METHOD, _METHOD[findings.criteria.rule]),
        ],
    )


def _report(
    identity: Identity,
    groups: Sequence[sr.VolumetricROIMeasurementsAndQualitativeEvaluations],
    sentences: Sequence[str],
    provenance: Provenance | None,
    criteria: Criteria | None,
) -> Dataset:
    """The content tree of TID 1500.

    highdicom's MeasurementReport insists on a measurement group; the template itself asks for
    measurements or qualitative evaluations, so the root is put together here.
    """
    root = sr.ContainerContentItem(codes.REPORT_TITLE, is_content_continuous=False, template_id="1500")
    children = sr.ContentSequence()
    children.extend(sr.LanguageOfContentItemAndDescendants(sr.CodedConcept.from_code(codes.ENGLISH)))
    children.extend(_observer(identity))
    children.append(sr.CodeContentItem(codes.PROCEDURE_REPORTED, codes.CT_PROCEDURE, Relationship.HAS_CONCEPT_MOD))
    if groups:
        measurements = sr.ContainerContentItem(
            codes.IMAGING_MEASUREMENTS, False, relationship_type=Relationship.CONTAINS
        )
        measurements.ContentSequence = sr.ContentSequence()
        for group in groups:
            measurements.ContentSequence.extend(group)
        children.append(measurements)
    evaluations = sr.ContainerContentItem(codes.QUALITATIVE_EVALUATIONS, False, relationship_type=Relationship.CONTAINS)
    evaluations.ContentSequence = sr.ContentSequence(list(_evaluations(sentences, provenance, criteria)))
    children.append(evaluations)
    root.ContentSequence = children
    return root


def _evaluations(
    sentences: Sequence[str], provenance: Provenance | None, criteria: Criteria | None
) -> Iterable[sr.ContentItem]:
    """The report in sentences: caution first, then the outcome, then by what rule and algorithm."""
    yield _text(codes.COMMENT, caveat(provenance))
    if provenance is not None and provenance.notice:
        yield _text(codes.COMMENT, provenance.notice)
    for sentence in sentences:
        yield _text(codes.FINDING, sentence)
    if criteria is not None:
        yield sr.CodeContentItem(codes.RESPONSE_EVALUATION_METHOD, _METHOD[criteria.rule], Relationship.CONTAINS)
        yield _text(codes.COMMENT, rule_text(criteria))
    if provenance is not None:
        yield _text(codes.ALGORITHM_NAME, provenance.pipeline)
        yield _text(codes.ALGORITHM_VERSION, provenance.version)
        for weight in weights(provenance):
            yield _text(codes.ALGORITHM_PARAMETERS, weight)


def _text(name: Code, words: str) -> sr.TextContentItem:
    return sr.TextContentItem(name, plain(words), Relationship.CONTAINS)


def _observer(identity: Identity) -> sr.ObservationContext:
    """The device that looked (TID 1004); no person did."""
    attributes = sr.DeviceObserverIdentifyingAttributes(
        uid=identity.device_uid,
        name=identity.station_name,
        manufacturer_name=identity.manufacturer,
        model_name=identity.model_name,
        serial_number=identity.device_serial_number,
    )
    context = sr.ObserverContext(
        observer_type=sr.CodedConcept.from_code(codes.DEVICE), observer_identifying_attributes=attributes
    )
    return sr.ObservationContext(observer_device_context=context)


def _check_segmentation(findings: Findings, seg: Dataset | None) -> None:
    if seg is None:
        if findings.lesions:
            raise EncodingError(f"a report on {len(findings.lesions)} lesions needs their segmentation, found none")
        return
    if seg.SOPInstanceUID not in {instance_uid(findings, with_organ=organ) for organ in (False, True)}:
        raise EncodingError("the segmentation was made from other findings than the report")


def _document(
    content: Dataset,
    evidence: Sequence[Dataset],
    source: Dataset,
    identity: Identity,
    produced_at: datetime,
    uid_parts: tuple[str, ...],
    provenance: Provenance | None,
) -> Dataset:
    notice = provenance.notice if provenance is not None else ""
    private = any(element.value == codes.PRIVATE_SCHEME for element in content.iterall())
    try:
        document: Dataset = sr.Comprehensive3DSR(
            evidence=evidence,
            content=content,
            series_instance_uid=uids.derive(*uid_parts, "series"),
            series_number=identity.sr_series_number,
            sop_instance_uid=uids.derive(*uid_parts),
            instance_number=1,
            manufacturer=identity.manufacturer,
            is_complete=True,
            is_final=False,
            is_verified=False,
            series_description=line(titled("report", provenance), notice),
            coding_schemes=[_private_scheme()] if private else None,
        )
    except (ValueError, TypeError, AttributeError) as exc:
        raise EncodingError(f"the report could not be put together ({type(exc).__name__})") from exc
    sign(document, source, identity, produced_at)
    return document


def _private_scheme() -> CodingSchemeIdentificationItem:
    return CodingSchemeIdentificationItem(
        codes.PRIVATE_SCHEME, name=codes.PRIVATE_SCHEME_NAME, responsible_organization=codes.PRIVATE_SCHEME_OWNER
    )
