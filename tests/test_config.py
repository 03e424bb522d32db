"""Settings: the shipped file equals the defaults, and a mistake names itself."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from salsa_node.config import Config, dump, load, parse
from salsa_node.criteria import Rule
from salsa_node.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "config" / "salsa_node.toml"
README = Path(__file__).parents[1] / "README.md"


def test_the_shipped_file_equals_the_defaults():
    assert load(SHIPPED) == Config()


def test_the_shipped_file_holds_every_key_with_a_comment():
    lines = SHIPPED.read_text().splitlines()
    for section in fields(Config()):
        values = getattr(Config(), section.name)
        if not is_dataclass(values):
            continue
        assert f"[{section.name}]" in lines
        for key in fields(values):
            if key.name in ("options", "tls"):
                assert f"[{section.name}.{key.name}]" in SHIPPED.read_text()
                continue
            line = next((text for text in lines if text.startswith(f"{key.name} = ")), None)
            assert line is not None, f"{section.name}.{key.name} is not in the shipped file"
            assert "#" in line, f"{section.name}.{key.name} has no comment"


def test_the_readme_names_every_key():
    text = README.read_text()
    missing = [
        f"{section.name}.{key.name}"
        for section in fields(Config())
        if is_dataclass(getattr(Config(), section.name))
        for key in fields(getattr(Config(), section.name))
        if f"`{section.name}.{key.name}`" not in text
    ]
    assert not missing


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[listner]\nport = 1", ["listner", "listener"]),
        ("[listener]\nprot = 1", ["listener.prot", "'port'"]),
        ("[listener]\nport = '104'", ["listener.port", "expected int", "'104'"]),
        ("[listener]\nport = 70000", ["listener.port", "65535", "70000"]),
        ("[listener]\nport = true", ["listener.port", "True"]),
        ("[listener]\nae_title = 'A TITLE THAT IS TOO LONG'", ["listener.ae_title", "16"]),
        ("[assembly]\nquiet_s = -1", ["assembly.quiet_s", "at least 0", "-1"]),
        ("[criteria]\nrule = 'size'", ["criteria.rule", "diameter, volume", "'size'"]),
        ("[node]\nlog_level = 'loud'", ["node.log_level", "debug", "'loud'"]),
        ('[worker]\nstat_ae_titles = ["A TITLE THAT IS TOO LONG"]', ["worker.stat_ae_titles", "1 to 16 characters"]),
        ('[series]\ntilt = "straighten"', ["series.tilt", "refuse, resample"]),
        ('[query]\nae_title = "A TITLE THAT IS TOO LONG"', ["query.ae_title", "1 to 16"]),
        ("[worker]\nlease_s = 5\nheartbeat_s = 4", ["worker.heartbeat_s", "half"]),
        ("[delivery]\nto = ['pacs']", ["delivery.to", "'pacs'", "sender"]),
        ("[delivery]\nto = ['sender', 'sender']", ["delivery.to", "twice"]),
        ("[[destination]]\nname = 'a'\nae_title = 'A'\nhost = 'h'", ["destination[0].port", "missing"]),
        ("[[destination]]\nname = 'a'\nae_title = 'A'\nhost = 'h'\nport = 1\n" * 2, ["destination", "'a'"]),
        ("listener = 3", ["listener", "table", "3"]),
        ("[listener", ["TOML"]),
        ("[pipeline]\noptions = 3", ["pipeline.options", "table"]),
        ("[pipeline]\ndevice = 'gpu'", ["pipeline.device", "cuda", "'gpu'"]),
        ("[assembly]\nquiet_s = inf", ["assembly.quiet_s", "at most 86400", "inf"]),
        ("[assembly]\nquiet_s = nan", ["assembly.quiet_s", "nan"]),
        ("[delivery]\nlease_s = inf", ["delivery.lease_s", "inf"]),
        ("[worker]\npoll_s = 0", ["worker.poll_s", "more than 0"]),
        ("[listener]\nallowed = [{ address = '10.0.0.300' }]", ["listener.allowed", "10.0.0.300"]),
        ("[listener]\nhost = ''", ["listener.host", "''"]),
        ("[results]\nfirst_series_number = 0", ["results.first_series_number", "at least 1"]),
        ('[results]\ntime_zone = "Berlin"', ["results.time_zone", "Europe/Berlin", "found 'Berlin'"]),
        ("[results]\nkey_images = 101", ["results.key_images", "at most 100"]),
        ('[guards]\nmirrored = "shrug"', ["guards.mirrored", "block, flag"]),
        (
            "[guards]\nmin_liver_ml = 7000",
            ["guards.min_liver_ml", "less than guards.max_liver_ml (6000)", "found 7000"],
        ),
        ("[guards]\nmax_liver_ml = 300", ["guards.min_liver_ml", "max_liver_ml (300)", "found 300"]),
        ("[guards]\nmax_share_of_body = 1.5", ["guards.max_share_of_body", "at most 1"]),
        ("[node]\nstore_url = 'mysql://h/db'", ["node.store_url", "sqlite:///", "postgresql://"]),
        ("[node]\ndata_dir = 'a?b'", ["node.data_dir", "?"]),
        ("[[destination]]\nname = 'sender'\nae_title = 'A'\nhost = 'h'\nport = 1", ["destination", "'sender'"]),
        (
            "[[destination]]\nname = 'a'\nae_title = 'A'\nhost = 'h'\nport = 1\nseg = 'map'",
            ["destination[0].seg", "binary, labelmap"],
        ),
        ("[[destination]]\nname = ''\nae_title = 'A'\nhost = 'h'\nport = 1", ["destination[0].name"]),
    ],
)
def test_a_mistake_is_named(text, words):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    for word in words:
        assert word in str(caught.value)


def test_values_arrive_typed():
    config = parse(
        "[criteria]\nrule = 'volume'\nmin_diameter_mm = 12\n"
        "[listener]\nallowed = [{ae_title = 'CT1', address = '192.0.2.1'}]\n"
        "[delivery]\nto = ['pacs', 'sender']\n"
        "[[destination]]\nname = 'pacs'\nae_title = 'PACS'\nhost = '192.0.2.2'\nport = 104\n"
    )
    assert config.criteria.rule is Rule.VOLUME
    assert config.criteria.min_diameter_mm == 12.0
    assert isinstance(config.criteria.min_diameter_mm, float)
    assert config.listener.allowed[0].ae_title == "CT1"
    assert config.destination_named("pacs").port == 104
    with pytest.raises(ConfigError, match="there are: pacs"):
        config.destination_named("pax")


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load(tmp_path / "absent.toml")


def test_the_environment_names_the_file(tmp_path, monkeypatch):
    file = tmp_path / "site.toml"
    file.write_text("[listener]\nport = 4242\n")
    monkeypatch.setenv("SALSA_NODE_CONFIG", str(file))
    assert load().listener.port == 4242
    assert load(SHIPPED).listener.port == 11112


def test_a_profile_has_its_own_pipeline_and_destinations() -> None:
    config = parse(
        """
        [pipeline]
        device = "cpu"
        [delivery]
        to = ["pacs"]
        [[destination]]
        name = "pacs"
        ae_title = "PACS"
        host = "192.0.2.1"
        port = 104
        [[profile]]
        ae_title = "SALSA_TEST"
        pipeline = "demo"
        to = ["sender"]
        [[profile]]
        ae_title = "SALSA_MORE"
        """
    )
    (choice,) = config.profile_pipelines.items()
    assert (choice[0], choice[1].name, choice[1].device) == ("SALSA_TEST", "demo", "cpu")
    assert [config.destinations_for(title) for title in ("SALSA_TEST", "SALSA_MORE", "SALSA_NODE", "")] == [
        ("sender",), ("pacs",), ("pacs",), ("pacs",)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[profile]]\nae_title = 'SALSA_NODE'", "profile[0].ae_title: 'SALSA_NODE' is taken"),
        ("[[profile]]\nae_title = 'A'\n[[profile]]\nae_title = 'A'", "profile[1].ae_title: 'A' is taken"),
        ("[[profile]]\nae_title = 'A'\nto = ['pacs']", "profile[0].to: no [[destination]] is called 'pacs'"),
        ("[[profile]]\nae_title = 'A'\noptions = { b = 1 }", "profile[0].options: name the pipeline"),
        ("[[profile]]\npipeline = 'demo'", "profile[0].ae_title: missing"),
    ],
)
def test_a_profile_that_cannot_be_used_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse(text)


def test_what_is_dumped_is_read_back() -> None:
    text = """
[listener]
allowed = [{ ae_title = "A \\"B\\"", address = "192.0.2.0/24" }]
[pipeline]
name = "salsa"
options = { tile_step = 0.25, mirroring = false, preset = "salsa" }
[criteria]
rule = "volume"
[[destination]]
name = "pacs"
ae_title = "PACS"
host = "192.0.2.10"
port = 104
[[profile]]
ae_title = "TEST"
to = ["pacs"]
"""
    for config in (Config(), parse(text)):
        assert parse(dump(config)) == config
