"""Model folders: whole, or a clear word about what is missing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from salsa_node.errors import WeightsMissing
from salsa_node.models import (
    DEMO_STAGES,
    ModelFolder,
    demo_models_dir,
    folders_of,
    require,
    task_folder,
    task_model,
)


def make_folder(path: Path, labels: str = '{"background": 0}') -> Path:
    (path / "fold_0").mkdir(parents=True)
    (path / "dataset.json").write_text(f'{{"labels": {labels}}}')
    (path / "plans.json").write_text("{}")
    (path / "fold_0" / "checkpoint_final.pth").write_bytes(b"weights")
    return path


def test_a_whole_folder_tells_its_files_and_hashes(tmp_path: Path) -> None:
    folder = ModelFolder(make_folder(tmp_path / "model"))
    assert folder.dataset == {"labels": {"background": 0}}
    assert folder.checkpoint == tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
    assert folder.sha256() == {
        "dataset.json": hashlib.sha256(b'{"labels": {"background": 0}}').hexdigest(),
        "plans.json": hashlib.sha256(b"{}").hexdigest(),
        "fold_0/checkpoint_final.pth": hashlib.sha256(b"weights").hexdigest(),
    }


def test_a_file_that_changed_after_the_model_was_installed_is_not_run(tmp_path: Path) -> None:
    folder = ModelFolder(make_folder(tmp_path / "salsa" / "a__b__3d_lowres"))
    recorded = {f"a__b__3d_lowres/{name}": sha for name, sha in folder.sha256().items()}
    (tmp_path / "salsa" / "manifest.json").write_text(json.dumps({"files": recorded}))
    assert len(folder.sha256()) == 3
    folder.checkpoint.write_bytes(b"Weights")
    with pytest.raises(WeightsMissing, match=r"checkpoint_final\.pth changed since the model was installed"):
        folder.sha256()


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


LESIONS = "totalsegmentator/Dataset591_ct_liver_lesions_842subj"
CROP = "totalsegmentator/Dataset297_TotalSegmentator_total_3mm_1559subj"
LIVER = "totalsegmentator/Dataset291_TotalSegmentator_part1_organs_1559subj"
ROUGH = "totalsegmentator/Dataset298_TotalSegmentator_total_6mm_1559subj"
TRAINED = {
    LESIONS: "nnUNetTrainer__nnUNetPlans__3d_fullres_high",
    CROP: "nnUNetTrainer_4000epochs_NoMirroring__nnUNetPlans__3d_fullres",
    LIVER: "nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres",
    ROUGH: "nnUNetTrainer_4000epochs_NoMirroring__nnUNetPlans__3d_fullres",
}


def make_task(models_dir: Path, task: str, *, named: str = "") -> Path:
    """The folder of that task with labels as it has them, under the name of another one if `named` says so."""
    labels = '{"background": 0, "lesion": 1}' if task == LESIONS else '{"background": 0, "liver": 5}'
    return make_folder(models_dir / (named or task) / TRAINED[task], labels)


@pytest.mark.parametrize("within", ["", "model_weights", "nnUNet_results/Dataset001_TALES"])
def test_salsas_two_stages_are_found_in_every_layout_seen(tmp_path: Path, within: str) -> None:
    lowres = make_folder(tmp_path / "salsa" / within / "nnUNetTrainer__nnUNetPlans__3d_lowres")
    cascade = make_folder(tmp_path / "salsa" / within / "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres")
    folders = folders_of("salsa", tmp_path)
    assert {stage: folder.path for stage, folder in folders.items()} == {"lowres": lowres, "cascade": cascade}


def test_absent_weights_name_the_command_that_installs_them(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="salsa-node models import FOLDER-OR-ZIP"):
        folders_of("salsa", tmp_path)
    with pytest.raises(WeightsMissing, match=r"task 591 \(Dataset591_ct.*salsa-node models fetch 591"):
        task_model(591, tmp_path)
    with pytest.raises(WeightsMissing, match="salsa-node models fetch 591"):
        task_folder(591, None)
    with pytest.raises(WeightsMissing, match="has no task 7"):
        task_folder(7, tmp_path)


def test_the_command_that_mends_it_goes_to_the_folder_that_was_looked_in(tmp_path: Path) -> None:
    models_dir = tmp_path / "of the site"
    for pipeline, task in (("salsa", 298), ("totalsegmentator-liver-lesions", 591)):
        with pytest.raises(WeightsMissing, match=f"salsa-node models fetch {task} --models-dir '{models_dir}'"):
            require(pipeline, models_dir)
    with pytest.raises(WeightsMissing, match=f"models import FOLDER-OR-ZIP --models-dir '{models_dir}'"):
        folders_of("salsa", models_dir)


def test_two_folders_for_one_stage_are_refused(tmp_path: Path) -> None:
    for copy in ("a", "b"):
        make_folder(tmp_path / "salsa" / copy / "nnUNetTrainer__nnUNetPlans__3d_lowres")
    with pytest.raises(WeightsMissing, match=r"holds 2 folders named \.\.\.__3d_lowres"):
        folders_of("salsa", tmp_path)


def test_a_task_lies_where_totalsegmentator_puts_it(tmp_path: Path) -> None:
    path = make_task(tmp_path, LESIONS)
    assert task_folder(591, tmp_path) == tmp_path / LESIONS
    assert task_model(591, tmp_path).path == path


@pytest.mark.parametrize(
    ("task", "named", "words"),
    [
        (
            CROP,
            LESIONS,
            r"does not hold TotalSegmentator's task 591: .*models remove totalsegmentator-591 .*, then .* fetch 591",
        ),
        (
            LESIONS,
            CROP,
            r"does not hold TotalSegmentator's task 297: .*models remove totalsegmentator-297 .*, then .* fetch 297",
        ),
    ],
)
def test_a_task_under_anothers_name_is_refused_before_a_scan_is_read(
    tmp_path: Path, task: str, named: str, words: str
) -> None:
    make_task(tmp_path, task, named=named)
    make_task(tmp_path, task)
    with pytest.raises(WeightsMissing, match=words):
        require("totalsegmentator-liver-lesions", tmp_path)


def test_a_half_extracted_task_is_not_taken_for_whole(tmp_path: Path) -> None:
    (tmp_path / LESIONS).mkdir(parents=True)
    with pytest.raises(WeightsMissing, match="holds 0 trained configurations"):
        task_model(591, tmp_path)
    path = make_task(tmp_path, LESIONS)
    (path / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(WeightsMissing, match="lacks fold_0"):
        task_model(591, tmp_path)


def test_a_broken_model_names_the_commands_that_put_a_whole_one_there(tmp_path: Path) -> None:
    task, salsa = make_task(tmp_path, LESIONS), tmp_path / "salsa" / "nnUNetTrainer__nnUNetPlans__3d_lowres"
    make_task(tmp_path, CROP)
    (task / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(WeightsMissing, match=r"lacks fold_0.* models remove totalsegmentator-591 .*models fetch 591"):
        require("totalsegmentator-liver-lesions", tmp_path)
    make_folder(salsa)
    (salsa / "dataset.json").unlink()
    with pytest.raises(WeightsMissing, match=r"lacks dataset.json.* models remove salsa .*models import FOLDER-OR-ZIP"):
        folders_of("salsa", tmp_path)


def test_a_checkpoint_that_is_cut_off_is_noticed_without_reading_it(tmp_path: Path) -> None:
    shutil.copytree(demo_models_dir(), tmp_path / "demo")
    assert require("demo", tmp_path) == 3
    checkpoint = tmp_path / "demo" / DEMO_STAGES["cascade"] / "fold_0" / "checkpoint_final.pth"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(WeightsMissing, match=r"cascade_fullres/fold_0/checkpoint_final.pth is cut off after \d+ bytes"):
        require("demo", tmp_path)


def test_what_a_pipeline_needs_is_counted_with_totalsegmentators_tasks(tmp_path: Path) -> None:
    assert require("given_masks", None) == 0
    assert require("demo", tmp_path) == 3
    for name in (CROP, LESIONS):
        make_task(tmp_path, name)
    assert require("totalsegmentator-liver-lesions", tmp_path) == 2
    make_task(tmp_path, ROUGH)
    with pytest.raises(
        WeightsMissing, match=r"models fetch 291 --models-dir .*; SALSA's weights are not in .*models import"
    ):
        require("salsa", tmp_path)
    make_task(tmp_path, LIVER)
    for stage in ("3d_lowres", "3d_cascade_fullres"):
        make_folder(tmp_path / "salsa" / f"nnUNetTrainer__nnUNetPlans__{stage}")
    assert require("salsa", tmp_path) == 4
    shutil.rmtree(tmp_path / LIVER)
    for options in ({"fast_liver": True}, {"preset": "salsa-2024"}):
        assert require("salsa", tmp_path, options) == 4
    with pytest.raises(WeightsMissing, match="models fetch 291"):
        require("salsa", tmp_path, {"preset": "salsa-2024", "fast_liver": False})
