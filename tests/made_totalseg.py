"""TotalSegmentator's weights folder as its downloader leaves it, filled with the demo networks under another head.

Its networks write liver as label 5 and keep their plans in nnU-Net's old format; so do these. They were trained on
phantoms at other spacings: what they find is good enough to compare two ways of running them, and no more.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from totalsegmentator.map_tasks_config import TASK_ID_WEIGHTS_CONFIGS

from salsa_node.models import DEMO_STAGES, TOTALSEGMENTATOR, demo_models_dir
from salsa_node.pipelines.totalseg import Task, task_of

LIVER = 5
SEGMENT = 2
LIVER_TASKS = (task_of("total", "default"), task_of("total", "fast"), task_of("total", "fastest"))


def make_weights(models_dir: Path) -> Path:
    """The weights folder in `models_dir`: 291, 297, 298 (liver = 5), 591 (lesions = 1), 570 (all liver = segment 2)."""
    folder = models_dir / TOTALSEGMENTATOR
    for task in LIVER_TASKS:
        _install(task, folder, "liver", {1: LIVER})
    _install(task_of("liver_lesions"), folder, "lowres", {1: 1})
    _install(task_of("liver_segments"), folder, "liver", {1: SEGMENT})
    for number in (292, 293, 294, 295):  # unused, but its `python_api` wants to see all five parts of the body
        (folder / TASK_ID_WEIGHTS_CONFIGS[number]["foldername"]).mkdir()
    return folder


def _install(task: Task, folder: Path, stage: str, moved: dict[int, int]) -> None:
    """The demo network of that stage as the network of `task`, its label n moved to `moved[n]`."""
    source = demo_models_dir() / DEMO_STAGES[stage]
    checkpoint = torch.load(source / "fold_0/checkpoint_final.pth", weights_only=False)
    plans = json.loads((source / "plans.json").read_text())
    known = checkpoint["init_args"]["configuration"]
    configuration = task.folder.name.split("__")[-1]
    plans["configurations"] = {configuration: _old_format(plans["configurations"][known])}
    classes = max(moved.values()) + 1
    weights = checkpoint["network_weights"]
    heads = [name for name in weights if ".seg_layers." in name]
    for name in heads:
        old = weights[name]
        new = torch.zeros((classes, *old.shape[1:]), dtype=old.dtype)
        if name.endswith("bias"):
            new.fill_(-100)  # of a class that this network does not know
        new[0] = old[0]
        for label, to in moved.items():
            new[to] = old[label]
        weights[name] = new
    labels = {"background": 0} | {task.classes.get(label, f"class {label}"): label for label in range(1, classes)}
    described = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    path = folder / task.folder
    (path / "fold_0").mkdir(parents=True)
    (path / "dataset.json").write_text(json.dumps(described))
    (path / "plans.json").write_text(json.dumps(plans))
    torch.save(
        {
            "network_weights": weights,
            "trainer_name": task.folder.name.split("__")[0],
            "inference_allowed_mirroring_axes": None,
            "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.01}]},
            "grad_scaler_state": {"scale": 65536.0, "growth_factor": 2.0},
            "logging": {"mean_fg_dice": [np.float64(0.9)], "lrs": [0.01]},
            "_best_ema": np.float64(0.9),
            "current_epoch": 4000,
            "init_args": {
                "configuration": configuration,
                "fold": 0,
                "plans": plans,
                "dataset_json": described,
                "unpack_dataset": True,
                "device": torch.device("cuda", 0),
            },
        },
        path / "fold_0" / "checkpoint_final.pth",
    )


def _old_format(configuration: dict) -> dict:
    """A configuration as nnU-Net wrote it before it named the architecture, where that format can say it."""
    old = dict(configuration)
    network = old["architecture"]
    known = network["arch_kwargs"]
    features = known["features_per_stage"]
    doubled = [min(features[0] * 2**n, features[-1]) for n in range(known["n_stages"])]
    if features != doubled:
        return old
    del old["architecture"]
    old["UNet_class_name"] = network["network_class_name"].rpartition(".")[2]
    old["UNet_base_num_features"] = features[0]
    old["unet_max_num_features"] = features[-1]
    old["n_conv_per_stage_encoder"] = known["n_conv_per_stage"]
    old["n_conv_per_stage_decoder"] = known["n_conv_per_stage_decoder"]
    old["conv_kernel_sizes"] = known["kernel_sizes"]
    old["pool_op_kernel_sizes"] = known["strides"]
    old["num_pool_per_axis"] = [sum(stride[axis] == 2 for stride in known["strides"]) for axis in range(3)]
    return old
