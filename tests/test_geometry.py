"""Whatever way the slices lie, results lie where the lesions lie: judged from the objects' own headers."""

from __future__ import annotations

from itertools import permutations, product

import made_findings as made
import numpy as np
import pytest
from pydicom.dataset import Dataset
from test_dicom_seg import positions
from test_dicom_viewer_sr import on_the_image

from salsa_node import codes, dicom_seg, dicom_viewer_sr, uids
from salsa_node.dicom_result import Identity
from salsa_node.findings import Findings
from salsa_node.volume import Grid

IDENTITY = Identity()
#: every way in which (slice, row, column) can run along the patient's axes: 6 orders times 8 directions
WAYS = [(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]
SPACINGS_MM = [(0.3, 0.3, 0.3), (10.0, 0.5, 0.5), (1.0, 3.5, 2.5), (5.0, 0.7, 1.4), (2.5, 10.0, 0.3)]


def lying(directions: np.ndarray, spacing_mm: tuple[float, float, float]) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing_mm)
    affine[:3, 3] = (-31.5, 12.25, -400.75)
    return Grid(made.SHAPE, affine, uids.derive("made", "frame"))


def check_segments(grid: Grid) -> None:
    """The centroid of each segment, by the standard's formula, lies within half a voxel of where it was drawn."""
    source = made.headers(grid, instance_numbers="falling")
    findings = made.findings(grid, source, made.MEASURABLE_BOX, made.SMALL_BOX)
    (seg,) = dicom_seg.build_lesions(findings, source, IDENTITY, made.PRODUCED_AT)
    for lesion in findings.lesions:
        box = made.MEASURABLE_BOX if lesion.number == 1 else made.SMALL_BOX
        middle = [(part.start + part.stop - 1) / 2 for part in box]
        truth = grid.affine_lps_mm @ np.array([*middle, 1.0])
        apart = np.linalg.solve(grid.affine_lps_mm[:3, :3], positions(seg, lesion.number).mean(axis=0) - truth[:3])
        assert np.abs(apart).max() < 0.5  # voxels; in fact about the rounding of a decimal string
        assert np.abs(apart).max() < 1e-3
    check_axes(findings, source)


def check_axes(findings: Findings, source: list[Dataset]) -> None:
    """Each end point lies on the lesion's edge, in the slice it names: a corner of a voxel of it, or on its hull."""
    report = dicom_viewer_sr.build(findings, source, IDENTITY, made.PRODUCED_AT)
    assert report is not None
    labels = findings.lesion_labels
    groups = next(
        i.ContentSequence for i in report.ContentSequence
        if i.ConceptNameCodeSequence[0].CodeValue == codes.IMAGING_MEASUREMENTS.value
    )  # fmt: skip
    for lesion, group in zip(findings.lesions, groups, strict=True):
        lines = [i for i in group.ContentSequence if i.ValueType == "NUM"]
        assert len(lines) == 2
        for number in lines:
            image, points = on_the_image(number.ContentSequence[0], source)
            k = next(n for n, ds in enumerate(source) if ds is image)
            mask = labels.labels[k] == lesion.number
            assert mask.any()
            rows, columns = np.nonzero(mask)
            for point in points:
                slice_, row, column = labels.grid.to_index(tuple(point))
                assert slice_ == pytest.approx(k, abs=1e-3)
                # the drawn lesions are boxes: their edge is half a voxel outside the outermost voxel centres
                outside = max(rows.min() - row, row - rows.max(), columns.min() - column, column - columns.max())
                assert outside == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    "way", WAYS, ids=lambda way: "".join(f"{'+-'[s < 0]}{'xyz'[a]}" for a, s in zip(*way, strict=True))
)
def test_every_permutation_and_flip(way):
    order, signs = way
    directions = np.zeros((3, 3))
    for axis, (along, sign) in enumerate(zip(order, signs, strict=True)):
        directions[along, axis] = sign
    check_segments(lying(directions, (2.5, 0.9, 1.1)))


@pytest.mark.parametrize("spacing_mm", SPACINGS_MM)
@pytest.mark.parametrize("orientation", ["axial", "feet first, turned over", "negated column cosines", "oblique"])
def test_every_spacing(orientation, spacing_mm):
    check_segments(made.grid(orientation, spacing_mm))
