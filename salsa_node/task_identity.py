"""Whether a trained configuration can be the network of a TotalSegmentator task: its folder's name and its labels.

A folder is easily renamed, and a network under another task's name gives labels that mean something else.
TotalSegmentator's own tables say what it looks for: TRAINER__PLANS__CONFIGURATION, and what each label is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

ORGAN: Final = "liver"
_READ: Final = ("total", "liver_lesions", "liver_segments")  # tasks whose labels a pipeline reads


def misfit(task_id: int, trained: str, dataset: Mapping[str, object]) -> str:
    """Why a network cannot be that task's, with what was expected; "" where it can.

    trained: the name of its folder, TRAINER__PLANS__CONFIGURATION. dataset: its dataset.json.
    Of tasks that no pipeline runs only the folder's name is looked at.
    """
    expected = [folder for number, folder, _ in _tasks() if number == task_id]
    if expected and trained not in expected:
        return f"found the network {trained}, expected {' or '.join(dict.fromkeys(expected))}"
    classes = next((classes for number, _, classes in _tasks() if number == task_id and classes), {})
    return _label_misfit(dataset.get("labels"), classes) if classes else ""


def _label_misfit(labels: object, classes: Mapping[int, str]) -> str:
    if not isinstance(labels, Mapping):
        return "dataset.json has no table of labels"
    names = {value: str(name) for name, given in labels.items() for value in _values(given) if value > 0}
    if not names:
        return f"dataset.json has no labels; expected 1 to {max(classes)}"
    if max(names) > max(classes):
        return f"found labels up to {max(names)} ({names[max(names)][:40]}), expected at most {max(classes)}"
    number = next((label for label, name in classes.items() if name == ORGAN), None)
    if number is not None and names.get(number, "").lower() != ORGAN:
        return f"found the label {number} = {names.get(number, 'nothing')[:40]}, expected {number} = {ORGAN}"
    return ""


def _values(given: object) -> tuple[int, ...]:
    """The values of a label; a region of nnU-Net has several."""
    found = given if isinstance(given, list) else [given]
    return tuple(value for value in found if isinstance(value, int))


def _tasks() -> Iterable[tuple[int, str, Mapping[int, str]]]:
    """Number, folder and classes of every network of TotalSegmentator; classes {} where no pipeline reads them."""
    from totalsegmentator import map_tasks_config, map_to_binary  # plain data; they import no network

    parts = map_to_binary.map_taskid_to_partname_ct
    for name, task in map_tasks_config.TASK_CONFIGS.items():
        for mode in task.get("sub_modes", {"": {}}).values():
            settings: Mapping[str, Any] = {**map_tasks_config.DEFAULT_CONFIG, **task, **mode}
            numbers = settings["task_id"]
            folder = f"{settings['trainer']}__{settings['plans'] or 'nnUNetPlans'}__{settings['model']}"
            for number in numbers if isinstance(numbers, list) else [numbers]:
                classes = map_to_binary.class_map[name] if name in _READ else {}
                if isinstance(numbers, list) and classes:
                    classes = map_to_binary.class_map_5_parts[parts[number]]
                yield int(number), folder, classes
