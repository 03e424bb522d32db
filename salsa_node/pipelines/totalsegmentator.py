"""TotalSegmentator's open `liver_lesions` task as a pipeline, with its own crop and spacing.

The 3 mm network of the task "total" finds the liver in the whole scan; the network of `liver_lesions` looks at the box
around it. What TotalSegmentator marks outside the liver is kept, as it keeps it: the guards speak of it. Optional,
each off by default and each a line of the report: the Couinaud segment of every lesion (`liver_segments`, with
its `robust_crop`: the liver is known from the 3 mm network), the contrast phase (`totalseg_get_phase`), and whether
the liver lies wholly in the field of view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from salsa_node import __version__
from salsa_node.errors import ConfigError, OrganNotFound
from salsa_node.models import task_model
from salsa_node.pipelines import Flag, Masks, Observer, PipelineSettings, Provenance, once, unobserved
from salsa_node.pipelines.device import all_places, choose_device, libraries
from salsa_node.pipelines.nnunet import ENGINES
from salsa_node.pipelines.phase import Phase, PhaseEstimator
from salsa_node.pipelines.scan import CROP_MARGIN_MM
from salsa_node.pipelines.totalseg import (
    Seen,
    TaskNetwork,
    task_of,
)
from salsa_node.volume import CtVolume, Grid, LabelVolume

NAME: Final = "totalsegmentator-liver-lesions"
EXPECTED_PHASE: Final = "portal venous"  # in which most liver lesions show best
_SWITCHES: Final = ("couinaud", "contrast_phase", "body_region")
_TOWARDS: Final = (("left", "right"), ("back", "front"), ("head", "feet"))  # where +x, -x, +y, -y, +z, -z of LPS lie


class LiverLesionsPipeline:
    """Liver and lesions by TotalSegmentator's open models, which must be installed.

    `settings.options`: "couinaud", "contrast_phase" and "body_region" (each false), "precision" ("float32"; "auto"
    and "bfloat16" as `Network` has them), "engine" (one of `ENGINES`). Raises
    WeightsMissing where a model is absent, ConfigError for a setting that cannot be.
    """

    def __init__(self, settings: PipelineSettings) -> None:
        wanted = _switches(settings.options)
        precision = settings.options.get("precision", "float32")
        if not isinstance(precision, str):
            raise ConfigError(f"{NAME}: precision must be a word, found {precision!r}")
        engine = settings.options.get("engine", "own")
        if engine not in ENGINES:
            raise ConfigError(f"{NAME}: engine is {' or '.join(ENGINES)}, found {engine!r}")
        tasks = [task_of("total", "fast"), task_of("liver_lesions")]
        tasks += [task_of("liver_segments")] if wanted["couinaud"] else []
        for task in tasks:
            task_model(task.number, settings.models_dir)
        self._phase = PhaseEstimator() if wanted["contrast_phase"] else None
        self._networks = [
            TaskNetwork(task, settings.models_dir, settings.device, precision, engine=str(engine)) for task in tasks
        ]
        self._checks_region = wanted["body_region"]
        hashes = {file: sha for network in self._networks for file, sha in network.weights_sha256.items()}
        parameters: dict[str, object] = {
            **wanted,
            "networks": [network.parameters for network in self._networks],
            "crop_margin_mm": CROP_MARGIN_MM,
            "precision": self._networks[0].precision,
            "engine": engine,
        }
        ran_with = libraries("TotalSegmentator")
        if self._phase is not None:
            hashes["contrast_phase_classifiers"] = self._phase.sha256
            ran_with |= self._phase.libraries
        device = str(choose_device(settings.device))
        self._provenance = Provenance(NAME, __version__, hashes, parameters, ran_with, device)

    @property
    def provenance(self) -> Provenance:
        """Which weights and parameters."""
        return self._provenance

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
        """Liver and lesions on `ct.grid`.

        observer: is told "liver".
        Raises OrganNotFound where no liver is seen, SeriesRejected for voxels that are no numbers or a scan that is
        too thin, DeviceExhausted.
        """
        total, lesions, *segments = self._networks
        scan = total.scan(ct)
        body = total.look(scan)
        box = body.box_around(total.task.label_of("liver"))
        if box is None:
            raise OrganNotFound("no voxel was marked as liver; an abdominal CT that shows the liver is expected")
        organ = body.mask(total.task.label_of("liver"))
        observer("liver", organ)
        found = lesions.look_near(scan, box).mask(lesions.task.label_of("liver_lesions"))
        parts = [network.look_near(scan, box).labels for network in segments]
        phase = self._seen(body, total.task.classes)
        odd = [flag for network in self._networks for flag in network.flags]
        return Masks(
            organ,
            found,
            replace(self._provenance, device=all_places(*(network.ran_on for network in self._networks))),
            segments=parts[0] if parts else None,
            flags=once(*self._told(organ, phase), *odd),
            pixel_phase=None if phase is None else phase.seen,
        )

    def unload(self) -> None:
        """Let go of the weights and of the device's memory; the pipeline is of no use afterwards."""
        for network in self._networks:
            network.unload()

    def _seen(self, body: Seen, classes: Mapping[int, str]) -> Phase | None:
        """The contrast phase, where that was asked for and can be told."""
        if self._phase is None:
            return None
        voxel_mm3 = float(np.prod(body.coarse_spacing_mm))
        return self._phase.estimate(body.coarse_hu, body.coarse_labels, classes, voxel_mm3)

    def _told(self, liver: LabelVolume, phase: Phase | None) -> list[Flag]:
        """A line for each check that was asked for."""
        told = []
        if self._checks_region:
            told.append(Flag("body_region", field_of_view(liver)))
        if self._phase is not None:
            text = "Contrast phase not estimated: the head is in the scan, and its vessels are not looked at."
            if phase is not None:
                text = (
                    f"Contrast phase estimated from the attenuation of the organs: {phase.name}, "
                    f"{phase.after_injection_s:.0f} s after injection (standard deviation of five estimates "
                    f"{phase.spread_s:.0f} s)."
                )
                if not phase.name.startswith(EXPECTED_PHASE):
                    text += f" Expected is {EXPECTED_PHASE}: lesions may be missed, and attenuation differs."
            told.append(Flag("contrast_phase", text))
        return told


def field_of_view(liver: LabelVolume) -> str:
    """One sentence: whether the liver lies wholly in the scan, or towards which sides it is cut off.

    It is cut off where it reaches the outermost voxels of the scan.
    """
    mask = liver.labels > 0
    edges = [(axis, end, mask.take(end, axis)) for axis in range(3) for end in (0, -1)]
    sides = [_side(liver.grid, axis, forwards=end == -1) for axis, end, edge in edges if edge.any()]
    if not sides:
        return "Body region: the liver lies wholly in the field of view."
    where = " and the ".join(sides)
    return f"Body region: the liver is not wholly in the field of view; it is cut off towards the {where}."


def _side(grid: Grid, axis: int, *, forwards: bool) -> str:
    """Where an axis of the grid runs to, in words."""
    way = grid.affine_lps_mm[:3, axis] * (1 if forwards else -1)
    nearest = int(np.argmax(np.abs(way)))
    return _TOWARDS[nearest][0 if way[nearest] > 0 else 1]


def _switches(options: Mapping[str, object]) -> dict[str, bool]:
    found = {name: options.get(name, False) for name in _SWITCHES}
    for name, value in found.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{NAME}: {name} must be true or false, found {value!r}")
    return {name: value is True for name, value in found.items()}
