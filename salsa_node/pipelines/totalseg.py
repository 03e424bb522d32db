"""TotalSegmentator's networks, resident and in memory: the steps of its `python_api` without its files and processes.

After TotalSegmentator 2.18 (Wasserthal et al., Radiology: Artificial Intelligence 2023, e230024). Its own tables say
which network a task takes, at what spacing and where its weights lie; its own functions crop and resample. What is
left out is `totalsegmentator.nnunet`: importing that changes nnU-Net's functions for the whole process, writes every
image to disk and loads every network anew. Nothing here reads or sets an environment variable, prints, ends the
process or sends usage statistics.

Images are NIfTI as TotalSegmentator's own: (x, y, z) in RAS; they are met here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.nifti1 import Nifti1Image

from salsa_node.errors import SeriesRejected
from salsa_node.models import task_model
from salsa_node.pipelines import Flag, once
from salsa_node.pipelines.device import all_places, choose_device
from salsa_node.pipelines.nnunet import Network
from salsa_node.volume import CtVolume, Grid, LabelVolume

CROP_MARGIN_MM: Final = 20  # what its python_api takes wherever its own liver network finds the crop
_RAS_TO_LPS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Task:
    """One network of TotalSegmentator.

    number: its nnU-Net data set. folder: where its weights lie in TotalSegmentator's layout.
    spacing_mm: what it sees, along (x, y, z). tile_step: of the sliding window, as a share of the patch.
    classes: label -> anatomy, in TotalSegmentator's words.
    """

    number: int
    folder: Path
    spacing_mm: tuple[float, float, float]
    tile_step: float
    classes: Mapping[int, str]

    def label_of(self, anatomy: str) -> int:
        """The label that the network gives to that anatomy."""
        return next(label for label, name in self.classes.items() if name == anatomy)


def task_of(name: str, mode: str = "default") -> Task:
    """The network of a task by TotalSegmentator's tables; of several, the one that knows the liver.

    mode: "default" (1.5 mm), "fast" (3 mm) or "fastest" (6 mm), for the task "total".
    """
    from totalsegmentator import map_tasks_config, map_to_binary

    settings = {**map_tasks_config.DEFAULT_CONFIG, **map_tasks_config.TASK_CONFIGS[name]}
    settings |= settings.get("sub_modes", {}).get(mode, {})
    number, classes = settings["task_id"], map_to_binary.class_map[name]
    if isinstance(number, list):
        parts = {one: map_to_binary.map_taskid_to_partname_ct[one] for one in number}
        classes_of = {one: map_to_binary.class_map_5_parts[part] for one, part in parts.items()}
        number = next(one for one, known in classes_of.items() if "liver" in known.values())
        classes = classes_of[number]
    spacing_mm = settings["resample"]
    x, y, z = spacing_mm if isinstance(spacing_mm, list) else [spacing_mm] * 3
    trained = f"{settings['trainer']}__{settings['plans'] or 'nnUNetPlans'}__{settings['model']}"
    folder = Path(map_tasks_config.TASK_ID_WEIGHTS_CONFIGS[number]["foldername"]) / trained
    tile_step = 0.8 if name == "total" else 0.5  # `nnUNet_predict_image`
    return Task(int(number), folder, (float(x), float(y), float(z)), tile_step, classes)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a network saw in an image.

    labels: (x, y, z) on the image's voxels.
    coarse_hu, coarse_labels: what the network looked at, at its own spacing, and what it found there; of the crop,
        where it looked at one. coarse_spacing_mm: along (x, y, z).
    """

    labels: Labels
    coarse_hu: npt.NDArray[np.float32]
    coarse_labels: Labels
    coarse_spacing_mm: tuple[float, float, float]


class TaskNetwork:
    """A task's network in memory.

    models_dir: the folder of all models, as `models` lays it out. precision, engine: as `Network` has them.
    Raises WeightsMissing, PipelineError.
    """

    def __init__(
        self, task: Task, models_dir: Path | None, device: str, precision: str = "float32", *, engine: str = "own"
    ) -> None:
        self.task = task
        folder = task_model(task.number, models_dir)
        self.weights_sha256 = {f"{task.folder.parts[0]}/{file}": sha for file, sha in folder.sha256().items()}
        self._network = Network(
            folder, choose_device(device), tile_step=task.tile_step, precision=precision, engine=engine
        )

    @property
    def flags(self) -> tuple[Flag, ...]:
        """What went otherwise than asked in the last prediction."""
        return self._network.flags

    @property
    def ran_on(self) -> str:
        """Where the last prediction was computed, in words."""
        return self._network.ran_on

    @property
    def precision(self) -> str:
        """In what numbers it multiplies, in a word."""
        return self._network.precision

    @property
    def parameters(self) -> dict[str, object]:
        """What decides the outcome beside the weights."""
        return {"task": self.task.number, "spacing_mm": list(self.task.spacing_mm), "tile_step": self.task.tile_step}

    def unload(self) -> None:
        """Lets go of the network; it cannot be used again."""
        self._network.unload()

    def look(self, image: Nifti1Image, near: Labels | None = None) -> Seen:
        """What the network sees in the image.

        near: (x, y, z); look only at the box around what is not 0, 20 mm wider on each side. Where all is 0, nothing
            is seen and the network does not run.
        Raises SeriesRejected where the image is too thin for the network's spacing, DeviceExhausted.
        """
        from totalsegmentator.alignment import undo_canonical
        from totalsegmentator.resampling import change_spacing

        self._network.forget()
        labels = np.zeros(image.shape, dtype=np.uint8, order="F")  # slices lie together, as in a CT of ours
        box = (slice(None), slice(None), slice(None)) if near is None else _box(near, image)
        if box is None:
            nowhere = np.zeros((0, 0, 0), dtype=np.float32)
            return Seen(labels, nowhere, nowhere.astype(np.uint8), self.task.spacing_mm)
        crop = image if near is None else _cropped(image, box)
        seen = nib.as_closest_canonical(crop)  # type: ignore[no-untyped-call]
        self._check_size(seen)
        coarse = change_spacing(seen, list(self.task.spacing_mm), order=1, dtype=np.int32)
        coarse_hu = np.asarray(coarse.dataobj).astype(np.float32)
        x_mm, y_mm, z_mm = (float(mm) for mm in coarse.header.get_zooms())
        coarse_labels = self._predict(coarse_hu, (x_mm, y_mm, z_mm))
        fine = Nifti1Image(nearest(coarse_labels, seen.shape), seen.affine)  # type: ignore[no-untyped-call]
        labels[box] = np.asarray(undo_canonical(fine, image).dataobj)
        return Seen(labels, coarse_hu, coarse_labels, (x_mm, y_mm, z_mm))

    def _check_size(self, image: Any) -> None:
        for count, mm, wanted_mm in zip(image.shape, image.header.get_zooms(), self.task.spacing_mm, strict=True):
            if round(count * mm / wanted_mm) < 1:
                raise SeriesRejected(
                    f"{count} voxels of {mm:.3g} mm in one direction: less than half of one voxel of "
                    f"{wanted_mm:.3g} mm, which is what TotalSegmentator's task {self.task.number} looks at"
                )

    def _predict(self, voxels_hu: npt.NDArray[np.float32], spacing_mm: tuple[float, float, float]) -> Labels:
        """The network on (x, y, z) voxels in RAS order at its own spacing."""
        x_mm, y_mm, z_mm = spacing_mm
        affine = np.array([[0, 0, -x_mm, 0], [0, -y_mm, 0, 0], [z_mm, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
        voxels = voxels_hu.transpose(2, 1, 0)
        grid = Grid((voxels.shape[0], voxels.shape[1], voxels.shape[2]), affine)
        labels = self._network.predict(CtVolume(voxels, grid)).labels
        return labels.transpose(2, 1, 0).astype(np.uint8)


def nearest(labels: Labels, shape: tuple[int, ...]) -> Labels:
    """Labels on as many voxels as `shape` has, each the nearest one: the first and last centres fall together.

    What `scipy.ndimage.zoom(order=0)` gives, axis by axis instead of voxel by voxel.
    """
    turned = labels.T  # whole slices are copied at a time
    for axis, (count, wanted) in enumerate(zip(turned.shape, shape[::-1], strict=True)):
        step = (count - 1) / (wanted - 1) if wanted > 1 else 1.0
        at = np.floor(np.arange(wanted) * step + 0.5).astype(np.intp)
        turned = np.take(turned, np.minimum(at, count - 1), axis)
    return turned.T


def _box(near: Labels, image: Nifti1Image) -> tuple[slice, slice, slice] | None:
    """The box around what is not 0, 20 mm wider on each side, in whole voxels rounded down; None where all is 0."""
    bounds = []
    for axis, mm in enumerate(image.header.get_zooms()):  # type: ignore[no-untyped-call]
        inside = np.flatnonzero(near.any(axis=tuple(n for n in range(3) if n != axis)))
        if not inside.size:
            return None
        margin = int(CROP_MARGIN_MM / float(mm))  # in float64, as it divides: 0.8 mm gives 24 voxels, not 25
        bounds.append(slice(max(0, int(inside[0]) - margin), min(near.shape[axis], int(inside[-1]) + 1 + margin)))
    return bounds[0], bounds[1], bounds[2]


def _cropped(image: Nifti1Image, box: tuple[slice, slice, slice]) -> Nifti1Image:
    """The part of the image in `box`, in whole Hounsfield units."""
    affine = image.affine.copy()
    affine[:3, 3] = (image.affine @ [box[0].start, box[1].start, box[2].start, 1])[:3]
    return Nifti1Image(np.asarray(image.dataobj)[box].astype(np.int32), affine)  # type: ignore[no-untyped-call]


class TotalSegmentatorLiver:
    """TotalSegmentator's liver, as `totalsegmentator(image, task="total", roi_subset=["liver"])` finds it.

    A 6 mm network finds roughly where it is; the 1.5 mm network (`fast`: the 3 mm network) looks there.
    models_dir: the folder of all models, as `models` lays it out. device: "auto", "cpu" or "cuda:N".
    precision, engine: as `Network` has them.
    Raises WeightsMissing where a network is not installed.
    """

    def __init__(
        self,
        models_dir: Path | None,
        device: str = "auto",
        *,
        fast: bool = False,
        precision: str = "float32",
        engine: str = "own",
    ) -> None:
        tasks = [task_of("total", "fastest"), task_of("total", "fast" if fast else "default")]
        for task in tasks:
            task_model(task.number, models_dir)
        self._rough, self._fine = (TaskNetwork(task, models_dir, device, precision, engine=engine) for task in tasks)

    @property
    def weights_sha256(self) -> dict[str, str]:
        """For a Provenance: of every file that decides the liver."""
        return self._rough.weights_sha256 | self._fine.weights_sha256

    @property
    def parameters(self) -> dict[str, object]:
        """For a Provenance: what decides the liver beside the weights."""
        return {
            "networks": [self._rough.parameters, self._fine.parameters],
            "precision": self._fine.precision,
            "crop_margin_mm": CROP_MARGIN_MM,
        }

    @property
    def flags(self) -> tuple[Flag, ...]:
        """What went otherwise than asked in the last prediction."""
        return once(*self._rough.flags, *self._fine.flags)

    @property
    def ran_on(self) -> str:
        """Where the last prediction was computed, in words."""
        return all_places(self._rough.ran_on, self._fine.ran_on)

    def liver(self, ct: CtVolume) -> LabelVolume:
        """1 = liver, on `ct.grid`; all 0 where none was found. Raises SeriesRejected, DeviceExhausted."""
        image = image_of(ct)
        near = self._rough.look(image).labels == self._rough.task.label_of("liver")
        found = self._fine.look(image, near.astype(np.uint8)).labels == self._fine.task.label_of("liver")
        return labels_of(found.astype(np.uint8), ct.grid)

    def unload(self) -> None:
        """Lets go of both networks; it cannot be used again."""
        self._rough.unload()
        self._fine.unload()


def image_of(ct: CtVolume) -> Nifti1Image:
    """The CT as the NIfTI image that TotalSegmentator would read. Raises SeriesRejected where a voxel is no number."""
    if not np.isfinite(ct.voxels_hu).all():
        raise SeriesRejected("some voxels are not finite numbers; Hounsfield units were expected")
    affine = _RAS_TO_LPS @ ct.grid.affine_lps_mm[:, [2, 1, 0, 3]]
    return Nifti1Image(ct.voxels_hu.transpose(2, 1, 0), affine)  # type: ignore[no-untyped-call]


def labels_of(labels: Labels, grid: Grid) -> LabelVolume:
    """Labels of an image made by `image_of`, on the grid of its CT."""
    return LabelVolume(np.ascontiguousarray(labels.transpose(2, 1, 0)), grid)
