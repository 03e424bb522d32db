"""A scan and what was found in it as a film (GIF) or a sheet (PNG), in SALSA's window and colours.

Axial slices from the head to the feet, the patient's right on the left: the liver outlined in yellow, lesions in red,
outlines one pixel outside of what they surround (after radiomicsgroup/liver-SALSA).
"""

from __future__ import annotations

from io import BytesIO
from itertools import permutations
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation

from salsa_node.dicom_result import caveat, plain
from salsa_node.findings import Findings
from salsa_node.picture import WINDOW_HU
from salsa_node.volume import CtVolume, Grid

LESION_RGB: Final = (200, 0, 0)
LIVER_RGB: Final = (255, 255, 0)
FILM_MS: Final = 10_000  # the whole film, whatever its length

_GREYS: Final = 253
_INK, _LIVER, _LESION = 253, 254, 255  # entries of the palette
_PALETTE: Final = [
    *(value * 255 // (_GREYS - 1) for value in range(_GREYS) for _ in range(3)), 255, 255, 255, *LIVER_RGB, *LESION_RGB
]  # fmt: skip
_SIDE_PX: Final = 448
_TEXT_PX: Final = 12
_SHEET: Final = 12  # slices on a sheet ...
_COLUMNS: Final = 4  # ... in so many columns

Indexed = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


def gif(ct: CtVolume, findings: Findings) -> bytes:
    """Every slice that shows liver or lesion (all of them where there is neither), looping once in ten seconds."""
    upright = _Upright(ct, findings)
    frames = [_picture([upright.frame(k)], 1, upright.words, _SIDE_PX) for k in upright.shown()]
    out = BytesIO()
    frames[0].save(
        out, format="GIF", save_all=True, append_images=frames[1:], loop=0, duration=max(20, FILM_MS // len(frames)),
        optimize=False, disposal=2,
    )  # fmt: skip
    return out.getvalue()


def png(ct: CtVolume, findings: Findings) -> bytes:
    """A sheet of at most twelve slices, evenly spread over those with a lesion, else over those with liver."""
    upright = _Upright(ct, findings)
    wanted = upright.shown(lesions_first=True)
    spread = np.unique(np.linspace(0, len(wanted) - 1, min(_SHEET, len(wanted))).round().astype(int))
    frames = [upright.frame(wanted[n]) for n in spread]
    out = BytesIO()
    _picture(frames, min(_COLUMNS, len(frames)), upright.words, _SIDE_PX // 2).convert("RGB").save(out, format="PNG")
    return out.getvalue()


class _Upright:
    """CT and masks turned so that slices run to the feet, rows to the back and columns to the patient's left."""

    def __init__(self, ct: CtVolume, findings: Findings) -> None:
        order, flipped = _way(ct.grid)
        self._hu = np.flip(ct.voxels_hu.transpose(order), flipped)
        self._lesions: Mask = np.flip(findings.lesion_labels.labels.transpose(order), flipped) > 0
        organ = findings.organ
        self._liver: Mask = (
            np.zeros_like(self._lesions) if organ is None else np.flip(organ.labels.transpose(order), flipped) == 1
        )
        spacing_mm = [ct.grid.spacing_mm[axis] for axis in order]
        self._size_mm = (self._hu.shape[1] * spacing_mm[1], self._hu.shape[2] * spacing_mm[2])
        notice = plain(findings.provenance.notice)
        self.words = [caveat(findings.provenance), *([notice] if notice else [])]

    def shown(self, *, lesions_first: bool = False) -> list[int]:
        """The slices to show."""
        for mask in (self._lesions, self._liver) if lesions_first else (self._lesions | self._liver,):
            hits = np.flatnonzero(mask.any(axis=(1, 2)))
            if hits.size:
                return [int(k) for k in hits] if lesions_first else list(range(int(hits[0]), int(hits[-1]) + 1))
        return list(range(len(self._hu)))

    def frame(self, k: int) -> tuple[Indexed, tuple[float, float]]:
        """One slice as entries of the palette, and its (height, width) in mm."""
        low, high = WINDOW_HU
        grey = np.clip((self._hu[k].astype(np.float32) - low) / (high - low) * _GREYS, 0, _GREYS - 1)
        frame = grey.astype(np.uint8)
        for mask, colour in ((self._liver[k], _LIVER), (self._lesions[k], _LESION)):
            frame[binary_dilation(mask, np.ones((3, 3), bool)) & ~mask] = colour
        return frame, self._size_mm


def _way(grid: Grid) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """The axes that become slice, row and column, and which of the new ones run backwards."""
    cosines = grid.affine_lps_mm[:3, :3] / np.array(grid.spacing_mm)
    wanted = np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]]) @ cosines  # (wanted axis, stored axis)
    best = max(permutations(range(3)), key=lambda order: sum(abs(wanted[n, axis]) for n, axis in enumerate(order)))
    flipped = tuple(n for n, axis in enumerate(best) if wanted[n, axis] < 0)
    return (best[0], best[1], best[2]), flipped


def _picture(
    frames: list[tuple[Indexed, tuple[float, float]]], columns: int, words: list[str], side_px: int
) -> Image.Image:
    """Frames side by side, in their true proportions, above words of caution."""
    height_mm, width_mm = frames[0][1]
    scale = side_px / max(height_mm, width_mm)
    width, height = max(1, round(width_mm * scale)), max(1, round(height_mm * scale))
    font = ImageFont.load_default(_TEXT_PX)
    lines = [line for text in words for line in _wrapped(text, font, width * columns - 8)]
    rows = -(-len(frames) // columns)
    sheet = Image.new("P", (width * columns, height * rows + (_TEXT_PX + 4) * len(lines) + 4), 0)
    sheet.putpalette(_PALETTE)
    for n, (frame, _) in enumerate(frames):
        tile = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (n % columns * width, n // columns * height))
    draw = ImageDraw.Draw(sheet)
    draw.fontmode = "1"  # no shades between the entries of the palette
    for n, line in enumerate(lines):
        draw.text((4, height * rows + 2 + n * (_TEXT_PX + 4)), line, fill=_INK, font=font)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
