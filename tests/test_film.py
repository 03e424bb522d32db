"""The film: upright whatever way the scan is stored, in SALSA's window and colours, and with its words of caution."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from salsa_node import film
from salsa_node.criteria import Criteria
from salsa_node.findings import Findings, measure
from salsa_node.phantom import Recipe
from salsa_node.pipelines import DEMO_NOTICE, Masks, Provenance
from salsa_node.volume import CtVolume, LabelVolume

SHAPE = {"S": 10, "P": 40, "L": 40}


def scanned(orientation: str, lesion: bool = True, liver: bool = True) -> tuple[CtVolume, Findings]:
    """Air, with a bright block at the patient's front right, liver around the middle and a lesion in it."""
    letters = {"I": "S", "A": "P", "R": "L"}
    axes = [letters.get(letter, letter) for letter in orientation]
    spl = {name: np.full((10, 40, 40), -1000, np.int16) for name in ("hu", "liver", "lesion")}
    spl["hu"][:, 2:6, 2:6] = 1000
    spl["hu"][:, 36, :] = np.arange(10)[:, None] * 20  # no two slices are alike: a GIF would make one of them
    spl["liver"][:] = spl["lesion"][:] = 0
    if liver:
        spl["liver"][3:8, 15:30, 10:30] = 1
    if lesion:
        spl["lesion"][5:7, 20:25, 15:20] = 1
    flips = tuple(n for n, letter in enumerate(orientation) if letter in letters)
    stored = {
        name: np.flip(array.transpose(["SPL".index(axis) for axis in axes]), flips).copy()
        for name, array in spl.items()
    }
    grid = Recipe(1, tuple(SHAPE[axis] for axis in axes), (2.0, 2.0, 2.0), orientation).grid  # type: ignore[arg-type]
    ct = CtVolume(stored["hu"], grid)
    masks = Masks(
        LabelVolume(stored["liver"].astype(np.uint8), grid),
        LabelVolume(stored["lesion"].astype(np.uint8), grid),
        Provenance("demo", "0", notice=DEMO_NOTICE),
    )
    return ct, measure(ct, masks, Criteria())


def frames(content: bytes) -> list[np.ndarray]:
    image = Image.open(BytesIO(content))
    found = []
    for n in range(image.n_frames):
        image.seek(n)
        found.append(np.array(image.convert("RGB")))
    return found


def middle(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(rows.mean()), float(columns.mean())


@pytest.mark.parametrize("orientation", ["SPL", "IPL", "SAR", "LSP", "PIR", "ALS"])
def test_the_film_is_upright_whatever_the_storage(orientation: str) -> None:
    shown = frames(film.gif(*scanned(orientation)))
    assert len(shown) == 5  # the slices with liver, of ten
    red = [(frame == film.LESION_RGB).all(axis=2) for frame in shown]
    yellow = [(frame == film.LIVER_RGB).all(axis=2) for frame in shown]
    assert [bool(mask.any()) for mask in red] == [False, True, True, False, False]  # from the head to the feet
    assert all(mask.any() for mask in yellow)
    side = shown[0].shape[1]
    assert shown[0][:side].shape == (side, side, 3)
    row, column = middle((shown[0][:side] > 250).all(axis=2))  # the bright block: front is up, right is left
    assert row < side / 4
    assert column < side / 4
    row, column = middle(red[1])
    assert row / side * 40 == pytest.approx(22.5, abs=0.3)
    assert column / side * 40 == pytest.approx(17.5, abs=0.3)


def test_outlines_lie_outside_of_what_they_surround() -> None:
    ct, findings = scanned("SPL")
    shown = frames(film.gif(ct, findings))[1]
    scale = shown.shape[1] / 40
    inside = shown[int(20.5 * scale) : int(24.5 * scale), int(15.5 * scale) : int(19.5 * scale)]
    assert not (inside == film.LESION_RGB).all(axis=2).any()
    assert (shown[int(19.5 * scale), int(17 * scale)] == film.LESION_RGB).all()


def test_the_window_is_salsas() -> None:
    ct, findings = scanned("SPL", lesion=False, liver=False)
    hu = np.full((10, 40, 40), -141, np.int16)
    hu[:, :, 10:20] = 60
    hu[:, :, 20:30] = 261
    hu[:, :, 30:] = 1000
    hu[:, 36, :] = np.arange(10)[:, None] * 20
    shown = frames(film.gif(CtVolume(hu, ct.grid), findings))
    assert len(shown) == 10
    greys = [int(shown[0][5, int((column + 0.5) * shown[0].shape[1] / 40), 0]) for column in (5, 15, 25, 35)]
    assert greys[0] == 0
    assert greys[1] == pytest.approx(127, abs=2)
    assert greys[2:] == [255, 255]


def test_a_film_lasts_ten_seconds_and_loops() -> None:
    image = Image.open(BytesIO(film.gif(*scanned("SPL"))))
    assert image.info["loop"] == 0
    assert image.info["duration"] * image.n_frames == 10_000


def test_a_sheet_shows_the_slices_with_lesions() -> None:
    sheet = Image.open(BytesIO(film.png(*scanned("SPL"))))
    assert sheet.format == "PNG"
    red = (np.array(sheet) == film.LESION_RGB).all(axis=2)
    halves = np.array_split(red, 2, axis=1)  # two slices with the lesion, side by side
    assert all(half.any() for half in halves)
    none = np.array(Image.open(BytesIO(film.png(*scanned("SPL", lesion=False)))))
    assert not (none == film.LESION_RGB).all(axis=2).any()
    assert (none == film.LIVER_RGB).all(axis=2).any()


def test_the_words_of_caution_are_drawn() -> None:
    ct, findings = scanned("SPL")
    assert film._Upright(ct, findings).words == [
        "AI candidate findings. Not a diagnosis.",
        "DEMO MODEL - NOT FOR CLINICAL USE",
    ]
    shown = frames(film.gif(ct, findings))[0]
    below = shown[shown.shape[1] :]
    assert (below == 255).all(axis=2).sum() > 500  # white ink below the slice
