"""`salsa-node batch` as a researcher runs it: the real command, the demo models, codes and words."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from salsa_node import nifti, phantom
from salsa_node.batch import Result
from salsa_node.cases import Case
from salsa_node.cli_batch import _line

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salsa_node", "batch", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)

    return run


def test_a_table_of_scans_in_salsas_way(cli: Cli, tmp_path: Path) -> None:
    made = phantom.make(phantom.Recipe(11, shape=(24, 64, 64), spacing_mm=(8.0, 4.5, 4.5)))
    data = tmp_path / "my data"
    data.mkdir()
    nifti.write_ct(made.ct, data / "case.1.2.nii")
    (tmp_path / "paths.csv").write_text("PATHS\nmy data/case.1.2.nii\nmy data/absent.nii.gz\n")
    options = ("--no-recist", "--overlay", "gif", "--keep-intermediates", "--rule", "volume")
    told = cli("--input-csv", "paths.csv", *options)
    assert told.returncode == 1, told.stderr
    assert "2 scans: 1 done, 0 finished before, 1 failed" in told.stdout
    assert "FAILED  my data/absent.nii.gz: no such file or folder" in told.stdout
    assert "[1/2] my data/case.1.2.nii: " in told.stderr
    written = nib.load(data / "case.1.2_SALSA.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(written.dataobj))) == {0, 1}
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert names == [
        "my data/case.1.2.nii",
        "my data/case.1.2_SALSA.gif",
        "my data/case.1.2_SALSA.json",
        "my data/case.1.2_SALSA.nii.gz",
        "my data/case.1.2_SALSA/cropped/mask_0000.nii.gz",
        "my data/case.1.2_SALSA/cropped/scan_0000.nii.gz",
        "my data/case.1.2_SALSA/liver.nii.gz",
        "paths.csv",
        "salsa_batch.json",
        "salsa_lesions.csv",
        "salsa_scans.csv",
    ]
    record = json.loads((data / "case.1.2_SALSA.json").read_text())
    assert record["criteria"]["rule"] == "volume"
    assert "DEMO" in record["pipeline"]["notice"]
    assert "DEMO" in nifti.read_description(data / "case.1.2_SALSA.nii.gz")
    again = cli("my data", *options, "--json")
    assert again.returncode == 0, again.stderr
    (only,) = json.loads(again.stdout)
    assert (only["state"], only["record"]["key"]) == ("there", record["key"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--input-csv", "absent.csv"), "absent.csv: cannot be read"),
        (("x.nii", "--rule", "size"), "--rule: expected diameter or volume, found 'size'"),
        (("x.nii", "--overlay", "jpg"), "--overlay: expected gif or png"),
        (("x.nii", "--pipeline", "given_masks"), "use salsa-node run --masks"),
        (("x.nii", "--pipeline", "salsa7"), "'salsa7'; there are demo, salsa, totalsegmentator-liver-lesions\n"),
    ],
)
def test_what_cannot_be_done_says_what_to_give(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    told = cli(*arguments)
    assert told.returncode == 3
    assert words in told.stderr
    assert "Traceback" not in told.stderr


def test_tables_that_cannot_be_written_are_told_before_the_work_or_after_the_summary(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    before = cli("absent.nii", "--output", "taken")
    assert before.returncode == 3
    assert "taken cannot be written, where the tables go; give --output" in before.stderr
    assert "loading" not in before.stderr
    (tmp_path / "salsa_lesions.csv").mkdir()
    after = cli("absent.nii")
    assert after.returncode == 1
    assert "the tables cannot be written to" in after.stderr
    assert "1 scan: 0 done, 0 finished before, 1 failed" in after.stdout
    assert "tables: none could be written" in after.stdout


def test_without_a_scan_the_command_is_called_wrongly(cli: Cli) -> None:
    told = cli()
    assert told.returncode == 2
    assert "give PATHs or --input-csv" in told.stderr


def test_flags_are_named_on_the_screen(tmp_path: Path) -> None:
    case = Case(Path("a.nii"), (), "a", Path())
    record = {"flags": [{"name": "liver_cut_off", "text": "..."}, {"name": "thick_slices", "text": "..."}]}
    done = Result(case, tmp_path, "done", "1 candidate lesion", record)
    assert _line(done) == "a.nii: 1 candidate lesion; flags: liver_cut_off, thick_slices"
    assert _line(Result(case, tmp_path, "failed", "no such file", {})) == "a.nii: FAILED: no such file"
