"""Findings -> the report: a TID 1500 Comprehensive 3D SR with one TID 1411 group per lesion.

Also the reports with nothing to measure: no candidate found, or no analysis possible. The code
tree is written for machines; a container of plain sentences says the same to a person.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    Kind,
    caveat,
    check_source,
    described,
    evidence,
    line,
    named,
    plain,
    series_read,
    sign,
    weights,
)
from salsa_node.dicom_seg import made_from, organ_segment, segment_of, tracking_identifier
from salsa_node.errors import EncodingError
from salsa_node.findings import Disease, Findings, Lesion
from salsa_node.owners import same_patient_and_study
from salsa_node.pipelines import Provenance

NOTHING_FOUND: Final = "The algorithm found no candidate lesion."
NOTHING_MARKED: Final = "The person's mask marks no lesion."
NOT_ANALYSED: Final = "No analysis was possible."
PER_ORGAN: Final = 2  # target lesions per organ at most (RECIST 1.1 section 3.1.2)
Group = sr.VolumetricROIMeasurementsAndQualitativeEvaluations | sr.MeasurementsAndQualitativeEvaluations
_DECIMALS: Final = 6  # of every measured number: finer than any voxel

_MEASURABILITY: Final = {Disease.MEASURABLE: codes.MEASURABLE, Disease.NON_MEASURABLE: codes.NON_MEASURABLE}
_METHOD: Final = {Rule.DIAMETER: codes.RECIST_1_1, Rule.VOLUME: codes.VOLUME_RULE}


def build(
    findings: Findings,
    segs: Sequence[Dataset],
    source: Sequence[Dataset],
    identity: Identity,
    produced_at: datetime,
    predecessor: Dataset | None = None,
) -> Dataset:
    """A valid report on these findings.

    segs: the segmentations that `dicom_seg` made of the same findings; each lesion refers to a segment of its own
        where there is one, else to the segment of its class. Empty where there is no lesion.
    source: the headers of the images the findings were made from, in slice order along the grid.
    produced_at: aware; becomes the object's dates.
    predecessor: the report that this one takes the place of.
    Raises EncodingError where findings, segmentations and source do not belong together.
    """
    check_source(source, findings.lesion_labels.grid)
    _check_segmentations(findings, segs)
    for seg in segs:
        same_patient_and_study(seg, source[0])
    groups = [_lesion_group(lesion, findings, segs, source) for lesion in findings.lesions]
    overall = _organ_group(findings, segs, source)
    said = [*sentences(findings), series_read(source)]
    content = content_tree(identity, groups, said, findings.provenance, findings.criteria, overall)
    made = DocumentOf(Kind.SR, (findings.run_digest, "SR"), "report", predecessor)
    return document(made, content, [*evidence(source), *segs], source[0], identity, produced_at, findings.provenance)


def build_not_analysed(
    reason: str,
    source: Dataset,
    identity: Identity,
    produced_at: datetime,
    run_digest: str,
    provenance: Provenance | None = None,
    predecessor: Dataset | None = None,
) -> Dataset:
    """A valid report that says no analysis was possible, and why.

    reason: one sentence without patient identity, as `SeriesRejected.reason` holds it.
    source: the header of any instance of the study.
    run_digest: the UIDs derive from it.
    provenance: of the pipeline that gave up, where one had been chosen.
    """
    said = [refusal(reason), *([nobody_looked(identity)] if provenance is None else [])]
    content = content_tree(identity, [], said, provenance, None)
    made = DocumentOf(Kind.SR, (run_digest, "SR", "not analysed"), "report", predecessor)
    return document(made, content, [named(source)], source, identity, produced_at, provenance)


def refusal(reason: str) -> str:
    """The sentence that says no analysis was possible, and why."""
    return f"{NOT_ANALYSED} Reason: {reason}"


def nobody_looked(identity: Identity) -> str:
    """The sentence that no algorithm had its say, and what wrote that down."""
    return f"No algorithm looked at the images. Written by {identity.manufacturer} {identity.software_version}."


def sentences(findings: Findings) -> list[str]:
    """The findings in words: the outcome, then each of `findings.flags`, then what else a reader should know."""
    return [_outcome(findings), *(flag.text for flag in findings.flags), *_remarks(findings)]


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
    largest = _largest(findings)
    if largest:
        total_mm = sum(lesion.long_axis.length_mm for lesion in largest)
        which = " and ".join(tracking_identifier(lesion) for lesion in largest)
        of = "of the one measurable lesion" if len(largest) == 1 else "of the largest measurable lesions"
        yield (
            f"Proposal, for the reader to accept or change: sum of diameters in the liver {total_mm:.1f} mm, {of} "
            f"({which}). Which lesions are targets is the reader's choice."
        )
    if findings.organ_volume_mm3 is not None:
        yield f"Liver volume as segmented: {findings.organ_volume_mm3 / 1000:.1f} cm3."
    if findings.dropped_specks:
        yield (
            f"Left out and not measured, because smaller than {findings.criteria.min_lesion_mm3:g} mm3: "
            f"{findings.dropped_specks}."
        )
    sites = [
        f"{tracking_identifier(lesion)} in {' and '.join(_roman(number) for number in lesion.segments)}"
        for lesion in findings.lesions
        if lesion.segments
    ]
    if sites:
        yield f"Couinaud segments, the one with most of the lesion first: {'; '.join(sites)}."
    for lesion in findings.lesions:
        if lesion.touches_volume_edge:
            where = "the edge of the scanned volume"
            yield f"{tracking_identifier(lesion)} touches {where} and may be larger than measured."
    if not findings.contrast_phase.wrong:  # else a flag has said so
        yield findings.contrast_phase.sentence


def _roman(segment: int) -> str:
    """The number of a liver segment as its code says it."""
    return codes.COUINAUD[segment].meaning.rpartition(" ")[2]


def _largest(findings: Findings) -> list[Lesion]:
    """The measurable lesions whose diameters the record proposes to add up."""
    measurable = [lesion for lesion in findings.lesions if lesion.disease is Disease.MEASURABLE]
    return sorted(measurable, key=lambda lesion: -lesion.long_axis.length_mm)[:PER_ORGAN]


def _lesion_group(
    lesion: Lesion, findings: Findings, segs: Sequence[Dataset], source: Sequence[Dataset]
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    """TID 1411: one lesion, its segment, its class and its numbers."""
    image = source[lesion.slice_index]
    seg, segment_number = segment_of(lesion, segs)
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
    group = sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=lesion.tracking_uid, identifier=tracking_identifier(lesion)),
        referenced_segment=_segment(seg, segment_number, image),
        finding_type=codes.LESION,
        finding_sites=[sr.FindingSite(site) for site in (codes.LIVER, *(codes.COUINAUD[n] for n in lesion.segments))],
        qualitative_evaluations=[
            sr.QualitativeEvaluation(codes.MEASURABILITY, _MEASURABILITY[lesion.disease]),
            sr.QualitativeEvaluation(codes.RESPONSE_EVALUATION_METHOD, _METHOD[findings.criteria.rule]),
        ],
    )
    # Put where the template has them, by hand: highdicom would search each for coordinates that none of them has.
    items = group[0].ContentSequence
    place = next(n for n, item in enumerate(items) if item.name == codes.MEASURABILITY)
    for n, measurement in enumerate(measured):
        items.insert(place + n, measurement[0])
    return group


def _organ_group(findings: Findings, segs: Sequence[Dataset], source: Sequence[Dataset]) -> Group | None:
    """The liver as a whole: its volume, how many candidates, the proposed sum; None where there is none of them.

    Like TID 1411 where the liver has a segment, else like TID 1501. Nothing found gives no count: a coded
    "Number of lesions: 0" would be read as a statement about the patient.
    """
    algorithm = sr.AlgorithmIdentification(line(findings.provenance.pipeline), line(findings.provenance.version))
    measured = []
    if findings.organ_volume_mm3 is not None:
        cm3 = round(findings.organ_volume_mm3 / 1000, _DECIMALS)
        measured.append(
            sr.Measurement(
                codes.VOLUME, cm3, codes.CUBIC_CENTIMETER, method=codes.SUM_OF_VOXELS, algorithm_id=algorithm
            )
        )
    if findings.lesions:
        measured += [_count(findings, disease) for disease in (None, *Disease)]
    largest = _largest(findings)
    if largest:
        measured.append(_sum_of_diameters(largest))
    if not measured:
        return None
    tracking = sr.TrackingIdentifier(uid=uids.derive(findings.run_digest, "liver"), identifier="Liver")
    sites, kind = [sr.FindingSite(codes.LIVER)], codes.ANATOMICAL_STRUCTURE
    shown = organ_segment(segs)
    if shown is None:
        return sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=tracking, finding_type=kind, finding_sites=sites, measurements=measured
        )
    seg, number = shown
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=tracking,
        referenced_segment=_segment(seg, number, source[0]),
        finding_type=kind,
        finding_sites=sites,
        measurements=measured,
    )


def _count(findings: Findings, disease: Disease | None) -> sr.Measurement:
    """How many candidates there are, of one class or of all."""
    number = sum(disease in (None, lesion.disease) for lesion in findings.lesions)
    count = sr.Measurement(codes.NUMBER_OF_LESIONS, number, codes.NO_UNITS)
    if disease is not None:
        of_class = sr.CodeContentItem(codes.MEASURABILITY, _MEASURABILITY[disease], Relationship.HAS_CONCEPT_MOD)
        count[0].ContentSequence = sr.ContentSequence([of_class])
    return count


def _sum_of_diameters(largest: Sequence[Lesion]) -> sr.Measurement:
    """A proposal, and which long axes it adds up."""
    total_mm = round(sum(lesion.long_axis.length_mm for lesion in largest), _DECIMALS)
    proposal = sr.Measurement(codes.SUM_OF_DIAMETERS, total_mm, codes.MILLIMETER)
    proposal[0].ContentSequence = sr.ContentSequence()
    for lesion in largest:
        axis = sr.NumContentItem(
            codes.LONG_AXIS,
            round(lesion.long_axis.length_mm, _DECIMALS),
            codes.MILLIMETER,
            relationship_type=Relationship.INFERRED_FROM,
        )
        axis.ContentSequence = sr.ContentSequence(
            [
                sr.TextContentItem(
                    codes.TRACKING_IDENTIFIER, tracking_identifier(lesion), Relationship.HAS_OBS_CONTEXT
                ),
                sr.UIDRefContentItem(codes.TRACKING_UID, lesion.tracking_uid, Relationship.HAS_OBS_CONTEXT),
            ]
        )
        proposal[0].ContentSequence.append(axis)
    return proposal


def _segment(seg: Dataset, number: int, image: Dataset) -> sr.ReferencedSegment:
    return sr.ReferencedSegment(
        sop_class_uid=seg.SOPClassUID,
        sop_instance_uid=seg.SOPInstanceUID,
        segment_number=number,
        source_series=sr.SourceSeriesForSegmentation(image.SeriesInstanceUID),
    )


def content_tree(
    identity: Identity,
    groups: Sequence[Group],
    sentences: Sequence[str],
    provenance: Provenance | None,
    criteria: Criteria | None,
    overall: Group | None = None,
) -> Dataset:
    """The content tree of TID 1500.

    overall: what is measured of the organ as a whole. It stands in a container of its own, because a common
    validator holds every group among the Imaging Measurements to the template of the first.
    highdicom's MeasurementReport insists on a measurement group; the template itself asks for
    measurements or qualitative evaluations, so the root is put together here.
    """
    root = sr.ContainerContentItem(codes.REPORT_TITLE, is_content_continuous=False, template_id="1500")
    children = sr.ContentSequence()
    children.extend(sr.LanguageOfContentItemAndDescendants(sr.CodedConcept.from_code(codes.ENGLISH)))
    children.extend(_observer(identity))
    children.append(sr.CodeContentItem(codes.PROCEDURE_REPORTED, codes.CT_PROCEDURE, Relationship.HAS_CONCEPT_MOD))
    for name, within in ((codes.IMAGING_MEASUREMENTS, groups), (codes.SUMMARY, [overall] if overall else [])):
        if within:
            container = sr.ContainerContentItem(name, False, relationship_type=Relationship.CONTAINS)
            container.ContentSequence = sr.ContentSequence([item for group in within for item in group])
            children.append(container)
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


def _check_segmentations(findings: Findings, segs: Sequence[Dataset]) -> None:
    if findings.lesions and not segs:
        raise EncodingError(f"a report on {len(findings.lesions)} lesions needs their segmentation, found none")
    if not all(made_from(seg, findings) for seg in segs):
        raise EncodingError("the segmentation was made from other findings than the report")


@dataclass(frozen=True, slots=True, eq=False)
class DocumentOf:
    """Which report a content tree becomes.

    uid_parts: what its UIDs derive from. title: how its series is called.
    predecessor: the report that this one takes the place of.
    """

    kind: Kind
    uid_parts: tuple[str, ...]
    title: str
    predecessor: Dataset | None = None


def document(
    made: DocumentOf,
    content: Dataset,
    referred: Sequence[Dataset],
    source: Dataset,
    identity: Identity,
    produced_at: datetime,
    provenance: Provenance | None,
) -> Dataset:
    """The content tree as a signed document: Comprehensive 3D SR for the record, Comprehensive SR for viewers.

    referred: the images and segmentations that it refers to, and what else is its evidence.
    Raises EncodingError where it cannot be put together, or refers to what is not among its evidence.
    """
    sop_class = sr.Comprehensive3DSR if made.kind is Kind.SR else sr.ComprehensiveSR
    elements = list(content.iterall())
    private = any(element.value == codes.PRIVATE_SCHEME for element in elements)
    named_inside = {str(element.value) for element in elements if element.keyword == "ReferencedSOPInstanceUID"}
    if not named_inside <= {ds.SOPInstanceUID for ds in referred}:
        raise EncodingError("the report refers to an object that is not among its evidence")
    tree = content.ContentSequence
    content.ContentSequence = tree[:1]  # the rest joins below: highdicom copies and searches all that it is given
    try:
        frame = sop_class(
            evidence=referred,
            content=content,
            series_instance_uid=uids.derive(*made.uid_parts, "series"),
            series_number=identity.series_number(made.kind),
            sop_instance_uid=uids.derive(*made.uid_parts),
            instance_number=1,
            manufacturer=identity.manufacturer,
            is_complete=True,
            is_final=False,
            is_verified=False,
            series_description=described(made.title, provenance, identity),
            coding_schemes=[_private_scheme()] if private else None,
            previous_versions=[made.predecessor] if made.predecessor is not None else None,
        )
    except (ValueError, TypeError, AttributeError, KeyError) as exc:  # KeyError: of a class that is not the standard's
        raise EncodingError(f"the report could not be put together ({type(exc).__name__})") from exc
    report = Dataset(frame)
    report.file_meta = frame.file_meta
    report.ContentSequence = tree
    sign(report, source, identity, produced_at)
    return report


def _private_scheme() -> CodingSchemeIdentificationItem:
    return CodingSchemeIdentificationItem(
        codes.PRIVATE_SCHEME, name=codes.PRIVATE_SCHEME_NAME, responsible_organization=codes.PRIVATE_SCHEME_OWNER
    )
