from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import made_findings as made
import numpy as np
import pytest
from PIL import Image

from salsa_node import codes, picture
from salsa_node.criteria import Criteria
from salsa_node.findings import Findings, measure
from salsa_node.pipelines import Masks
from salsa_node.volume import CtVolume, Grid, LabelVolume

SPACING_MM = (2.5, 0.9, 1.1)


def scene(grid: Grid | None = None) -> tuple[CtVolume, LabelVolume, LabelVolume]:
    """A patient of uneven brightness with one large and one small lesion: CT, liver, lesions."""
    grid = grid or made.grid("axial", SPACING_MM)
    _, r, c = np.indices(grid.shape)
    hu = (4 * r + 3 * c - 120).astype(np.int16)  # brighter to the back and to the left
    organ = made.boxes(grid, (slice(2, 18), slice(5, 44), slice(4, 36)))
    return CtVolume(hu, grid), organ, made.boxes(grid, made.MEASURABLE_BOX, made.SMALL_BOX)


def found(ct: CtVolume, organ: LabelVolume | None, lesions: LabelVolume) -> Findings:
    return measure(ct, Masks(organ, lesions, made.PROVENANCE), Criteria())


def drawn(path: Path, ct: CtVolume, findings: Findings, truth: LabelVolume | None = None) -> np.ndarray:
    picture.overlay(ct, findings, path, truth)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def stored_otherwise(ct: CtVolume, *labels: LabelVolume, axes: tuple[int, int, int], flips: tuple[int, ...]):
    """The same patient with the array's axes permuted and flipped, the affine with them."""
    move = np.eye(4)
    for new, old in enumerate(axes):
        move[:3, new] = np.eye(3)[old] * (-1 if new in flips else 1)
        if new in flips:
            move[:3, 3] += np.eye(3)[old] * (ct.grid.shape[old] - 1)

    def again(array):
        return np.ascontiguousarray(np.flip(array.transpose(axes), flips))

    shape = tuple(ct.grid.shape[a] for a in axes)
    grid = Grid(shape, ct.grid.affine_lps_mm @ move, ct.grid.frame_of_reference_uid)
    return CtVolume(again(ct.voxels_hu), grid), *(LabelVolume(again(m.labels), grid) for m in labels)


@pytest.mark.parametrize("flips", [(), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1)])
def test_the_same_slice_looks_the_same_however_it_is_stored(tmp_path, axes, flips):
    ct, organ, lesions = scene()
    usual = drawn(tmp_path / "usual.png", ct, found(ct, organ, lesions))
    ct, organ, lesions = stored_otherwise(ct, organ, lesions, axes=axes, flips=flips)
    other = drawn(tmp_path / "other.png", ct, found(ct, organ, lesions))
    assert other.shape == usual.shape
    # equal but for the texts: the same diameter may be found from its other end, or along the other diagonal
    assert (np.abs(other - usual).max(axis=2) > 12).mean() < 0.02


def tile_view(ct: CtVolume, findings: Findings) -> picture._View:
    return picture._View.of(ct.grid, picture._shown(ct.grid, findings, None), picture._TILE_PX)


def test_right_is_left_and_front_is_up():
    ct, _, _ = scene()
    findings = found(ct, None, made.boxes(ct.grid, (slice(9, 10), slice(20, 21), slice(20, 21))))
    view = tile_view(ct, findings)
    assert view.letters == ("R", "L", "A", "P")
    tile = np.asarray(view.show(np.indices(ct.grid.shape)[2][0].astype(np.uint8), Image.Resampling.NEAREST))
    assert tile[0, 0] < tile[0, -1]  # columns grow to the patient's left, on the right of the screen
    sagittal = made.grid("sagittal")
    assert picture._View.of(sagittal, (slice(0, 48), slice(0, 40)), picture._TILE_PX).letters == ("A", "P", "H", "F")
    coronal = made.grid("coronal")
    assert picture._View.of(coronal, (slice(0, 48), slice(0, 40)), picture._TILE_PX).letters == ("R", "L", "H", "F")


def test_pixels_keep_their_proportions():
    view = picture._View.of(made.grid("axial", SPACING_MM), (slice(0, 48), slice(0, 40)), picture._TILE_PX)
    width, height = view.size_px
    assert width / height == pytest.approx(40 * 1.1 / (48 * 0.9), abs=0.01)
    assert max(width, height) == picture._TILE_PX


@pytest.mark.parametrize("orientation", made.ORIENTATIONS)
def test_a_point_of_the_slice_is_drawn_where_its_voxel_is(orientation):
    grid = made.grid(orientation, SPACING_MM)
    view = picture._View.of(grid, (slice(3, 45), slice(2, 38)), picture._TILE_PX)
    plane = np.zeros(grid.shape[1:], dtype=bool)
    plane[30, 7] = True
    rows, columns = np.nonzero(view.mask(plane))
    x, y = view.at(grid, grid.to_lps_mm((4, 30, 7)))
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((x, y), abs=1.0)


def test_lesions_are_outlined_in_the_colour_of_their_class(tmp_path):
    ct, organ, lesions = scene()
    pixels = drawn(tmp_path / "p.png", ct, found(ct, organ, lesions))
    tiles = pixels[: picture._TILE_PX + 6]

    def count(rgb):
        return int((tiles == rgb).all(axis=2).sum())

    assert count(codes.MEASURABLE_RGB) > 300
    assert count(codes.NON_MEASURABLE_RGB) > 60
    assert count(picture.ORGAN_RGB) > 1000
    assert count(picture.TRUTH_RGB) == 0
    with_truth = drawn(tmp_path / "t.png", ct, found(ct, None, made.boxes(ct.grid, made.MEASURABLE_BOX)), lesions)
    tiles = with_truth[: picture._TILE_PX + 6]
    assert count(picture.TRUTH_RGB) > 60
    assert count(picture.ORGAN_RGB) == 0


def test_the_caliper_ends_on_the_lesions_edge(tmp_path):
    ct, organ, lesions = scene()
    findings = found(ct, organ, lesions)
    view = tile_view(ct, findings)
    lesion = findings.lesions[0]
    rows, columns = np.nonzero(view.mask(findings.lesion_labels.labels[lesion.slice_index] == 1))
    corners = {(x, y) for x in (columns.min(), columns.max() + 1) for y in (rows.min(), rows.max() + 1)}
    for point in (lesion.long_axis.start_lps_mm, lesion.long_axis.end_lps_mm):
        x, y = view.at(ct.grid, point)
        assert min(abs(x - cx) + abs(y - cy) for cx, cy in corners) < 2.0


@pytest.mark.parametrize("axis", ["long_axis", "short_axis"])
def test_a_key_image_draws_both_diameters(axis):
    ct, organ, lesions = scene()
    findings = found(ct, organ, lesions)
    view = picture._View.of(ct.grid, (slice(0, 48), slice(0, 40)), picture._KEY_PX)
    drawn_line = getattr(findings.lesions[0], axis)
    pixels = np.asarray(picture.key_image(ct, findings, findings.lesions[0].slice_index)).astype(int)
    start, end = (np.array(view.at(ct.grid, p)) for p in (drawn_line.start_lps_mm, drawn_line.end_lps_mm))
    for share in (0.2, 0.4, 0.6, 0.8):
        x, y = (start + share * (end - start) + picture._GAP_PX).round().astype(int)
        assert (pixels[y - 2 : y + 3, x - 2 : x + 3] == picture.CALIPER_RGB).all(axis=2).any()


def test_a_slice_with_many_lesions_is_one_key_image():
    ct, organ, _ = scene()
    many = made.boxes(ct.grid, *((slice(k, k + 1), slice(r, r + 2), slice(5, 8)) for k in (3, 9) for r in (5, 9, 13)))
    findings = found(ct, organ, many)
    assert len(findings.lesions) == 6
    assert sorted(picture.key_slices(findings, 10)) == [3, 9]
    ct, organ, lesions = scene()
    assert picture.key_slices(found(ct, organ, lesions), 1) == [5]


def test_no_text_is_written_on_another_nor_on_a_lesion():
    boxes = [np.array([x, y, x + 12.0, y + 12.0]) for x in range(300, 500, 40) for y in range(300, 580, 35)]
    assert len(boxes) == 40
    size = (80.0, 20.0)
    places = picture._apart(boxes, [size] * len(boxes), (720, 720), 15)
    for n, place in enumerate(places):
        assert (place[:2] >= 15).all()
        assert (place[2:] <= (705, 690)).all()
        assert place[2:] - place[:2] == pytest.approx(size)
        for other in [*places[:n], *boxes]:
            assert picture._overlaps(place[None], other)[0] == 0


def test_a_text_stands_right_of_its_lesion_where_there_is_room():
    near, at_the_edge = np.array([100.0, 100, 140, 130]), np.array([650.0, 300, 700, 330])
    (beside,) = picture._apart([near], [(80.0, 20.0)], (720, 720), 15)
    assert beside.tolist() == [145, 105, 225, 125]
    (left,) = picture._apart([at_the_edge], [(80.0, 20.0)], (720, 720), 15)
    assert left[2] < 650


def test_a_crowd_of_lesions_has_numbers_without_lengths(monkeypatch):
    ct, organ, _ = scene()
    texts: list[str] = []
    monkeypatch.setattr(picture, "_labels", lambda draw, found, view: texts.extend(text.words for text in found))
    crowd = made.boxes(
        ct.grid, *((slice(3, 4), slice(r, r + 1), slice(c, c + 1)) for r in range(5, 41, 3) for c in (6, 9))
    )
    picture.mosaic(ct, found(ct, organ, crowd))
    assert "L24 1.4 mm" in texts
    texts.clear()
    view = picture._View.of(ct.grid, (slice(0, 48), slice(0, 40)), picture._TILE_PX, picture._TEXT_PX[3])
    picture._tile(ct, found(ct, organ, crowd), None, view, 3)
    assert texts == [f"L{n}" for n in range(1, 25)]


def test_slices_come_by_size_then_what_was_missed():
    ct, organ, lesions = scene()
    assert picture._slices(found(ct, organ, lesions), None, 20) == [5, 14]
    only_small = found(ct, organ, made.boxes(ct.grid, made.SMALL_BOX))
    assert picture._slices(only_small, lesions, 20) == [14, 5]
    nothing = found(ct, organ, made.boxes(ct.grid))
    assert picture._slices(nothing, None, 20) == [2]  # where the liver is largest
    assert picture._slices(replace(nothing, organ=None), None, 20) == [10]


def test_never_more_than_six_slices():
    ct, _, _ = scene()
    many = made.boxes(ct.grid, *((slice(2 * n, 2 * n + 1), slice(5, 9), slice(5, 9)) for n in range(9)))
    assert len(picture._slices(found(ct, None, many), None, 20)) == 6


def test_nothing_found_still_makes_a_picture(tmp_path):
    ct, _, _ = scene()
    pixels = drawn(tmp_path / "p.png", ct, found(ct, None, made.boxes(ct.grid)))
    assert pixels.shape[0] > 300


def test_labels_on_another_grid_are_refused(tmp_path):
    ct, organ, lesions = scene()
    with pytest.raises(ValueError, match="another grid"):
        picture.overlay(ct, found(ct, organ, lesions), tmp_path / "p.png", made.boxes(made.grid("sagittal")))
    assert not (tmp_path / "p.png").exists()


def test_a_tile_names_its_image_as_the_pacs_does(monkeypatch):
    told = []
    monkeypatch.setattr(picture, "_edges", lambda draw, view, caption: told.append(caption))
    ct, _, lesions = scene()
    findings = found(ct, None, lesions)
    k, slices = findings.lesions[0].slice_index, ct.grid.shape[0]
    numbered = replace(findings, image_numbers=tuple(range(286, 286 - slices, -1)))
    for one in (findings, numbered):
        picture.key_image(ct, one, k)
    assert told == [f"slice {k + 1} of {slices}", f"image {286 - k}"]
