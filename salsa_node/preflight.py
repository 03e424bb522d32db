"""Can a node start with these settings? Each check says what it found and what to do."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path

from salsa_node import models, pipelines
from salsa_node.config import Config
from salsa_node.errors import ConfigError, PipelineError, WeightsMissing
from salsa_node.settings import AUTO, SENDER

_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    warns: the node starts, but somebody should read the detail.
    """

    name: str
    ok: bool
    detail: str
    warns: bool = False


def checks(config: Config) -> tuple[Check, ...]:
    """Every check, failed ones included; quick, and beside a running node without harm."""
    return (
        _data_dir(config.node.data_dir),
        _pipeline(config),
        *(_of_profile(title, replace(config, pipeline=choice)) for title, choice in config.profile_pipelines.items()),
        *_device(config.pipeline.device),
        _libraries(config),
        _destinations(config),
    )


def require(config: Config) -> None:
    """Raises ConfigError with the first check that fails; what merely warns goes into the log."""
    for check in checks(config):
        if not check.ok:
            raise ConfigError(f"{check.name}: {check.detail}")
        if check.warns:
            log.warning(f"{check.name}: {check.detail}", extra={"event": "preflight.warning"})


def _data_dir(data_dir: Path) -> Check:
    """Writable, or can be made."""
    name = "node.data_dir"
    existing = next(folder for folder in (data_dir.absolute(), *data_dir.absolute().parents) if folder.exists())
    if not existing.is_dir():
        return Check(name, ok=False, detail=f"{existing} is not a folder; choose another place or move it away")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check(name, ok=False, detail=f"{existing} cannot be written; choose a folder that this user may write")
    return Check(name, ok=True, detail=f"{data_dir} {'exists' if existing == data_dir.absolute() else 'will be made'}")


def settled(config: Config) -> Config:
    """The config with the pipeline that "auto" stands for on this machine, by its real name.

    Call it once, at the start: models installed later count from the next start on.
    """
    if AUTO not in (config.pipeline.name, *(profile.pipeline for profile in config.profile)):
        return config
    best = models.preferred(config.models_dir)
    pipeline = replace(config.pipeline, name=best) if config.pipeline.name == AUTO else config.pipeline
    profiles = tuple(replace(one, pipeline=best) if one.pipeline == AUTO else one for one in config.profile)
    return replace(config, pipeline=pipeline, profile=profiles)


def ready(config: Config, pipeline: str = "", device: str = "") -> Config:
    """The settings to analyse with here and now: `pipeline` and `device` in place of the configured ones, none "auto".

    The configured pipeline's own settings stay with it; another pipeline has its defaults.
    Raises ConfigError, WeightsMissing where it cannot be loaded; given_masks never can, for it needs a mask.
    """
    config = settled(config)
    choice = replace(config.pipeline, device=device or config.pipeline.device)
    if pipeline and pipeline != choice.name:
        choice = replace(choice, name=pipeline, options={})
    config = settled(replace(config, pipeline=choice))
    if config.pipeline.name == "given_masks":
        raise ConfigError("the pipeline given_masks needs a mask for each scan: use salsa-node run --masks FILE")
    if config.pipeline.name not in pipelines.names():
        there = ", ".join(name for name in pipelines.names() if name != "given_masks")
        raise ConfigError(f"no pipeline is called {config.pipeline.name!r}; there are {there}")
    require_pipeline(config.pipeline.name, config)
    return config


def require_pipeline(name: str, config: Config) -> int:
    """How many model folders that pipeline needs, all complete. Raises ConfigError, WeightsMissing.

    The settings that are checked with it are the configured pipeline's own; another one has its defaults.
    """
    if name not in pipelines.names():
        raise ConfigError(f"no pipeline is called {name!r}; there are {', '.join(pipelines.names())}")
    if config.pipeline.models_dir and not config.models_dir.is_dir():
        raise ConfigError(f"pipeline.models_dir: there is no folder {config.models_dir}")
    options = config.pipeline.options if name == config.pipeline.name else {}
    pipelines.options.check(name, options)
    return models.require(name, config.models_dir, options)


def to_download(config: Config) -> tuple[int, ...]:
    """TotalSegmentator's tasks that a start downloads: what is missing, where `pipeline.may_download` allows it."""
    if not config.pipeline.may_download:
        return ()
    name = settled(config).pipeline.name
    if config.pipeline.name == AUTO and name == "demo":
        name = models.OPEN_LESIONS
    return models.missing_tasks(name, config.models_dir, config.pipeline.options)


def download(config: Config, now: datetime, progress: Callable[[str], None]) -> None:
    """Install what `to_download` names; nothing where that is nothing.

    Raises WeightsMissing with the way to carry the files over by hand, ModelRefused, ConfigError; what came is kept.
    """
    tasks = to_download(config)
    if not tasks:
        return
    from salsa_node import model_fetch  # tries what it installs: torch

    for at, task in enumerate(tasks):
        try:
            model_fetch.fetch(task, config.models_dir, now, progress)
        except WeightsMissing as error:
            raise WeightsMissing(f"{error}{model_fetch.not_tried(tasks[at + 1 :], config.models_dir)}") from error


def _pipeline(config: Config) -> Check:
    missing = to_download(config)
    if missing:
        tasks = ", ".join(map(str, missing))
        detail = f"TotalSegmentator's tasks {tasks} are missing; the start downloads them (pipeline.may_download)"
        return Check(f"pipeline {config.pipeline.name}", ok=True, detail=detail, warns=True)
    auto = " (chosen by auto)" if config.pipeline.name == AUTO else ""
    config = settled(config)
    chosen = config.pipeline.name
    name = f"pipeline {chosen}{auto}"
    if chosen == "given_masks":
        detail = "needs a mask for each study: use salsa-node rerun STUDY --masks FILE instead"
        return Check(name, ok=False, detail=detail)
    try:
        count = require_pipeline(chosen, config)
    except (ConfigError, PipelineError) as error:
        return Check(name, ok=False, detail=str(error))
    detail = f"{count} model folders are complete"
    if auto and chosen == "demo":
        return Check(name, ok=True, detail=f"{detail}; {instead_of_demo(config)}", warns=True)
    return Check(name, ok=True, detail=detail)


def _of_profile(title: str, config: Config) -> Check:
    found = _pipeline(config)
    return replace(found, name=f"{found.name} of profile {title}")


def instead_of_demo(config: Config) -> str:
    """What to say where "auto" came down to the demo: nothing is ever downloaded unless somebody asks for it."""
    tasks = " ".join(map(str, models.PIPELINE_TASKS[models.OPEN_LESIONS]))
    return (
        "what the demo models find means nothing, and no others are installed: for real results run "
        f"{models.command(f'fetch {tasks}', config.models_dir)} (TotalSegmentator's, open; with "
        "pipeline.may_download = true a start does it), or import SALSA's"
    )


def _device(device: str) -> tuple[Check, ...]:
    """Whether the GPU that is named is there, as torch counts them; "auto" and "cpu" need no question.

    Torch is asked in a process of its own: a parent that has seen a GPU cannot pass it on.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return ()
    count = subprocess.run([sys.executable, "-c", _COUNT_GPUS], capture_output=True, text=True, check=False)
    if not count.stdout.strip().isdecimal():
        return (Check("pipeline.device", ok=False, detail="torch cannot be imported, so no GPU can be counted"),)
    there = int(count.stdout)
    if int(number or 0) >= there:
        detail = f"{device} was asked for, but torch sees {there} CUDA devices; choose auto, cpu or one that is there"
        return (Check("pipeline.device", ok=False, detail=detail),)
    return (Check("pipeline.device", ok=True, detail=f"{device} is one of {there}"),)


def known_faults(versions: Mapping[str, str]) -> tuple[str, ...]:
    """What is known to be wrong or slow about these versions (distribution -> version), each with what to do."""
    faults = []
    if versions.get("torch", "").startswith("2.9."):
        faults.append("torch 2.9 runs mixed-precision 3-D convolutions four times slower; install torch 2.10 or later")
    for name, version in versions.items():
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
        if name.startswith("nvidia-cudnn") and (9, 8) <= numbers <= (9, 10):
            faults.append(f"cuDNN {version} gave wrong bfloat16 3-D convolutions; install cuDNN 9.11 or later")
    return tuple(faults)


def _libraries(config: Config) -> Check:
    """The versions of what multiplies on a GPU; torch itself is not imported."""
    looked_at = ("torch", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
    versions = {name: metadata.version(name) for name in looked_at if _is_installed(name)}
    faults = known_faults(versions) if config.pipeline.device != "cpu" else ()
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Check("libraries", ok=True, detail="; ".join((found, *faults)), warns=bool(faults))


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _destinations(config: Config) -> Check:
    name = "delivery.to"
    if config.delivery.shadow:
        research = ", ".join(config.delivery.research)
        detail = f"the node works in the shadow: nothing is sent{f', except to {research}' if research else ''}"
        return Check("delivery.shadow", ok=True, detail=f"{detail}; set it to false to go to work", warns=True)
    if not config.delivery.to:
        return Check(name, ok=True, detail="empty: results stay on this machine")
    if not config.destination:
        detail = "no [[destination]] yet: results wait on this machine until one is added, then salsa-node resend STUDY"
        return Check(name, ok=True, detail=detail)
    known = ", ".join(f"{d.name} = {d.where}" for d in config.destination)
    sender = f" ({SENDER}: the one whose AE title sent the study)" if SENDER in config.delivery.to else ""
    profiles = "".join(f"; profile {one.ae_title}: {', '.join(one.to)}" for one in config.profile if one.to)
    return Check(name, ok=True, detail=f"{', '.join(config.delivery.to)}{sender}{profiles}; destinations: {known}")
