"""A plans file is data from elsewhere: what it names is nnU-Net's own, or it is refused before anything is called."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from salsa_node.errors import PipelineError
from salsa_node.models import DEMO_STAGES, ModelFolder, demo_models_dir
from salsa_node.pipelines.nnunet import Network

Plans = dict[str, Any]


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Callable[[Plans], None]], ModelFolder]:
    """A copy of the demo's low-resolution model whose plans somebody changed."""

    def copy(change: Callable[[Plans], None]) -> ModelFolder:
        path = shutil.copytree(demo_models_dir() / DEMO_STAGES["lowres"], tmp_path / "model", dirs_exist_ok=True)
        plans = json.loads((path / "plans.json").read_text())
        change(plans)
        (path / "plans.json").write_text(json.dumps(plans))
        return ModelFolder(path)

    return copy


def configuration(plans: Plans) -> Plans:
    found: Plans = plans["configurations"]["3d_lowres"]
    return found


def architecture(plans: Plans) -> Plans:
    found: Plans = configuration(plans)["architecture"]
    return found


def arch_kwargs(plans: Plans) -> Plans:
    found: Plans = architecture(plans)["arch_kwargs"]
    return found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plans: architecture(plans).update(network_class_name="os.system"), r"the network os\.system"),
        (lambda plans: architecture(plans).update(network_class_name="torch.hub.load"), r"the network torch\.hub"),
        (
            lambda plans: architecture(plans).update(
                network_class_name="dynamic_network_architectures.architectures.unet.torch.load"
            ),
            r"the network dynamic_network_architectures\.architectures\.unet\.torch\.load",
        ),
        (lambda plans: architecture(plans).update(network_class_name=["x"]), "the network"),
        (lambda plans: architecture(plans).update(network_class_name="dynamic_network_architectures..x"), "network"),
        (lambda plans: arch_kwargs(plans).update(nonlin="os.system"), r"the import nonlin = os\.system"),
        (lambda plans: arch_kwargs(plans).update(conv_op="torch.load"), r"the import conv_op = torch\.load"),
        (lambda plans: arch_kwargs(plans).update(conv_op="torch.nn.functional.conv3d"), "the import conv_op"),
        (lambda plans: arch_kwargs(plans).update(nonlin="torch.nn.Parameter"), "the import nonlin"),
        (lambda plans: arch_kwargs(plans).update(norm_op="torch.nn.modules.module.warnings.warn"), "norm_op"),
        (
            lambda plans: architecture(plans).update(_kw_requires_import=["nonlin_kwargs"]),
            "the import nonlin_kwargs",
        ),
        (lambda plans: architecture(plans).update(_kw_requires_import="conv_op"), "the imports conv_op"),
        (lambda plans: configuration(plans).update(preprocessor_name="Popen"), "the preprocessor Popen"),
        (lambda plans: configuration(plans).update(preprocessor_name="np"), "the preprocessor np"),
        (lambda plans: configuration(plans).update(normalization_schemes=["np"]), "the normalisation np"),
        (lambda plans: configuration(plans).update(normalization_schemes="np"), "the normalisation np"),
        (lambda plans: configuration(plans).update(resampling_fn_data="deepcopy"), "the resampling deepcopy"),
        (lambda plans: configuration(plans).update(resampling_fn_seg="resize"), "the resampling resize"),
        (lambda plans: configuration(plans).update(resampling_fn_probabilities="../x"), "the resampling"),
        (lambda plans: plans.update(label_manager="np"), "the label manager np"),
        (lambda plans: configuration(plans).update(patch_size=[4096, 4096, 4096]), "a patch of"),
        (lambda plans: configuration(plans).update(patch_size=[0, 64, 64]), "a patch of"),
        (lambda plans: configuration(plans).update(patch_size="64"), "a patch of 64"),
        (lambda plans: configuration(plans).update(spacing=[0.001] * 3), "a spacing of"),
        (lambda plans: configuration(plans).update(spacing=[1e9] * 3), r"a spacing of .* from 0\.05 to 50"),
        (lambda plans: configuration(plans).update(spacing=None), "a spacing of None"),
        (lambda plans: arch_kwargs(plans).update(n_stages=10**6), "n_stages = 1000000; a count from 1 to 12"),
        (lambda plans: arch_kwargs(plans).update(features_per_stage=[1 << 40] * 4), "features_per_stage"),
        (lambda plans: arch_kwargs(plans).update(features_per_stage=8.5), "a network with features_per_stage"),
        (lambda plans: arch_kwargs(plans).update(n_conv_per_stage="2"), "a network with n_conv_per_stage = 2"),
        (lambda plans: arch_kwargs(plans).update(n_conv_per_stage=[2]), "do not fit together"),  # nnU-Net asserts it
        (lambda plans: configuration(plans).update(architecture=None), "has no table architecture"),
        (lambda plans: plans.update(configurations=[]), "plans and weights do not fit together"),
    ],
)
def test_a_foreign_name_is_refused_with_the_reason(
    changed: Callable[..., ModelFolder], change: Callable[[Plans], None], words: str
) -> None:
    with pytest.raises(PipelineError, match=words):
        Network(changed(change), torch.device("cpu"))


def test_what_a_plan_names_is_never_called(
    changed: Callable[..., ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[object] = []
    monkeypatch.setattr(os, "system", called.append)
    monkeypatch.setattr(torch.hub, "load", called.append)
    for name in ("os.system", "torch.hub.load"):
        with pytest.raises(PipelineError, match="no code of a model folder is run"):
            Network(changed(lambda plans, name=name: arch_kwargs(plans).update(conv_op=name)), torch.device("cpu"))
    assert called == []


def to_old_format(plans: Plans) -> None:
    """As nnU-Net 2.0 to 2.2 wrote them: the network in words of its own, no `architecture`."""
    part = configuration(plans)
    design = part.pop("architecture")["arch_kwargs"]
    part.update(
        UNet_class_name="PlainConvUNet",
        UNet_base_num_features=design["features_per_stage"][0],
        unet_max_num_features=design["features_per_stage"][-1],
        n_conv_per_stage_encoder=design["n_conv_per_stage"],
        n_conv_per_stage_decoder=design["n_conv_per_stage_decoder"],
        conv_kernel_sizes=design["kernel_sizes"],
        pool_op_kernel_sizes=design["strides"],
        num_pool_per_axis=[3, 3, 3],
    )


def test_plans_in_the_old_format_are_read(changed: Callable[..., ModelFolder]) -> None:
    # The old format doubles the features at every stage; the demo's first two are alike.
    folder = changed(lambda plans: arch_kwargs(plans).update(features_per_stage=[8, 16, 32, 64]))
    design = architecture(folder.plans)
    layers = {"conv_op": torch.nn.Conv3d, "norm_op": torch.nn.InstanceNorm3d, "nonlin": torch.nn.LeakyReLU}
    new = PlainConvUNet(1, num_classes=2, **design["arch_kwargs"] | layers | {"deep_supervision": False})
    checkpoint = {"network_weights": new.state_dict(), "init_args": {"configuration": "3d_lowres"}}
    torch.save(checkpoint, folder.checkpoint)
    plans = folder.plans
    to_old_format(plans)
    (folder.path / "plans.json").write_text(json.dumps(plans))
    read = Network(folder, torch.device("cpu")).module.state_dict()
    assert read.keys() == new.state_dict().keys()
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in read.items())


def test_an_old_plan_that_names_another_network_is_refused(changed: Callable[..., ModelFolder]) -> None:
    def other(plans: Plans) -> None:
        to_old_format(plans)
        configuration(plans)["UNet_class_name"] = "Popen"

    with pytest.raises(PipelineError, match="Unknown architecture Popen"):
        Network(changed(other), torch.device("cpu"))
