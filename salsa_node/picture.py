"""Findings -> pictures: the slices where the lesions are, outlined, with their calipers.

Tiles are shown as a radiologist expects them, whatever the order on disk: an axial slice has the
patient's right on the left and anterior at the top; pixels are drawn in their true proportions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from salsa_node.codes import MEASURABLE_RGB, NON_MEASURABLE_RGB
from salsa_node.dicom_result import caveat, plain
from salsa_node.findings import Disease, Findings, Lesion, lengths_mm
from salsa_node.volume import CtVolume, Grid, LabelVolume, PointMm

Rgb = tuple[int, int, int]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Box = tuple[slice, slice]

WINDOW_HU: Final = (-141.0, 261.0)  # SALSA's own window
ORGAN_RGB: Final = (96, 176, 96)
TRUTH_RGB: Final = (0, 200, 255)
CALIPER_RGB: Final = (255, 255, 255)

_TILES = 6
_COLUMNS = 3
_TILE_PX = 480  # the longer side of a tile
_KEY_PX = 720  # of a key image
_GAP_PX = 6
_MARGIN_MM = 25.0  # around the liver
_TEXT_PX: Final = {1: 15, 2: 20, 3: 24}  # by the columns of tiles: more of them are shown smaller, on a page
_LENGTHS: Final = 1.0  # so many lesions per width of a letter have room for their length beside their number
_INK: Final = (235, 235, 235)
# Normal of the slice plane along x, y or z -> where (right, down) of the screen point in the patient.
_SCREEN: Final = {
    0: (np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, -1.0])),
    1: (np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, -1.0])),
    2: (np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])),
}
_LETTERS: Final = (("R", "L"), ("A", "P"), ("F", "H"))  # at the low and the high end of x, y, z


def overlay(ct: CtVolume, findings: Findings, path: Path, truth: LabelVolume | None = None) -> None:
    """Write the picture that `mosaic` draws to `path` (PNG)."""
    mosaic(ct, findings, truth).save(path, format="PNG")


def mosaic(ct: CtVolume, findings: Findings, truth: LabelVolume | None = None) -> Image.Image:
    """The slices where the lesions are, side by side.

    Up to six slices: those of the lesions, largest first, then those of truth lesions that were
    missed; without any, the slice with most liver. truth: 0 = background, on the same grid.
    Raises ValueError where the grids differ.
    """
    for labels in (findings.lesion_labels, findings.organ, truth):
        if labels is not None and not labels.grid.matches(ct.grid):
            raise ValueError(f"labels of shape {labels.grid.shape} lie on another grid than the CT {ct.grid.shape}")
    slices = _slices(findings, truth, ct.grid.shape[0])
    text_px = _TEXT_PX[min(_COLUMNS, len(slices))]
    view = _View.of(ct.grid, _shown(ct.grid, findings, truth), _TILE_PX, text_px)
    tiles = [_tile(ct, findings, truth, view, k) for k in slices]
    captions = [
        caveat(findings.provenance),
        *([plain(findings.provenance.notice)] if findings.provenance.notice else []),
    ]
    return _mosaic(tiles, captions, _legend(findings, truth), text_px)


def key_slices(findings: Findings, most: int) -> list[int]:
    """The slices that are worth a key image, each once: where the diameters of the lesions lie, the largest first.

    most: slices at most.
    """
    return _of_lesions(findings)[:most]


def key_image(ct: CtVolume, findings: Findings, slice_index: int, about: str = "") -> Image.Image:
    """The whole slice, the contours of every lesion in it and the calipers of those measured there drawn in.

    Words of caution stand below, and `about`: of which series it is.
    """
    rows, columns = ct.grid.shape[1:]
    view = _View.of(ct.grid, (slice(0, rows), slice(0, columns)), _KEY_PX)
    tile = _tile(ct, findings, None, view, slice_index)
    said = " ".join(part for part in (caveat(findings.provenance), plain(findings.provenance.notice)) if part)
    captions = [plain(words) for words in (about, said) if words]
    return _mosaic([tile], captions, _legend(findings, None), view.text_px)


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """How a slice becomes a tile: which part, turned how, drawn how large.

    box: (rows, columns) of the slice that are shown. turned: rows run across the screen.
    flip_right, flip_down: reverse the tile after turning. size_px: (width, height).
    letters: what lies at the left, right, top and bottom edge. text_px: how high they are.
    """

    box: Box
    turned: bool
    flip_right: bool
    flip_down: bool
    size_px: tuple[int, int]
    letters: tuple[str, str, str, str]
    text_px: int

    @classmethod
    def of(cls, grid: Grid, box: Box, longer_side_px: int, text_px: int = _TEXT_PX[1]) -> _View:
        down, across = grid.affine_lps_mm[:3, 1], grid.affine_lps_mm[:3, 2]
        right_lps, down_lps = _SCREEN[int(np.argmax(np.abs(np.cross(across, down))))]
        turned = bool(abs(down @ right_lps) / np.linalg.norm(down) > abs(across @ right_lps) / np.linalg.norm(across))
        if turned:
            down, across = across, down
        flip_right, flip_down = bool(across @ right_lps < 0), bool(down @ down_lps < 0)
        lengths_mm = [
            (part.stop - part.start) * mm for part, mm in zip(box, grid.spacing_mm[1:], strict=True)
        ]  # of the rows' stack, of the columns' stack
        height_mm, width_mm = reversed(lengths_mm) if turned else lengths_mm
        scale = longer_side_px / max(width_mm, height_mm)
        right = across * (-1 if flip_right else 1)
        below = down * (-1 if flip_down else 1)
        return cls(
            box=box,
            turned=turned,
            flip_right=flip_right,
            flip_down=flip_down,
            size_px=(max(1, round(width_mm * scale)), max(1, round(height_mm * scale))),
            letters=(_end(-right), _end(right), _end(-below), _end(below)),
            text_px=text_px,
        )

    def show(self, plane: npt.NDArray[np.uint8], resample: Image.Resampling) -> Image.Image:
        """(rows, columns) of a whole slice -> the tile's grey picture."""
        part = plane[self.box]
        part = part.T if self.turned else part
        part = part[:: -1 if self.flip_down else 1, :: -1 if self.flip_right else 1]
        return Image.fromarray(np.ascontiguousarray(part)).resize(self.size_px, resample)

    def mask(self, plane: Mask) -> Mask:
        """(rows, columns) of a whole slice -> (height, width) of the tile."""
        shown = self.show(plane.astype(np.uint8) * 255, Image.Resampling.NEAREST)
        return np.asarray(shown) > 127

    def at(self, grid: Grid, point_lps_mm: PointMm) -> tuple[float, float]:
        """Where a point of the slice lies on the tile: (x, y) in pixels from its upper left corner."""
        _, row, column = grid.to_index(point_lps_mm)
        rows, columns = self.box
        along = (column + 0.5 - columns.start) / (columns.stop - columns.start)
        below = (row + 0.5 - rows.start) / (rows.stop - rows.start)
        if self.turned:
            along, below = below, along
        along = 1 - along if self.flip_right else along
        below = 1 - below if self.flip_down else below
        return along * self.size_px[0], below * self.size_px[1]


def _end(direction: npt.NDArray[np.float64]) -> str:
    """The letter of the patient's side that a direction points to."""
    axis = int(np.argmax(np.abs(direction)))
    return _LETTERS[axis][int(direction[axis] > 0)]


def _shown(grid: Grid, findings: Findings, truth: LabelVolume | None) -> Box:
    """The rows and columns around liver and lesions, with a margin; all of them where there is neither."""
    seen = findings.lesion_labels.labels.any(axis=0)
    for labels in (findings.organ, truth):
        if labels is not None:
            seen = seen | labels.labels.any(axis=0)
    if not seen.any():
        return slice(0, grid.shape[1]), slice(0, grid.shape[2])
    rows, columns = (
        slice(max(0, hits.min() - margin), min(n, hits.max() + 1 + margin))
        for hits, margin, n in zip(
            np.nonzero(seen), (ceil(_MARGIN_MM / mm) for mm in grid.spacing_mm[1:]), grid.shape[1:], strict=True
        )
    )
    return rows, columns


def _slices(findings: Findings, truth: LabelVolume | None, slices: int) -> list[int]:
    wanted = _of_lesions(findings)
    if truth is not None:
        wanted += _missed(findings, truth)
    if not wanted:
        area = findings.organ.labels.sum(axis=(1, 2)) if findings.organ is not None else np.zeros(slices)
        wanted = [int(np.argmax(area)) if area.any() else slices // 2]
    return list(dict.fromkeys(wanted))[:_TILES]


def _of_lesions(findings: Findings) -> list[int]:
    """The slices where diameters lie, each once, that of the longest one first."""
    by_size = sorted(findings.lesions, key=lambda lesion: -lesion.long_axis.length_mm)
    return list(dict.fromkeys(lesion.slice_index for lesion in by_size))


def _missed(findings: Findings, truth: LabelVolume) -> Iterable[int]:
    """For each truth lesion that no finding touches, the slice where it is largest."""
    values = np.unique(truth.labels)
    found = set(np.unique(truth.labels[findings.lesion_labels.labels > 0]).tolist())
    for value in values[values > 0].tolist():
        if value not in found:
            yield int(np.argmax((truth.labels == value).sum(axis=(1, 2))))


def _tile(ct: CtVolume, findings: Findings, truth: LabelVolume | None, view: _View, k: int) -> Image.Image:
    low, high = WINDOW_HU
    grey = np.clip((ct.voxels_hu[k].astype(np.float32) - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    tile = np.array(view.show(grey, Image.Resampling.BICUBIC).convert("RGB"))
    if findings.organ is not None:
        tile[_outline(view.mask(findings.organ.labels[k] > 0))] = ORGAN_RGB
    if truth is not None:
        for value in np.unique(truth.labels[k]):
            if value:
                tile[_outline(view.mask(truth.labels[k] == value))] = TRUTH_RGB
    measured = [lesion for lesion in findings.lesions if lesion.slice_index == k]
    lengths = len(measured) <= _LENGTHS * view.size_px[0] / view.text_px
    texts = []
    for lesion in findings.lesions:
        here = findings.lesion_labels.labels[k] == lesion.number
        if not here.any():
            continue
        shown = view.mask(here)
        tile[_outline(shown)] = _colour(lesion)
        if shown.any():
            length = f" {lengths_mm(lesion, findings)[0]:.1f} mm" if lesion.slice_index == k and lengths else ""
            texts.append(_Text(f"L{lesion.number}{length}", _colour(lesion), _box(shown)))
    image = Image.fromarray(tile)
    draw = ImageDraw.Draw(image)
    for lesion in measured:
        _caliper(draw, lesion, ct.grid, view)
    _edges(draw, view, findings.called(k))
    _labels(draw, texts, view)
    return image


def _outline(mask: Mask) -> Mask:
    """The pixels of a mask that have a neighbour outside it; the border of the picture counts as inside."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: Mask = mask & ~inside
    return edge


def _colour(lesion: Lesion) -> Rgb:
    return MEASURABLE_RGB if lesion.disease is Disease.MEASURABLE else NON_MEASURABLE_RGB


def _caliper(draw: ImageDraw.ImageDraw, lesion: Lesion, grid: Grid, view: _View) -> None:
    """Both diameters; the ends of the long one are ticked."""
    start, end = (view.at(grid, p) for p in (lesion.short_axis.start_lps_mm, lesion.short_axis.end_lps_mm))
    draw.line([start, end], fill=CALIPER_RGB, width=1)
    start, end = (view.at(grid, p) for p in (lesion.long_axis.start_lps_mm, lesion.long_axis.end_lps_mm))
    draw.line([start, end], fill=CALIPER_RGB, width=1)
    along = np.subtract(end, start)
    tick = np.array([-along[1], along[0]]) / max(float(np.linalg.norm(along)), 1e-6) * 4
    for point in (start, end):
        draw.line([tuple(point - tick), tuple(point + tick)], fill=CALIPER_RGB, width=1)


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    """What is written beside a lesion. box: (left, top, right, bottom) of the lesion on the tile, in pixels."""

    words: str
    rgb: Rgb
    box: Floats


def _box(mask: Mask) -> Floats:
    """The rectangle around a mask that is not empty."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.float64)


def _labels(draw: ImageDraw.ImageDraw, texts: Sequence[_Text], view: _View) -> None:
    """Each text beside its lesion, none on another; a line leads to the lesion from a text that stands farther off."""
    font = _font(view.text_px)
    sizes = [(draw.textlength(text.words, font=font), 1.3 * view.text_px) for text in texts]
    places = _apart([text.box for text in texts], sizes, view.size_px, view.text_px)
    for text, place in zip(texts, places, strict=True):
        middle = (text.box[:2] + text.box[2:]) / 2
        end = np.clip(middle, place[:2], place[2:])
        start = np.clip(end, text.box[:2], text.box[2:])
        if np.linalg.norm(end - start) > 2 * view.text_px:
            draw.line([tuple(start), tuple(end)], fill=text.rgb, width=1)
    for text, place in zip(texts, places, strict=True):
        draw.text(tuple(place[:2]), text.words, fill=text.rgb, font=font, stroke_width=2, stroke_fill=(0, 0, 0))


def _apart(
    boxes: Sequence[Floats], sizes: Sequence[tuple[float, float]], tile_px: tuple[int, int], margin_px: int
) -> list[Floats]:
    """Where to write beside each box: (left, top, right, bottom), as near as there is room for.

    sizes: (width, height) of each text. margin_px: of the tile, where letters and the caption stand already.
    Where no room is left, a text lies on a lesion rather than on another text.
    """
    placed: list[Floats] = []
    for box, size in zip(boxes, sizes, strict=True):
        corners = np.clip(
            _beside(box, size, margin_px, max(tile_px)),
            margin_px,
            np.maximum(np.array(tile_px) - (margin_px, 2 * margin_px) - size, margin_px),
        )
        candidates = np.hstack([corners, corners + size])
        covered = sum((_overlaps(candidates, other) for other in boxes), np.zeros(len(candidates)))
        covered += 100 * sum((_overlaps(candidates, other) for other in placed), np.zeros(len(candidates)))
        placed.append(candidates[int(np.argmin(covered))])
    return placed


def _beside(box: Floats, size: tuple[float, float], step_px: int, far_px: int) -> Floats:
    """(n, 2) upper left corners of a text beside the box: right, left, below, above, and ever farther off."""
    left, top, right, bottom = box
    width, height = size
    x, y = (left + right - width) / 2, (top + bottom - height) / 2
    corners = []
    for off in range(step_px // 3, far_px, step_px):
        for aside in (0, -off, off):
            corners += [
                (right + off, y + aside),
                (left - off - width, y + aside),
                (x + aside, bottom + off),
                (x + aside, top - off - height),
            ]
    return np.array(corners)


def _overlaps(rectangles: Floats, other: Floats) -> Floats:
    """The area that each of (n, 4) rectangles shares with another one, in square pixels."""
    sides = np.minimum(rectangles[:, 2:], other[2:]) - np.maximum(rectangles[:, :2], other[:2])
    areas: Floats = np.prod(np.maximum(sides, 0), axis=1)
    return areas


def _edges(draw: ImageDraw.ImageDraw, view: _View, caption: str) -> None:
    width, height = view.size_px
    left, right, top, bottom = view.letters
    for letter, place, anchor in (
        (left, (4, height / 2), "lm"),
        (right, (width - 4, height / 2), "rm"),
        (top, (width / 2, 3), "ma"),
        (bottom, (width / 2, height - 3), "md"),
    ):
        draw.text(
            place, letter, fill=_INK, font=_font(view.text_px), anchor=anchor, stroke_width=1, stroke_fill=(0, 0, 0)
        )
    draw.text(
        (4, height - 3),
        caption,
        fill=_INK,
        font=_font(view.text_px),
        anchor="ld",
        stroke_width=1,
        stroke_fill=(0, 0, 0),
    )


def _legend(findings: Findings, truth: LabelVolume | None) -> list[tuple[Rgb, str]]:
    counts = {d: sum(lesion.disease is d for lesion in findings.lesions) for d in Disease}
    entries = [
        (MEASURABLE_RGB, f"measurable ({counts[Disease.MEASURABLE]})"),
        (NON_MEASURABLE_RGB, f"non-measurable ({counts[Disease.NON_MEASURABLE]})"),
    ]
    if findings.organ is not None:
        entries.append((ORGAN_RGB, "liver"))
    if truth is not None:
        entries.append((TRUTH_RGB, "truth"))
    return [*entries, (CALIPER_RGB, "diameters")]


def _mosaic(tiles: list[Image.Image], captions: list[str], legend: list[tuple[Rgb, str]], text_px: int) -> Image.Image:
    width, height = tiles[0].size
    columns = min(_COLUMNS, len(tiles))
    rows = ceil(len(tiles) / columns)
    font = _font(text_px)
    legend_px = [int(font.getlength(words)) + 3 * text_px for _, words in legend]
    wanted = max(sum(legend_px), *(int(font.getlength(words)) for words in captions)) + 2 * _GAP_PX
    whole = max(columns * (width + _GAP_PX) + _GAP_PX, wanted)
    line_px = text_px + 7
    picture = Image.new("RGB", (whole, rows * (height + _GAP_PX) + _GAP_PX + (1 + len(captions)) * line_px))
    for n, tile in enumerate(tiles):
        at = (n % columns * (width + _GAP_PX) + _GAP_PX, n // columns * (height + _GAP_PX) + _GAP_PX)
        picture.paste(tile, at)
    draw = ImageDraw.Draw(picture)
    x, y = _GAP_PX, rows * (height + _GAP_PX) + _GAP_PX
    for (rgb, words), px in zip(legend, legend_px, strict=True):
        draw.rectangle([x, y + 4, x + text_px - 4, y + text_px], fill=rgb)
        draw.text((x + text_px + 2, y), words, fill=_INK, font=font)
        x += px
    for n, words in enumerate(captions, start=1):
        draw.text((_GAP_PX, y + n * line_px), words, fill=_INK, font=font)
    return picture


def _font(text_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=text_px)
