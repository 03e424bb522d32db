"""A CT on the device as TotalSegmentator's image: its own functions find the same numbers, to the last bit."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from pretended_gpu import DEVICE, pretended_gpu
from scipy import ndimage
from totalsegmentator.alignment import undo_canonical
from totalsegmentator.cropping import crop_to_mask
from totalsegmentator.resampling import change_spacing

from salsa_node.errors import SeriesRejected
from salsa_node.pipelines import scan
from salsa_node.pipelines.scan import Box, Scan, image_of, nearest
from salsa_node.volume import CtVolume, Grid

CPU = torch.device("cpu")
SHAPE = (23, 41, 37)
#: where (slice, row, column) grow to in LPS, in columns: axial, axial upside down and prone, coronal, sagittal, tilted
AXES = {
    "axial": [[0, 0, 1], [0, 1, 0], [1, 0, 0]],
    "prone from the head": [[0, 0, -1], [0, -1, 0], [-1, 0, 0]],
    "coronal": [[0, 0, 1], [1, 0, 0], [0, -1, 0]],
    "sagittal": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
    "tilted": [[0, 0.1, 1], [0, 1, -0.1], [1, 0, 0]],
}


def scanned(axes: str, spacing_mm: tuple[float, float, float], dtype: type[np.generic] = np.int16) -> CtVolume:
    """Noise on that grid; `spacing_mm` along (slice, row, column)."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(AXES[axes], dtype=np.float64).T * spacing_mm
    if axes != "tilted":
        affine[:3, :3] = np.array(AXES[axes], dtype=np.float64) * spacing_mm
    affine[:3, 3] = (-80.5, 33.25, 7)
    noise = np.random.default_rng(5).normal(0, 300, SHAPE)
    noise[:4] = -1000  # what is flat must stay flat
    return CtVolume(noise.astype(dtype), Grid(SHAPE, affine))


def by_totalsegmentator(
    ct: CtVolume, spacing_mm: tuple[float, float, float], box: Box | None
) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """The image that is turned, or its box, and the same at that spacing, by TotalSegmentator's functions."""
    image = image_of(ct)
    if box is not None:
        mask = np.zeros(image.shape, dtype=np.uint8)
        mask[box] = 1
        image, _ = crop_to_mask(image, nib.Nifti1Image(mask, image.affine), dtype=np.int32)
    turned = nib.as_closest_canonical(image)
    return image, change_spacing(turned, list(spacing_mm), order=1, dtype=np.int32)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("box", [None, (slice(3, 30), slice(0, 41), slice(5, 20))])
@pytest.mark.parametrize("wanted_mm", [(1.5, 1.5, 1.5), (3.0, 3.0, 3.0), (0.7, 4.0, 1.1)])
def test_another_spacing_is_totalsegmentators_to_the_last_bit(
    axes: str, box: Box | None, wanted_mm: tuple[float, float, float]
) -> None:
    ct = scanned(axes, (2.5, 0.8, 1.3))
    if box is not None:
        box = tuple(
            slice(side.start, min(side.stop, count)) for side, count in zip(box, ct.voxels_hu.shape[::-1], strict=True)
        )
    _, expected = by_totalsegmentator(ct, wanted_mm, box)
    found, spacing_mm = Scan(ct, CPU).at_spacing(wanted_mm, box)
    assert np.array_equal(found, np.asarray(expected.dataobj))
    assert spacing_mm == tuple(map(float, expected.header.get_zooms()))
    assert found.dtype == np.float32


@pytest.mark.parametrize("at_once", [1, 2000])
def test_slab_by_slab_is_the_same(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan of 400 slices takes many slabs; this one is a single one unless it is told otherwise."""
    ct = scanned("prone from the head", (2.5, 0.8, 1.3))
    _, expected = by_totalsegmentator(ct, (1.5, 1.5, 1.5), None)
    monkeypatch.setattr(scan, "_AT_ONCE", at_once)
    found, _ = Scan(ct, CPU).at_spacing((1.5, 1.5, 1.5), None)
    assert np.array_equal(found, np.asarray(expected.dataobj))


@pytest.mark.parametrize("box", [None, (slice(0, 37), slice(0, 41), slice(0, 23))])
def test_shares_of_a_unit_are_cut_off_before_in_a_box_and_after_in_the_whole(box: Box | None) -> None:
    ct = scanned("axial", (2.5, 0.8, 1.3), np.float32)
    _, expected = by_totalsegmentator(ct, (3.0, 3.0, 3.0), box)
    found, _ = Scan(ct, CPU).at_spacing((3.0, 3.0, 3.0), box)
    assert np.array_equal(found, np.asarray(expected.dataobj))
    whole = Scan(ct, CPU).at_spacing((3.0, 3.0, 3.0), None)[0]
    assert np.array_equal(found, whole) == (box is None)


@pytest.mark.parametrize("axes", ["axial", "prone from the head", "sagittal"])
@pytest.mark.parametrize("box", [None, (slice(2, 20), slice(1, 22), slice(3, 20))])
def test_what_has_the_spacing_stays_what_it_is(axes: str, box: Box | None) -> None:
    ct = scanned(axes, (1.5, 1.5, 1.5), np.float32)
    _, expected = by_totalsegmentator(ct, (1.5, 1.5, 1.5), box)
    found, spacing_mm = Scan(ct, CPU).at_spacing((1.5, 1.5, 1.5), box)
    assert np.array_equal(found, np.asarray(expected.dataobj).astype(np.float32))
    assert spacing_mm == (1.5, 1.5, 1.5)


def test_the_interpolation_is_scipys_at_any_size() -> None:
    dice = np.random.default_rng(1)
    for _ in range(200):
        shape, zoom = dice.integers(1, 30, 3), dice.uniform(0.2, 2.5, 3)
        hu = dice.integers(-1024, 3000, shape).astype(np.int16)
        expected = ndimage.zoom(hu.astype(np.float64), zoom, mode="nearest", order=1).astype(np.int32)
        if 0 in expected.shape:
            continue
        ct = CtVolume(hu, Grid(tuple(shape), np.eye(4)))
        scan = Scan(ct, CPU)
        found = scan._linear(torch.from_numpy(hu.copy()), list(expected.shape), whole=False)
        flips = tuple(axis for axis, flipped in enumerate(scan._flipped) if flipped)
        again = ndimage.zoom(np.flip(hu, flips).astype(np.float64), zoom, mode="nearest", order=1).astype(np.int32)
        assert np.array_equal(found, again)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("box", [None, (slice(2, 20), slice(1, 22), slice(3, 20))])
def test_labels_come_back_to_the_voxels_they_were_seen_in(axes: str, box: Box | None) -> None:
    ct = scanned(axes, (2.5, 0.8, 1.3))
    crop, coarse = by_totalsegmentator(ct, (3.0, 3.0, 3.0), box)
    labels = np.random.default_rng(2).integers(0, 9, coarse.shape).astype(np.uint8)
    turned = nib.as_closest_canonical(crop)
    fine = ndimage.zoom(labels, np.array(turned.shape) / labels.shape, order=0, mode="nearest")
    expected = np.zeros(image_of(ct).shape, dtype=np.uint8)
    sides = (slice(None),) * 3 if box is None else box
    expected[sides] = np.asarray(undo_canonical(nib.Nifti1Image(fine, turned.affine), crop).dataobj)
    scan = Scan(ct, CPU)
    found = scan.brought_back(labels, box)
    assert np.array_equal(found, expected)
    assert np.array_equal(scan.labelled(found).labels, expected.transpose(2, 1, 0))
    assert scan.labelled(found).grid is ct.grid


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("spacing_mm", [(2.5, 0.8, 0.8), (2.0, 0.7, 3.0), (5.0, 6.4, 6.4), (4.0, 5.0, 5.0)])
def test_the_box_around_the_liver_is_totalsegmentators(axes: str, spacing_mm: tuple[float, float, float]) -> None:
    ct = scanned(axes, spacing_mm)
    scan = Scan(ct, CPU)
    seen = np.zeros(scan.at_spacing((3.0, 3.0, 3.0), None)[0].shape, dtype=bool)
    middle = tuple(count // 2 for count in seen.shape)
    blob = np.random.default_rng(3).random((3, 4, 5)) > 0.8
    seen[tuple(slice(at, at + side) for at, side in zip(middle, blob.shape, strict=True))] = blob
    image = image_of(ct)
    mask = nib.Nifti1Image(scan.brought_back(seen.astype(np.uint8), None), image.affine)
    crop, bounds = crop_to_mask(image, mask, addon=[20] * 3, dtype=np.int32)
    box = scan.box_around(seen)
    assert box is not None
    assert [[one.start, one.stop] for one in box] == bounds
    assert crop.shape == tuple(one.stop - one.start for one in box)


def test_nothing_has_no_box() -> None:
    assert Scan(scanned("axial", (2.5, 0.8, 1.3)), CPU).box_around(np.zeros((5, 6, 7), dtype=bool)) is None


@pytest.mark.parametrize("shape", [(7, 12, 30), (1, 5, 9), (24, 3, 1)])
@pytest.mark.parametrize("wanted", [(20, 31, 17), (1, 2, 1), (9, 64, 50)])
def test_labels_come_back_as_scipy_zooms_them(shape: tuple[int, int, int], wanted: tuple[int, int, int]) -> None:
    labels = np.random.default_rng(1).integers(0, 200, shape).astype(np.uint8)
    expected = ndimage.zoom(labels, np.array(wanted) / shape, order=0, mode="nearest")
    assert np.array_equal(nearest(labels, wanted), expected)


def test_voxels_that_torch_cannot_take_as_they_lie_are_taken_all_the_same() -> None:
    ct = scanned("axial", (2.5, 0.8, 1.3))
    expected = Scan(ct, CPU).at_spacing((3.0, 3.0, 3.0), None)[0]
    backwards = ct.voxels_hu[::-1].copy()[::-1]
    locked = ct.voxels_hu.copy()
    locked.flags.writeable = False
    for voxels in (backwards, locked):
        found = Scan(CtVolume(voxels, ct.grid), CPU).at_spacing((3.0, 3.0, 3.0), None)[0]
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_voxel_that_is_no_number_is_refused(odd: float) -> None:
    ct = scanned("axial", (2.5, 0.8, 1.3), np.float32)
    voxels = ct.voxels_hu.copy()
    voxels[3, 4, 5] = odd
    with pytest.raises(SeriesRejected, match="not finite"):
        Scan(CtVolume(voxels, ct.grid), CPU)


def test_a_gpu_computes_the_same_and_gets_the_scan_once() -> None:
    ct = scanned("prone from the head", (2.5, 0.8, 1.3))
    box = (slice(2, 20), slice(1, 22), slice(3, 20))
    here = Scan(ct, CPU)
    expected = [here.at_spacing((3.0, 3.0, 3.0), where)[0] for where in (None, box)]
    with pretended_gpu(1) as gpu:
        there = Scan(ct, DEVICE)
        found = [there.at_spacing((3.0, 3.0, 3.0), where)[0] for where in (None, box)]
        assert there._voxels.device == DEVICE
        assert gpu.page_locked == 1
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_gpu_without_room_leaves_it_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ct = scanned("axial", (2.5, 0.8, 1.3))
    expected = Scan(ct, CPU).at_spacing((3.0, 3.0, 3.0), None)[0]
    with pretended_gpu(1):
        scan, tries = Scan(ct, DEVICE), []
        linear = scan._linear

        def full(voxels: torch.Tensor, shape: list[int], *, whole: bool) -> np.ndarray:
            tries.append(voxels.device)
            if voxels.device == DEVICE:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return linear(voxels, shape, whole=whole)

        monkeypatch.setattr(scan, "_linear", full)
        assert np.array_equal(scan.at_spacing((3.0, 3.0, 3.0), None)[0], expected)
        assert tries == [DEVICE, CPU]

        def no_room(*_: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr("salsa_node.pipelines.scan.sent", no_room)
        assert Scan(ct, DEVICE)._voxels.device == CPU


def test_a_gpu_without_room_for_what_has_the_spacing_leaves_it_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ct = scanned("prone from the head", (1.5, 1.5, 1.5))
    expected = Scan(ct, CPU).at_spacing((1.5, 1.5, 1.5), None)[0]
    flip, tried = torch.flip, []

    def full(voxels: torch.Tensor, axes: list[int]) -> torch.Tensor:
        tried.append(voxels.device)
        if voxels.device == DEVICE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return flip(voxels, axes)

    with pretended_gpu(1):
        scan = Scan(ct, DEVICE)
        monkeypatch.setattr(torch, "flip", full)
        assert np.array_equal(scan.at_spacing((1.5, 1.5, 1.5), None)[0], expected)
    assert tried == [DEVICE, CPU]


def test_another_fault_of_a_gpu_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("salsa_node.pipelines.scan.sent", broken)
    with pretended_gpu(1), pytest.raises(RuntimeError, match="illegal memory access"):
        Scan(scanned("axial", (2.5, 0.8, 1.3)), DEVICE)
