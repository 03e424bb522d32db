"""The synthetic patient that a seed draws: organs, vessels and lesions as formulas in patient coordinates.

Nothing here knows a grid until the patient is sampled on one; that is why every grid shows the same patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi

import numpy as np
import numpy.typing as npt

from salsa_node.volume import Grid, PointMm

Floats = npt.NDArray[np.float32]
Box = tuple[slice, slice, slice]

ORGANS = {
    "liver": 1,
    "spleen": 2,
    "kidneys": 3,
    "spine": 4,
    "stomach": 5,
    "lungs": 6,
    "aorta": 7,
    "inferior vena cava": 8,
}

# Mean CT numbers by contrast phase: liver, liver vessels, spleen, kidneys, aorta, inferior vena cava.
PHASES_HU = {
    "native": (58, 42, 50, 34, 42, 40),
    "arterial": (72, 90, 110, 140, 300, 95),
    "portal_venous": (112, 158, 124, 170, 160, 150),
    "delayed": (94, 112, 104, 160, 118, 116),
}


@dataclass(frozen=True, slots=True)
class LesionSpec:
    """A lesion asked for: an ellipsoid along the patient's axes.

    semi_axes_mm: along x, y and z.
    hu: its CT number; the liver's lies near 112 in the portal venous phase.
    rim_hu: brighter than the liver by this much in a thin shell around it; 0 for none.
    """

    center_lps_mm: PointMm
    semi_axes_mm: PointMm
    hu: float = 55.0
    rim_hu: float = 0.0


@dataclass(frozen=True, slots=True)
class TrueLesion:
    """A lesion that is there, in exact numbers.

    number: its value in `Phantom.lesion_labels`.
    diameter_mm: the longest diameter in an axial plane.
    volume_mm3: of the ellipsoid, not of its voxels.
    touches_capsule: it reaches the liver's surface and bulges through it.
    """

    number: int
    center_lps_mm: PointMm
    semi_axes_mm: PointMm
    diameter_mm: float
    volume_mm3: float
    hu: float
    touches_capsule: bool


# Geometry: formulas on affine grids.


class Points:
    """The voxel centres of a grid, in patient millimetres, whole or in boxes."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._inverse = np.linalg.inv(grid.affine_lps_mm)

    def box(self, center: Sequence[float], reach: Sequence[float]) -> Box:
        """The slices that hold an ellipsoid with these semi-axes; empty ones where it lies outside."""
        middle = (self._inverse @ np.array([*center, 1.0]))[:3]
        half = np.sqrt((self._inverse[:3, :3] ** 2) @ np.square(np.asarray(reach, dtype=np.float64)))
        low, high = np.floor(middle - half), np.ceil(middle + half) + 1
        bounds = [
            (int(np.clip(a, 0, n)), int(np.clip(b, 0, n))) for a, b, n in zip(low, high, self.grid.shape, strict=True)
        ]
        return slice(*bounds[0]), slice(*bounds[1]), slice(*bounds[2])

    def everywhere(self) -> Box:
        """The whole grid."""
        return slice(0, self.grid.shape[0]), slice(0, self.grid.shape[1]), slice(0, self.grid.shape[2])

    def xyz(self, box: Box) -> tuple[Floats, Floats, Floats]:
        """x, y and z of the box's voxels, each of a shape that broadcasts to the box."""
        indices = [
            np.arange(part.start, part.stop).reshape([-1 if n == axis else 1 for n in range(3)])
            for axis, part in enumerate(box)
        ]
        affine = self.grid.affine_lps_mm
        found = []
        for row in affine[:3]:
            value: npt.NDArray[np.float64] = np.full((1, 1, 1), row[3])
            for axis in range(3):
                if abs(row[axis]) > 1e-12:
                    value = value + row[axis] * indices[axis]
            found.append(value.astype(np.float32))
        return found[0], found[1], found[2]


class _Ripple:
    """A smooth random field over space with zero mean and unit variance: a sum of plane waves.

    A plane wave on an affine grid is a product of one factor per index, so a whole grid costs one matrix product.
    """

    def __init__(self, rng: np.random.Generator, wavelength_mm: float, waves: int = 40) -> None:
        directions = rng.standard_normal((waves, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        lengths = wavelength_mm * rng.uniform(0.75, 1.5, waves)
        self._k = 2 * pi * directions / lengths[:, None]
        self._phase = rng.uniform(0, 2 * pi, waves)
        self._scale = (2 / waves) ** 0.5

    def on(self, grid: Grid) -> Floats:
        steps = self._k @ grid.affine_lps_mm[:3, :3]
        start = self._phase + self._k @ grid.affine_lps_mm[:3, 3]
        along = [np.exp(1j * np.outer(np.arange(n), steps[:, axis])) for axis, n in enumerate(grid.shape)]
        planes = (along[0] * np.exp(1j * start))[:, None, :] * along[1][None]
        left = np.concatenate([planes.real, -planes.imag], axis=2).astype(np.float32)
        right = np.concatenate([along[2].real, along[2].imag], axis=1).astype(np.float32)
        field: Floats = (left @ right.T) * np.float32(self._scale)
        return field

    def at(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The field at points of shape (n, 3)."""
        waves: npt.NDArray[np.float64] = np.cos(points @ self._k.T + self._phase).sum(axis=1) * self._scale
        return waves


@dataclass(frozen=True, slots=True)
class _Ellipsoid:
    center: PointMm
    axes: PointMm

    def level(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """0 in the centre, 1 on the surface; grows with the square of the distance."""
        (cx, cy, cz), (ax, ay, az) = self.center, self.axes
        level: Floats = ((x - cx) / ax) ** 2 + ((y - cy) / ay) ** 2 + ((z - cz) / az) ** 2
        return level


# The patient: everything drawn from the seed, in patient millimetres, before any grid is known.


class Patient:
    """Organs, vessels and lesions of one seed, and how they look on a grid."""

    def __init__(self, seed: int, phase: str, lesions: tuple[LesionSpec, ...] | None) -> None:
        rng = np.random.default_rng((seed, 0))
        u = rng.uniform
        self.size = size = float(u(0.94, 1.04))
        self.coarse, self.fine, self.texture = _Ripple(rng, 110.0), _Ripple(rng, 45.0), _Ripple(rng, 16.0)
        self.noise_sd_hu = float(u(8, 16))
        means = np.array(PHASES_HU[phase], dtype=np.float64) * u(0.9, 1.1)
        self.liver_hu, self.vessel_hu, self.spleen_hu, self.kidney_hu, self.aorta_hu, self.cava_hu = map(float, means)
        self.body = (float(u(118, 130)) * size, float(u(84, 94)) * size)
        self.fat_mm = float(u(9, 18))
        self.fat_hu, self.muscle_hu, self.lung_hu = float(u(-112, -92)), float(u(45, 62)), float(u(-880, -800))
        self.dome_mm = float(u(46, 62))

        def ellipsoid(center: Sequence[tuple[float, float]], axes: Sequence[tuple[float, float]]) -> _Ellipsoid:
            c = [float(u(*span)) * size for span in center]
            a = [float(u(*span)) * size for span in axes]
            return _Ellipsoid((c[0], c[1], c[2]), (a[0], a[1], a[2]))

        self.right_lobe = ellipsoid([(-54, -44), (-10, 6), (4, 18)], [(50, 60), (56, 67), (58, 72)])
        self.left_lobe = ellipsoid([(2, 22), (-36, -24), (12, 30)], [(46, 62), (23, 32), (28, 42)])
        self.spleen = ellipsoid([(72, 84), (22, 36), (12, 34)], [(20, 29), (24, 35), (30, 46)])
        self.stomach = ellipsoid([(46, 60), (-30, -12), (2, 30)], [(25, 36), (22, 31), (30, 44)])
        self.kidneys = tuple(
            ellipsoid(
                [(side * 58, side * 48) if side < 0 else (48, 58), (38, 48), (-58, -36)], [(18, 23), (18, 23), (40, 50)]
            )
            for side in (-1, 1)
        )
        self.cava = (float(u(-26, -18)) * size, float(u(20, 28)) * size, float(u(9, 12)) * size)
        self.aorta = (float(u(6, 14)) * size, float(u(22, 28)) * size, float(u(9, 12)) * size)
        self.spine = (0.0, 54.0 * size, 19.0 * size)
        self.vessels = self._grow_vessels(rng)
        self.lesions = self._draw_lesions(rng, phase) if lesions is None else lesions
        self.true_lesions = tuple(self._truth(number, spec) for number, spec in enumerate(self.lesions, start=1))

    # -- the liver's shape, as a formula: below 1 is inside

    def _liver_level(self, x: Floats, y: Floats, z: Floats, coarse: Floats, fine: Floats) -> Floats:
        warp = 0.09 * coarse + 0.04 * fine
        lobes = np.minimum(self.right_lobe.level(x, y, z), self.left_lobe.level(x, y, z)) + warp
        wall = self._wall_level(x, y) + 0 * z
        spine_x, spine_y, _ = self.spine
        spine = 2 - ((x - spine_x) ** 2 + (y - spine_y + 6) ** 2) / (27 * self.size) ** 2
        kidney = 2 - self.kidneys[0].level(x, y, z) / 1.15
        cava = 2 - ((x - self.cava[0]) ** 2 + (y - self.cava[1]) ** 2) / self.cava[2] ** 2
        level: Floats = np.maximum.reduce(np.broadcast_arrays(lobes, wall, spine, kidney, cava))
        return level

    def _wall_level(self, x: Floats, y: Floats) -> Floats:
        """The inside of the abdominal wall."""
        inset = self.fat_mm + 9
        level: Floats = (x / (self.body[0] - inset)) ** 2 + (y / (self.body[1] - inset)) ** 2
        return level

    def _inside_liver(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        x, y, z = points.astype(np.float32).T
        coarse, fine = (field.at(points).astype(np.float32) for field in (self.coarse, self.fine))
        inside: npt.NDArray[np.bool_] = self._liver_level(x, y, z, coarse, fine) < 1
        return inside

    def _points_in_liver(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        low, high = np.array([-115.0, -80.0, -75.0]) * self.size, np.array([85.0, 70.0, 95.0]) * self.size
        points = rng.uniform(low, high, (count * 12, 3))
        return points[self._inside_liver(points)][:count]

    # -- what is drawn inside it

    def _grow_vessels(
        self, rng: np.random.Generator
    ) -> tuple[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]], ...]:
        """Curved tubes from the hilum to points in the liver: centres (n, 3) and radii (n,)."""
        root = np.array([-14.0, 4.0, 4.0]) * self.size
        vessels = []
        for target in self._points_in_liver(rng, int(rng.integers(8, 13))):
            middle = (root + target) / 2 + rng.normal(0, 11, 3)
            t = np.linspace(0, 1, int(np.linalg.norm(target - root)) + 2)[:, None]
            path = (1 - t) ** 2 * root + 2 * t * (1 - t) * middle + t**2 * target
            vessels.append((path, np.linspace(rng.uniform(3.2, 5.5), 1.2, len(path))))
        return tuple(vessels)

    def _draw_lesions(self, rng: np.random.Generator, phase: str) -> tuple[LesionSpec, ...]:
        large, small = (0, 0) if rng.random() < 0.1 else (int(rng.integers(1, 5)), int(rng.integers(0, 4)))
        contrast = 0.45 if phase == "native" else 1.0
        chosen: list[LesionSpec] = []
        for number in range(large + small):
            wanted_touch = number == 0 and large > 1
            for center in self._points_in_liver(rng, 150):
                diameter = float(
                    np.exp(rng.uniform(np.log(10.5), np.log(38))) if number < large else rng.uniform(4.0, 9.0)
                )
                ratio = rng.uniform(0.75, 1.0, 3)
                ratio[int(rng.integers(0, 2))] = 1.0  # x or y: the longest axis lies in an axial plane
                axes = diameter / 2 * ratio
                cyst = rng.random() < 0.15
                hu = float(rng.uniform(0, 15)) if cyst else self.liver_hu - float(rng.uniform(40, 80)) * contrast
                rim = float(rng.uniform(12, 28)) if not cyst and diameter > 14 and rng.random() < 0.3 else 0.0
                spec = LesionSpec(
                    (float(center[0]), float(center[1]), float(center[2])),
                    (float(axes[0]), float(axes[1]), float(axes[2])),
                    hu,
                    rim,
                )
                inside = self._share_inside(spec)
                fits = 0.75 < inside < 0.95 if wanted_touch else self._share_inside(spec, margin_mm=3.0) == 1.0
                if fits and all(_apart(spec, other) for other in chosen):
                    chosen.append(spec)
                    break
        return tuple(chosen)

    def _share_inside(self, spec: LesionSpec, margin_mm: float = 0.0) -> float:
        """Share of the lesion's surface that lies inside the liver."""
        surface = np.array(spec.center_lps_mm) + _sphere(120) * (np.array(spec.semi_axes_mm) + margin_mm)
        return float(self._inside_liver(surface).mean())

    def _truth(self, number: int, spec: LesionSpec) -> TrueLesion:
        a, b, c = spec.semi_axes_mm
        touches = self._share_inside(spec) < 1.0
        return TrueLesion(
            number, spec.center_lps_mm, spec.semi_axes_mm, 2 * max(a, b), 4 / 3 * pi * a * b * c, spec.hu, touches
        )

    # -- the patient on a grid

    def sampled(self, points: Points) -> tuple[Floats, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """CT numbers without noise, organ labels and lesion labels, each of the grid's shape."""
        grid = points.grid
        coarse, fine = self.coarse.on(grid), self.fine.on(grid)
        x, y, z = points.xyz(points.everywhere())
        organs = np.zeros(grid.shape, dtype=np.uint8)
        hu = np.full(grid.shape, -1000.0, dtype=np.float32)

        def within(level: Floats) -> npt.NDArray[np.bool_]:
            inside: npt.NDArray[np.bool_] = np.broadcast_to(level < 1, grid.shape)
            return inside

        width, depth = self.body
        wall = within(self._wall_level(x, y) + 0 * z)
        hu[within((x / width) ** 2 + (y / depth) ** 2 + 0 * z)] = self.fat_hu
        hu[within((x / (width - self.fat_mm)) ** 2 + (y / (depth - self.fat_mm)) ** 2 + 0 * z)] = self.muscle_hu
        np.copyto(hu, -75 + 22 * fine, where=wall)
        np.copyto(hu, 40 + 8 * fine, where=wall & (fine + 0.6 * coarse > 0.5) & (z < 15))  # bowel
        for side in (-1, 1):
            base = _Ellipsoid((side * 55.0, 0.0, 108.0), (60 * self.size, 72 * self.size, 108 - self.dome_mm))
            lung = wall & within(base.level(x, y, z))
            hu[lung], organs[lung] = self.lung_hu, ORGANS["lungs"]

        liver = within(self._liver_level(x, y, z, coarse, fine))
        self._paint_tissue(points, hu, organs, coarse, wall & ~liver)
        hu[liver] = self.liver_hu + 3 * coarse[liver] + 3 * self.texture.on(grid)[liver]
        organs[liver] = ORGANS["liver"]
        for path, radii in self.vessels:
            self._paint_vessel(points, hu, liver, path, radii)
        return hu, organs, self._paint_lesions(points, hu, organs)

    def _paint_tissue(
        self, points: Points, hu: Floats, organs: npt.NDArray[np.uint8], coarse: Floats, free: npt.NDArray[np.bool_]
    ) -> None:
        """Spleen, kidneys, stomach, great vessels and spine, in that order, around the liver."""
        solid = [(self.spleen, "spleen", self.spleen_hu), (self.stomach, "stomach", 25.0)]
        solid += [(kidney, "kidneys", self.kidney_hu) for kidney in self.kidneys]
        for organ, name, mean_hu in solid:
            box = points.box(organ.center, [axis * 1.25 for axis in organ.axes])
            x, y, z = points.xyz(box)
            inside = (organ.level(x, y, z) + 0.06 * coarse[box] < 1) & free[box]
            hu[box][inside], organs[box][inside] = mean_hu, ORGANS[name]
            if name == "stomach":  # gas lies in front: the patient is supine
                hu[box][inside & np.broadcast_to(y < organ.center[1] - 7, inside.shape)] = -950.0
        x, y, z = points.xyz(points.everywhere())
        tubes = (
            (self.cava, "inferior vena cava", self.cava_hu),
            (self.aorta, "aorta", self.aorta_hu),
            (self.spine, "spine", 190.0),
        )
        for (cx, cy, radius), name, mean_hu in tubes:
            tube = np.broadcast_to((x - cx) ** 2 + (y - cy) ** 2 + 0 * z < radius**2, hu.shape)
            hu[tube], organs[tube] = mean_hu, ORGANS[name]
        cx, cy, radius = self.spine
        hu[np.broadcast_to(np.abs((x - cx) ** 2 + (y - cy) ** 2 + 0 * z - (radius * 0.93) ** 2) < 35, hu.shape)] = 480.0
        hu[np.broadcast_to((x - cx) ** 2 + (y - cy - 13) ** 2 + 0 * z < 60, hu.shape)] = 30.0  # the canal

    def _paint_vessel(
        self,
        points: Points,
        hu: Floats,
        liver: npt.NDArray[np.bool_],
        path: npt.NDArray[np.float64],
        radii: npt.NDArray[np.float64],
    ) -> None:
        for center, radius in zip(path, radii, strict=True):
            box = points.box(center, (radius, radius, radius))
            x, y, z = points.xyz(box)
            inside = ((x - center[0]) ** 2 + (y - center[1]) ** 2 + (z - center[2]) ** 2 < radius**2) & liver[box]
            hu[box][inside] = self.vessel_hu

    def _paint_lesions(self, points: Points, hu: Floats, organs: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        labels = np.zeros(hu.shape, dtype=np.uint8)
        for number, spec in enumerate(self.lesions, start=1):
            shape = _Ellipsoid(spec.center_lps_mm, spec.semi_axes_mm)
            box = points.box(spec.center_lps_mm, [axis + 4 for axis in spec.semi_axes_mm])
            distance = (np.sqrt(shape.level(*points.xyz(box))) - 1) * float(np.mean(spec.semi_axes_mm))  # mm, outwards
            in_liver = organs[box] == ORGANS["liver"]
            if spec.rim_hu:
                hu[box][(distance > 0) & (distance < 2.5) & in_liver] = self.liver_hu + spec.rim_hu
            inside = distance < 0
            edge = np.clip(0.5 - distance / 1.5, 0, 1) * (in_liver | inside)
            hu[box] += (spec.hu - hu[box]) * edge
            organs[box][inside], labels[box][inside] = ORGANS["liver"], number
        return labels


def _sphere(count: int) -> npt.NDArray[np.float64]:
    """Points spread evenly over the unit sphere (the golden spiral), (count, 3)."""
    n = np.arange(count) + 0.5
    z = 1 - 2 * n / count
    turn = pi * (1 + 5**0.5) * n
    flat = np.sqrt(1 - z**2)
    return np.stack([flat * np.cos(turn), flat * np.sin(turn), z], axis=1)


def _apart(one: LesionSpec, other: LesionSpec, gap_mm: float = 5.0) -> bool:
    distance = float(np.linalg.norm(np.array(one.center_lps_mm) - np.array(other.center_lps_mm)))
    return distance > max(one.semi_axes_mm) + max(other.semi_axes_mm) + gap_mm
