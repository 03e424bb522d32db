"""Findings -> pictures: the slices where the lesions are, outlined, with their calipers.

Tiles are shown as a radiologist expects them, whatever the order on disk: an axial slice has the
patient's right on the left and anterior at the top; pixels are drawn in their true proportions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from salsa_node.codes import MEASURABLE_RGB, NON_MEASURABLE_RGB
from salsa_node.dicom_result import caveat, plain
from salsa_node.findings import Disease, Findings, Lesion
from salsa_node.volume import CtVolume, Grid, LabelVolume, PointMm

Rgb = tuple[int, int, int]
Mask = npt.NDArray[np.bool_]
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
_TEXT_PX = 15
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
    view = _View.of(ct.grid, _shown(ct.grid, findings, truth), _TILE_PX)
    tiles = [_tile(ct, findings, truth, view, k) for k in _slices(findings, truth, ct.grid.shape[0])]
    captions = [
        caveat(findings.provenance),
        *([plain(findings.provenance.notice)] if findings.provenance.notice else []),
    ]
    return _mosaic(tiles, captions, _legend(findings, truth))


def key_image(ct: CtVolume, findings: Findings, lesion: Lesion) -> Image.Image:
    """The whole slice where a lesion's diameters lie, contours and calipers drawn in, words of caution below."""
    rows, columns = ct.grid.shape[1:]
    view = _View.of(ct.grid, (slice(0, rows), slice(0, columns)), _KEY_PX)
    tile = _tile(ct, findings, None, view, lesion.slice_index)
    said = " ".join(part for part in (caveat(findings.provenance), plain(findings.provenance.notice)) if part)
    return _mosaic([tile], [said], _legend(findings, None))


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """How a slice becomes a tile: which part, turned how, drawn how large.

    box: (rows, columns) of the slice that are shown. turned: rows run across the screen.
    flip_right, flip_down: reverse the tile after turning. size_px: (width, height).
    letters: what lies at the left, right, top and bottom edge.
    """

    box: Box
    turned: bool
    flip_right: bool
    flip_down: bool
    size_px: tuple[int, int]
    letters: tuple[str, str, str, str]

    @classmethod
    def of(cls, grid: Grid, box: Box, longer_side_px: int) -> _View:
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
    by_size = sorted(findings.lesions, key=lambda lesion: -lesion.long_axis.length_mm)
    wanted = [lesion.slice_index for lesion in by_size]
    if truth is not None:
        wanted += _missed(findings, truth)
    if not wanted:
        area = findings.organ.labels.sum(axis=(1, 2)) if findings.organ is not None else np.zeros(slices)
        wanted = [int(np.argmax(area)) if area.any() else slices // 2]
    return list(dict.fromkeys(wanted))[:_TILES]


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
    for lesion in findings.lesions:
        here = findings.lesion_labels.labels[k] == lesion.number
        if here.any():
            tile[_outline(view.mask(here))] = _colour(lesion)
    image = Image.fromarray(tile)
    draw = ImageDraw.Draw(image)
    for lesion in findings.lesions:
        if lesion.slice_index == k:
            _caliper(draw, lesion, ct.grid, view)
    _edges(draw, view, f"slice {k + 1} of {ct.grid.shape[0]}")
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
    start, end = (view.at(grid, p) for p in (lesion.long_axis.start_lps_mm, lesion.long_axis.end_lps_mm))
    draw.line([start, end], fill=CALIPER_RGB, width=1)
    along = np.subtract(end, start)
    tick = np.array([-along[1], along[0]]) / max(float(np.linalg.norm(along)), 1e-6) * 4
    for point in (start, end):
        draw.line([tuple(point - tick), tuple(point + tick)], fill=CALIPER_RGB, width=1)
    text = f"L{lesion.number} {lesion.long_axis.length_mm:.1f} mm"
    width = draw.textlength(text, font=_font())
    x = min(max(start[0], end[0]) + 6, view.size_px[0] - width - 18)
    y = min(max(min(start[1], end[1]) - _TEXT_PX, 18), view.size_px[1] - 2 * _TEXT_PX - 6)
    draw.text((x, y), text, fill=_colour(lesion), font=_font(), stroke_width=2, stroke_fill=(0, 0, 0))


def _edges(draw: ImageDraw.ImageDraw, view: _View, caption: str) -> None:
    width, height = view.size_px
    left, right, top, bottom = view.letters
    for letter, place, anchor in (
        (left, (4, height / 2), "lm"),
        (right, (width - 4, height / 2), "rm"),
        (top, (width / 2, 3), "ma"),
        (bottom, (width / 2, height - 3), "md"),
    ):
        draw.text(place, letter, fill=_INK, font=_font(), anchor=anchor, stroke_width=1, stroke_fill=(0, 0, 0))
    draw.text((4, height - 3), caption, fill=_INK, font=_font(), anchor="ld", stroke_width=1, stroke_fill=(0, 0, 0))


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
    return [*entries, (CALIPER_RGB, "longest diameter")]


def _mosaic(tiles: list[Image.Image], captions: list[str], legend: list[tuple[Rgb, str]]) -> Image.Image:
    width, height = tiles[0].size
    columns = min(_COLUMNS, len(tiles))
    rows = ceil(len(tiles) / columns)
    font = _font()
    legend_px = [int(font.getlength(words)) + 3 * _TEXT_PX for _, words in legend]
    wanted = max(sum(legend_px), *(int(font.getlength(words)) for words in captions)) + 2 * _GAP_PX
    whole = max(columns * (width + _GAP_PX) + _GAP_PX, wanted)
    line_px = _TEXT_PX + 7
    picture = Image.new("RGB", (whole, rows * (height + _GAP_PX) + _GAP_PX + (1 + len(captions)) * line_px))
    for n, tile in enumerate(tiles):
        at = (n % columns * (width + _GAP_PX) + _GAP_PX, n // columns * (height + _GAP_PX) + _GAP_PX)
        picture.paste(tile, at)
    draw = ImageDraw.Draw(picture)
    x, y = _GAP_PX, rows * (height + _GAP_PX) + _GAP_PX
    for (rgb, words), px in zip(legend, legend_px, strict=True):
        draw.rectangle([x, y + 4, x + _TEXT_PX - 4, y + _TEXT_PX], fill=rgb)
        draw.text((x + _TEXT_PX + 2, y), words, fill=_INK, font=font)
        x += px
    for n, words in enumerate(captions, start=1):
        draw.text((_GAP_PX, y + n * line_px), words, fill=_INK, font=font)
    return picture


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_TEXT_PX)
