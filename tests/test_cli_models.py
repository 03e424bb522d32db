"""`salsa-node models` as an admin uses it: import, list, show, verify, remove, and codes that a script can read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from salsa_node.models import CHECKPOINT, DEMO_STAGES, demo_models_dir

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
LESIONS = "Dataset591_ct_liver_lesions_842subj"


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    folder = tmp_path_factory.mktemp("site")
    config = folder / "site.toml"
    config.write_text(f'[node]\ndata_dir = "{folder / "data"}"\n')

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salsa_node", "models", *map(str, arguments), "--config", str(config)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL, cwd=folder
        )

    return run


@pytest.fixture(scope="module")
def salsa(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an imported SALSA, made of the demo's cascade."""
    given = tmp_path_factory.mktemp("given") / "weights"
    shutil.copytree(demo_models_dir() / "salsa", given / "model_weights")
    told = cli("import", given)
    assert told.returncode == 0, told.stderr
    assert "COMMERCIAL USE FORBIDDEN" in told.stdout
    assert "CC BY-NC-SA 4.0" in told.stdout
    assert "first run" in told.stderr
    return Path(told.stdout.split("is installed in ")[1].strip())


def test_the_default_folder_lies_below_the_data(salsa: Path) -> None:
    assert salsa.parts[-3:] == ("data", "models", "salsa")


def test_the_list_tells_what_is_there_and_what_is_not(cli: Cli, salsa: Path) -> None:
    rows = {row["name"]: row for row in json.loads(cli("list", "--json").stdout)}
    assert rows["demo"]["state"] == "installed"
    assert rows["salsa"]["state"] == "installed"
    assert rows["salsa"]["commercial_use"] is False
    assert rows["totalsegmentator-591"]["state"] == "absent"
    mend = rows["totalsegmentator-591"]["mend"]
    assert mend == f"salsa-node models fetch 591 --models-dir {salsa.parent}"  # as typed, it goes to this folder
    told = cli("list")
    assert told.returncode == 0
    assert "CC BY-NC-SA 4.0" in told.stdout
    assert f"totalsegmentator-591: {mend}" in told.stdout


def test_show_tells_licence_and_hashes(cli: Cli, salsa: Path) -> None:
    told = cli("show", "salsa")
    assert told.returncode == 0
    for words in ("COMMERCIAL USE FORBIDDEN", "10.1016/j.xcrm.2025.102032", "VHIO", "sha256:", "ran with:  nnunetv2"):
        assert words in told.stdout
    shown = json.loads(cli("show", "salsa", "--json").stdout)
    assert len(shown["files"]) == 6
    assert json.loads(cli("show", "demo", "--json").stdout)["manifest"] is None
    for name in ("totalsegmentator-591", "591"):
        told = cli("show", name)
        assert told.returncode == 7
        assert "is not installed" in told.stderr
    assert cli("show", "sala").returncode == 3


def test_a_second_import_says_that_nothing_was_done(cli: Cli, salsa: Path) -> None:
    told = cli("import", salsa)
    assert told.returncode == 0
    assert f"salsa was there already, the same file for file, in {salsa}" in told.stdout


def test_verify_finds_a_changed_byte_and_import_mends_it(cli: Cli, salsa: Path) -> None:
    assert cli("verify").returncode == 0
    checkpoint = next(salsa.rglob(CHECKPOINT))
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    told = cli("verify", "salsa")
    assert told.returncode == 1
    assert f"FAIL  salsa: {checkpoint.relative_to(salsa).as_posix()} changed" in told.stdout
    assert "--replace" in told.stderr
    assert set(json.loads(cli("verify", "--json").stdout)["salsa"].values()) == {"ok", "changed"}
    checkpoint.write_bytes(content)
    assert cli("verify", "salsa").returncode == 0


def test_what_is_refused_is_told_with_the_reason(cli: Cli, tmp_path: Path) -> None:
    told = cli("import", tmp_path)
    assert told.returncode == 7
    assert "no model was recognised" in told.stderr
    told = cli("import", tmp_path / "nothing")
    assert (told.returncode, told.stderr) == (3, f"salsa-node: there is no file or folder {tmp_path / 'nothing'}\n")
    told = cli("fetch", "liver_lesion")
    assert told.returncode == 3
    assert "liver_lesions" in told.stderr
    assert cli("fetch", "301").returncode == 7


def test_removing_asks_first(cli: Cli) -> None:
    given = Path(demo_models_dir() / "liver")
    data = Path(json.loads(cli("list", "--json").stdout)[0]["path"])
    assert data == demo_models_dir()
    told = cli("remove", "demo", "--yes")
    assert told.returncode == 3
    assert "stay" in told.stderr
    assert given.is_dir()


def test_a_task_is_removed(cli: Cli, tmp_path: Path) -> None:
    trained = tmp_path / LESIONS / "nnUNetTrainer__nnUNetPlans__3d_fullres_high"
    shutil.copytree(demo_models_dir() / DEMO_STAGES["liver"], trained)
    told = cli("import", tmp_path / LESIONS, "--json")
    assert told.returncode == 0, told.stderr
    (manifest,) = json.loads(told.stdout)
    assert manifest["name"] == "totalsegmentator-591"
    assert manifest["origin"] == LESIONS
    listed = cli("list", "--json", "--models-dir", tmp_path)
    assert "installed" not in {row["state"] for row in json.loads(listed.stdout)[1:]}
    told = cli("remove", "totalsegmentator-591")  # nobody answers
    assert told.returncode == 1
    assert cli("show", "totalsegmentator-591").returncode == 0
    assert cli("remove", "totalsegmentator-591", "--yes").returncode == 0
    assert cli("show", "totalsegmentator-591").returncode == 7
