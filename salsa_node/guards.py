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

from salsa_node.findings import Box, Findings, box_around, moved
from salsa_node.limits import Limits
from salsa_node.pipelines import Flag
from salsa_node.volume import CtVolume, Grid

Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.unsignedinteger]
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
    liver = _Liver.of(findings.organ.labels) if findings.organ is not None else None
    if liver is not None:
        found += _of_liver(ct, liver, findings, limits)
    if liver is not None and np.count_nonzero(_Sparse.of(liver, grid).mask) >= ENOUGH_VOXELS:
        found += _of_place(ct, liver, limits)
    elif findings.lesions:
        found.append(
            Flag(
                "laterality_unchecked",
                "Laterality could not be checked, nor the order of slices: the masks hold no liver to compare with the "
                "images. Whether the lesions lie in the liver is not known either.",
            )
        )
    if liver is not None and findings.organ is not None and liver.mask.any():
        found += _of_lesions(findings.organ.labels, findings, limits)
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


def _of_liver(ct: CtVolume, liver: _Liver, findings: Findings, limits: Limits) -> Iterable[Flag]:
    grid, areas = findings.lesion_labels.grid, liver.counts(0)
    volume_ml = grid.volume_mm3(areas) / 1000
    towards = _ends(grid)
    cut = [
        f"{name} slice (the end {end})"
        for name, end, area in zip(("first", "last"), towards, areas[[0, -1]], strict=True)
        if area
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
    share = _share_of_body(ct, liver) if areas.any() else 0.0
    if share > limits.max_share_of_body:
        yield Flag(
            "not_an_abdomen",
            f"What was taken for the liver fills {ceil(100 * share)} % of the body's cross-section, at most "
            f"{100 * limits.max_share_of_body:.0f} % are plausible: this may not be an abdomen.",
        )


def _of_place(ct: CtVolume, liver: _Liver, limits: Limits) -> Iterable[Flag]:
    fit, mirrored = _fit(ct, liver)
    if not mirrored and _outlines_run_backwards(ct, liver):
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
    elif _on_the_left(ct, liver):
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


def _of_lesions(organ: Labels, findings: Findings, limits: Limits) -> Iterable[Flag]:
    labels, grid = findings.lesion_labels.labels, findings.lesion_labels.grid
    within = box_around(labels)
    boxes = find_objects(labels[within])
    for lesion in findings.lesions:
        box = moved(boxes[lesion.number - 1], within)
        share = _share_near(labels, lesion.number, box, organ, grid, limits.near_liver_mm)
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


@dataclass(frozen=True, slots=True, eq=False)
class _Liver:
    """Where the liver lies on a grid of that shape: in the `mask` within `box`, and nowhere outside of it."""

    mask: Mask
    box: Box
    shape: tuple[int, ...]

    @classmethod
    def of(cls, organ: Labels) -> _Liver:
        """organ: (slices, rows, columns), 1 = liver."""
        box = box_around(organ)
        return cls(organ[box] == 1, box, organ.shape)

    def counts(self, axis: int) -> Indices:
        """The voxels of the liver at each index of the grid along an axis."""
        counts = np.zeros(self.shape[axis], dtype=np.int64)
        others = tuple(other for other in range(3) if other != axis)
        counts[self.box[axis]] = self.mask.view(np.uint8).sum(axis=others, dtype=np.uint32)
        return counts

    def plane(self, k: int) -> Mask:
        """(rows, columns) of the grid's slice k, which the box must hold."""
        plane = np.zeros(self.shape[1:], dtype=np.bool_)
        plane[self.box[1:]] = self.mask[k - self.box[0].start]
        return plane


@dataclass(frozen=True, slots=True, eq=False)
class _Sparse:
    """The liver on every n-th voxel of the grid: enough for lengths of millimetres.

    mask: those within the liver's box. start: where the first of them lies on the sparse grid.
    shape: of the whole sparse grid. stride: voxels of the CT a step.
    """

    mask: Mask
    start: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, liver: _Liver, grid: Grid) -> _Sparse:
        stride = tuple(max(1, int(_COARSE_MM / mm)) for mm in grid.spacing_mm)
        places = tuple(slice(-part.start % step, None, step) for part, step in zip(liver.box, stride, strict=True))
        start = tuple(-(-part.start // step) for part, step in zip(liver.box, stride, strict=True))
        shape = tuple(-(-n // step) for n, step in zip(liver.shape, stride, strict=True))
        return cls(liver.mask[places], start, shape, stride)


@dataclass(frozen=True, slots=True, eq=False)
class _Near:
    """A liver that is there and what lies just around it, on the sparse grid.

    places: voxels of the CT that hold both. inside, around: which of them, in their order, lie in the liver and in the
    shell around it.
    """

    places: Box
    inside: Indices
    around: Indices

    @classmethod
    def of(cls, liver: _Liver, grid: Grid) -> _Near:
        sparse = _Sparse.of(liver, grid)
        step_mm = np.array(sparse.stride) * grid.spacing_mm
        held = [(int(there[0]), int(there[-1]) + 1) for there in _projected(sparse.mask)]
        around = [
            (max(0, first + start - margin), min(n, first + stop + margin))
            for first, (start, stop), margin, n in zip(
                sparse.start, held, (int(_SHELL_MM[1] / mm) + 1 for mm in step_mm), sparse.shape, strict=True
            )
        ]
        inside = np.zeros([stop - start for start, stop in around], dtype=np.bool_)
        held_there = tuple(
            slice(first + start - low, first + stop - low)
            for first, (start, stop), (low, _) in zip(sparse.start, held, around, strict=True)
        )
        inside[held_there] = sparse.mask[tuple(slice(*span) for span in held)]
        first, second, third = (
            slice(start * step, (stop - 1) * step + 1, step)
            for (start, stop), step in zip(around, sparse.stride, strict=True)
        )
        near, far = (_within(inside, step_mm, at_most_mm) for at_most_mm in _SHELL_MM)
        return cls((first, second, third), np.flatnonzero(inside), np.flatnonzero(far & ~near))


def _within(mask: Mask, step_mm: npt.ArrayLike, at_most_mm: float) -> Mask:
    """Where a voxel of a mask (slices, rows, columns) lies at most so far away: `distance_transform_edt` and a limit.

    Several times faster, where the limit is a few steps.
    """
    step = np.asarray(step_mm)
    reach = [min(int(at_most_mm / mm) + 1, n - 1) for mm, n in zip(step, mask.shape, strict=True)]
    spread = [mask]  # by so many columns
    for columns in range(1, reach[2] + 1):
        spread.append(_joined(spread[-1].copy(), mask, columns, axis=2))
    found = np.zeros_like(mask)
    for slices in range(reach[0] + 1):
        plane = np.zeros_like(mask)
        for rows in range(reach[1] + 1):
            away = np.array([(slices, rows, columns) for columns in range(reach[2] + 1)])
            near = np.flatnonzero(np.sqrt(((away * step) ** 2).sum(axis=1)) <= at_most_mm)
            if near.size:
                _joined(plane, spread[near[-1]], rows, axis=1)
        _joined(found, plane, slices, axis=0)
    return found


def _joined(to: Mask, mask: Mask, by: int, axis: int) -> Mask:
    """`to`, with the mask added as it lies that many steps on and as many back along an axis."""
    into, shifted = np.moveaxis(to, axis, 0), np.moveaxis(mask, axis, 0)
    into[by:] |= shifted[: len(shifted) - by]
    into[: len(into) - by] |= shifted[by:]
    return to


def _projected(mask: Mask) -> Iterable[Indices]:
    """Along each axis, the indices where anything of the mask lies."""
    for axis in range(mask.ndim):
        yield np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))


def _share_near(labels: Labels, number: int, box: Box, organ: Labels, grid: Grid, near_mm: float) -> float:
    """The share of that lesion's voxels in the organ or at most `near_mm` from it; `box` is where the lesion lies."""
    reach = [int(near_mm / mm) + 1 for mm in grid.spacing_mm]
    around = tuple(slice(max(0, part.start - by), part.stop + by) for part, by in zip(box, reach, strict=True))
    lesion, nearby = labels[around] == number, organ[around] == 1
    inside = nearby[lesion]
    if inside.all() or not nearby.any():
        return float(inside.mean())
    apart_mm = distance_transform_edt(~nearby, sampling=grid.spacing_mm)
    return float(np.mean(apart_mm[lesion] <= near_mm))


def _share_of_body(ct: CtVolume, liver: _Liver) -> float:
    """Of the body's cross-section, in the slice with most liver."""
    k = int(np.argmax(liver.counts(0)))
    plane = liver.plane(k)
    body = (ct.voxels_hu[k] > BODY_HU) | plane
    return float(np.count_nonzero(plane) / np.count_nonzero(body))


def _fit(ct: CtVolume, liver: _Liver) -> tuple[float, str]:
    """How well the mask fits, at most 1, and which axes of it to reverse so that it fits far better, in words.

    A mask fits where its inside looks like liver and what lies just around it does not. No words where it fits
    best as it is, or nowhere: a bad segmentation is not a mirrored one.
    """
    near = _Near.of(liver, ct.grid)
    fits = {}
    for flip in product((False, True), repeat=3):
        reversed_hu = ct.voxels_hu[tuple(slice(None, None, -1 if turned else 1) for turned in flip)]
        hu = reversed_hu[near.places].ravel()
        fits[flip] = _contrast(hu[near.inside], hu[near.around])
    best = max(fits, key=lambda flip: (fits[flip], -sum(flip)))
    as_it_is = fits[False, False, False]
    if fits[best] < FITS or fits[best] - as_it_is < BETTER_BY:
        return as_it_is, ""
    return as_it_is, " and ".join(name for name, reversed_ in zip(_AXES, best, strict=True) if reversed_)


def _outlines_run_backwards(ct: CtVolume, liver: _Liver) -> bool:
    """Whether the mask's outlines follow the images far better with the slices in reverse order.

    What `_fit` does not tell where a liver changes little from slice to slice: only what lies a few millimetres inside
    and outside of each outline is looked at, in some slices.
    """
    filled = np.flatnonzero(liver.counts(0))
    slices = filled[np.unique(np.linspace(0, len(filled) - 1, _OUTLINES).astype(int))]
    reach = [ceil(_OUTLINE_MM / mm) + 1 for mm in ct.grid.spacing_mm[1:]]
    inside: list[Indices] = []
    outside: list[Indices] = []
    for k in slices:
        plane = liver.plane(k)
        (box,) = find_objects(plane.view(np.uint8))
        window = tuple(slice(max(0, part.start - by), part.stop + by) for part, by in zip(box, reach, strict=True))
        mask = plane[window]
        corner = [k, window[0].start, window[1].start]
        for part, found in ((mask, inside), (~mask, outside)):
            (near,) = part & _within(~part[None], ct.grid.spacing_mm, _OUTLINE_MM)
            found.append(np.insert(np.argwhere(near), 0, 0, axis=1) + corner)
    bands = np.concatenate(inside), np.concatenate(outside)
    as_it_is = [ct.voxels_hu[tuple(voxels.T)] for voxels in bands]
    backwards = [ct.voxels_hu[(liver.shape[0] - 1 - voxels[:, 0], voxels[:, 1], voxels[:, 2])] for voxels in bands]
    fits, fit = (_contrast(*hu) for hu in (backwards, as_it_is))
    return fits >= OUTLINES_FIT and fits - fit >= BETTER_BY


def _contrast(liver_hu: Hu, around_hu: Hu) -> float:
    """By how much more of the liver's voxels than of those around it are near the middle of the liver's, at most 1.

    A middle that no liver has is taken for the nearest that one can have.
    """
    known = liver_hu[np.isfinite(liver_hu)]
    if not len(known):
        return 0.0
    middle = np.clip(np.median(known), *LIVER_HU)
    inside, around = (
        float(np.mean(np.abs(voxels_hu - middle) <= WITHIN_HU)) if len(voxels_hu) else 0.0
        for voxels_hu in (liver_hu, around_hu)
    )
    return inside - around


def _on_the_left(ct: CtVolume, liver: _Liver) -> bool:
    """Whether most of the liver lies left of the body's middle (LPS: x grows to the left).

    Not judged where the body reaches a side of the images.
    """
    directions = np.abs(ct.grid.affine_lps_mm[:3, :3] / ct.grid.spacing_mm)
    across = int(np.argmax(directions[0]))
    along = max((axis for axis in range(3) if axis != across), key=lambda axis: directions[2, axis])
    level = int(np.argmax(liver.counts(along)))
    body = np.moveaxis(ct.voxels_hu, along, 0)[level] > BODY_HU  # the cross-section of the body with most liver
    over = 1 if across < 3 - across - along else 0
    there = np.flatnonzero(body.any(axis=over))
    if not len(there) or body.mean(axis=over)[[0, -1]].max() >= CUT_BODY:
        return False  # nobody knows where the middle of a body is whose side was not scanned
    middle = np.average(np.arange(liver.shape[across]), weights=liver.counts(across))
    beyond = middle - (there[0] + there[-1]) / 2
    return bool(beyond * ct.grid.affine_lps_mm[0, across] > 0)
