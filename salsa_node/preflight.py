"""Can a node start with these settings? Each check says what it found and what to do."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from salsa_node import models, pipelines
from salsa_node.config import Config
from salsa_node.errors import ConfigError, PipelineError
from salsa_node.settings import AUTO, SENDER


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str


def checks(config: Config) -> tuple[Check, ...]:
    """Every check, failed ones included; quick, and beside a running node without harm."""
    return (_data_dir(config.node.data_dir), _pipeline(config), _destinations(config))


def require(config: Config) -> None:
    """Raises ConfigError with the first check that fails."""
    for check in checks(config):
        if not check.ok:
            raise ConfigError(f"{check.name}: {check.detail}")


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
    if config.pipeline.name != AUTO:
        return config
    return replace(config, pipeline=replace(config.pipeline, name=models.preferred(config.models_dir)))


def require_pipeline(name: str, config: Config) -> int:
    """How many model folders that pipeline needs, all complete. Raises ConfigError, WeightsMissing."""
    if name not in pipelines.names():
        raise ConfigError(f"no pipeline is called {name!r}; there are {', '.join(pipelines.names())}")
    if config.pipeline.models_dir and not config.models_dir.is_dir():
        raise ConfigError(f"pipeline.models_dir: there is no folder {config.models_dir}")
    options = config.pipeline.options if name == config.pipeline.name else {}
    return models.require(name, config.models_dir, options)


def _pipeline(config: Config) -> Check:
    auto = " (chosen by auto)" if config.pipeline.name == AUTO else ""
    config = settled(config)
    chosen = config.pipeline.name
    name = f"pipeline {chosen}{auto}"
    if chosen == "given_masks":
        detail = "needs a mask for each study: use salsa-node rerun STUDY --masks FILE instead"
        return Check(name, ok=False, detail=detail)
    try:
        count = require_pipeline(chosen, config)
        pipelines.check_options(chosen, config.pipeline.options)
    except (ConfigError, PipelineError) as error:
        return Check(name, ok=False, detail=str(error))
    return Check(name, ok=True, detail=f"{count} model folders are complete")


def _destinations(config: Config) -> Check:
    name = "delivery.to"
    if not config.delivery.to:
        return Check(name, ok=True, detail="empty: results stay on this machine")
    if not config.destination:
        detail = "no [[destination]] yet: results wait on this machine until one is added, then salsa-node resend STUDY"
        return Check(name, ok=True, detail=detail)
    known = ", ".join(f"{d.name} = {d.ae_title} at {d.host}:{d.port}" for d in config.destination)
    sender = f" ({SENDER}: the one whose AE title sent the study)" if SENDER in config.delivery.to else ""
    return Check(name, ok=True, detail=f"{', '.join(config.delivery.to)}{sender}; destinations: {known}")
