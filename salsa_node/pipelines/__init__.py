"""From a CT volume to masks: the Pipeline protocol, what it returns, and the table of those at hand.

A pipeline is one file in this folder with a class that obeys `Pipeline`, one line in `_TABLE` and its own settings in
`options`. Files are imported on `load`, so that listing names costs nothing and torch stays out of the command line.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from salsa_node.contrast_phase import PixelPhase
from salsa_node.errors import ConfigError
from salsa_node.pipelines import options
from salsa_node.uids import digest
from salsa_node.volume import CtVolume, LabelVolume

DEMO_NOTICE = "DEMO MODEL – NOT FOR CLINICAL USE"


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made a set of masks: enough to make it again and to tell it from another.

    weights_sha256: file name -> SHA-256, of every file that decided the outcome.
    parameters: JSON-able settings that change the outcome.
    libraries: distribution -> version, of those whose arithmetic decides the outcome.
    device: where it ran, several places where memory ran out on the way; not part of the digest.
    notice: words that every object made from these masks must carry; empty for released models.
    by_person: a person drew the masks; the objects then say so instead of naming an algorithm.
    """

    pipeline: str
    version: str
    weights_sha256: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, object] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    notice: str = ""
    by_person: bool = False

    @property
    def mark(self) -> str:
        """The notice where there is room for a few ASCII words, such as in a NIfTI header; "" where there is none."""
        return "; DEMO, NOT FOR CLINICAL USE" if self.notice == DEMO_NOTICE else ""

    @property
    def digest(self) -> str:
        """SHA-256 over all that decides the outcome."""
        decisive = {
            "weights": dict(self.weights_sha256),
            "parameters": dict(self.parameters),
            "libraries": dict(self.libraries),
        }
        return digest(self.pipeline, self.version, json.dumps(decisive, sort_keys=True))


@dataclass(frozen=True, slots=True)
class Flag:
    """Something odd that a reader should know.

    name: for machines, such as "liver_cut_off". text: one sentence without patient identity.
    blocks: the result is kept and not sent until a person has looked.
    """

    name: str
    text: str
    blocks: bool = False


def once(*flags: Flag) -> tuple[Flag, ...]:
    """The flags without repetitions, in their order."""
    return tuple(dict.fromkeys(flags))


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """What a pipeline saw, on the grid of the CT it was given.

    organ: 1 = liver; None where the pipeline (or the person) gave none.
    lesions: 0 = background; every other value is a lesion, and touching voxels of different values
        are different lesions.
    lesion_per_value: a value is one lesion even where its voxels are not connected (a person numbered
        them); False: each 26-connected part is a lesion.
    segments: 1 to 8 = the Couinaud segments of the liver, 0 = none; None where nobody looked.
    flags: what the pipeline found odd, or did otherwise than asked.
    pixel_phase: the contrast phase that it saw; None where nobody looked, or it cannot be told.
    """

    organ: LabelVolume | None
    lesions: LabelVolume
    provenance: Provenance
    lesion_per_value: bool = False
    segments: LabelVolume | None = None
    flags: tuple[Flag, ...] = ()
    pixel_phase: PixelPhase | None = None

    def __post_init__(self) -> None:
        if any(
            other is not None and not other.grid.matches(self.lesions.grid) for other in (self.organ, self.segments)
        ):
            raise ValueError("organ, segments and lesions lie on different grids")


Observer = Callable[[str, "CtVolume | LabelVolume"], None]  #: is told each intermediate volume by its name


def unobserved(_name: str, _volume: CtVolume | LabelVolume) -> None:
    """The observer that looks away."""


@runtime_checkable
class Pipeline(Protocol):
    """Finds the liver and its lesions."""

    @property
    def provenance(self) -> Provenance:
        """What this pipeline is, known before it has run."""
        ...

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
        """Masks on `ct.grid`. Raises PipelineError; OrganNotFound where there is no liver.

        observer: is told what lies between the images and the masks, in the order in which it comes to be.
        """
        ...

    def unload(self) -> None:
        """Let go of the weights and of the device's memory; the pipeline is of no use afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """What any pipeline may be told.

    device: "auto", "cpu" or "cuda:N".
    models_dir: where installed models lie, see `models`; None for the packaged demo models alone.
    masks_path: the label map of `given_masks`.
    options: the pipeline's own settings.
    """

    device: str = "auto"
    models_dir: Path | None = None
    masks_path: Path | None = None
    options: Mapping[str, object] = field(default_factory=dict)


_TABLE = {
    "demo": "salsa_node.pipelines.demo:DemoPipeline",
    "salsa": "salsa_node.pipelines.salsa:SalsaPipeline",
    "given_masks": "salsa_node.pipelines.given_masks:GivenMasksPipeline",
    "totalsegmentator-liver-lesions": "salsa_node.pipelines.totalsegmentator:LiverLesionsPipeline",
}


def names() -> tuple[str, ...]:
    """The pipelines that `load` knows."""
    return tuple(_TABLE)


def load(name: str, settings: PipelineSettings) -> Pipeline:
    """The pipeline of that name with its weights in memory.

    Raises ConfigError for an unknown name or a setting that cannot be, WeightsMissing where a model folder is absent.
    """
    if name not in _TABLE:
        raise ConfigError(f"no pipeline is called {name!r}; there are {', '.join(_TABLE)}")
    options.check(name, settings.options)
    module, _, attribute = _TABLE[name].partition(":")
    pipeline: Pipeline = getattr(importlib.import_module(module), attribute)(settings)
    return pipeline
