"""Whether findings can be what they say: looked at beside the CT, before the report is written, so that it tells.

A flag that blocks keeps the result here, as a failed check of the finished objects does (`placement`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt, find_objects

from salsa_node.findings import Findings
from salsa_node.limits import Limits
from salsa_node.pipelines import Flag
from salsa_node.volume import CtVolume, Grid

Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.unsignedinteger]
Box = tuple[slice, ...]
Indices = npt.NDArray[np.int64]
Hu = npt.NDArray[np.int16] | npt.NDArray[np.float32]

BODY_HU: Final = -300.0  # what is denser belongs to the body or lies on the table
LIVER_HU: Final = (0.0, 250.0)  # where the middle of a liver's attenuation can lie, native to arterial
SOFT_TISSUE_HU: Final = -50.0  # fat lies below, air far below; so does the mean of no lesion but a rare fatty one
WITHIN_HU: Final = 50.0  # of that middle: parenchyma and its noise
BETTER_BY: Final = 0.15  # so much better must a mirrored mask fit (phantoms: 0.2)
ENOUGH_VOXELS: Final = 300  # of a liver on the sparse grid, to tell by their attenuation how it lies
FITS: Final = 0.3  # so well must it fit then (livers of phantoms and of real CT: 0.57 and more)
FITS_NOWHERE: Final = 0.1  # what fits no better than that, as it is, was not drawn along a liver
OUTLINES_FIT: Final = 0.35  # what outlines of a liver come to (phantoms and real CT: 0.39 and more)
_OUTLINE_MM: Final = 4.0  # on both sides of an outline
_OUTLINES: Final = 24  # slices whose outlines are looked at
CUT_BODY: Final = 0.1  # with so much of a side of the images in the body, the body goes on beyond; a table is thinner
_SHELL_MM: Final = (3.0, 10.0)  # around the liver: what looks like liver there speaks against the mask
_NAMED: Final = 5  # lesions that a flag names at most
_COARSE_MM: Final = 2.0  # steps of the grid that distances are judged on
_ENDS: Final = (("on the right", "on the left"), ("in front", "at the back"), ("at the feet", "at the head"))
_GRAVE: Final = (  # flags that do not block, in the order in which a reader needs them; others come after
    "not_an_abdomen",
    "not_like_a_liver",
    "liver_on_the_left",
    "not_soft_tissue",
    "lesion_outside_liver",
    "laterality_unchecked",
    "liver_volume",
    "liver_cut_off",
)
_AXES: Final = ("slices", "rows", "columns")


def flags(ct: CtVolume, findings: Findings, limits: Limits) -> tuple[Flag, ...]:
    """What a reader should know before trusting these findings, the gravest first.

    Raises nothing; what cannot be judged without a liver in the masks is said to be so.
    """
    grid = findings.lesion_labels.grid
    found = list(_of_slices(grid, findings))
    organ = findings.organ.labels == 1 if findings.organ is not None else None
    if organ is not None:
        found += _of_liver(ct, organ, findings, limits)
    if organ is not None and np.count_nonzero(organ[_sparse(grid)]) >= ENOUGH_VOXELS:
        found += _of_place(ct, organ, limits)
    elif findings.lesions:
        found.append(
            Flag(
                "laterality_unchecked",
                "Laterality could not be checked, nor the order of slices: the masks hold no liver to compare with the "
                "images. Whether the lesions lie in the liver is not known either.",
            )
        )
    if organ is not None and organ.any():
        found += _of_lesions(organ, findings, limits)
    found += _of_attenuation(findings, limits, explained=any(flag.name == "mirrored" for flag in found))
    return gravest_first(found)


def gravest_first(found: Iterable[Flag]) -> tuple[Flag, ...]:
    """What keeps a result here, then what says that it may not show what it says, then the rest."""
    rank = {name: n for n, name in enumerate(_GRAVE)}
    return tuple(sorted(found, key=lambda flag: (not flag.blocks, rank.get(flag.name, len(rank)))))


def _of_slices(grid: Grid, findings: Findings) -> Iterable[Flag]:
    step_mm = grid.spacing_mm[0]
    if step_mm > findings.criteria.thick_slice_mm:
        yield Flag(
            "thick_slices",
            f"Thick slices: they lie {step_mm:.1f} mm apart, and small lesions may be missed; "
            f"{findings.criteria.thick_slice_mm:g} mm or less is recommended.",
        )


def _of_liver(ct: CtVolume, organ: Mask, findings: Findings, limits: Limits) -> Iterable[Flag]:
    grid = findings.lesion_labels.grid
    volume_ml = grid.volume_mm3(np.count_nonzero(organ, axis=(1, 2))) / 1000
    towards = _ends(grid)
    cut = [
        f"{name} slice (the end {end})"
        for name, end, edge in zip(("first", "last"), towards, organ[[0, -1]], strict=True)
        if edge.any()
    ]
    if cut:
        which = " and the ".join(cut)
        yield Flag(
            "liver_cut_off",
            f"The liver reaches the {which}: part of it may not have been scanned, its volume is a lower bound.",
        )
    if volume_ml > limits.max_liver_ml or (volume_ml < limits.min_liver_ml and not cut):
        yield Flag(
            "liver_volume",
            f"Implausible liver volume: {volume_ml:.0f} cm3, expected {limits.min_liver_ml:.0f} to "
            f"{limits.max_liver_ml:.0f} cm3.",
        )
    share = _share_of_body(ct, organ) if organ.any() else 0.0
    if share > limits.max_share_of_body:
        yield Flag(
            "not_an_abdomen",
            f"What was taken for the liver fills {ceil(100 * share)} % of the body's cross-section, at most "
            f"{100 * limits.max_share_of_body:.0f} % are plausible: this may not be an abdomen.",
        )


def _of_place(ct: CtVolume, organ: Mask, limits: Limits) -> Iterable[Flag]:
    fit, mirrored = _fit(ct, organ)
    if not mirrored and _outlines_run_backwards(ct, organ):
        mirrored = _AXES[0]
    if mirrored:
        yield Flag(
            "mirrored",
            f"The masks fit the images far better when the order of their {mirrored} is reversed: they are probably "
            "mirrored.",
            blocks=limits.mirrored == "block",
        )
    elif fit < FITS_NOWHERE:
        yield Flag(
            "not_like_a_liver",
            "Implausible liver: by its attenuation, what was taken for the liver looks no more like one than what lies "
            "around it. The segmentation is probably wrong.",
        )
    elif _on_the_left(ct, organ):
        yield Flag(
            "liver_on_the_left",
            "Most of the liver lies in the left half of the body: situs inversus, or images whose sides are swapped.",
        )


def _ends(grid: Grid) -> tuple[str, str]:
    """Where in the patient the first and the last slice lie, in words."""
    along = grid.affine_lps_mm[:3, 0]
    axis = int(np.argmax(np.abs(along)))
    low, high = _ENDS[axis]
    return (low, high) if along[axis] > 0 else (high, low)


def _of_lesions(organ: Mask, findings: Findings, limits: Limits) -> Iterable[Flag]:
    labels, grid = findings.lesion_labels.labels, findings.lesion_labels.grid
    boxes = find_objects(labels)
    for lesion in findings.lesions:
        share = _share_near(labels, lesion.number, boxes[lesion.number - 1], organ, grid, limits.near_liver_mm)
        if share < limits.min_share_in_liver:
            yield Flag(
                "lesion_outside_liver",
                f"Lesion {lesion.number} lies outside the liver region: {100 * share:.0f} % of it within "
                f"{limits.near_liver_mm:g} mm of the liver.",
            )


def _of_attenuation(findings: Findings, limits: Limits, *, explained: bool) -> Iterable[Flag]:
    odd = [lesion for lesion in findings.lesions if lesion.mean_hu < SOFT_TISSUE_HU]
    if not odd:
        return
    which = ", ".join(f"Lesion {lesion.number} ({lesion.mean_hu:.0f} HU)" for lesion in odd[:_NAMED])
    which += f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
    text = f"Not in soft tissue, by mean attenuation: {which}."
    most = 2 * len(odd) > len(findings.lesions) and not explained
    if most:
        text += " So are most of the lesions: their masks are probably mirrored, or drawn on other images."
    yield Flag("not_soft_tissue", text, blocks=most and limits.mirrored == "block")


def _sparse(grid: Grid) -> Box:
    """Every n-th voxel: enough for lengths of millimetres."""
    return tuple(slice(None, None, max(1, int(_COARSE_MM / mm))) for mm in grid.spacing_mm)


@dataclass(frozen=True, slots=True, eq=False)
class _Near:
    """How far from a liver that is there, on the sparse grid.

    apart_mm: (slices, rows, columns) of the sparse grid; inf beyond the box around liver and shell.
    stride: voxels of the CT a step.
    """

    apart_mm: npt.NDArray[np.float64]
    stride: npt.NDArray[np.int64]

    @classmethod
    def of(cls, organ: Mask, grid: Grid) -> _Near:
        places = _sparse(grid)
        stride = np.array([place.step for place in places])
        sparse, step_mm = organ[places], stride * grid.spacing_mm
        apart_mm = np.full(sparse.shape, np.inf)
        around = tuple(
            slice(max(0, int(there[0]) - margin), int(there[-1]) + margin + 1)
            for there, margin in zip(_projected(sparse), (int(_SHELL_MM[1] / mm) + 1 for mm in step_mm), strict=True)
        )
        apart_mm[around] = distance_transform_edt(~sparse[around], sampling=step_mm)
        return cls(apart_mm, stride)

    def between(self, more_than_mm: float, at_most_mm: float) -> Indices:
        """(n, 3) indices of the CT's grid that lie so far from the liver; from -1 on, those inside it."""
        found: Indices = np.argwhere((self.apart_mm > more_than_mm) & (self.apart_mm <= at_most_mm)) * self.stride
        return found


def _projected(mask: Mask) -> Iterable[Indices]:
    """Along each axis, the indices where anything of the mask lies."""
    for axis in range(mask.ndim):
        yield np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))


def _share_near(labels: Labels, number: int, box: Box, organ: Mask, grid: Grid, near_mm: float) -> float:
    """The share of that lesion's voxels in the organ or at most `near_mm` from it; `box` is where the lesion lies."""
    reach = [int(near_mm / mm) + 1 for mm in grid.spacing_mm]
    around = tuple(slice(max(0, part.start - by), part.stop + by) for part, by in zip(box, reach, strict=True))
    lesion, nearby = labels[around] == number, organ[around]
    inside = nearby[lesion]
    if inside.all() or not nearby.any():
        return float(inside.mean())
    apart_mm = distance_transform_edt(~nearby, sampling=grid.spacing_mm)
    return float(np.mean(apart_mm[lesion] <= near_mm))


def _share_of_body(ct: CtVolume, organ: Mask) -> float:
    """Of the body's cross-section, in the slice with most liver."""
    k = int(np.argmax(organ.sum(axis=(1, 2))))
    body = (ct.voxels_hu[k] > BODY_HU) | organ[k]
    return float(np.count_nonzero(organ[k]) / np.count_nonzero(body))


def _fit(ct: CtVolume, organ: Mask) -> tuple[float, str]:
    """How well the mask fits, at most 1, and which axes of it to reverse so that it fits far better, in words.

    A mask fits where its inside looks like liver and what lies just around it does not. No words where it fits
    best as it is, or nowhere: a bad segmentation is not a mirrored one.
    """
    near = _Near.of(organ, ct.grid)
    inside, around = near.between(-1.0, 0.0), near.between(*_SHELL_MM)
    last = np.array(organ.shape) - 1
    fits = {}
    for flip in product((False, True), repeat=3):
        hu = [ct.voxels_hu[tuple(np.where(flip, last - voxels, voxels).T)] for voxels in (inside, around)]
        fits[flip] = _looks_like_liver(hu[0], hu[0]) - _looks_like_liver(hu[0], hu[1])
    best = max(fits, key=lambda flip: (fits[flip], -sum(flip)))
    as_it_is = fits[False, False, False]
    if fits[best] < FITS or fits[best] - as_it_is < BETTER_BY:
        return as_it_is, ""
    return as_it_is, " and ".join(name for name, reversed_ in zip(_AXES, best, strict=True) if reversed_)


def _outlines_run_backwards(ct: CtVolume, organ: Mask) -> bool:
    """Whether the mask's outlines follow the images far better with the slices in reverse order.

    What `_fit` does not tell where a liver changes little from slice to slice: only what lies a few millimetres inside
    and outside of each outline is looked at, in some slices.
    """
    filled = np.flatnonzero(organ.any(axis=(1, 2)))
    slices = filled[np.unique(np.linspace(0, len(filled) - 1, _OUTLINES).astype(int))]
    reach = [ceil(_OUTLINE_MM / mm) + 1 for mm in ct.grid.spacing_mm[1:]]
    inside: list[Indices] = []
    outside: list[Indices] = []
    for k in slices:
        (box,) = find_objects(organ[k].astype(np.uint8))
        window = tuple(slice(max(0, part.start - by), part.stop + by) for part, by in zip(box, reach, strict=True))
        mask = organ[k][window]
        corner = [k, window[0].start, window[1].start]
        for part, found in ((mask, inside), (~mask, outside)):
            near = part & (distance_transform_edt(part, sampling=ct.grid.spacing_mm[1:]) <= _OUTLINE_MM)
            found.append(np.insert(np.argwhere(near), 0, 0, axis=1) + corner)
    bands = np.concatenate(inside), np.concatenate(outside)
    as_it_is = [ct.voxels_hu[tuple(voxels.T)] for voxels in bands]
    backwards = [ct.voxels_hu[(len(organ) - 1 - voxels[:, 0], voxels[:, 1], voxels[:, 2])] for voxels in bands]
    fits, fit = (_looks_like_liver(hu[0], hu[0]) - _looks_like_liver(hu[0], hu[1]) for hu in (backwards, as_it_is))
    return fits >= OUTLINES_FIT and fits - fit >= BETTER_BY


def _looks_like_liver(liver_hu: Hu, voxels_hu: Hu) -> float:
    """The share of `voxels_hu` near the middle of `liver_hu`, which must be one that livers have; 0 for no voxels."""
    if not len(voxels_hu):
        return 0.0
    known = liver_hu[np.isfinite(liver_hu)]
    if not len(known):
        return 0.0
    middle = np.clip(np.median(known), *LIVER_HU)
    return float(np.mean(np.abs(voxels_hu - middle) <= WITHIN_HU))


def _on_the_left(ct: CtVolume, organ: Mask) -> bool:
    """Whether most of the liver lies left of the body's middle (LPS: x grows to the left).

    Not judged where the body reaches a side of the images.
    """
    directions = np.abs(ct.grid.affine_lps_mm[:3, :3] / ct.grid.spacing_mm)
    across = int(np.argmax(directions[0]))
    along = max((axis for axis in range(3) if axis != across), key=lambda axis: directions[2, axis])
    level = int(np.argmax(np.count_nonzero(organ, axis=tuple(axis for axis in range(3) if axis != along))))
    body = np.take(ct.voxels_hu, level, axis=along) > BODY_HU  # the cross-section of the body with most liver
    over = 1 if across < 3 - across - along else 0
    there = np.flatnonzero(body.any(axis=over))
    if not len(there) or body.mean(axis=over)[[0, -1]].max() >= CUT_BODY:
        return False  # nobody knows where the middle of a body is whose side was not scanned
    liver = np.count_nonzero(organ, axis=tuple(axis for axis in range(3) if axis != across))
    beyond = np.average(np.arange(len(liver)), weights=liver) - (there[0] + there[-1]) / 2
    return bool(beyond * ct.grid.affine_lps_mm[0, across] > 0)
