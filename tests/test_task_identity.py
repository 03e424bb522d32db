"""A network under another task's name is told from the right one by its folder and its labels."""

from __future__ import annotations

import pytest

from salsa_node.task_identity import misfit

TOTAL = "nnUNetTrainer_4000epochs_NoMirroring__nnUNetPlans__3d_fullres"
LESIONS = "nnUNetTrainer__nnUNetPlans__3d_fullres_high"
ORGANS: dict[str, object] = {"background": 0, "spleen": 1, "liver": 5}
LESION: dict[str, object] = {"background": 0, "lesion": 1}


@pytest.mark.parametrize(
    ("task", "trained", "labels"),
    [
        (297, TOTAL, ORGANS),
        (298, TOTAL, ORGANS),
        (291, "nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres", ORGANS),
        (591, LESIONS, LESION),
        (591, LESIONS, {"background": 0, "whole": [1]}),
        (570, "nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres", {f"liver_segment_{n}": n for n in range(1, 9)}),
        (8, "nnUNetTrainer__nnUNetPlans__3d_fullres", {"vessel": 3}),  # no pipeline reads its labels
        (999_999, "whatever__of__nobody", {}),
    ],
)
def test_the_right_network_fits(task: int, trained: str, labels: dict[str, object]) -> None:
    assert misfit(task, trained, {"labels": labels}) == ""


@pytest.mark.parametrize(
    ("task", "trained", "dataset", "words"),
    [
        (297, LESIONS, {"labels": ORGANS}, f"found the network {LESIONS}, expected {TOTAL}"),
        (591, TOTAL, {"labels": LESION}, f"found the network {TOTAL}, expected {LESIONS}"),
        (297, TOTAL, {"labels": LESION}, "found the label 5 = nothing, expected 5 = liver"),
        (297, TOTAL, {"labels": {"stomach": 5}}, "found the label 5 = stomach, expected 5 = liver"),
        (591, LESIONS, {"labels": ORGANS}, "found labels up to 5 (liver), expected at most 1"),
        (591, LESIONS, {"labels": {"background": 0}}, "has no labels; expected 1 to 1"),
        (591, LESIONS, {}, "has no table of labels"),
    ],
)
def test_another_network_is_told_with_what_was_expected(
    task: int, trained: str, dataset: dict[str, object], words: str
) -> None:
    assert words in misfit(task, trained, dataset)
