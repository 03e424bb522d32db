"""What a plans file may name: nnU-Net turns names in it into code, and a model folder is data from elsewhere.

nnU-Net looks names up with `pydoc.locate` and calls what it finds. Here every such name must lead to the thing that is
meant: a network or a layer of torch and dynamic_network_architectures, and nnU-Net's own steps around it.
"""

from __future__ import annotations

import math
import pydoc
import re
from collections.abc import Mapping
from typing import TypeGuard

import torch

from salsa_node.errors import PipelineError

_NETWORKS = "dynamic_network_architectures.architectures."
_LAYERS = ("torch.nn.", "dynamic_network_architectures.building_blocks.")
_STEPS = "nnunetv2.preprocessing."
_MAX_PATCH_VOXELS = 64 << 20  # 400 x 400 x 400; nnU-Net's own planning stays ten times below it
_SPACING_MM = (0.05, 50.0)  # of the network's own voxels; a scan is resampled to them
_MAX_STAGES = 12
_MAX_FEATURES = 4096  # of one stage, and layers of one stage; nnU-Net's own planning stays ten times below it
_SIZES = ("features_per_stage", "n_conv_per_stage", "n_conv_per_stage_decoder", "n_blocks_per_stage")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def check(plans: Mapping[str, object], configuration: Mapping[str, object], model: str) -> None:
    """Raises PipelineError where a configuration of `plans` names anything but nnU-Net's own parts.

    configuration: with what it inherits. model: how the refusal calls the model folder.
    Imports modules of the packages named above; calls nothing.
    """
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    architecture = _table(configuration.get("architecture"), "architecture", model)
    _check_network(architecture, model)
    preprocessor = configuration.get("preprocessor_name")
    if preprocessor != DefaultPreprocessor.__name__:
        raise _refusal(model, "the preprocessor", preprocessor, "DefaultPreprocessor is known")
    schemes = configuration.get("normalization_schemes")
    if not isinstance(schemes, list):
        raise _refusal(model, "the normalisation", schemes, "a list of nnU-Net's schemes is expected")
    for scheme in schemes:
        found = _own("normalization.default_normalization_schemes", scheme)
        if not (isinstance(found, type) and issubclass(found, ImageNormalization)):
            raise _refusal(model, "the normalisation", scheme, "nnU-Net's own schemes are known")
    _check_patch(configuration.get("patch_size"), model)
    _check_spacing(configuration.get("spacing"), model)
    for kind in ("data", "seg", "probabilities"):
        function = configuration.get(f"resampling_fn_{kind}")
        places = ("default_resampling", "resample_torch", "no_resampling")
        if not any(_is_function(_own(f"resampling.{place}", function)) for place in places):
            raise _refusal(model, "the resampling", function, "nnU-Net's own functions are known")
    manager = plans.get("label_manager", "LabelManager")
    if manager != "LabelManager":
        raise _refusal(model, "the label manager", manager, "LabelManager is known")


def _check_patch(sides: object, model: str) -> None:
    """A patch is padded up to: one that no memory holds must not be tried."""
    if not isinstance(sides, list) or not sides or not all(isinstance(side, int) and side > 0 for side in sides):
        raise _refusal(model, "a patch of", sides, "a list of positive counts is expected")
    if math.prod(sides) > _MAX_PATCH_VOXELS:
        raise _refusal(model, "a patch of", sides, f"at most {_MAX_PATCH_VOXELS} voxels are taken")


def _check_spacing(spacing: object, model: str) -> None:
    """A scan is resampled to it: too fine fills the memory, too coarse leaves nothing to see."""
    least, most = _SPACING_MM
    if not isinstance(spacing, list) or not all(_is_number(mm) and least <= mm <= most for mm in spacing):
        raise _refusal(model, "a spacing of", spacing, f"a list of millimetres from {least:g} to {most:g} is expected")


def _check_sizes(kwargs: Mapping[str, object], model: str) -> None:
    """What is multiplied into weights before the file with the weights has a say."""
    stages = kwargs.get("n_stages")
    if not _is_count(stages, _MAX_STAGES):
        raise _refusal(model, "a network with n_stages =", stages, f"a count from 1 to {_MAX_STAGES} is expected")
    for name in _SIZES:
        sizes = kwargs.get(name, 1)
        counts = sizes if isinstance(sizes, list) else [sizes]
        if not all(_is_count(count, _MAX_FEATURES) for count in counts):
            expected = f"counts from 1 to {_MAX_FEATURES}, one for each stage, are expected"
            raise _refusal(model, f"a network with {name} =", sizes, expected)


def _is_number(found: object) -> TypeGuard[float]:
    return isinstance(found, int | float) and not isinstance(found, bool)


def _is_count(found: object, most: int) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and 1 <= found <= most


def _check_network(architecture: Mapping[str, object], model: str) -> None:
    name = architecture.get("network_class_name")
    if not _is_module(name, (_NETWORKS,)):
        raise _refusal(model, "the network", name, "only nnU-Net's own are built")
    kwargs = _table(architecture.get("arch_kwargs"), "arch_kwargs", model)
    _check_sizes(kwargs, model)
    imported = architecture.get("_kw_requires_import")
    if not isinstance(imported, list | tuple):
        raise _refusal(model, "the imports", imported, "a list of names in arch_kwargs is expected")
    for key in imported:
        layer = kwargs.get(key) if isinstance(key, str) else key
        if layer is not None and not _is_module(layer, _LAYERS):
            raise _refusal(model, f"the import {key!s} =", layer, "only layers of torch.nn are built")


def _is_module(name: object, sources: tuple[str, ...]) -> bool:
    """Whether `name` leads into one of the packages, and there to a class of networks or layers."""
    if not isinstance(name, str) or not name.startswith(sources) or not _DOTTED.fullmatch(name):
        return False
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport:
        return False
    packages = tuple({source.partition(".")[0] + "." for source in sources})
    return isinstance(found, type) and issubclass(found, torch.nn.Module) and found.__module__.startswith(packages)


def _own(module: str, name: object) -> object:
    """What nnU-Net's preprocessing has under that name in that module; None where there is nothing."""
    if not isinstance(name, str) or not name.isidentifier():
        return None
    return pydoc.locate(f"{_STEPS}{module}.{name}")


def _is_function(found: object) -> bool:
    return callable(found) and str(getattr(found, "__module__", "")).startswith(f"{_STEPS}resampling.")


def _table(found: object, name: str, model: str) -> Mapping[str, object]:
    if not isinstance(found, Mapping):
        raise PipelineError(f"{model}: plans.json has no table {name}; expected plans of nnU-Net v2")
    return found


def _refusal(model: str, what: str, found: object, known: str) -> PipelineError:
    return PipelineError(f"{model} asks for {what} {str(found)[:120]}; {known}, and no code of a model folder is run")
