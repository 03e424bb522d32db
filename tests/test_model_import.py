"""A model from elsewhere: every layout that is given out goes in, whatever is unsound leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import pytest
import torch
from made_totalseg import make_weights

from salsa_node import model_import, model_manifest, model_source, model_trial
from salsa_node.errors import ConfigError, ModelRefused
from salsa_node.model_import import import_model, recognise
from salsa_node.models import CHECKPOINT, DEMO_STAGES, demo_models_dir, folders_of, task_model

NOW = datetime(2026, 11, 21, 8, tzinfo=UTC)
LOWRES = "nnUNetTrainer__nnUNetPlans__3d_lowres"
CASCADE = "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres"
LESIONS = "Dataset591_ct_liver_lesions_842subj"
WHOLE_BODY = "Dataset297_TotalSegmentator_total_3mm_1559subj"
SALSA = demo_models_dir() / "salsa"  # the demo's cascade has the layout of SALSA's weights


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the way there: the first run has tests of its own."""
    monkeypatch.setattr(model_trial, "run", lambda folders: {"torch": "0"})


def salsa_at(folder: Path, within: str = "model_weights") -> Path:
    for name in (LOWRES, CASCADE):
        shutil.copytree(SALSA / name, folder / within / name)
    return folder


def zipped(folder: Path, to: Path, *, top: bool = True) -> Path:
    with zipfile.ZipFile(to, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent if top else folder))
    return to


def task_at(folder: Path, name: str = LESIONS, trained: str = "nnUNetTrainer__nnUNetPlans__3d_fullres_high") -> Path:
    shutil.copytree(demo_models_dir() / DEMO_STAGES["liver"], folder / name / trained)
    return folder / name


def whole_body_at(folder: Path, name: str = WHOLE_BODY) -> Path:
    """Task 297 with the liver as label 5, as TotalSegmentator has it."""
    given = make_weights(folder / "made") / WHOLE_BODY
    given.rename(folder / name)
    shutil.rmtree(folder / "made")
    return folder / name


def left_behind(models_dir: Path) -> list[str]:
    return sorted(path.name for path in models_dir.iterdir()) if models_dir.is_dir() else []


def test_salsas_models_are_run_and_recorded(tmp_path: Path) -> None:
    told: list[str] = []
    (manifest,) = import_model(salsa_at(tmp_path / "from VHIO"), tmp_path / "models", NOW, progress=told.append)
    assert "CC BY-NC-SA 4.0" in manifest.card.terms
    assert "COMMERCIAL USE FORBIDDEN" in manifest.card.terms
    assert manifest.origin == "from VHIO"
    assert set(manifest.tested_with) == {"nnunetv2", "torch", "dynamic_network_architectures"}
    assert any("first run" in line for line in told)
    folders = folders_of("salsa", tmp_path / "models")
    hashes = {f"{f.path.name}/{name}": sha for f in folders.values() for name, sha in f.sha256().items()}
    assert dict(manifest.files) == hashes
    (found,) = [model for model in model_manifest.installed(tmp_path / "models") if model.name == "salsa"]
    assert found.manifest == manifest
    assert set(model_manifest.verify(found).values()) == {"ok"}
    assert left_behind(tmp_path / "models") == ["salsa"]


@pytest.mark.parametrize("within", ["", "model_weights", "nnUNet_results/Dataset001_TALES"])
@pytest.mark.parametrize("packed", ["folder", "zip", "zip without a folder"])
@pytest.mark.usefixtures("untried")
def test_every_layout_of_salsa_is_recognised(tmp_path: Path, within: str, packed: str) -> None:
    given = salsa_at(tmp_path / "weights", within)
    if packed != "folder":
        given = zipped(given, tmp_path / "weights.zip", top=packed == "zip")
    import_model(given, tmp_path / "models", NOW)
    assert set(folders_of("salsa", tmp_path / "models")) == {"lowres", "cascade"}
    kept = {path.name for path in (tmp_path / "models" / "salsa").iterdir()}
    assert kept == {LOWRES, CASCADE, "manifest.json"}


@pytest.mark.usefixtures("untried")
def test_totalsegmentators_tasks_go_where_it_looks_for_them(tmp_path: Path) -> None:
    whole_body_at(tmp_path / "results")
    task_at(tmp_path / "results")
    done = import_model(tmp_path / "results", tmp_path / "models", NOW)
    assert [manifest.card.name for manifest in done] == ["totalsegmentator-297", "totalsegmentator-591"]
    assert all(manifest.card.commercial_use for manifest in done)
    assert task_model(591, tmp_path / "models").path.parent.name == LESIONS
    (again,) = import_model(zipped(task_at(tmp_path), tmp_path / "x.zip", top=True), tmp_path / "models", NOW)
    assert again.origin == "results"  # the same files are there: nothing is done


@pytest.mark.usefixtures("untried")
def test_a_network_under_another_tasks_name_is_refused(tmp_path: Path) -> None:
    trained = "nnUNetTrainer_4000epochs_NoMirroring__nnUNetPlans__3d_fullres"
    given = [
        whole_body_at(tmp_path / "a", LESIONS),
        task_at(tmp_path / "b", WHOLE_BODY),
        task_at(tmp_path / "c", WHOLE_BODY, trained),  # its folder is right, its only label is no liver
    ]
    expected = ["3d_fullres_high", trained, "expected 5 = liver"]
    for folder, words in zip(given, expected, strict=True):
        with pytest.raises(ModelRefused, match=f"holds another network than its name says: .*{words}"):
            import_model(folder, tmp_path / "models", NOW)
    assert left_behind(tmp_path / "models") == []


@pytest.mark.usefixtures("untried")
def test_another_version_takes_the_place_only_when_told_to(tmp_path: Path) -> None:
    import_model(task_at(tmp_path / "a"), tmp_path / "models", NOW)
    other = task_at(tmp_path / "b")
    dataset = next(other.rglob("dataset.json"))
    dataset.write_text(dataset.read_text() + "\n")
    with pytest.raises(ModelRefused, match="add --replace"):
        import_model(other, tmp_path / "models", NOW)
    (manifest,) = import_model(other, tmp_path / "models", NOW, replace=True)
    assert manifest.files != {}
    installed = model_manifest.find("totalsegmentator-591", tmp_path / "models")
    assert set(model_manifest.verify(installed).values()) == {"ok"}
    assert left_behind(tmp_path / "models" / "totalsegmentator") == [LESIONS]


@pytest.mark.usefixtures("untried")
def test_a_damaged_installation_is_mended_by_importing_again(tmp_path: Path) -> None:
    given = task_at(tmp_path / "a")
    import_model(given, tmp_path / "models", NOW)
    installed = model_manifest.find("totalsegmentator-591", tmp_path / "models")
    checkpoint = next(installed.path.rglob(CHECKPOINT))
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1] + b"x")
    assert sorted(model_manifest.verify(installed).values()) == ["changed", "ok", "ok"]
    next(installed.path.rglob("plans.json")).unlink()
    assert sorted(model_manifest.verify(installed).values()) == ["changed", "missing", "ok"]
    import_model(given, tmp_path / "models", NOW)  # the same version: it takes no --replace
    assert set(model_manifest.verify(installed).values()) == {"ok"}


def names(*found: str) -> list[PurePosixPath]:
    return [PurePosixPath(name) for name in found]


def whole(folder: str) -> list[PurePosixPath]:
    return names(f"{folder}/dataset.json", f"{folder}/plans.json", f"{folder}/fold_0/{CHECKPOINT}")


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ([], "no model was recognised: expected SALSA's.*; found no file$"),
        (names("scan.nii.gz"), "no model was recognised.*; found 1 other files$"),
        (whole("x/nnUNetTrainer__nnUNetPlans__2d"), "found x/nnUNetTrainer__nnUNetPlans__2d"),
        (whole(f"x/{LOWRES}"), r"salsa: found 0 folders named \.\.\.__3d_cascade_fullres; .* that holds all"),
        (whole(f"a/{LOWRES}") + whole(f"b/{LOWRES}") + whole(CASCADE), f"found 2 folders .* \\(a/{LOWRES}, b/{LOWRES}"),
        (whole(LOWRES) + whole(CASCADE)[:2], f"salsa: {CASCADE} lacks fold_0/{CHECKPOINT}"),
        (whole(LOWRES)[1:] + whole(CASCADE), f"salsa: {LOWRES} lacks dataset.json; copy or unpack the model again"),
        (whole(LOWRES) + whole(CASCADE)[::2], f"salsa: {CASCADE} lacks plans.json"),
        (whole(LOWRES) + whole(CASCADE)[2:], f"salsa: {CASCADE} lacks dataset.json, plans.json"),
        (whole(f"{LESIONS}/a__b__c") + whole(f"{LESIONS}/a__b__d"), "totalsegmentator-591: found 2 trained"),
        (whole("Dataset297_TotalSegmentator_total_3mm_1559subj_v204/a__b__c"), "another version of the weights"),
    ],
)
def test_what_is_no_whole_model_is_refused_by_name(there: list[PurePosixPath], words: str) -> None:
    with pytest.raises(ModelRefused, match=words):
        recognise(there)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_bomb_is_refused_unread_and_nothing_stays(tmp_path: Path) -> None:
    given = salsa_at(tmp_path / "given")
    file = given / "model_weights" / LOWRES / "fold_0" / CHECKPOINT
    torch.save(torch.load(file, weights_only=True) | {"logging": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(
        ModelRefused, match=r"asks for posix\.mkdir\); a checkpoint that carries code, .* refused"
    ) as told:
        import_model(given, tmp_path / "models", NOW)
    assert "Re-running" not in str(told.value)  # torch's advice would spring it
    assert not (tmp_path / "sprung").exists()
    assert left_behind(tmp_path / "models") == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda weights: {name: torch.full_like(t, torch.nan) for name, t in weights.items()}, "not finite numbers"),
        (lambda weights: {}, "plans and weights do not fit together"),
    ],
)
def test_weights_that_cannot_work_are_refused(tmp_path: Path, spoil: Callable[..., object], words: str) -> None:
    given = task_at(tmp_path)
    file = next(given.rglob(CHECKPOINT))
    found = torch.load(file, weights_only=True)
    torch.save(found | {"network_weights": spoil(found["network_weights"])}, file)
    with pytest.raises(ModelRefused, match=words):
        import_model(given, tmp_path / "models", NOW)
    assert left_behind(tmp_path / "models") == []


def test_plans_that_nnunet_asserts_against_are_refused_with_words(tmp_path: Path) -> None:
    given = task_at(tmp_path)
    file = next(given.rglob("plans.json"))
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_conv_per_stage"] = [2]
    file.write_text(json.dumps(plans))
    with pytest.raises(ModelRefused, match=r"its first run on a phantom failed .*do not fit together"):
        import_model(given, tmp_path / "models", NOW)
    assert left_behind(tmp_path / "models") == []


def test_plans_that_name_foreign_code_are_refused(tmp_path: Path) -> None:
    given = task_at(tmp_path)
    file = next(given.rglob("plans.json"))
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["preprocessor_name"] = "Popen"
    file.write_text(json.dumps(plans))
    with pytest.raises(ModelRefused, match="asks for the preprocessor Popen"):
        import_model(given, tmp_path / "models", NOW)
    file.write_text("{")
    with pytest.raises(
        ModelRefused, match=r"591: nnUNetTrainer__.*/plans.json is not JSON .*; get the model again"
    ) as told:
        import_model(given, tmp_path / "models", NOW)
    assert ".incoming" not in str(told.value)
    assert left_behind(tmp_path / "models") == []


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/outside", "a/../../outside", "C:/outside", "a\\..\\outside", "..\\outside"]
)
def test_a_zip_that_would_write_outside_is_refused(tmp_path: Path, name: str) -> None:
    given = zipped(salsa_at(tmp_path / "given"), tmp_path / "given.zip")
    with zipfile.ZipFile(given, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ModelRefused, match="would write outside of its folder"):
        import_model(given, tmp_path / "models", NOW)
    assert left_behind(tmp_path / "models") == []
    assert not list(tmp_path.parent.glob("outside"))


def test_a_zip_with_a_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo(f"x/{LOWRES}/plans.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ModelRefused, match="holds a link or a device"):
        model_source.open_source(tmp_path / "x.zip")


def test_a_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (LOWRES, CASCADE):
            for file in ("dataset.json", "plans.json"):
                archive.writestr(f"{name}/{file}", "{}")
            archive.writestr(f"{name}/fold_0/{CHECKPOINT}", bytes(30_000_000))
    with pytest.raises(ModelRefused, match=r"would grow from \d+ to 30000000 bytes"):
        import_model(tmp_path / "x.zip", tmp_path / "models", NOW)
    assert left_behind(tmp_path / "models") == []


def test_a_zip_that_says_less_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a__b__c/plans.json", b"0123456789" * 100)
    content = path.read_bytes()
    assert content.count((1000).to_bytes(4, "little")) == 2  # the local header and the directory
    path.write_bytes(content.replace((1000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    source = model_source.open_source(path)
    with pytest.raises(ModelRefused):
        source.copy(source.names[0], tmp_path / "out" / "plans.json")
    out = tmp_path / "out" / "plans.json"
    assert not out.exists() or out.stat().st_size <= 10


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.zip", b"PK\x05\x06 no", "no whole zip .*; copy or download it again"),
        ("weights", b"PK\x03\x04 cut off", "no whole zip .*; copy or download it again"),
        ("x.zip", b"", "is an empty file"),
        ("x.tar", b"tar", "neither a folder nor a zip; unpack it"),
    ],
)
def test_what_is_no_zip_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelRefused, match=words):
        import_model(tmp_path / name, tmp_path / "models", NOW)
    assert left_behind(tmp_path / "models") == []


def test_a_path_where_nothing_is_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file or folder .*absent"):
        import_model(tmp_path / "absent", tmp_path / "models", NOW)


def test_a_truncated_zip_is_refused(tmp_path: Path) -> None:
    given = zipped(salsa_at(tmp_path / "given"), tmp_path / "given.zip")
    content = bytearray(given.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    given.write_bytes(content)
    with pytest.raises(ModelRefused, match="cannot be read as a zip"):
        import_model(given, tmp_path / "models", NOW)
    assert left_behind(tmp_path / "models") == []


def test_a_plans_file_that_no_plans_file_is_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = task_at(tmp_path)
    plans = next(given.rglob("plans.json"))
    plans.write_text("[" * 200_000)
    with pytest.raises(ModelRefused, match="is not JSON"):
        import_model(given, tmp_path / "models", NOW)
    monkeypatch.setattr(model_source, "MAX_JSON_BYTES", 1000)
    with pytest.raises(ModelRefused, match="holds more than 1000 bytes"):
        import_model(given, tmp_path / "models", NOW)
    assert left_behind(tmp_path / "models") == []


def test_a_link_to_a_folder_is_told_not_followed(tmp_path: Path) -> None:
    given = salsa_at(tmp_path / "given")
    (given / "model_weights" / CASCADE).rename(tmp_path / CASCADE)
    (given / "model_weights" / CASCADE).symlink_to(tmp_path / CASCADE)
    with pytest.raises(ModelRefused, match=f"found 0 .*; given/model_weights/{CASCADE} is a link to a folder"):
        import_model(given, tmp_path / "models", NOW)


@pytest.mark.usefixtures("untried")
def test_what_a_killed_import_left_is_swept_and_what_is_at_work_is_not(tmp_path: Path) -> None:
    for name, hours in ((".incoming-old", 48), (".incoming-new", 1)):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "plans.json").write_text("{}")
        then = NOW.timestamp() - hours * 3600
        os.utime(folder, (then, then))
    import_model(task_at(tmp_path / "a"), tmp_path / "models", NOW)
    assert left_behind(tmp_path / "models") == [".incoming-new", "totalsegmentator"]


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "MAX_FILES", 5)
    given = salsa_at(tmp_path / "given")
    with pytest.raises(ModelRefused, match="holds more than 5 files"):
        model_source.open_source(given)
    with pytest.raises(ModelRefused, match="at most 5"):
        model_source.open_source(zipped(given, tmp_path / "given.zip"))


def test_a_models_folder_that_cannot_be_made_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"pipeline\.models_dir"):
        import_model(salsa_at(tmp_path / "given"), tmp_path / "file" / "models", NOW)


def test_a_model_put_there_by_hand_is_recorded_in_place(tmp_path: Path) -> None:
    salsa_at(tmp_path / "models" / "salsa", "model_weights")
    found = model_manifest.find("salsa", tmp_path / "models")
    assert found.manifest is None
    import_model(found.path, tmp_path / "models", NOW)
    assert model_manifest.find("salsa", tmp_path / "models").manifest is not None
    assert left_behind(tmp_path / "models") == ["salsa"]
    assert left_behind(tmp_path / "models" / "salsa") == ["manifest.json", CASCADE, LOWRES]


def test_interrupted_renames_leave_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_trial, "run", lambda folders: {})
    import_model(task_at(tmp_path / "a"), tmp_path / "models", NOW)
    before = model_manifest.find("totalsegmentator-591", tmp_path / "models").manifest

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_import, "_put_into_place", full)
    other = task_at(tmp_path / "b")
    next(other.rglob("dataset.json")).write_text('{"labels": {"lesion": 1}}')
    with pytest.raises(ConfigError, match="No space left"):
        import_model(other, tmp_path / "models", NOW, replace=True)
    assert model_manifest.find("totalsegmentator-591", tmp_path / "models").manifest == before
    assert left_behind(tmp_path / "models") == ["totalsegmentator"]
