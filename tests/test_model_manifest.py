"""An installed model on disk: what is removed is gone as a whole, or stays as a whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from salsa_node import model_manifest
from salsa_node.errors import ConfigError
from salsa_node.models import demo_models_dir


def salsa_in(models_dir: Path) -> Path:
    shutil.copytree(demo_models_dir() / "salsa", models_dir / "salsa")
    return models_dir / "salsa"


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_model_that_cannot_be_removed_is_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = files_in(salsa_in(tmp_path))

    def refused(_path: Path, _target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ConfigError, match=r"cannot be removed \(Permission denied\); nothing of it was touched"):
        model_manifest.remove(model_manifest.find("salsa", tmp_path))
    assert files_in(tmp_path) == there


def test_a_removed_model_leaves_nothing(tmp_path: Path) -> None:
    salsa_in(tmp_path)
    model_manifest.remove(model_manifest.find("salsa", tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_files_that_stay_are_no_installed_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    salsa_in(tmp_path)

    def refused(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.raises(ConfigError, match=r"no longer installed, .* delete .*\.incoming-.* by hand"):
        model_manifest.remove(model_manifest.find("salsa", tmp_path))
    assert [model.name for model in model_manifest.installed(tmp_path)] == ["demo"]
