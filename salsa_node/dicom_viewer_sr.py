"""Findings -> the report for viewers: each lesion's two diameters as lines on the image where they lie.

A viewer that knows no segments still draws these: a TID 1500 Comprehensive SR with one TID 1501 group per lesion,
whose long and short axis are inferred from a two-point SCOORD. The Tracking Identifier and the meanings "Long Axis"
and "Short Axis" are those by which Cornerstone3D's adapter knows a bidirectional measurement; the Tracking UIDs are
those of the record. Nothing else hangs below the numbers, because that viewer drops a number with other children.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import numpy as np
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from salsa_node import codes
from salsa_node.dicom_result import Identity, Kind, check_source, named
from salsa_node.dicom_sr import DocumentOf, content_tree, document, sentences
from salsa_node.findings import Axis, Findings, Lesion, lengths_mm
from salsa_node.volume import Grid

BIDIRECTIONAL: Final = "Cornerstone3DTools@^0.1.0:Bidirectional"
_LONG_AXIS: Final = Code(codes.LONG_AXIS.value, codes.LONG_AXIS.scheme_designator, "Long Axis")
_SHORT_AXIS: Final = Code(codes.SHORT_AXIS.value, codes.SHORT_AXIS.scheme_designator, "Short Axis")
_DECIMALS: Final = 2  # of a length: what a viewer writes beside the line


def build(
    findings: Findings,
    source: Sequence[Dataset],
    identity: Identity,
    produced_at: datetime,
    predecessor: Dataset | None = None,
) -> Dataset | None:
    """A valid report with the diameters, or None where there is no lesion.

    source: the headers of the images the findings were made from, in slice order along the grid.
    produced_at: aware; becomes the object's dates.
    predecessor: the report for viewers that this one takes the place of.
    Raises EncodingError where findings and source do not belong together.
    """
    check_source(source, findings.lesion_labels.grid)
    if not findings.lesions:
        return None
    groups = [_group(lesion, findings, source[lesion.slice_index]) for lesion in findings.lesions]
    content = content_tree(identity, groups, sentences(findings)[:1], findings.provenance, None)
    evidence = [named(source[k]) for k in sorted({lesion.slice_index for lesion in findings.lesions})]
    made = DocumentOf(Kind.VIEWER_SR, (findings.run_digest, "VIEWER_SR"), "diameters", predecessor)
    return document(made, content, evidence, source[0], identity, produced_at, findings.provenance)


def _group(lesion: Lesion, findings: Findings, image: Dataset) -> sr.MeasurementsAndQualitativeEvaluations:
    """TID 1501: one lesion and its two axes."""
    long_mm, short_mm = lengths_mm(lesion, findings, _DECIMALS)
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=lesion.tracking_uid, identifier=BIDIRECTIONAL),
        finding_type=codes.LESION,
        finding_sites=[sr.FindingSite(codes.LIVER)],
        measurements=[
            sr.Measurement(
                name,
                length_mm,
                codes.MILLIMETER,
                referenced_coordinates=[_line(axis, findings.lesion_labels.grid, image)],
            )
            for name, axis, length_mm in (
                (_LONG_AXIS, lesion.long_axis, long_mm),
                (_SHORT_AXIS, lesion.short_axis, short_mm),
            )
        ],
    )


def _line(axis: Axis, grid: Grid, image: Dataset) -> sr.CoordinatesForMeasurement:
    """(column, row) of both ends; the upper left corner of the first pixel is (0, 0) (PS3.3 C.18.6.1.1)."""
    ends = [grid.to_index(point) for point in (axis.start_lps_mm, axis.end_lps_mm)]
    limits = (image.Columns, image.Rows)
    points = np.array([[column + 0.5, row + 0.5] for _, row, column in ends])
    return sr.CoordinatesForMeasurement(
        graphic_type=sr.GraphicTypeValues.POLYLINE,
        graphic_data=np.clip(points, 0, limits),
        source_image=sr.SourceImageForRegion(image.SOPClassUID, image.SOPInstanceUID),
    )
