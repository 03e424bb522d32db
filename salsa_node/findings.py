"""Masks -> lesions: volumes, diameters, attenuation, and whether RECIST 1.1 can measure them.

Lesions are 26-connected; voxels of different label values are different lesions even where they touch
(and voxels of one value are one lesion wherever they lie, where the masks say so: `Masks.lesion_per_value`).
Diameters run between voxel *outer corners* in one slice of the grid (the acquisition plane), so a
single voxel measures its own in-plane diagonal, not zero. Both axes are caliper diameters: their ends
lie on the convex hull of the slice, and a deeply dented lesion is measured across its dent. All
lengths are taken in millimetres in the slice plane, so pixels need not be square nor slices axial.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from math import floor
from typing import Final

import cc3d
import numpy as np
import numpy.typing as npt
from scipy.spatial import ConvexHull

from salsa_node.contrast_phase import UNKNOWN_PHASE, ContrastPhase
from salsa_node.criteria import Criteria, Rule
from salsa_node.errors import PipelineError
from salsa_node.pipelines import Flag, Masks, Provenance
from salsa_node.uids import derive, digest
from salsa_node.volume import CtVolume, Grid, LabelVolume, PointMm

_SMALL_SHARE = 0.1  # of a lesion; less in a Couinaud segment does not make it a lesion of that segment
_SAME_LENGTH_MM = 1e-6  # lengths that differ by less came from the same voxels by another rounding

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Components = npt.NDArray[np.unsignedinteger]
Box = tuple[slice, slice, slice]

_NOWHERE: Final[Box] = (slice(0, 1), slice(0, 1), slice(0, 1))


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
    long_axis: longest in-plane diameter over all slices (RECIST 1.1); of slices with the same
        diameter, the one where the lesion has the largest area, then the lowest.
    short_axis: in that slice, the longest chord of the convex hull that is perpendicular to the
        long axis (PS3.16 TID 1411); its ends need not be voxel corners.
    slice_index, slice_sop_uid: where both axes lie; the UID is "" where no DICOM image stands behind.
    mean_hu, sd_hu: over the lesion's voxels (sd with ddof = 1; 0.0 for a single voxel).
    touches_volume_edge: a voxel lies in the first or last slice, row or column.
    segments: the Couinaud segments it lies in, the one with most of its voxels first; those with less than
        a tenth of it are left out. Empty where the pipeline did not look.
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
    segments: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """What was found in one CT volume.

    lesion_labels: 0 = background, n = lesion number n, on the CT's grid.
    organ: 1 = liver, or None; organ_volume_mm3 likewise.
    run_digest: SHA-256 of source, pipeline, criteria and the masks themselves, because one pipeline may see a voxel
        otherwise on another device; every UID of the results derives from it.
    flags: what is odd about them, as `guards.flags` and the pipeline found.
    contrast_phase: of the CT, as its headers have it; unknown where nobody looked.
    image_numbers: the Instance Number of each slice, by which a PACS shows it; empty where nobody looked, or where the
        images have none of their own.
    """

    lesions: tuple[Lesion, ...]
    lesion_labels: LabelVolume
    organ: LabelVolume | None
    organ_volume_mm3: float | None
    dropped_specks: int
    criteria: Criteria
    provenance: Provenance
    run_digest: str
    flags: tuple[Flag, ...] = ()
    contrast_phase: ContrastPhase = UNKNOWN_PHASE
    image_numbers: tuple[int, ...] = ()

    def image_number(self, k: int) -> int | None:
        """By which a reader finds slice k, where there is such a number."""
        return self.image_numbers[k] if self.image_numbers else None

    def called(self, k: int) -> str:
        """Slice k as a reader finds it: "image 286", or "slice 1 of 20" in the order along the grid's slice axis."""
        number = self.image_number(k)
        return f"slice {k + 1} of {self.lesion_labels.grid.shape[0]}" if number is None else f"image {number}"


def measure(ct: CtVolume, masks: Masks, criteria: Criteria) -> Findings:
    """Every lesion of `masks`, measured on `ct`.

    The same CT, masks, provenance and criteria always give the same numbers and tracking UIDs.
    Raises PipelineError where the masks do not lie on the CT's grid.
    """
    if not masks.lesions.grid.matches(ct.grid):
        raise PipelineError(f"the masks lie on {masks.lesions.grid}, the CT on {ct.grid}")
    box = box_around(masks.lesions.labels)
    components = _components(masks.lesions.labels[box], masks.lesion_per_value)
    voxels, boxes = _sizes(components)
    voxel_mm3 = ct.grid.voxel_volume_mm3
    kept = [n for n in range(1, len(voxels)) if voxels[n] * voxel_mm3 >= criteria.min_lesion_mm3]
    kept.sort(key=lambda n: (-voxels[n], n))

    renumbered = np.zeros(len(voxels), dtype=np.uint8 if len(kept) < 256 else np.uint32)
    renumbered[kept] = np.arange(1, len(kept) + 1)
    labels = np.zeros(ct.grid.shape, dtype=renumbered.dtype)
    labels[box] = renumbered[components]
    organ = masks.organ
    organ_box = _NOWHERE if organ is None else box_around(organ.labels)
    shown = [_mask_digest(labels, moved(box_around(labels[box]), box) if kept else _NOWHERE)]
    shown.append("" if organ is None else _mask_digest(organ.labels, organ_box))
    run_digest = digest(ct.source_digest, masks.provenance.digest, _fingerprint(criteria), *shown)

    lesions = []
    for number, component in enumerate(kept, start=1):
        place = moved(boxes[component], box)
        mask = components[boxes[component]] == component
        lesion = _lesion(ct, mask, place, number, run_digest, criteria)
        lesions.append(
            lesion
            if masks.segments is None
            else replace(lesion, segments=_segments(masks.segments.labels[place][mask]))
        )
    return Findings(
        lesions=tuple(lesions),
        lesion_labels=LabelVolume(labels, ct.grid),
        organ=organ,
        organ_volume_mm3=None if organ is None else ct.grid.volume_mm3(_areas(organ.labels, organ_box)),
        dropped_specks=len(voxels) - 1 - len(kept),
        criteria=criteria,
        provenance=masks.provenance,
        run_digest=run_digest,
        flags=masks.flags,
    )


def lengths_mm(lesion: Lesion, findings: Findings, decimals: int = 1) -> tuple[float, float]:
    """Long and short axis as every result writes them: rounded, but never up to a length that were measurable.

    The one rule for pages, pictures, tables, names of segments and the lines that viewers draw; the record alone holds
    the numbers as they were measured. 9.96 mm beside "non-measurable" reads 9.9, never 10.0.
    """
    long_mm, short_mm = (round(axis.length_mm, decimals) for axis in (lesion.long_axis, lesion.short_axis))
    criteria = findings.criteria
    least_mm = criteria.min_long_axis_mm(findings.lesion_labels.grid.spacing_mm[0])
    if criteria.rule is Rule.DIAMETER and lesion.disease is Disease.NON_MEASURABLE and long_mm >= least_mm:
        step = 10.0**decimals
        long_mm = floor(lesion.long_axis.length_mm * step) / step
    return long_mm, min(short_mm, long_mm)


def table(findings: Findings) -> list[dict[str, str | int | float | bool | None]]:
    """The findings as rows for CSV or JSON, one a lesion, every row with the same keys in the same order.

    Volumes in ml, lengths and positions in mm (LPS), attenuation in HU; the slice is counted from 0, the image
    number is the PACS's own, None where there is none.
    """
    return [
        {
            "lesion": lesion.number,
            "disease": lesion.disease.value,
            "volume_ml": round(lesion.volume_mm3 / 1000, 4),
            "long_axis_mm": lengths_mm(lesion, findings, 2)[0],
            "short_axis_mm": lengths_mm(lesion, findings, 2)[1],
            "mean_hu": round(lesion.mean_hu, 3),
            "sd_hu": round(lesion.sd_hu, 3),
            "min_hu": round(lesion.min_hu, 3),
            "max_hu": round(lesion.max_hu, 3),
            "centroid_x_mm": round(lesion.centroid_lps_mm[0], 2),
            "centroid_y_mm": round(lesion.centroid_lps_mm[1], 2),
            "centroid_z_mm": round(lesion.centroid_lps_mm[2], 2),
            "slice_index": lesion.slice_index,
            "image_number": findings.image_number(lesion.slice_index),
            "slice_sop_uid": lesion.slice_sop_uid,
            "voxels": lesion.voxels,
            "touches_volume_edge": lesion.touches_volume_edge,
            "couinaud_segments": " ".join(map(str, lesion.segments)),
            "tracking_uid": lesion.tracking_uid,
        }
        for lesion in findings.lesions
    ]


def _fingerprint(criteria: Criteria) -> str:
    return json.dumps(asdict(criteria) | {"rule": criteria.rule.value}, sort_keys=True)


def _mask_digest(labels: npt.NDArray[np.unsignedinteger], box: Box) -> str:
    """SHA-256 of where every value lies, whatever integer type it is held in; `box` is the one around them."""
    inside = np.ascontiguousarray(labels[box])
    whole = inside.astype(np.uint8 if inside.max() < 256 else np.uint32, copy=False)
    return digest(repr(labels.shape), repr(box), hashlib.sha256(whole.data).hexdigest())


def _components(labels: npt.NDArray[np.unsignedinteger], lesion_per_value: bool) -> Components:
    """The lesions numbered from 1 in no particular order."""
    if lesion_per_value:
        values, numbers = np.unique(labels, return_inverse=True)
        first = 0 if values[0] == 0 else 1  # a box without background has no value 0
        return np.asarray(numbers.reshape(labels.shape) + first, dtype=np.uint32)
    components: Components = cc3d.connected_components(np.array(labels, order="C"), connectivity=26)
    return components


def box_around(labels: npt.NDArray[np.unsignedinteger]) -> Box:
    """The slices, rows and columns that hold anything; the first voxel where there is nothing."""
    slices = np.flatnonzero(labels.max(axis=(1, 2)))
    if not slices.size:
        return _NOWHERE
    seen = labels[slices[0] : slices[-1] + 1].max(axis=0)
    filled = (slices, np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0)))
    first, second, third = (slice(int(there[0]), int(there[-1]) + 1) for there in filled)
    return first, second, third


def moved(box: Box, within: Box) -> Box:
    """A box that was found inside another one, on the grid of that one."""
    first, second, third = (slice(s.start + w.start, s.stop + w.start) for s, w in zip(box, within, strict=True))
    return first, second, third


def _areas(organ: npt.NDArray[np.unsignedinteger], box: Box) -> npt.NDArray[np.int64]:
    """Voxels of the liver in each slice; `box` is the one around all labels."""
    areas = np.zeros(len(organ), dtype=np.int64)
    areas[box[0]] = np.count_nonzero(organ[box] == 1, axis=(1, 2))
    return areas


def _sizes(components: Components) -> tuple[list[int], list[Box]]:
    """Voxel count and bounding box of each component; entry 0 is the background."""
    statistics = cc3d.statistics(components)
    return [int(n) for n in statistics["voxel_counts"]], list(statistics["bounding_boxes"])


def _lesion(ct: CtVolume, mask: Bools, box: Box, number: int, run_digest: str, criteria: Criteria) -> Lesion:
    """`mask` is the lesion within `box` of the CT."""
    hu = ct.voxels_hu[box][mask].astype(np.float64)
    start = np.array([side.start for side in box])
    centroid = [float(first + _mean_index(mask, axis)) for axis, first in enumerate(start)]
    slice_index, long_axis, short_axis = _axes(mask, start, ct.grid)
    volume_mm3 = ct.grid.volume_mm3(mask.sum(axis=(1, 2)), box[0].start)
    return Lesion(
        number=number,
        tracking_uid=derive(run_digest, "lesion", str(number)),
        disease=_disease(volume_mm3, long_axis.length_mm, ct.grid, criteria),
        voxels=int(hu.size),
        volume_mm3=volume_mm3,
        long_axis=long_axis,
        short_axis=short_axis,
        slice_index=slice_index,
        slice_sop_uid=ct.slice_sop_uids[slice_index] if ct.slice_sop_uids else "",
        centroid_lps_mm=ct.grid.to_lps_mm((centroid[0], centroid[1], centroid[2])),
        mean_hu=float(hu.mean()),
        sd_hu=float(hu.std(ddof=1)) if hu.size > 1 else 0.0,
        min_hu=float(hu.min()),
        max_hu=float(hu.max()),
        touches_volume_edge=any(s.start == 0 or s.stop == n for s, n in zip(box, ct.grid.shape, strict=True)),
    )


def _segments(labels: npt.NDArray[np.unsignedinteger]) -> tuple[int, ...]:
    """The segments of a lesion's voxels by falling count, without background and small shares."""
    counts = np.bincount(labels, minlength=9)
    counts[0] = 0
    order = np.argsort(-counts, kind="stable")
    return tuple(int(n) for n in order if counts[n] >= max(1, _SMALL_SHARE * labels.size))


def _mean_index(mask: Bools, axis: int) -> float:
    counts = mask.sum(axis=tuple(other for other in range(3) if other != axis))
    return float(counts @ np.arange(len(counts)) / counts.sum())


def _disease(volume_mm3: float, long_axis_mm: float, grid: Grid, criteria: Criteria) -> Disease:
    if criteria.rule is Rule.VOLUME:
        measurable = volume_mm3 >= criteria.min_volume_mm3
    else:
        measurable = long_axis_mm >= criteria.min_long_axis_mm(grid.spacing_mm[0]) - _SAME_LENGTH_MM
    return Disease.MEASURABLE if measurable else Disease.NON_MEASURABLE


def _axes(mask: Bools, start: npt.NDArray[np.int64], grid: Grid) -> tuple[int, Axis, Axis]:
    """Slice index in the grid, long axis and short axis of a lesion whose mask begins at index `start`."""
    _, to_mm = np.linalg.qr(grid.affine_lps_mm[:3, 1:3])  # (row, column) -> mm within the slice plane
    areas = mask.sum(axis=(1, 2))
    best_k, best_mm, best_hull, best_ends = -1, -1.0, np.empty((0, 2)), (0, 0)
    for k in _by_falling_area(areas):
        corners = _outer_corners(mask[k]) @ to_mm.T
        if np.linalg.norm(np.ptp(corners, axis=0)) <= best_mm + _SAME_LENGTH_MM:
            continue
        hull = corners[ConvexHull(corners).vertices]
        length_mm, ends = _farthest(hull)
        if length_mm > best_mm + _SAME_LENGTH_MM:
            best_k, best_mm, best_hull, best_ends = k, length_mm, hull, ends
    long_ends = best_hull[list(best_ends)]
    short_ends = _longest_chord_across(best_hull, long_ends[1] - long_ends[0])
    slice_index = best_k + int(start[0])

    def axis(ends_mm: Floats) -> Axis:
        a, b = (np.linalg.solve(to_mm, end) + start[1:] for end in ends_mm)
        length_mm = float(np.linalg.norm(ends_mm[1] - ends_mm[0]))
        return Axis(length_mm, grid.to_lps_mm((slice_index, a[0], a[1])), grid.to_lps_mm((slice_index, b[0], b[1])))

    return slice_index, axis(long_ends), axis(short_ends)


def _by_falling_area(areas: npt.NDArray[np.int64]) -> Iterable[int]:
    return (int(k) for k in np.argsort(-areas, kind="stable") if areas[k])


def _outer_corners(mask: Bools) -> Floats:
    """(n, 2) row and column of the outer corners of each row's first and last voxel: their hull is the slice's hull."""
    rows = np.flatnonzero(mask.any(axis=1))
    first = mask[rows].argmax(axis=1) - 0.5
    last = mask.shape[1] - mask[rows, ::-1].argmax(axis=1) - 0.5
    corners = [np.stack([rows + side, columns], axis=1) for side in (-0.5, 0.5) for columns in (first, last)]
    return np.concatenate(corners)


def _farthest(hull: Floats) -> tuple[float, tuple[int, int]]:
    """The largest distance between two of these points, and which two; the first such pair where several are equal."""
    apart = np.linalg.norm(hull[:, None] - hull[None], axis=2)
    a, b = np.unravel_index(np.argmax(apart.round(9)), apart.shape)
    return float(apart[a, b]), (int(a), int(b))


def _longest_chord_across(hull: Floats, direction: Floats) -> Floats:
    """(2, 2) ends of the longest chord of a convex polygon that is perpendicular to `direction`.

    The width of a convex polygon changes linearly between vertices, so the longest chord starts at one.
    """
    along = direction / np.linalg.norm(direction)
    across = np.array([-along[1], along[0]])
    t, w = hull @ along, hull @ across
    t_next, w_next = np.roll(t, -1), np.roll(w, -1)
    rise = np.where(np.abs(t_next - t) < 1e-12, np.inf, t_next - t)
    share = (t[:, None] - t[None]) / rise[None]  # (vertex, edge): where the line across the vertex cuts the edge
    meets = (share >= 0) & (share <= 1) & np.isfinite(rise)[None]
    cut = w[None] + share * (w_next - w)[None]
    low = np.minimum(np.where(meets, cut, np.inf).min(axis=1), w)
    high = np.maximum(np.where(meets, cut, -np.inf).max(axis=1), w)
    best = int(np.argmax((high - low).round(9)))
    return np.array([t[best] * along + low[best] * across, t[best] * along + high[best] * across])
