"""How the slices of one series lie in the patient: one regular grid, or a verdict that says what was found.

Slices are put in order by their position along the normal of Image Orientation (Patient), and spaced by their
positions (PS3.3 C.7.6.2.1.1): not by Instance Number, Slice Location, Slice Thickness, Spacing Between Slices or
the sign of Gantry/Detector Tilt, which scanners fill in as they please.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from salsa_node.errors import SeriesRejected
from salsa_node.series_rules import REFUSE, SeriesRules
from salsa_node.volume import Affine

Numbers = npt.NDArray[np.float64]

STRICT = SeriesRules()

MIN_SLICES = 3  #: two slices have a distance but no evidence that it is regular
SAME_POSITION_MM = 0.01  #: slices nearer than this are one position twice; the thinnest CT steps are above 0.1 mm
SPACING_TOLERANCE_MM = 0.1  #: positions written with one decimal are off by 0.05 mm at either end of a step
SPACING_TOLERANCE = 0.02  #: or this share of the spacing; no volume changes by more
TILT_TOLERANCE_PIXELS = 0.1  #: sideways drift of any slice; a tenth of a pixel changes no voxel's place
DIRECTION_TOLERANCE = 1e-3  #: cosines written with four decimals
_MOST_NAMED = 3  # acquisitions on either side of a gap; scanners that count every slice up have no ranges
PIXEL_SPACING_TOLERANCE_MM = 1e-4  #: 0.05 mm over 512 pixels


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """How slices make one grid.

    order: of each slice along the grid's slice axis, its place among the images given.
    affine_lps_mm, slice_offsets: as in `volume.Grid`. The slice axis runs the way of the normal (row direction x
        column direction), so that an axial series of a supine patient runs from the feet to the head; it is the
        normal itself but for slices that a tilted gantry shears, where the rules let them pass.
    """

    order: tuple[int, ...]
    affine_lps_mm: Affine
    slice_offsets: tuple[float, ...] | None = None


def check_count(slices: int) -> None:
    """Raises SeriesRejected where so many slices cannot prove to be a volume."""
    if slices < MIN_SLICES:
        raise SeriesRejected(f"{slices} slice(s); a volume needs at least {MIN_SLICES}")


def stack(
    positions_lps_mm: Numbers,
    cosines: Numbers,
    spacings_mm: Numbers,
    image_numbers: tuple[int, ...] = (),
    rules: SeriesRules = STRICT,
    acquisitions: tuple[str, ...] = (),
) -> Stack:
    """The grid that slices make; the first three arguments as (images, values) of the attributes of those names.

    image_numbers: by which a reader finds these images; a verdict names them where there are any.
    acquisitions: the Acquisition Number of each image, "" where it has none; a verdict names those beside a gap.
    Raises SeriesRejected with what was found and expected.
    """
    check_count(len(positions_lps_mm))
    row, column = _directions(cosines)
    spacing_mm = _pixel_spacing(spacings_mm)
    normal = np.cross(row, column)
    order = np.argsort(positions_lps_mm @ normal, kind="stable")
    positions = positions_lps_mm[order]
    along_mm = (positions - positions[0]) @ normal
    regular, uneven = _check_regular(along_mm, [image_numbers[n] for n in order] if image_numbers else [], rules)
    if uneven and acquisitions:
        uneven += _ranges(np.diff(along_mm), [acquisitions[n] for n in order])
    sheared, tilted = _check_straight(positions, along_mm, normal, min(spacing_mm), rules)
    if tilted or uneven:
        raise SeriesRejected("; ".join(filter(None, (tilted, uneven, _what_to_do(tilted, uneven, along_mm, rules)))))
    step_mm = float(along_mm[-1] / (len(positions) - 1))
    affine = np.eye(4)
    affine[:3, 0] = (positions[-1] - positions[0]) / (len(positions) - 1) if sheared else normal * step_mm
    affine[:3, 1] = column * spacing_mm[0]
    affine[:3, 2] = row * spacing_mm[1]
    affine[:3, 3] = positions[0]
    offsets = None if regular else tuple(float(mm / step_mm) for mm in along_mm)
    return Stack(tuple(int(n) for n in order), affine, offsets)


def _directions(cosines: Numbers) -> tuple[Numbers, Numbers]:
    """Unit vectors along a row and down a column, of all images alike."""
    apart = np.abs(cosines - cosines[0]).max()
    if not apart <= DIRECTION_TOLERANCE:
        raise SeriesRejected(
            f"images of different orientations in one series (direction cosines differ by {apart:.4f})"
        )
    row, column = cosines[0, :3], cosines[0, 3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not (np.abs(np.array(lengths) - 1) <= DIRECTION_TOLERANCE).all() or not abs(row @ column) <= DIRECTION_TOLERANCE:
        raise SeriesRejected("Image Orientation (Patient) is not two perpendicular unit vectors")
    row = row / lengths[0]
    column = column - (column @ row) * row
    return row, column / np.linalg.norm(column)


def _pixel_spacing(spacings: Numbers) -> tuple[float, float]:
    """Distance between rows and between columns in mm, of all images alike."""
    apart = np.ptp(spacings, axis=0).max()
    if not apart <= PIXEL_SPACING_TOLERANCE_MM:
        raise SeriesRejected(f"images of different pixel spacings in one series (they differ by {apart:.4f} mm)")
    between_rows, between_columns = (float(x) for x in spacings[0])
    if between_rows <= 0 or between_columns <= 0:
        raise SeriesRejected(
            f"Pixel Spacing of {between_rows:g} and {between_columns:g} mm; expected two positive numbers"
        )
    return between_rows, between_columns


def _check_regular(along_mm: Numbers, image_numbers: Sequence[int], rules: SeriesRules) -> tuple[bool, str]:
    """Whether these places along the normal lie at one distance, and what speaks against them, if anything."""
    steps = np.diff(along_mm)
    doubled = int((steps < SAME_POSITION_MM).sum())
    if doubled == len(steps):
        raise SeriesRejected(f"all {len(along_mm)} slices lie at one position; expected one slice at each position")
    if doubled:
        return (
            True,
            f"{doubled} of {len(along_mm)} slices lie where another one lies; expected one slice at each position",
        )
    step_mm = along_mm[-1] / len(steps)
    off_mm = np.abs(along_mm - step_mm * np.arange(len(along_mm))).max()
    if off_mm <= max(SPACING_TOLERANCE_MM, SPACING_TOLERANCE * step_mm):
        return True, ""
    told = _describe_steps(steps, image_numbers)
    if rules.irregular == REFUSE:
        return False, told
    if steps.max() > rules.max_gap_mm:
        return False, f"{told}; at most {rules.max_gap_mm:g} mm may be resampled"
    return False, ""


def _check_straight(
    positions: Numbers, along_mm: Numbers, normal: Numbers, pixel_mm: float, rules: SeriesRules
) -> tuple[bool, str]:
    """Whether the slices are sheared against each other, and what speaks against that, if anything."""
    sideways = (positions - positions[0]) - np.outer(along_mm, normal)
    drift_mm = float(np.linalg.norm(sideways, axis=1).max())
    if drift_mm <= TILT_TOLERANCE_PIXELS * pixel_mm:
        return False, ""
    if rules.tilt == REFUSE:
        degrees = np.degrees(np.arctan2(np.linalg.norm(sideways[-1]), along_mm[-1]))
        return (
            True,
            f"slices are sheared by {degrees:.1f} degrees (gantry tilt), so that they lie up to "
            f"{drift_mm:.1f} mm beside their stack; expected no shear",
        )
    apart_mm = float(np.linalg.norm(sideways - np.outer(along_mm / along_mm[-1], sideways[-1]), axis=1).max())
    if apart_mm > TILT_TOLERANCE_PIXELS * pixel_mm:
        return True, f"slices lie up to {apart_mm:.1f} mm beside one line (gantry tilt); expected one shear of all"
    return True, ""


def _what_to_do(tilted: str, uneven: str, along_mm: Numbers, rules: SeriesRules) -> str:
    """The settings that would let these slices pass; "" where none would."""
    steps = np.diff(along_mm)
    if uneven and not SAME_POSITION_MM <= steps.min() <= steps.max() <= rules.max_gap_mm:
        return ""
    refusing = (
        ("series.tilt", tilted and rules.tilt == REFUSE),
        ("series.irregular", uneven and rules.irregular == REFUSE),
    )
    settings = [setting for setting, refuses in refusing if refuses]
    return f'to have it resampled set {" and ".join(settings)} = "resample"' if settings else ""


def _ranges(steps: Numbers, acquisitions: Sequence[str]) -> str:
    """Which acquisitions lie on either side of the widest step, where it parts them; else ""."""
    widest = int(np.argmax(steps))
    sides = [set(acquisitions[: widest + 1]), set(acquisitions[widest + 1 :])]
    if sides[0] & sides[1] or "" in sides[0] | sides[1] or max(map(len, sides)) > _MOST_NAMED:
        return ""
    names = [f"Acquisition Number {' and '.join(sorted(side, key=int))}" for side in sides]
    return (
        f"; before the widest step ({steps[widest]:.1f} mm) lie images of {names[0]}, behind it of {names[1]}: "
        "send each range as a series of its own"
    )


def _describe_steps(steps: Numbers, image_numbers: Sequence[int]) -> str:
    """What is wrong with these distances between slices: slices missing, or no regular spacing at all."""
    usual = float(np.median(steps))
    odd = np.flatnonzero(np.abs(steps - usual) > max(SPACING_TOLERANCE_MM, SPACING_TOLERANCE * usual))
    times = steps[odd] / usual
    if len(odd) and (times > 1.5).all() and (np.abs(times - np.rint(times)) < SPACING_TOLERANCE * times + 0.02).all():
        missing = int((np.rint(times) - 1).sum())
        widest = odd[np.argmax(times)]
        what, numbers = ("images", image_numbers) if image_numbers else ("slices", range(1, len(steps) + 2))
        return (
            f"{missing} of {len(steps) + 1 + missing} slices missing: gap of {steps[widest]:.1f} mm "
            f"between {what} {numbers[widest]} and {numbers[widest + 1]}, spacing is {usual:.1f} mm"
        )
    return (
        f"irregular slice spacing: steps from {steps.min():.2f} to {steps.max():.2f} mm, median {usual:.2f} mm; "
        "expected one spacing"
    )
