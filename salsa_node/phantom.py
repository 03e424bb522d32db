"""Synthetic abdominal CT with known anatomy: the demo, the self-test, the training and the tests use it.

A seed draws a patient in patient coordinates (LPS millimetres): every surface is a formula, so any grid -
whatever its matrix, spacing, slice order or direction - shows the same patient, and each lesion's centre,
axes and volume are known exactly. Only the noise belongs to the grid, as it does to a scan.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from salsa_node import dicom_ct, nifti
from salsa_node.anatomy import ORGANS, PHASES_HU, LesionSpec, Patient, Points, TrueLesion
from salsa_node.uids import derive
from salsa_node.volume import CtVolume, Grid, LabelVolume, PointMm

_DIRECTIONS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which patient, and how it is scanned.

    seed: decides the patient; the other values decide the scan.
    shape: (slices, rows, columns).
    spacing_mm: distance of voxel centres along (slice, row, column).
    orientation: where slice, row and column indices grow to, of L/R, A/P and S/I: "SPL" is the usual axial
        series, "IPL" the same from head to feet, "LSP"-like ones are sagittal.
    rotation_deg: turns the grid about the patient's x, y and z axes, for oblique series.
    center_lps_mm: where the middle of the grid lies; the patient's middle is the origin.
    lesions: None draws them from the seed: most patients have some of 10 mm and more, some smaller, and one
        that touches the capsule; a few have none. A tuple replaces them; () is a healthy liver.
    noise_sd_hu: None draws 8 to 16.
    phase: "native", "arterial", "portal_venous" or "delayed".
    """

    seed: int
    shape: tuple[int, int, int] = (64, 192, 192)
    spacing_mm: tuple[float, float, float] = (3.0, 1.5, 1.5)
    orientation: str = "SPL"
    rotation_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    center_lps_mm: PointMm = (0.0, 0.0, 0.0)
    lesions: tuple[LesionSpec, ...] | None = None
    noise_sd_hu: float | None = None
    phase: str = "portal_venous"

    def __post_init__(self) -> None:
        axes = [_DIRECTIONS.get(letter, (0, 0, 0)) for letter in self.orientation]
        if len(axes) != 3 or abs(np.linalg.det(np.array(axes, dtype=np.float64))) < 0.5:
            raise ValueError(
                f"orientation must name one of L/R, A/P and S/I each, such as SPL; found {self.orientation!r}"
            )
        if self.phase not in PHASES_HU:
            raise ValueError(f"phase must be one of {', '.join(PHASES_HU)}; found {self.phase!r}")

    @property
    def grid(self) -> Grid:
        """Where the voxels of this recipe lie."""
        axes = np.array([_DIRECTIONS[letter] for letter in self.orientation], dtype=np.float64).T
        directions = _rotation(self.rotation_deg) @ axes * np.array(self.spacing_mm)
        affine = np.eye(4)
        affine[:3, :3] = directions
        affine[:3, 3] = np.array(self.center_lps_mm) - directions @ ((np.array(self.shape) - 1) / 2)
        return Grid(self.shape, affine, derive("phantom", "frame of reference", str(self.seed)))


@dataclass(frozen=True, slots=True, eq=False)
class Phantom:
    """A synthetic patient, scanned.

    organs: 0 = background, else the values of `ORGANS`; the liver (1) includes its vessels and lesions.
    lesion_labels: 0 = background, n = `lesions[n - 1]`.
    lesions: every lesion of the patient; one too small for the grid, or outside of it, has no voxels.
    """

    recipe: Recipe
    ct: CtVolume
    organs: LabelVolume
    lesion_labels: LabelVolume
    lesions: tuple[TrueLesion, ...]

    @property
    def liver(self) -> LabelVolume:
        """1 = liver with its vessels and lesions."""
        return LabelVolume((self.organs.labels == ORGANS["liver"]).astype(np.uint8), self.organs.grid)


def make(recipe: Recipe) -> Phantom:
    """The patient of that seed on the grid of that recipe; the same recipe gives the same voxels.

    2.4 million voxels take about 2 s and 150 MB.
    """
    patient = Patient(recipe.seed, recipe.phase, recipe.lesions)
    grid = recipe.grid
    hu, organs, lesion_labels = patient.sampled(Points(grid))
    rng = np.random.default_rng((recipe.seed, 1, *recipe.shape))
    noise_sd_hu = patient.noise_sd_hu if recipe.noise_sd_hu is None else recipe.noise_sd_hu
    hu = gaussian_filter(hu, (0.45, 0.55, 0.55))  # the point spread of the scan, in voxels
    noise = gaussian_filter(rng.standard_normal(grid.shape, dtype=np.float32), (0.0, 0.7, 0.7))
    hu += noise * (noise_sd_hu / max(float(noise.std()), 1e-6))
    voxels_hu = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    scan = derive("phantom", "series", repr(recipe))
    uids = tuple(derive(scan, "slice", str(n)) for n in range(grid.shape[0]))
    return Phantom(
        recipe,
        CtVolume(voxels_hu, grid, uids),
        LabelVolume(organs, grid),
        LabelVolume(lesion_labels, grid),
        patient.true_lesions,
    )


@dataclass(frozen=True, slots=True)
class Study:
    """A phantom's study on disk.

    axial: the files of the CT series, in slice order. localizer: the scout images, a series of their own.
    truth_labels: NIfTI, 0 = background, 1 = liver, n + 1 = lesion n. truth_numbers: JSON.
    """

    study_uid: str
    series_uid: str
    localizer_uid: str
    axial: tuple[Path, ...]
    localizer: tuple[Path, ...]
    truth_labels: Path
    truth_numbers: Path


def write_study(phantom: Phantom, folder: Path, *, study: str = "1", acquired: datetime | None = None) -> Study:
    """Writes the CT series to `folder`/axial, two scouts to `folder`/localizer, and the truth beside them.

    study: another word gives the same patient another study with other UIDs (a follow-up, a second try).
    acquired: noon of 1 January 2020 where None, so that the files are the same every time.
    """
    recipe = phantom.recipe
    study_uid = derive("phantom", "study", str(recipe.seed), study)
    series_uid = derive(study_uid, "axial", repr(recipe))
    localizer_uid = derive(study_uid, "localizer", repr(recipe))
    axial = dicom_ct.CtHeader(
        study_uid=study_uid,
        series_uid=series_uid,
        patient_name=f"Phantom^Seed{recipe.seed}",
        patient_id=f"PHANTOM-{recipe.seed}",
        acquired=acquired or datetime(2020, 1, 1, 12, tzinfo=UTC),
        patient_sex="O",
        study_description="Synthetic abdominal CT",
        series_description=f"Phantom {recipe.phase.replace('_', ' ')}",
        series_number=2,
    )
    uids = tuple(derive(series_uid, "slice", str(n)) for n in range(phantom.ct.grid.shape[0]))
    paths = dicom_ct.write(CtVolume(phantom.ct.voxels_hu, phantom.ct.grid, uids), folder / "axial", axial)
    scouts = _write_localizer(phantom, folder / "localizer", axial, localizer_uid)
    truth = Study(study_uid, series_uid, localizer_uid, paths, scouts, folder / "truth.nii.gz", folder / "truth.json")
    _write_truth(phantom, truth)
    return truth


def _write_localizer(phantom: Phantom, folder: Path, axial: dicom_ct.CtHeader, series_uid: str) -> tuple[Path, ...]:
    """A frontal and a lateral scout: the mean along the beam, one image each."""
    paths: list[Path] = []
    for orientation, name in (("AIL", "frontal"), ("LIP", "lateral")):
        recipe = replace(
            phantom.recipe, shape=(16, 96, 144), spacing_mm=(16.0, 2.0, 2.0), orientation=orientation,
            rotation_deg=(0.0, 0.0, 0.0), center_lps_mm=(0.0, 0.0, 0.0), noise_sd_hu=0.0,
        )  # fmt: skip
        beam = make(recipe)
        mean = np.rint(beam.ct.voxels_hu.mean(axis=0, keepdims=True)).astype(np.int16)
        affine = beam.ct.grid.affine_lps_mm.copy()
        affine[:3, 3] = beam.ct.grid.to_lps_mm((7.5, 0, 0))
        image = CtVolume(
            mean, Grid((1, 96, 144), affine, beam.ct.grid.frame_of_reference_uid), (derive(series_uid, name),)
        )
        header = replace(
            axial, series_uid=series_uid, series_number=1, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"),
            series_description="Scout",
        )  # fmt: skip
        (path,) = dicom_ct.write(image, folder / name, header)
        paths.append(path)
    return tuple(paths)


def _write_truth(phantom: Phantom, study: Study) -> None:
    grid = phantom.ct.grid
    labels = np.where(phantom.lesion_labels.labels > 0, phantom.lesion_labels.labels + 1, phantom.liver.labels)
    nifti.write_labels(LabelVolume(labels.astype(np.uint8), grid), study.truth_labels, nifti.LABEL_MAP)
    numbers = {
        "seed": phantom.recipe.seed,
        "study_uid": study.study_uid,
        "series_uid": study.series_uid,
        "liver_volume_mm3": float((phantom.liver.labels > 0).sum() * grid.voxel_volume_mm3),
        "lesions": [
            asdict(lesion) | {"voxels": int((phantom.lesion_labels.labels == lesion.number).sum())}
            for lesion in phantom.lesions
        ],
    }
    study.truth_numbers.write_text(json.dumps(numbers, indent=2) + "\n")


def _rotation(degrees: Sequence[float]) -> npt.NDArray[np.float64]:
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[j, i] = np.sin(angle)
        turn[i, j] = -turn[j, i]
        matrix = turn @ matrix
    return matrix
