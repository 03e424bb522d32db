"""Masks -> lesions: volumes, diameters, attenuation, and whether RECIST 1.1 can measure them.

Lesions are 26-connected. Diameters run between voxel *outer corners* in one axial slice, so a
single voxel measures its own in-plane diagonal, not zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from salsa_node.criteria import Criteria
from salsa_node.pipelines import Masks, Provenance
from salsa_node.volume import CtVolume, LabelVolume, PointMm


class Disease(Enum):
    """RECIST 1.1 section 3.1: can this lesion be followed by its diameter?"""

    MEASURABLE = "measurable"
    NON_MEASURABLE = "non-measurable"


@dataclass(frozen=True, slots=True)
class Axis:
    """A diameter: a straight line within one slice.

    start_lps_mm, end_lps_mm: its end points in the patient.
    """

    length_mm: float
    start_lps_mm: PointMm
    end_lps_mm: PointMm


@dataclass(frozen=True, slots=True)
class Lesion:
    """One connected candidate lesion.

    number: 1, 2, ... by falling volume; the value of its voxels in `Findings.lesions_labels`.
    tracking_uid: the same in SEG and SR; derives from the run.
    long_axis, short_axis: longest in-plane diameter over all slices, and the longest chord
        perpendicular to it in that slice (RECIST 1.1; short axis per TID 1411 note).
    slice_index, slice_sop_uid: where both axes lie; the UID is "" where no DICOM image stands behind.
    mean_hu, sd_hu: over the lesion's voxels (sd with ddof = 1; 0.0 for a single voxel).
    touches_volume_edge: a voxel lies in the first or last slice, row or column.
    """

    number: int
    tracking_uid: str
    disease: Disease
    voxels: int
    volume_mm3: float
    long_axis: Axis
    short_axis: Axis
    slice_index: int
    slice_sop_uid: str
    centroid_lps_mm: PointMm
    mean_hu: float
    sd_hu: float
    min_hu: float
    max_hu: float
    touches_volume_edge: bool


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """What was found in one CT volume.

    lesion_labels: 0 = background, n = lesion number n, on the CT's grid.
    organ: 1 = liver, or None; organ_volume_mm3 likewise.
    run_digest: SHA-256 of source, pipeline and criteria; every UID of the results derives from it.
    """

    lesions: tuple[Lesion, ...]
    lesion_labels: LabelVolume
    organ: LabelVolume | None
    organ_volume_mm3: float | None
    dropped_specks: int
    criteria: Criteria
    provenance: Provenance
    run_digest: str


def measure(ct: CtVolume, masks: Masks, criteria: Criteria) -> Findings:
    """Every lesion of `masks`, measured on `ct`. Raises PipelineError where the grids differ."""
    raise NotImplementedError  # written next
