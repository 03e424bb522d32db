"""Model folders of nnU-Net v2: where they lie, whether they are whole, what they hash to.

A model folder is data from elsewhere. This room reads its names and bytes and runs nothing of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from salsa_node.errors import WeightsMissing

CHECKPOINT = "checkpoint_final.pth"
DEMO_STAGES = {
    "liver": "liver/nnUNetTrainer__nnUNetPlans__3d_fullres",
    "lowres": "salsa/nnUNetTrainer__nnUNetPlans__3d_lowres",
    "cascade": "salsa/nnUNetTrainer__nnUNetPlans__3d_cascade_fullres",
}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One trained configuration: `dataset.json`, `plans.json` and `fold_N/checkpoint_final.pth`.

    Raises WeightsMissing where one of them is absent, empty, or, for the two JSON files, not JSON.
    """

    path: Path
    folds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        missing = [file.relative_to(self.path).as_posix() for file in self.files if not _has_content(file)]
        if missing:
            raise WeightsMissing(
                f"the model folder {self.path} lacks {', '.join(missing)}; an nnU-Net v2 model folder holds "
                f"dataset.json, plans.json and {self._fold_file(self.folds[0])}: install the model there, or set "
                "models_dir to the folder that holds it"
            )
        for name in ("dataset.json", "plans.json"):
            _read_json(self.path / name)

    def _fold_file(self, fold: int) -> str:
        return f"fold_{fold}/{CHECKPOINT}"

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that decides what the network answers."""
        names = ("dataset.json", "plans.json", *(self._fold_file(fold) for fold in self.folds))
        return tuple(self.path / name for name in names)

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """The weights, one file a fold."""
        return self.files[2:]

    @property
    def dataset(self) -> dict[str, object]:
        """dataset.json: channels and labels."""
        return _read_json(self.path / "dataset.json")

    @property
    def plans(self) -> dict[str, object]:
        """plans.json: architecture, spacing, normalisation."""
        return _read_json(self.path / "plans.json")

    def sha256(self) -> dict[str, str]:
        """Name within the folder -> SHA-256, for every file of `files`; reads each of them once."""
        hashes = {}
        for file in self.files:
            with file.open("rb") as stream:
                hashes[file.relative_to(self.path).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
        return hashes


def demo_models_dir() -> Path:
    """The folder of the packaged demo models; they are trained on phantoms alone and fit no clinical use."""
    return Path(str(resources.files("salsa_node"))) / "demo_models"


def folders_of(pipeline: str, models_dir: Path | None) -> dict[str, ModelFolder]:
    """Stage -> model folder of a pipeline; {} for one that needs no weights.

    The demo models lie in `models_dir`/demo where that folder exists, else in the package.
    Raises WeightsMissing where a folder is incomplete. Opens no weights, so it is quick.
    """
    if pipeline != "demo":
        return {}
    root = demo_models_dir()
    if models_dir is not None and (models_dir / "demo").is_dir():
        root = models_dir / "demo"
    return {stage: ModelFolder(root / name) for stage, name in DEMO_STAGES.items()}


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _read_json(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise WeightsMissing(f"{file} is not JSON ({exc}); install the model again") from exc
    if not isinstance(found, dict):
        raise WeightsMissing(
            f"{file} holds a {type(found).__name__} where an object was expected; install the model again"
        )
    return found
