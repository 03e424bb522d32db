"""Fetching a task: TotalSegmentator's own downloader against a server on the loopback, and words without a network."""

from __future__ import annotations

import http.server
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import made_totalseg
import pytest
import requests
from totalsegmentator import libs

from salsa_node import cli_models, model_cards, model_fetch, model_manifest, model_trial, preflight
from salsa_node.config import Config
from salsa_node.errors import ConfigError, ModelRefused, WeightsMissing
from salsa_node.models import (
    CHECKPOINT,
    DEMO_STAGES,
    OPEN_LESIONS,
    PIPELINE_TASKS,
    demo_models_dir,
    task_model,
    task_name,
)
from salsa_node.settings import NodeSettings, PipelineChoice

NOW = datetime(2026, 11, 21, 8, tzinfo=UTC)
LESIONS = "Dataset591_ct_liver_lesions_842subj"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        return


@pytest.fixture
def releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that stands for GitHub's: the real downloader runs, its requests go to the loopback."""
    served = tmp_path / "served"
    (served / "v2.5.0-weights").mkdir(parents=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    here = f"http://127.0.0.1:{server.server_port}"
    real_get, real_head = requests.get, requests.head
    asked: list[str] = []

    def turned(url: str) -> str:
        assert url.startswith(model_cards.RELEASES), f"asked for {url}"
        asked.append(url)
        return url.replace(model_cards.RELEASES, here)

    monkeypatch.setattr(requests, "get", lambda url, **options: real_get(turned(url), **options))
    monkeypatch.setattr(requests, "head", lambda url, **options: real_head(turned(url), **options))
    yield served / "v2.5.0-weights"
    server.shutdown()
    server.server_close()
    thread.join()


def put(folder: Path, name: str = LESIONS) -> Path:
    model = folder / name / "nnUNetTrainer__nnUNetPlans__3d_fullres_high"
    shutil.copytree(demo_models_dir() / DEMO_STAGES["liver"], model)
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        for file in sorted(model.rglob("*")):
            archive.write(file, file.relative_to(folder))
    shutil.rmtree(folder / name)
    return folder / f"{name}.zip"


def totalsegmentators_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("TOTALSEG", "nnUNet_"))}


def test_an_open_task_is_downloaded_checked_and_recorded(
    releases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(releases)
    before = totalsegmentators_environment()
    told: list[str] = []
    manifest = model_fetch.fetch(591, tmp_path / "models", NOW, told.append)
    assert manifest is not None
    assert manifest.origin == f"{model_cards.RELEASES}/v2.5.0-weights/{LESIONS}.zip"
    assert task_model(591, tmp_path / "models").path.parent.name == LESIONS
    assert [line for line in told if "downloading" in line]
    assert totalsegmentators_environment() == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["totalsegmentator"]
    said = capsys.readouterr()
    assert said.out == ""
    assert "Downloading" in said.err  # the downloader's bar
    assert not list((tmp_path / "models").rglob("config.json"))  # nothing that would send usage statistics
    assert model_fetch.fetch(591, tmp_path / "models", NOW) is None  # it is there


def test_a_download_that_is_no_model_is_refused(releases: Path, tmp_path: Path) -> None:
    (releases / f"{LESIONS}.zip").write_bytes(b"<html>log in to the hospital's proxy</html>")
    with pytest.raises(WeightsMissing, match=r"could not be downloaded \(BadZipFile\)"):
        model_fetch.fetch(591, tmp_path / "models", NOW)
    archive = put(releases)
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(releases / "x.zip", "w") as new:
        for entry in old.infolist():
            if not entry.filename.endswith(CHECKPOINT):
                new.writestr(entry, old.read(entry))
    (releases / "x.zip").replace(archive)
    with pytest.raises(ModelRefused, match=f"lacks fold_0/{CHECKPOINT}"):
        model_fetch.fetch(591, tmp_path / "models", NOW)
    assert list((tmp_path / "models").iterdir()) == []


def test_an_address_that_is_gone_names_the_way_by_hand(releases: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"\(HTTPError\)\. By hand: download it"):
        model_fetch.fetch(591, tmp_path / "models", NOW)


def test_without_a_network_the_way_by_hand_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str, **options: object) -> None:
        assert options["timeout"]
        raise requests.ConnectionError(url)

    monkeypatch.setattr(requests, "head", unreachable)
    with pytest.raises(WeightsMissing) as told:
        model_fetch.fetch(291, tmp_path / "models", NOW)
    words = str(told.value)
    name = "Dataset291_TotalSegmentator_part1_organs_1559subj"
    assert f"{model_cards.RELEASES}/v2.0.0-weights/{name}.zip" in words
    assert f"salsa-node models import {name}.zip --models-dir {tmp_path / 'models'}" in words
    assert list((tmp_path / "models").iterdir()) == []


def test_without_a_network_everything_that_was_asked_for_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(url: str, **options: object) -> None:
        raise requests.ConnectionError(url)

    monkeypatch.setattr(requests, "head", unreachable)
    with pytest.raises(WeightsMissing) as told:
        cli_models.fetch(["salsa", "591"], folder=tmp_path / "models")
    for task in (298, 291, 591):
        assert model_cards.download_url(task) in str(told.value)
    assert "VHIO gives them out on request" in str(told.value)
    assert capsys.readouterr().out == ""


def test_a_task_that_needs_a_licence_number_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="by licence number only"):
        model_fetch.fetch(301, tmp_path, NOW)
    with pytest.raises(WeightsMissing, match="has no task 7"):
        model_fetch.fetch(7, tmp_path, NOW)


def test_a_disk_without_room_is_told_before_the_download(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(releases)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    monkeypatch.setattr(libs, "download_pretrained_weights", lambda task: pytest.fail("the download began"))
    with pytest.raises(ConfigError, match="1000 bytes are free"):
        model_fetch.fetch(591, tmp_path / "models", NOW)


def test_a_folder_without_a_manifest_is_fetched_anew(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TotalSegmentator takes any folder of that name for whole; here a half-extracted one is replaced."""
    monkeypatch.setattr(model_trial, "run", lambda folders: {})
    put(releases)
    (tmp_path / "models" / "totalsegmentator" / LESIONS / "nnUNetTrainer__nnUNetPlans__3d_fullres_high").mkdir(
        parents=True
    )
    assert model_fetch.fetch(591, tmp_path / "models", NOW) is not None
    found = model_manifest.find("totalsegmentator-591", tmp_path / "models")
    assert set(model_manifest.verify(found).values()) == {"ok"}


@pytest.mark.parametrize(
    ("word", "tasks"),
    [
        ("591", (591,)),
        ("totalsegmentator-570", (570,)),
        ("liver_lesions", (297, 591)),
        ("totalsegmentator-liver-lesions", (297, 591)),
        ("salsa", (298, 291)),
    ],
)
def test_words_stand_for_tasks(word: str, tasks: tuple[int, ...]) -> None:
    assert model_cards.tasks_meant(word) == tasks


@pytest.mark.parametrize("word", ["liver-lesion", "totalsegmentator-x", ""])
def test_a_word_that_stands_for_nothing_is_refused(word: str) -> None:
    with pytest.raises(ConfigError):
        model_cards.tasks_meant(word)


# ---- what a start may download ---------------------------------------------------------------------


def serve_all(releases: Path, tmp_path: Path) -> None:
    """The two models of the open lesion pipeline, each where its release lies."""
    made = made_totalseg.make_weights(tmp_path / "made")
    for task in PIPELINE_TASKS[OPEN_LESIONS]:
        folder, url = made / task_name(task), model_cards.download_url(task)
        archive = releases.parent / url.removeprefix(f"{model_cards.RELEASES}/")
        archive.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(archive, "w") as packed:
            for file in sorted(folder.rglob("*")):
                packed.write(file, file.relative_to(made))


def test_a_start_that_may_download_gets_the_open_models_instead_of_the_demo(releases: Path, tmp_path: Path) -> None:
    serve_all(releases, tmp_path)
    config = Config(node=NodeSettings(data_dir=tmp_path / "data"), pipeline=PipelineChoice(may_download=True))
    (told,) = [check for check in preflight.checks(config) if check.name == "pipeline auto"]
    assert told.ok
    assert told.warns
    assert "297, 591 are missing; the start downloads them" in told.detail
    lines: list[str] = []
    preflight.download(config, NOW, lines.append)
    assert sum("downloading" in line for line in lines) == 2
    assert preflight.settled(config).pipeline.name == OPEN_LESIONS
    preflight.require(config)
    assert preflight.to_download(config) == ()
    preflight.download(config, NOW, lambda line: pytest.fail(line))


def test_a_start_that_may_not_download_asks_for_nothing(releases: Path, tmp_path: Path) -> None:
    serve_all(releases, tmp_path)
    config = Config(node=NodeSettings(data_dir=tmp_path / "data"))
    preflight.download(config, NOW, lambda line: pytest.fail(line))
    assert preflight.settled(config).pipeline.name == "demo"
    assert not config.models_dir.exists()


def test_a_start_whose_download_fails_names_every_file(releases: Path, tmp_path: Path) -> None:
    config = Config(node=NodeSettings(data_dir=tmp_path / "data"), pipeline=PipelineChoice(may_download=True))
    with pytest.raises(WeightsMissing, match=r"Dataset297_.*could not be downloaded.*Not tried.*Dataset591_"):
        preflight.download(config, NOW, lambda _: None)
