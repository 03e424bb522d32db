"""Model folders of nnU-Net v2: where they lie, whether they are whole, what they hash to.

A model folder is data from elsewhere. This room reads its names and bytes and runs nothing of it.
One folder holds all that is installed: `demo`, `salsa` and, in TotalSegmentator's own layout, `totalsegmentator`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from salsa_node import task_identity
from salsa_node.errors import WeightsMissing

CHECKPOINT = "checkpoint_final.pth"
_WEIGHTS = f"fold_0/{CHECKPOINT}"
MANIFEST: Final = "manifest.json"  #: of an installed model, beside the folders of its networks; see `model_manifest`
DEMO_STAGES = {
    "liver": "liver/nnUNetTrainer__nnUNetPlans__3d_fullres",
    "lowres": "salsa/nnUNetTrainer__nnUNetPlans__3d_lowres",
    "cascade": "salsa/nnUNetTrainer__nnUNetPlans__3d_cascade_fullres",
}

SALSA: Final = "salsa"
TOTALSEGMENTATOR: Final = "totalsegmentator"
INCOMING: Final = ".incoming-"  #: begins the names of folders that are not whole, or going; they may be removed
#: stage -> how the name of its folder ends, as nnU-Net writes it: TRAINER__PLANS__CONFIGURATION
SALSA_STAGES: Final[Mapping[str, str]] = {"lowres": "__3d_lowres", "cascade": "__3d_cascade_fullres"}
OPEN_LESIONS: Final = "totalsegmentator-liver-lesions"  #: the pipeline whose models anybody may download
#: TotalSegmentator's tasks that a pipeline runs, by number, the first one first: 298 and 297 find where the liver is.
PIPELINE_TASKS: Final[Mapping[str, tuple[int, ...]]] = {
    SALSA: (298, 291),
    OPEN_LESIONS: (297, 591),
}
FAST_LIVER_TASKS: Final = (298, 297)  #: of SALSA with the option fast_liver, or with the preset that had it
#: pipeline -> one of its own settings -> the tasks that it runs besides, where the setting is on
OPTION_TASKS: Final[Mapping[str, Mapping[str, tuple[int, ...]]]] = {
    OPEN_LESIONS: {"couinaud": (570,)},
}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One trained configuration: `dataset.json`, `plans.json` and `fold_0/checkpoint_final.pth`.

    Of several folds the first alone decides, as SALSA and TotalSegmentator have it.

    Raises WeightsMissing where one of them is absent, empty, or, for the two JSON files, not JSON.
    """

    path: Path

    def __post_init__(self) -> None:
        missing = [file.relative_to(self.path).as_posix() for file in self.files if not _has_content(file)]
        if missing:
            raise WeightsMissing(
                f"the model folder {self.path} lacks {', '.join(missing)}; an nnU-Net v2 model folder holds "
                f"dataset.json, plans.json and {_WEIGHTS}"
            )
        for name in ("dataset.json", "plans.json"):
            _read_json(self.path / name)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that decides what the network answers."""
        return tuple(self.path / name for name in ("dataset.json", "plans.json", _WEIGHTS))

    @property
    def checkpoint(self) -> Path:
        """The weights."""
        return self.path / _WEIGHTS

    @property
    def dataset(self) -> dict[str, object]:
        """dataset.json: channels and labels."""
        return _read_json(self.path / "dataset.json")

    @property
    def plans(self) -> dict[str, object]:
        """plans.json: architecture, spacing, normalisation."""
        return _read_json(self.path / "plans.json")

    def sha256(self) -> dict[str, str]:
        """Name within the folder -> SHA-256, for every file of `files`; reads each of them once.

        Raises WeightsMissing where a file is not the one that the manifest beside the folder records.
        """
        found = {file.relative_to(self.path).as_posix(): sha256_of(file) for file in self.files}
        recorded = self._recorded()
        changed = [name for name, sha in found.items() if recorded.get(f"{self.path.name}/{name}", sha) != sha]
        if changed:
            raise WeightsMissing(
                f"{self.path}: {', '.join(changed)} changed since the model was installed, so nobody knows what it "
                "finds; see salsa-node models verify, and import the model again"
            )
        return found

    def _recorded(self) -> Mapping[str, object]:
        """File -> SHA-256 of the model's manifest; {} where it was put there by hand."""
        manifest = self.path.parent / MANIFEST
        files = _read_json(manifest).get("files") if manifest.is_file() else None
        return files if isinstance(files, Mapping) else {}


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def demo_models_dir() -> Path:
    """The folder of the packaged demo models; they are trained on phantoms alone and fit no clinical use."""
    return Path(str(resources.files("salsa_node"))) / "demo_models"


def folders_of(pipeline: str, models_dir: Path | None) -> dict[str, ModelFolder]:
    """Stage -> model folder of the pipeline's own networks; {} for one that has none.

    The demo models lie in `models_dir`/demo where that folder exists, else in the package. SALSA's two
    ("lowres", "cascade") lie anywhere below `models_dir`/salsa. TotalSegmentator's are found by `task_model`.
    Raises WeightsMissing where a folder is absent or incomplete. Opens no weights, so it is quick.
    """
    if pipeline == SALSA:
        return _salsa_folders(models_dir)
    if pipeline != "demo":
        return {}
    root = demo_models_dir()
    if models_dir is not None and (models_dir / "demo").is_dir():
        root = models_dir / "demo"
    mend = f"put the model back there, or take {root} away: the package has its own"
    return {stage: _whole(root / name, mend) for stage, name in DEMO_STAGES.items()}


def require(pipeline: str, models_dir: Path | None, options: Mapping[str, object] | None = None) -> int:
    """How many model folders that pipeline needs with these settings of its own, TotalSegmentator's among them.

    Raises WeightsMissing with all that is absent and the commands that install it. Opens no weights.
    """
    found, missing = 0, []
    for task in tasks_of(pipeline, options or {}):
        try:
            task_model(task, models_dir)
        except WeightsMissing as exc:
            missing.append(str(exc))
        else:
            found += 1
    try:
        found += len(folders_of(pipeline, models_dir))
    except WeightsMissing as exc:
        missing.append(str(exc))
    if missing:
        raise WeightsMissing("; ".join(missing))
    return found


def missing_tasks(pipeline: str, models_dir: Path | None, options: Mapping[str, object]) -> tuple[int, ...]:
    """Those of `tasks_of` that are not installed, or not whole."""
    missing = []
    for task in tasks_of(pipeline, options):
        try:
            task_model(task, models_dir)
        except WeightsMissing:
            missing.append(task)
    return tuple(missing)


def tasks_of(pipeline: str, options: Mapping[str, object]) -> tuple[int, ...]:
    """TotalSegmentator's tasks that a pipeline runs with these settings of its own."""
    tasks = PIPELINE_TASKS.get(pipeline, ())
    if pipeline == SALSA and options.get("fast_liver", options.get("preset") == "salsa-2024"):
        tasks = FAST_LIVER_TASKS
    for option, more in OPTION_TASKS.get(pipeline, {}).items():
        tasks += more if options.get(option) else ()
    return tasks


def preferred(models_dir: Path | None) -> str:
    """The pipeline whose own networks somebody installed, whole or not: SALSA's before TotalSegmentator's; else demo.

    A broken folder is still a choice: `require` says what it lacks.
    """
    if models_dir is not None and (models_dir / SALSA).is_dir():
        return SALSA
    lesions = task_name(PIPELINE_TASKS[OPEN_LESIONS][-1])
    if models_dir is not None and (models_dir / TOTALSEGMENTATOR / lesions).is_dir():
        return OPEN_LESIONS
    return "demo"


def command(words: str, models_dir: Path | None) -> str:
    """`salsa-node models WORDS` for that models folder, as a person types it."""
    return f"salsa-node models {words}" + (f" --models-dir {shlex.quote(str(models_dir))}" if models_dir else "")


def task_name(task_id: int) -> str:
    """The folder of a TotalSegmentator task, such as "Dataset591_ct_liver_lesions_842subj".

    Raises WeightsMissing for a number that the installed TotalSegmentator does not know.
    """
    from totalsegmentator.map_tasks_config import TASK_ID_WEIGHTS_CONFIGS  # plain data; imports no network

    if task_id not in TASK_ID_WEIGHTS_CONFIGS:
        raise WeightsMissing(f"the installed TotalSegmentator has no task {task_id}")
    return str(TASK_ID_WEIGHTS_CONFIGS[task_id]["foldername"])


def task_folder(task_id: int, models_dir: Path | None) -> Path:
    """`models_dir`/totalsegmentator/DatasetNNN_..., as TotalSegmentator lays it out. Raises WeightsMissing."""
    name = task_name(task_id)
    path = (models_dir or Path()) / TOTALSEGMENTATOR / name
    if models_dir is None or not path.is_dir():
        raise WeightsMissing(
            f"TotalSegmentator's task {task_id} ({name}) is not in {models_dir or 'any models folder'}; "
            f"run: {command(f'fetch {task_id}', models_dir)}"
        )
    return path


def task_model(task_id: int, models_dir: Path | None) -> ModelFolder:
    """The trained configuration of a TotalSegmentator task (fold 0, as TotalSegmentator runs it).

    Raises WeightsMissing where it is absent, incomplete, another task's, or more than one lies there.
    """
    folder = task_folder(task_id, models_dir)
    found = sorted(file.parent for file in folder.glob("*__*__*/plans.json"))
    if len(found) != 1:
        raise WeightsMissing(
            f"{folder} holds {len(found)} trained configurations; expected one, such as "
            "nnUNetTrainer__nnUNetPlans__3d_fullres: "
            f"remove that folder and run: {command(f'fetch {task_id}', models_dir)}"
        )
    again = (
        f"run: {command(f'remove {TOTALSEGMENTATOR}-{task_id}', models_dir)}, "
        f"then {command(f'fetch {task_id}', models_dir)}"
    )
    model = _whole(found[0], again)
    misfit = task_identity.misfit(task_id, model.path.name, model.dataset)
    if misfit:
        raise WeightsMissing(f"{folder} does not hold TotalSegmentator's task {task_id}: {misfit}; {again}")
    return model


def salsa_stages(root: Path) -> dict[str, tuple[Path, ...]]:
    """Stage of SALSA -> the folders below `root` that are named as that stage and hold plans; nothing is read."""
    return {
        stage: tuple(sorted(file.parent for file in root.rglob("plans.json") if file.parent.name.endswith(end)))
        for stage, end in SALSA_STAGES.items()
    }


def _salsa_folders(models_dir: Path | None) -> dict[str, ModelFolder]:
    root = (models_dir or Path()) / SALSA
    if models_dir is None or not root.is_dir():
        raise WeightsMissing(
            f"SALSA's weights are not in {models_dir or 'any models folder'}; VHIO gives them out on request "
            "(https://github.com/radiomicsgroup/liver-SALSA); then run: " + command("import FOLDER-OR-ZIP", models_dir)
        )
    again = f"run {command('remove salsa', models_dir)}, then {command('import FOLDER-OR-ZIP', models_dir)}"
    folders = {}
    for stage, paths in salsa_stages(root).items():
        if len(paths) != 1:
            raise WeightsMissing(
                f"{root} holds {len(paths)} folders named ...{SALSA_STAGES[stage]} with a plans.json; expected one: "
                f"{again}"
            )
        folders[stage] = _whole(paths[0], again)
    return folders


def _whole(path: Path, mend: str) -> ModelFolder:
    """The model folder, its checkpoint not cut off. Raises WeightsMissing with what mends it."""
    try:
        folder = ModelFolder(path)
    except WeightsMissing as exc:
        raise WeightsMissing(f"{exc}; {mend}") from exc
    file = folder.checkpoint
    if _is_cut_off(file):
        raise WeightsMissing(f"{file} is cut off after {file.stat().st_size} bytes; {mend}")
    return folder


def _is_cut_off(checkpoint: Path) -> bool:
    """Whether it begins as torch's zip and does not end as one; reads its two ends alone."""
    with checkpoint.open("rb") as stream:
        begins = stream.read(2) == b"PK"
    return begins and not zipfile.is_zipfile(checkpoint)


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _read_json(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
        raise WeightsMissing(f"{file} is not JSON ({exc})") from exc
    if not isinstance(found, dict):
        raise WeightsMissing(f"{file} holds a {type(found).__name__} where an object was expected")
    return found
