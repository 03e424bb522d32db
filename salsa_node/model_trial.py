"""A model's first run: every network of it is loaded and shown a piece of a phantom before anybody relies on it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

import torch

from salsa_node.errors import ModelRefused, PipelineError
from salsa_node.models import ModelFolder
from salsa_node.phantom import Recipe, make
from salsa_node.pipelines.nnunet import MISFITS, Network
from salsa_node.volume import CtVolume, LabelVolume

_SIDE = 32  # voxels of the network's own size; nnU-Net pads them to one patch
_IN_THE_LIVER_LPS_MM = (-60.0, 0.0, 0.0)


def run(folders: Mapping[str, ModelFolder]) -> dict[str, str]:
    """Load the networks in the order given and run each on a phantom, on the CPU; a cascade sees the one before.

    Returns the versions of the libraries that did it. Raises ModelRefused where a network cannot be built,
    holds weights that are not numbers, or gives no labels.
    """
    shown: CtVolume | None = None
    before: LabelVolume | None = None
    for stage, folder in folders.items():
        try:
            network = Network(folder, torch.device("cpu"), precision="float32")
            _check_numbers(network, stage)
            if shown is None or not network.is_cascade:
                shown = _piece(network)
            before = network.predict(shown, before if network.is_cascade else None)
        except ModelRefused:
            raise
        except (PipelineError, *MISFITS) as exc:
            told = str(exc) or type(exc).__name__
            raise ModelRefused(f"{folder.path.name}: its first run on a phantom failed ({told})") from exc
    return {name: version(name) for name in ("nnunetv2", "torch", "dynamic_network_architectures")}


def _check_numbers(network: Network, stage: str) -> None:
    for name, tensor in network.module.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelRefused(f"{stage}: the weights {name} are not finite numbers")


def _piece(network: Network) -> CtVolume:
    """A cube of a phantom's liver in the network's own voxels, so that one patch holds it."""
    shape = tuple(min(_SIDE, side) for side in network.patch_size)
    recipe = Recipe(1, (shape[0], shape[1], shape[2]), network.spacing_mm, center_lps_mm=_IN_THE_LIVER_LPS_MM)
    return make(recipe).ct
