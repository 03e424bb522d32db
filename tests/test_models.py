"""Model folders: whole, or a clear word about what is missing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from salsa_node.errors import WeightsMissing
from salsa_node.models import ModelFolder, demo_models_dir


def make_folder(path: Path) -> Path:
    (path / "fold_0").mkdir(parents=True)
    (path / "dataset.json").write_text('{"labels": {"background": 0}}')
    (path / "plans.json").write_text("{}")
    (path / "fold_0" / "checkpoint_final.pth").write_bytes(b"weights")
    return path


def test_a_whole_folder_tells_its_files_and_hashes(tmp_path: Path) -> None:
    folder = ModelFolder(make_folder(tmp_path / "model"))
    assert folder.dataset == {"labels": {"background": 0}}
    assert folder.checkpoints == (tmp_path / "model" / "fold_0" / "checkpoint_final.pth",)
    assert folder.sha256() == {
        "dataset.json": hashlib.sha256(b'{"labels": {"background": 0}}').hexdigest(),
        "plans.json": hashlib.sha256(b"{}").hexdigest(),
        "fold_0/checkpoint_final.pth": hashlib.sha256(b"weights").hexdigest(),
    }


@pytest.mark.parametrize("name", ["dataset.json", "plans.json", "fold_0/checkpoint_final.pth"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = make_folder(tmp_path / "model")
    (path / name).unlink()
    with pytest.raises(WeightsMissing, match=f"lacks {name};"):
        ModelFolder(path)


def test_an_empty_checkpoint_counts_as_missing(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "model")
    (path / "fold_0" / "checkpoint_final.pth").write_bytes(b"")
    with pytest.raises(WeightsMissing, match=r"lacks fold_0/checkpoint_final\.pth"):
        ModelFolder(path)


def test_an_absent_folder_says_what_a_model_folder_holds(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"holds dataset\.json, plans\.json and fold_0/checkpoint_final\.pth"):
        ModelFolder(tmp_path / "nowhere")


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[1]", "holds a list")])
def test_a_damaged_plan_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = make_folder(tmp_path / "model")
    (path / "plans.json").write_text(text)
    with pytest.raises(WeightsMissing, match=words):
        ModelFolder(path)


def test_the_packaged_models_are_whole_and_small() -> None:
    root = demo_models_dir()
    folders = [ModelFolder(path.parent) for path in sorted(root.rglob("plans.json"))]
    assert [folder.path.name for folder in folders] == [
        "nnUNetTrainer__nnUNetPlans__3d_fullres",
        "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres",
        "nnUNetTrainer__nnUNetPlans__3d_lowres",
    ]
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) < 6_000_000
