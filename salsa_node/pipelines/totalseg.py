"""TotalSegmentator's networks, resident and in memory: the steps of its `python_api` without its files and processes.

After TotalSegmentator 2.18 (Wasserthal et al., Radiology: Artificial Intelligence 2023, e230024). Its own tables say
which network a task takes, at what spacing and where its weights lie; `scan` crops and resamples as it does. What is
left out is `totalsegmentator.nnunet`: importing that changes nnU-Net's functions for the whole process, writes every
image to disk and loads every network anew. Nothing here reads or sets an environment variable, prints, ends the
process or sends usage statistics.

Images are NIfTI as TotalSegmentator's own: (x, y, z) in RAS; they are met here and in `scan`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from salsa_node.errors import SeriesRejected
from salsa_node.models import task_model
from salsa_node.pipelines import Flag, once
from salsa_node.pipelines.device import all_places, choose_device
from salsa_node.pipelines.nnunet import Network
from salsa_node.pipelines.scan import CROP_MARGIN_MM, Box, Labels, Scan
from salsa_node.volume import CtVolume, Grid, LabelVolume


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
    """What a network saw in a scan, or in the box of it that it looked at.

    coarse_hu, coarse_labels: (x, y, z) of the turned image at the network's own spacing: what it looked at, and what
        it found there. coarse_spacing_mm: along (x, y, z).
    """

    scan: Scan
    box: Box | None
    coarse_hu: npt.NDArray[np.float32]
    coarse_labels: Labels
    coarse_spacing_mm: tuple[float, float, float]

    @property
    def labels(self) -> LabelVolume:
        """All that it found, on the grid of the CT; 0 beside the box."""
        return self.scan.labelled(self.scan.brought_back(self.coarse_labels, self.box))

    def mask(self, label: int) -> LabelVolume:
        """1 where it found that label, on the grid of the CT."""
        found = (self.coarse_labels == label).astype(np.uint8)
        return self.scan.labelled(self.scan.brought_back(found, self.box))

    def box_around(self, label: int) -> Box | None:
        """Of the scan, where it looked at all of it: 20 mm wider than the label on each side; None where it is not."""
        return self.scan.box_around(self.coarse_labels == label)


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
        self._device = choose_device(device)
        self._network = Network(folder, self._device, tile_step=task.tile_step, precision=precision, engine=engine)

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

    def scan(self, ct: CtVolume) -> Scan:
        """The CT where this network computes. Raises SeriesRejected where a voxel is no number."""
        return Scan(ct, self._device)

    def look(self, scan: Scan) -> Seen:
        """What the network sees in the scan.

        Raises SeriesRejected where that is too thin for the network's spacing, DeviceExhausted.
        """
        return self._look(scan, None)

    def look_near(self, scan: Scan, box: Box | None) -> Seen:
        """What the network sees in that box of the scan; nothing in none, and the network does not run then.

        Raises as `look` does.
        """
        if box is None:
            self._network.forget()
            nowhere = np.zeros((1, 1, 1), dtype=np.float32)
            return Seen(scan, (slice(0), slice(0), slice(0)), nowhere, nowhere.astype(np.uint8), self.task.spacing_mm)
        return self._look(scan, box)

    def _look(self, scan: Scan, box: Box | None) -> Seen:
        self._network.forget()
        self._check_size(scan, box)
        coarse_hu, spacing_mm = scan.at_spacing(self.task.spacing_mm, box)
        return Seen(scan, box, coarse_hu, self._predict(coarse_hu, spacing_mm), spacing_mm)

    def _check_size(self, scan: Scan, box: Box | None) -> None:
        counts = scan.shape if box is None else tuple(side.stop - side.start for side in box)
        seen = zip(scan.turned(counts), scan.turned(scan.spacing_mm), self.task.spacing_mm, strict=True)
        for count, mm, wanted_mm in seen:
            if round(count * (mm / wanted_mm)) < 1:  # as the scan is resampled, to the last bit
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
        scan = self._rough.scan(ct)
        box = self._rough.look(scan).box_around(self._rough.task.label_of("liver"))
        return self._fine.look_near(scan, box).mask(self._fine.task.label_of("liver"))

    def unload(self) -> None:
        """Lets go of both networks; it cannot be used again."""
        self._rough.unload()
        self._fine.unload()
