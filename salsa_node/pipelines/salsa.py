"""SALSA: TotalSegmentator's liver, its neighbourhood at 1 mm, and two nnU-Net stages that see nothing else.

After radiomicsgroup/liver-SALSA (Balaguer-Montero et al., Cell Reports Medicine 2025, 102032), in memory from the
volume to the labels. The networks are loaded once and stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from salsa_node import __version__
from salsa_node.errors import ConfigError, SeriesRejected
from salsa_node.models import SALSA, folders_of
from salsa_node.pipelines import (
    DEMO_NOTICE,
    Flag,
    Masks,
    Observer,
    PipelineSettings,
    Provenance,
    once,
    salsa_steps,
    unobserved,
)
from salsa_node.pipelines.device import all_places, choose_device, libraries
from salsa_node.pipelines.nnunet import ENGINES, Network
from salsa_node.pipelines.part import Part, part_of
from salsa_node.pipelines.salsa_steps import (
    LIVER,
    PRESETS,
    Preset,
    clean_liver,
    clean_part,
    crop,
    found_part,
    resample_crop,
    resample_part,
    restore_part,
)
from salsa_node.pipelines.totalseg import TotalSegmentatorLiver
from salsa_node.regrid import onto
from salsa_node.volume import CtVolume, Grid, LabelVolume

FAST_LIVER_PRESET = "salsa-2024"  # upstream asked TotalSegmentator for its 3 mm liver then, for its 1.5 mm liver since


class LiverFinder(Protocol):
    """Finds the liver, before anything else is looked at."""

    @property
    def weights_sha256(self) -> Mapping[str, str]:
        """Of every file that decides the liver."""
        ...

    @property
    def parameters(self) -> Mapping[str, object]:
        """What decides the liver beside the weights."""
        ...

    @property
    def flags(self) -> tuple[Flag, ...]:
        """What went otherwise than asked the last time."""
        ...

    @property
    def ran_on(self) -> str:
        """Where it was computed the last time, in words."""
        ...

    def liver(self, ct: CtVolume) -> LabelVolume:
        """1 = liver, on `ct.grid`; all 0 where none was found."""
        ...

    def unload(self) -> None:
        """Let go of its weights."""
        ...


class Resampler(Protocol):
    """To 1 mm and back: `salsa_steps` or `salsa_upstream`."""

    def resample_ct(self, ct: CtVolume) -> CtVolume:
        """The CT at 1 mm."""
        ...

    def resample_labels(self, labels: LabelVolume) -> LabelVolume:
        """The labels at 1 mm, where the CT lies."""
        ...

    def restore_labels(self, labels: LabelVolume, grid: Grid) -> LabelVolume:
        """Labels at 1 mm back on `grid`."""
        ...


class SalsaPipeline:
    """Liver lesions by SALSA's networks, where a site has installed them.

    `settings.options`:
      preset: "salsa" (ours), "salsa-2025" (today's upstream, bit for bit, by MONAI: slower, and some gigabytes more)
      or "salsa-2024" (the cleaning and crop of that time); see `salsa_steps.PRESETS`.
      mirroring (true), tile_step (0.5), precision ("float32"; "auto" and "bfloat16" are faster on CPUs that have
      it), engine ("own" or "reference"): as `Network` has them.
      fast_liver: take TotalSegmentator's 3 mm liver; true for "salsa-2024" alone.
    liver: finds the liver; TotalSegmentator where none is given.
    Raises ConfigError for an option it cannot use, WeightsMissing where SALSA's or TotalSegmentator's are absent.
    """

    def __init__(self, settings: PipelineSettings, liver: LiverFinder | None = None) -> None:
        options = dict(settings.options)
        preset = options.pop("preset", "salsa")
        if preset not in PRESETS:
            raise ConfigError(f"pipeline.options.preset: salsa has {', '.join(PRESETS)}; found {preset!r}")
        fast_liver = options.pop("fast_liver", preset == FAST_LIVER_PRESET)
        mirroring, tile_step = options.pop("mirroring", True), options.pop("tile_step", 0.5)
        precision, engine = options.pop("precision", "float32"), options.pop("engine", "own")
        if options:
            raise ConfigError(f"pipeline.options.{next(iter(options))}: salsa has no such option")
        if not isinstance(mirroring, bool) or not isinstance(fast_liver, bool):
            raise ConfigError("pipeline.options: salsa's mirroring and fast_liver are true or false")
        if not isinstance(tile_step, float | int) or engine not in ENGINES or not isinstance(precision, str):
            raise ConfigError(
                f"pipeline.options: salsa's tile_step is a number, precision a word, engine {' or '.join(ENGINES)}"
            )
        folders = folders_of(SALSA, settings.models_dir)
        self._preset = PRESETS[str(preset)]
        self._resampler = _resampler(self._preset)
        self._liver: LiverFinder = liver or TotalSegmentatorLiver(
            settings.models_dir,
            settings.device,
            fast=fast_liver,
            precision=precision,
            engine=str(engine),
        )
        device = choose_device(settings.device)
        self._lowres, self._cascade = (
            Network(
                folders[stage],
                device,
                mirroring=mirroring,
                tile_step=float(tile_step),
                precision=precision,
                engine=str(engine),
            )
            for stage in ("lowres", "cascade")
        )
        hashes = {f"{stage}/{name}": sha for stage, folder in folders.items() for name, sha in folder.sha256().items()}
        self._provenance = Provenance(
            pipeline=SALSA,
            version=__version__,
            weights_sha256=hashes | dict(self._liver.weights_sha256),
            parameters={
                "preset": preset,
                "mirroring": mirroring,
                "tile_step": float(tile_step),
                "precision": self._lowres.precision,
                "engine": engine,
                "liver": dict(self._liver.parameters),
            },
            libraries=libraries("TotalSegmentator", *(["monai"] if self._preset.by_monai else [])),
            device=str(device),
            notice=DEMO_NOTICE if _are_demo_models(hashes) else "",
        )

    @property
    def provenance(self) -> Provenance:
        """Which preset, weights, libraries and parameters."""
        return self._provenance

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
        """Liver and lesions on `ct.grid`.

        The observer is told what upstream keeps as files, by their names: "liver", "liver_resampled",
        "liver_postprocessed", "scan_resampled", "cropped/scan_0000", "cropped/mask_0000", "mask_resampled".
        Raises OrganNotFound where there is no liver, SeriesRejected where a voxel is no number, DeviceExhausted.
        """
        if ct.voxels_hu.dtype.kind == "f" and not np.isfinite(ct.voxels_hu).all():
            raise SeriesRejected("some voxels are not finite numbers; Hounsfield units were expected")
        liver = self._liver.liver(ct)
        if observer is unobserved and not self._preset.by_monai:
            found = self._near(ct, liver)
        else:
            found = self._step_by_step(ct, liver, observer)
        organ = (liver.labels > 0).view(np.uint8)
        organ[found.box] |= found.mask
        ran_on = all_places(self._liver.ran_on, self._lowres.ran_on, self._cascade.ran_on)
        return Masks(
            LabelVolume(organ, ct.grid),
            found.whole(),
            replace(self._provenance, device=ran_on),
            flags=once(*self._liver.flags, *self._lowres.flags, *self._cascade.flags),
        )

    def _near(self, ct: CtVolume, liver: LabelVolume) -> Part:
        """The lesions, where nothing is made but what they can reach."""
        cleaned = clean_part(resample_part(part_of(liver, LIVER)), self._preset)
        found = self._look(resample_crop(ct, cleaned, self._preset))
        return restore_part(found_part(found, cleaned, self._preset), ct.grid)

    def _step_by_step(self, ct: CtVolume, liver: LabelVolume, observer: Observer) -> Part:
        """The lesions by way of all that upstream keeps; the same voxels."""
        observer("liver", liver)
        liver_fine = self._resampler.resample_labels(liver)
        observer("liver_resampled", liver_fine)
        cleaned = clean_liver(liver_fine, self._preset)
        observer("liver_postprocessed", cleaned)
        fine = self._resampler.resample_ct(ct)
        observer("scan_resampled", fine)
        seen = crop(fine, cleaned, self._preset)
        observer("cropped/scan_0000", seen)
        found = self._look(seen)
        observer("cropped/mask_0000", found)
        whole = onto(found, cleaned.grid)
        observer("mask_resampled", whole)
        return part_of(self._resampler.restore_labels(whole, ct.grid))

    def _look(self, seen: CtVolume) -> LabelVolume:
        return self._cascade.predict(seen, previous=self._lowres.predict(seen))

    def unload(self) -> None:
        """Let go of the liver's networks and of both stages."""
        self._liver.unload()
        self._lowres.unload()
        self._cascade.unload()


def _resampler(preset: Preset) -> Resampler:
    if not preset.by_monai:
        return salsa_steps
    from salsa_node.pipelines import salsa_upstream  # MONAI takes seconds to import

    return salsa_upstream


def _are_demo_models(hashes: Mapping[str, str]) -> bool:
    """Whether a network is one of those that ship with this package, whatever folder it lies in."""
    shipped = {sha for folder in folders_of("demo", None).values() for sha in folder.sha256().values()}
    return any(sha in shipped for name, sha in hashes.items() if name.endswith(".pth"))
