"""The demo pipeline: liver, then lesions in two stages as SALSA does it, with small models trained on phantoms.

It shows the whole street on any machine in seconds. Its weights never saw a patient: what it finds in a real CT
means nothing, and every object made from it says so.
"""

from __future__ import annotations

from dataclasses import replace

import cc3d
import numpy as np
import numpy.typing as npt
from scipy.ndimage import maximum_filter, minimum_filter

from salsa_node import __version__
from salsa_node.errors import ConfigError, OrganNotFound
from salsa_node.models import folders_of
from salsa_node.pipelines import DEMO_NOTICE, Masks, Observer, PipelineSettings, Provenance, once, unobserved
from salsa_node.pipelines.device import all_places, choose_device, libraries
from salsa_node.pipelines.nnunet import ENGINES, Network
from salsa_node.volume import CtVolume, Grid, LabelVolume

OUTSIDE_HU = -1024
MIN_LIVER_ML = 50.0
SOFT_TISSUE_HU = (-100, 300)  # outside of it a network may mark what it likes: that is no liver
CLOSING_MM = 9.0
DILATION_MM = 4.0
MARGIN_MM = 6.0
MIN_COMPONENT_MM3 = 30.0
MIN_SHARE_IN_LIVER = 0.5
TILE_STEP = 0.75  # a third of the tiles that nnU-Net's 0.5 takes

Mask = npt.NDArray[np.bool_]


class DemoPipeline:
    """Liver and lesions by the packaged demo models.

    Takes its models from `settings.models_dir`/demo where that folder exists, else from the package.
    `settings.options`: "mirroring" (false) and "precision" ("auto"), as `Network` has them, and "engine" (one of
    `ENGINES`).
    Raises WeightsMissing where a model folder is incomplete, ConfigError for an unknown option or device.
    """

    def __init__(self, settings: PipelineSettings) -> None:
        unknown = sorted(set(settings.options) - {"mirroring", "precision", "engine"})
        if unknown:
            raise ConfigError(f"the demo pipeline has no option {unknown[0]!r}; it has mirroring, precision and engine")
        mirroring = settings.options.get("mirroring", False)
        precision = settings.options.get("precision", "auto")
        if not isinstance(mirroring, bool) or not isinstance(precision, str):
            raise ConfigError("the demo pipeline's mirroring must be true or false and its precision a word")
        engine = settings.options.get("engine", "own")
        if engine not in ENGINES:
            raise ConfigError(f"the demo pipeline's engine is {' or '.join(ENGINES)}; found {engine!r}")
        folders = folders_of("demo", settings.models_dir)
        device = choose_device(settings.device)
        self._liver, self._lowres, self._cascade = (
            Network(
                folders[stage],
                device,
                mirroring=mirroring and stage != "liver",
                tile_step=TILE_STEP,
                precision=precision,
                engine=str(engine),
            )
            for stage in ("liver", "lowres", "cascade")
        )
        hashes = {f"{stage}/{name}": sha for stage, folder in folders.items() for name, sha in folder.sha256().items()}
        parameters = {
            "mirroring": mirroring,
            "precision": self._liver.precision,
            "engine": engine,
            "tile_step": TILE_STEP,
            "min_liver_ml": MIN_LIVER_ML,
            "closing_mm": CLOSING_MM,
            "dilation_mm": DILATION_MM,
            "min_component_mm3": MIN_COMPONENT_MM3,
            "min_share_in_liver": MIN_SHARE_IN_LIVER,
        }
        self._provenance = Provenance("demo", __version__, hashes, parameters, libraries(), str(device), DEMO_NOTICE)

    @property
    def provenance(self) -> Provenance:
        """Which weights and parameters."""
        return self._provenance

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
        """Liver and lesions on `ct.grid`. Raises OrganNotFound below 50 ml of liver, DeviceExhausted.

        The observer is told "liver", "cropped/scan_0000" and "cropped/mask_0000".
        """
        liver = find_liver(self._liver, ct)
        observer("liver", LabelVolume(liver.astype(np.uint8), ct.grid))
        crop, box = liver_only(ct, liver)
        observer("cropped/scan_0000", crop)
        lowres = self._lowres.predict(crop)
        found = self._cascade.predict(crop, previous=lowres)
        observer("cropped/mask_0000", found)
        lesions = np.zeros(ct.grid.shape, dtype=np.uint8)
        lesions[box] = plausible(found.labels == 1, liver[box], ct.grid)
        organ = liver | (lesions > 0)
        ran_on = all_places(self._liver.ran_on, self._lowres.ran_on, self._cascade.ran_on)
        return Masks(
            LabelVolume(organ.astype(np.uint8), ct.grid),
            LabelVolume(lesions, ct.grid),
            replace(self._provenance, device=ran_on),
            flags=once(*self._liver.flags, *self._lowres.flags, *self._cascade.flags),
        )

    def unload(self) -> None:
        """Let go of the three networks."""
        for network in (self._liver, self._lowres, self._cascade):
            network.unload()


def find_liver(network: Network, ct: CtVolume) -> Mask:
    """The largest connected piece of label 1. Raises OrganNotFound where it holds less soft tissue than a liver."""
    pieces = cc3d.connected_components(network.predict(ct).labels == 1, connectivity=6)
    sizes = np.bincount(pieces.ravel(), minlength=2)
    sizes[0] = 0
    largest: Mask = pieces == np.argmax(sizes)
    tissue_hu = ct.voxels_hu[largest] if sizes.any() else np.zeros(0)
    voxels = np.count_nonzero((tissue_hu > SOFT_TISSUE_HU[0]) & (tissue_hu < SOFT_TISSUE_HU[1]))
    found_ml = voxels * ct.grid.voxel_volume_mm3 / 1000
    if found_ml < MIN_LIVER_ML:
        raise OrganNotFound(f"found {found_ml:.0f} ml of liver; at least {MIN_LIVER_ML:.0f} ml are needed to go on")
    return largest


def liver_only(ct: CtVolume, liver: Mask) -> tuple[CtVolume, tuple[slice, slice, slice]]:
    """The box around the liver, all else at -1024 HU, and where that box lies in `ct`.

    The liver is closed and then widened by a few millimetres first, so that lesions at its rim stay inside.
    """
    spacing_mm = ct.grid.spacing_mm
    box = _box(liver, spacing_mm, CLOSING_MM + DILATION_MM + MARGIN_MM)
    room = [(_voxels(CLOSING_MM + DILATION_MM, mm),) * 2 for mm in spacing_mm]  # the edge of the scan closes nothing
    padded = np.pad(liver[box], room).view(np.uint8)
    widened = maximum_filter(padded, size=[2 * _voxels(CLOSING_MM + DILATION_MM, mm) + 1 for mm in spacing_mm])
    closed = minimum_filter(widened, size=[2 * _voxels(CLOSING_MM, mm) + 1 for mm in spacing_mm])
    seen = closed[tuple(slice(before, -after or None) for before, after in room)] > 0
    voxels_hu = np.where(seen, ct.voxels_hu[box], np.array(OUTSIDE_HU, dtype=ct.voxels_hu.dtype))
    affine = ct.grid.affine_lps_mm.copy()
    affine[:3, 3] = ct.grid.to_lps_mm((box[0].start, box[1].start, box[2].start))
    shape = (seen.shape[0], seen.shape[1], seen.shape[2])
    return CtVolume(voxels_hu, Grid(shape, affine, ct.grid.frame_of_reference_uid)), box


def plausible(lesions: Mask, liver: Mask, grid: Grid) -> Mask:
    """The 26-connected pieces of at least 30 mm3 that lie for at least one half in the liver.

    The box shows a rim of the liver's neighbours too, and lung or fat there can look like a lesion.
    """
    pieces = cc3d.connected_components(lesions, connectivity=26)
    voxels = np.bincount(pieces.ravel())
    inside = np.bincount(pieces[liver], minlength=len(voxels))
    kept = (voxels * grid.voxel_volume_mm3 >= MIN_COMPONENT_MM3) & (inside >= MIN_SHARE_IN_LIVER * voxels)
    kept[0] = False
    mask: Mask = kept[pieces]
    return mask


def _voxels(length_mm: float, spacing_mm: float) -> int:
    return round(length_mm / spacing_mm)


def _box(mask: Mask, spacing_mm: tuple[float, float, float], margin_mm: float) -> tuple[slice, slice, slice]:
    bounds = []
    for axis, (count, mm) in enumerate(zip(mask.shape, spacing_mm, strict=True)):
        inside = np.flatnonzero(mask.any(axis=tuple(n for n in range(3) if n != axis)))
        margin = _voxels(margin_mm, mm)
        bounds.append(slice(max(0, int(inside[0]) - margin), min(count, int(inside[-1]) + 1 + margin)))
    return bounds[0], bounds[1], bounds[2]
