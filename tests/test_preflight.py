"""What stands in the way of a start is named before the start."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from salsa_node import pipelines, preflight
from salsa_node.config import Config, parse
from salsa_node.errors import ConfigError, WeightsMissing
from salsa_node.pipelines.nnunet import ENGINES
from salsa_node.pipelines.options import OPTIONS
from salsa_node.pipelines.salsa_steps import PRESETS
from salsa_node.settings import NodeSettings, PipelineChoice

REPOSITORY = Path(__file__).parent.parent


def failed(config: Config) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in preflight.checks(config) if not check.ok]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(Config(), node=NodeSettings(data_dir=tmp_path / "data"))


def test_the_defaults_can_start(config):
    assert failed(config) == []
    preflight.require(config)


def test_auto_that_came_down_to_the_demo_says_how_to_get_real_results(config):
    (told,) = [check for check in preflight.checks(config) if check.name == "pipeline demo (chosen by auto)"]
    assert told.warns
    assert f"salsa-node models fetch 297 591 --models-dir {config.models_dir}" in told.detail
    named = replace(config, pipeline=PipelineChoice(name="demo"))
    assert not [check for check in preflight.checks(named) if check.warns and "pipeline" in check.name]


def test_given_masks_cannot_be_the_node_s_pipeline(config):
    (told,) = failed(replace(config, pipeline=PipelineChoice(name="given_masks")))
    assert "rerun STUDY --masks" in told


def test_an_option_that_the_pipeline_does_not_have_is_named(config):
    (told,) = failed(replace(config, pipeline=PipelineChoice(options={"mirorring": True})))
    assert "mirorring" in told
    assert "mirroring" in told


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("demo", {"precision": "bogus"}, "demo takes one of auto, float32, bfloat16; found 'bogus'"),
        ("demo", {"mirroring": "yes"}, "demo takes true or false; found 'yes'"),
        ("salsa", {"preset": "salsa-2026"}, "salsa takes one of salsa, salsa-2025, salsa-2024"),
        ("salsa", {"engine": "fast"}, "salsa takes one of own, compiled, reference"),
        ("salsa", {"tile_step": True}, "above 0 and at most 1; found True"),
        ("salsa", {"tile_step": 1.5}, "above 0 and at most 1; found 1.5"),
        ("salsa", {"fast_liver": 1}, "pipeline.options.fast_liver: salsa takes true or false"),
        ("totalsegmentator-liver-lesions", {"couinaud": "on"}, "takes true or false; found 'on'"),
    ],
)
def test_a_value_that_every_run_would_fail_on_stops_the_start(config, name, options, words):
    choice = replace(config, pipeline=PipelineChoice(name, options=options))
    (told,) = failed(choice)
    assert words in told
    with pytest.raises(ConfigError, match=re.escape(words)):
        preflight.require(choice)
    with pytest.raises(ConfigError, match=re.escape(words)):
        preflight.ready(choice)


def test_the_values_that_pipelines_know_are_those_that_are_let_through():
    salsa = OPTIONS["salsa"]
    assert salsa["preset"].expected == f"one of {', '.join(PRESETS)}"
    assert salsa["engine"].expected == f"one of {', '.join(ENGINES)}"
    assert all(salsa["precision"].fits(word) for word in ("auto", "float32", "bfloat16"))
    assert all(salsa["tile_step"].fits(share) for share in (1, 0.5))
    assert all(OPTIONS["given_masks"]["organ_labels"].fits(labels) for labels in (1, [1, 2]))
    assert set(OPTIONS) == set(pipelines.names())


def test_every_setting_of_a_pipeline_stands_in_the_config_and_in_the_readme():
    shipped = (REPOSITORY / "config" / "salsa_node.toml").read_text()
    block = shipped.partition("[pipeline.options]")[2].partition("[criteria]")[0]
    told: dict[str, str] = {}
    for line in block.splitlines()[1:]:
        heading = re.fullmatch(r"# ([a-z-]+):", line)
        if heading:
            told[heading[1]] = ""
        elif told:
            told[list(told)[-1]] += line.removeprefix("# ") + "\n"
    readme = (REPOSITORY / "README.md").read_text()
    for name, known in OPTIONS.items():
        if name != "given_masks":
            defaults = tomllib.loads(told[name])
            assert set(defaults) == set(known)
            pipelines.options.check(name, {key: defaults[key] for key in known if key != "contrast_phase"})
            assert [key for key in known if f"`{key}`" not in readme] == []
    for preset in PRESETS:
        assert f"`{preset}`" in readme
        assert preset in block


def test_a_gpu_that_is_not_there_stops_the_start(config):
    (told,) = failed(replace(config, pipeline=PipelineChoice(device="cuda:99")))
    assert "cuda:99 was asked for, but torch sees" in told
    assert not [check for check in preflight.checks(config) if check.name == "pipeline.device"]


def test_a_models_folder_that_is_not_there_is_named(config, tmp_path):
    (told,) = failed(replace(config, pipeline=PipelineChoice(models_dir=str(tmp_path / "absent"))))
    assert "there is no folder" in told


def test_missing_weights_name_the_folder_and_the_files(config, tmp_path):
    (tmp_path / "demo").mkdir()
    without = replace(config, pipeline=PipelineChoice(models_dir=str(tmp_path)))
    (told,) = failed(without)
    assert str(tmp_path / "demo") in told
    assert "checkpoint_final.pth" in told
    with pytest.raises(WeightsMissing):
        preflight.require_pipeline("demo", without)
    with pytest.raises(ConfigError, match="checkpoint_final"):
        preflight.require(without)


def test_a_folder_that_is_a_file_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    (told,) = failed(replace(config, node=NodeSettings(data_dir=tmp_path / "file" / "data")))
    assert "is not a folder" in told


def test_destinations_are_told():
    config = parse("[[destination]]\nname = 'pacs'\nae_title = 'PACS'\nhost = 'h'\nport = 104")
    told = preflight.checks(config)[-1]
    assert told.ok
    assert "pacs = PACS at h:104" in told.detail
    assert "until one is added" in preflight.checks(Config())[-1].detail


def test_a_shadow_and_the_ways_of_a_profile_are_told():
    text = "[delivery]\nto = ['pacs']\nresearch = ['lab']\nshadow = {}\n" + "".join(
        f"[[destination]]\nname = '{name}'\nae_title = 'A'\nhost = 'h'\nport = 1\n" for name in ("pacs", "lab")
    )
    text += "[[profile]]\nae_title = 'TEST'\npipeline = 'demo'\nto = ['lab']\n"
    by_light = {check.name: check for check in preflight.checks(parse(text.format("false")))}
    assert "profile TEST: lab" in by_light["delivery.to"].detail
    assert by_light["pipeline demo of profile TEST"].ok
    told = {check.name: check for check in preflight.checks(parse(text.format("true")))}["delivery.shadow"]
    assert (told.ok, told.warns) == (True, True)
    assert "nothing is sent, except to lab" in told.detail


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"torch": "2.9.0+cu128"}, "four times slower"),
        ({"torch": "2.13.0", "nvidia-cudnn-cu12": "9.10.2.21"}, "wrong bfloat16"),
        ({"nvidia-cudnn-cu13": "9.8.0.87"}, "wrong bfloat16"),
    ],
)
def test_versions_that_are_known_to_be_wrong_or_slow_are_told(versions, words):
    (told,) = preflight.known_faults(versions)
    assert words in told
    assert "install" in told


def test_good_versions_are_not_complained_of():
    assert preflight.known_faults({"torch": "2.13.0+cpu", "nvidia-cudnn-cu13": "9.20.0.48"}) == ()
    assert preflight.known_faults({"torch": "2.10.0", "nvidia-cudnn-cu12": "9.7.1.26"}) == ()


def test_a_fault_of_the_libraries_warns_at_start_and_stops_nothing(config, monkeypatch, caplog):
    monkeypatch.setattr(preflight.metadata, "version", lambda name: {"torch": "2.9.1"}.get(name, "9.9.0"))
    config = replace(config, pipeline=PipelineChoice(name="demo"))
    warned = [check for check in preflight.checks(config) if check.warns]
    assert [check.name for check in warned] == ["libraries"]
    preflight.require(config)
    assert "four times slower" in caplog.text
    on_cpu = replace(config, pipeline=PipelineChoice(name="demo", device="cpu"))
    assert not any(check.warns for check in preflight.checks(on_cpu))


def test_what_is_asked_for_takes_the_place_of_what_is_configured(config):
    assert preflight.ready(config).pipeline.name == "demo"
    assert preflight.ready(config, "auto").pipeline.name == "demo"
    choice = replace(config, pipeline=PipelineChoice(name="demo", options={"mirroring": True}))
    assert preflight.ready(choice, device="cpu").pipeline == PipelineChoice("demo", "cpu", options={"mirroring": True})
    with pytest.raises(ConfigError, match="needs a mask for each scan"):
        preflight.ready(choice, "given_masks")
    with pytest.raises(ConfigError, match="no pipeline is called 'salsa7'"):
        preflight.ready(choice, "salsa7")


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("totalsegmentator-liver-lesions", ["models fetch 297", "models fetch 591"]),
        ("salsa", ["models fetch 298", "models fetch 291", "models import FOLDER-OR-ZIP"]),
    ],
)
def test_absent_weights_refuse_and_name_the_commands_that_mend_it(config, name, commands):
    (told,) = failed(replace(config, pipeline=PipelineChoice(name=name)))
    for command in commands:
        assert f"salsa-node {command}" in told
        with pytest.raises(WeightsMissing, match=command):
            preflight.ready(config, name)
        with pytest.raises(ConfigError, match=command):
            preflight.require(replace(config, pipeline=PipelineChoice(name=name)))
