"""Every command through the real process: tables, JSON, exit codes, and words that say what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pydicom
import pytest
import typer
from pynetdicom import AE
from typer.core import TyperGroup
from typer.testing import CliRunner

from salsa_node import cli as command_line
from salsa_node import cli_queue, console, errors, phantom
from salsa_node.cli import _with_command, app
from salsa_node.nifti import read_labels, write_labels
from salsa_node.store import NewInstance, Store, StoreSettings
from salsa_node.volume import LabelVolume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).parents[1]
T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> phantom.Study:
    recipe = phantom.Recipe(11, shape=(24, 64, 64), spacing_mm=(8.0, 4.5, 4.5))
    return phantom.write_study(phantom.make(recipe), tmp_path_factory.mktemp("study"))


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    config = tmp_path / "site.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n')

    def run(*arguments: object, config: Path = config) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salsa_node", *map(str, arguments), "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    return run


def test_version_and_help_need_no_config():
    told = subprocess.run([sys.executable, "-m", "salsa_node", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("salsa_node ")
    told = subprocess.run([sys.executable, "-m", "salsa_node", "--help"], capture_output=True, text=True, check=True)
    for command in ("serve", "studies", "show", "rerun", "resend", "echo", "config", "run", "demo"):
        assert command in told.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError, 3),
        (errors.UnknownStudy, 4),
        (errors.IllegalTransition, 4),
        (errors.StoreError, 5),
        (errors.LeaseLost, 5),
        (errors.DeliveryError, 6),
        (errors.DestinationRefused, 6),
        (errors.PipelineError, 7),
        (errors.WeightsMissing, 7),
        (errors.SeriesRejected, 7),
    ],
)
def test_each_error_has_the_exit_code_of_the_readme(monkeypatch, capsys, error, code):
    def fail(_: object) -> None:
        raise error("what was found and what to do")

    monkeypatch.setattr(command_line, "_with_command", fail)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == code
    assert capsys.readouterr() == ("", "salsa-node: what was found and what to do\n")
    codes = re.findall(r"^\| (\d) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert str(code) in codes


@pytest.mark.parametrize(
    ("words", "empty"),
    [
        (("studies",), []),
        (("quarantine",), []),
        (("retry", "--all"), []),
        (("verify",), {"checked": 0, "read_bytes": 0, "unknown": 0, "faults": [], "set_aside": 0}),
        (("resume",), {"paused": False, "was_paused": False}),
        (("audit", "verify"), {"lines": 0, "last": "0" * 64, "broken": None, "untold": 0}),
        (("cancel", "1.2", "--yes"), []),
        (("hold", "1.2"), {"study_uid": "1.2", "held": []}),
        (("retry", "1.2"), []),
        (("purge", "1.2", "--yes"), [{"study_uid": "1.2", "files": 0, "image_bytes": 0}]),
    ],
)
def test_json_is_json_where_there_is_nothing(tmp_path, words, empty):
    """A study without images where the command wants one; no line of words beside the document."""
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'salsa_node.sqlite'}"), create=True) as record:
        if "1.2" in words:
            record.add_instance(NewInstance("1.2.1.1", "1.2.1", "1.2", "1.5", "1.6", "p", "0" * 32, 9, "CT1"), T0)
            record.complete_series(T0, T0)
            record.study_assembled(record.study("1.2"), "", T0)
            record.purge("1.2", "gone", T0, lambda _: None)
    (tmp_path / "site.toml").write_text(f'[node]\ndata_dir = "{tmp_path}"\n')
    told = CliRunner().invoke(command_line.app, [*words, "--json", "--config", str(tmp_path / "site.toml")])
    assert told.exception is None or isinstance(told.exception, SystemExit), told.exception
    assert json.loads(told.stdout) == empty


@pytest.mark.parametrize("words", [("logs",), ("audit", "show")])
def test_json_lines_of_nothing_are_none(tmp_path, words):
    Store.open(StoreSettings(f"sqlite:///{tmp_path / 'salsa_node.sqlite'}"), create=True).close()
    (tmp_path / "site.toml").write_text(f'[node]\ndata_dir = "{tmp_path}"\n')
    told = CliRunner().invoke(command_line.app, [*words, "--json", "--config", str(tmp_path / "site.toml")])
    assert (told.exit_code, told.stdout) == (0, "")


def test_a_command_is_read_alone_and_a_wrong_one_among_all():
    """The signatures of the others would take a fifth of the time of an answer."""
    [only] = _with_command(["pause"]).registered_commands
    assert (only.callback, _with_command(["pause"]).registered_groups) == (cli_queue.pause, [])
    for called in (["config"], ["paus"], []):
        assert len(_with_command(called).registered_commands) == len(app.registered_commands) > 20
        assert _with_command(called).registered_groups == app.registered_groups
    heavy = {"pydantic", "numpy", "torch", "pydicom", "pynetdicom", "alembic", "sqlalchemy.dialects.postgresql"}
    loaded = f"str({heavy} & set(sys.modules) or 'nothing')"
    asked = f"import sys; from salsa_node import cli, overview; cli._with_command(['studies']); sys.exit({loaded})"
    answer = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False)
    assert answer.stderr.strip() == "nothing"


def test_every_command_stands_in_the_readme():
    text = (ROOT / "README.md").read_text()
    commands = typer.main.get_command(app)
    assert isinstance(commands, TyperGroup)
    assert "serve" in commands.commands
    absent = [
        name for name, command in commands.commands.items() if not command.hidden and f"salsa-node {name}" not in text
    ]
    assert not absent


def test_every_command_of_the_readme_exists():
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `salsa-node ")]
    assert len(table) >= 8
    for line in table:
        words = line.split("`")[1].split()[1:]
        command = [word for word in words if word.islower() and not word.startswith("-")][:2]
        told = subprocess.run(
            [sys.executable, "-m", "salsa_node", *command, "--help"], capture_output=True, check=False
        )
        assert told.returncode == 0, line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[listner]\n", ["listner", "did you mean 'listener'"]),
        ("[pipeline]\nname = 'salsa3'\n", ["salsa3", "demo"]),
        ("[pipeline]\nmodels_dir = 'MODELS'\n", ["lacks", "plans.json", "checkpoint_final.pth"]),
        ("[node]\ndata_dir = 'FILE/data'\n", ["node.data_dir", "is not a folder"]),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_check_and_by_serve(cli, tmp_path, text, words):
    (tmp_path / "models" / "demo").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    text = text.replace("MODELS", str(tmp_path / "models")).replace("FILE", str(tmp_path / "file"))
    if "data_dir" not in text:
        text += f'[node]\ndata_dir = "{tmp_path / "data"}"\n'
    config = tmp_path / "wrong.toml"
    config.write_text(text)
    for command in (("config", "check"), ("serve",)):
        told = cli(*command, config=config)
        assert told.returncode == 3, told
        for word in words:
            assert word in told.stdout + told.stderr
        assert "Traceback" not in told.stderr


def test_a_good_config_says_so(cli):
    told = cli("config", "check", "--json")
    assert told.returncode == 0
    assert all(check["ok"] for check in json.loads(told.stdout))
    told = cli("config", "check")
    assert "ok    node.data_dir" in told.stdout


def test_serve_with_a_port_in_use_says_which_key_to_change(cli, tmp_path, free_port):
    ae = AE("OTHER")
    ae.add_supported_context("1.2.840.10008.1.1")
    server = ae.start_server(("127.0.0.1", free_port), block=False)
    try:
        config = tmp_path / "port.toml"
        config.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n[listener]\nport = {free_port}\n')
        told = cli("serve", config=config)
        assert told.returncode == 3
        assert str(free_port) in told.stderr
        assert "listener.port" in told.stderr
    finally:
        server.shutdown()


def test_a_store_that_is_not_there_yet_says_what_to_do(cli):
    for command in (("studies",), ("show", "1.2"), ("rerun", "1.2"), ("resend", "1.2")):
        told = cli(*command)
        assert told.returncode == 5, told
        assert "start the node" in told.stderr


def test_an_unknown_study_has_its_own_exit_code(cli, tmp_path):

    (tmp_path / "data").mkdir()
    Store.open(StoreSettings(f"sqlite:///{tmp_path / 'data' / 'salsa_node.sqlite'}"), create=True).close()
    for command in ("show", "rerun", "resend"):
        assert cli(command, "1.2.3").returncode == 4
    told = cli("studies")
    assert (told.returncode, told.stdout.strip()) == (0, "no study has arrived yet")
    assert json.loads(cli("studies", "--json").stdout) == []


@pytest.mark.parametrize(("number", "told"), [(286, ["image", "286"]), (0, ["image", "0"]), (None, ["slice", "5"])])
def test_a_table_of_lesions_names_the_image_as_the_pacs_does(capsys, number, told):
    console.put_lesions([{"lesion": 1, "slice_index": 4, "image_number": number}])
    heading, _, row = (line.split() for line in capsys.readouterr().out.splitlines() if line.strip())
    assert [heading[-1], row[-1]] == told


def test_echo(cli, tmp_path, free_port):
    config = tmp_path / "echo.toml"
    config.write_text(
        f'[[destination]]\nname = "pacs"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = {free_port}\n'
        "[delivery]\ntimeout_s = 5\n"
    )
    told = cli("echo", "pacs", config=config)
    assert told.returncode == 6
    assert "nobody listens" in told.stderr
    told = cli("echo", "pax", config=config)
    assert told.returncode == 3
    assert "there are: pacs" in told.stderr
    ae = AE("PACS")
    ae.add_supported_context("1.2.840.10008.1.1")
    server = ae.start_server(("127.0.0.1", free_port), block=False)
    try:
        assert json.loads(cli("echo", "pacs", "--json", config=config).stdout)["answer"] == "0x0000"
    finally:
        server.shutdown()


def test_run_on_a_dicom_folder_and_a_nifti_gives_the_same_findings(cli, study, tmp_path):
    from salsa_node.series import inspect, read_volume

    told = cli("run", study.axial[0].parent.parent, "--masks", study.truth_labels, "--output", tmp_path / "a", "--json")
    assert told.returncode == 0, told.stderr
    (result,) = json.loads(told.stdout)
    assert result["analysed"]
    assert len(result["lesions"]) >= 2
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "seg.dcm", "sr.dcm", "lesion_seg_1.dcm", "viewer_sr.dcm", "pdf.dcm", "ko.dcm", "labels.nii.gz",
        *(f"sc_{n}.dcm" for n in range(1, len({lesion["slice_index"] for lesion in result["lesions"]}) + 2)),
        "findings.csv", "findings.json", "overlay.png",
    }  # fmt: skip
    truth, made = read_labels(study.truth_labels), read_labels(tmp_path / "a" / "labels.nii.gz")
    assert made.grid.matches(truth.grid)
    assert ((made.labels >= 2) == (truth.labels >= 2)).all()
    assert ((made.labels == 1) == (truth.labels == 1)).all()
    rows = (tmp_path / "a" / "findings.csv").read_text().splitlines()
    assert len(rows) == 1 + len(result["lesions"])

    import nibabel as nib
    import numpy as np

    ct = read_volume(inspect(study.axial))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ct.grid.affine_lps_mm[:, [2, 1, 0, 3]]
    nib.save(nib.Nifti1Image(ct.voxels_hu.transpose(2, 1, 0), affine), tmp_path / "scan.v1.nii.gz")
    assert isinstance(truth, LabelVolume)
    told = cli("run", tmp_path / "scan.v1.nii.gz", "--masks", study.truth_labels, "--output", tmp_path / "b", "--json")
    assert told.returncode == 0, told.stderr
    (again,) = json.loads(told.stdout)
    numbers = [[row[key] for key in ("volume_ml", "long_axis_mm", "mean_hu")] for row in result["lesions"]]
    assert [[row[key] for key in ("volume_ml", "long_axis_mm", "mean_hu")] for row in again["lesions"]] == numbers
    seg = pydicom.dcmread(tmp_path / "b" / "seg.dcm", stop_before_pixels=True)
    ct_uids = {pydicom.dcmread(p, stop_before_pixels=True).SOPInstanceUID for p in (tmp_path / "b" / "ct").iterdir()}
    referenced = {item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referenced <= ct_uids


def test_run_by_the_other_rule(cli, study, tmp_path):
    told = cli(
        "run", study.axial[0].parent, "--masks", study.truth_labels, "--rule", "volume", "--output", tmp_path / "a"
    )
    assert told.returncode == 0, told.stderr
    assert json.loads((tmp_path / "a" / "findings.json").read_text())["criteria"]["rule"] == "volume"
    told = cli("run", study.axial[0].parent, "--rule", "size", "--output", tmp_path / "b")
    assert told.returncode == 3
    assert "diameter or volume" in told.stderr


def test_run_on_a_result_that_must_not_leave_says_so_and_fails(cli, study, tmp_path):
    labels = read_labels(study.truth_labels)
    write_labels(LabelVolume(labels.labels[:, :, ::-1].copy(), labels.grid), tmp_path / "mirrored.nii.gz")
    told = cli("run", study.axial[0].parent, "--masks", tmp_path / "mirrored.nii.gz", "--output", tmp_path / "a")
    assert told.returncode == 1, told.stderr
    assert "BLOCKED, do not hand this on: " in told.stdout


def test_run_tells_each_bad_path_and_goes_on(cli, study, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no image")
    bad = [tmp_path / "empty", tmp_path / "text.txt", tmp_path / "absent"]
    told = cli(
        "run", *bad, study.axial[0].parent, "--masks", study.truth_labels, "--output", tmp_path / "out", "--json"
    )
    assert told.returncode == 1
    results = json.loads(told.stdout)
    assert [r["analysed"] for r in results] == [False, False, False, True]
    assert ["no DICOM file" in results[0]["told"], "expected a DICOM folder" in results[1]["told"]] == [True, True]
    assert "no such file" in results[2]["told"]


def test_run_on_a_series_with_a_gap_writes_the_report_that_says_so(cli, study, tmp_path):
    holed = tmp_path / "holed"
    holed.mkdir()
    for n, path in enumerate(study.axial):
        if n != 9:
            (holed / path.name).write_bytes(path.read_bytes())
    told = cli("run", holed, "--masks", study.truth_labels, "--output", tmp_path / "out")
    assert told.returncode == 1
    assert "gap of 16.0 mm" in told.stdout
    assert b"gap of 16.0 mm" in (tmp_path / "out" / "sr.dcm").read_bytes()
    assert not (tmp_path / "out" / "seg.dcm").exists()


def test_a_resend_says_whose_result_it_sends(cli, tmp_path):
    from datetime import UTC, datetime

    from test_store import STUDY, arrived, produced, queued

    (tmp_path / "data").mkdir()
    now = datetime.now(UTC)
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'data' / 'salsa_node.sqlite'}"), create=True) as store:
        arrived(store, now=now)
        queued(store, now=now)
        produced(store, now=now)
        assert cli("resend", STUDY).stdout == "2 deliveries of run 1 are due again; a running node sends them\n"
        queued(store, "d2", now=now)
        told = cli("resend", STUDY)
        assert told.returncode == 0
        assert told.stdout.endswith("its result is the current one: run 2 after it is QUEUED\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--pipeline", "nosuch"), ["nosuch", "demo, salsa, given_masks"]),
        (("--pipeline", "given_masks"), ["--masks FILE"]),
        (("--lesion-label", "1"), ["--masks FILE"]),
        (("--masks", "MASKS", "--pipeline", "demo"), ["--masks goes with"]),
        (("--masks", "ABSENT"), ["cannot be read"]),
        (("--masks", "MASKS"), ["cannot be read as NIfTI"]),
        (("--masks", "TEXT"), ["neither NIfTI", "nor a DICOM Segmentation"]),
    ],
)
def test_a_rerun_that_cannot_work_queues_nothing_and_cancels_nothing(cli, tmp_path, options, words):
    from datetime import UTC, datetime

    from test_store import STUDY, an_instance

    from salsa_node.store import RunState

    (tmp_path / "data").mkdir()
    (tmp_path / "masks.nii.gz").write_bytes(b"")
    (tmp_path / "text").write_text("no mask")
    now = datetime.now(UTC)
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'data' / 'salsa_node.sqlite'}"), create=True) as store:
        store.add_instance(an_instance(), now)
        store.queue_run(STUDY, "demo", "digest", now)
        told = cli(
            "rerun",
            STUDY,
            *({"MASKS": tmp_path / "masks.nii.gz", "TEXT": tmp_path / "text"}.get(o, o) for o in options),
        )
        assert told.returncode == 3, told
        for word in words:
            assert word in told.stderr
        assert [run.state for run in store.runs_of(STUDY)] == [RunState.QUEUED]
        told = cli("resend", STUDY)
        assert told.returncode == 4
        assert "no result to send" in told.stderr
        told = cli("resend", STUDY, "--to", "nowhere")
        assert told.returncode == 3
        assert "nowhere" in told.stderr


def test_a_mask_s_labels_can_be_named(cli, study, tmp_path):
    import numpy as np

    truth = read_labels(study.truth_labels)
    binary = tmp_path / "binary.nii.gz"
    write_labels(LabelVolume((truth.labels >= 2).astype(np.uint8), truth.grid), binary)
    folder = study.axial[0].parent
    told = cli("run", folder, "--masks", binary, "--output", tmp_path / "a", "--json")
    assert told.returncode == 1
    assert "--lesion-label" in json.loads(told.stdout)[0]["told"]
    told = cli("run", folder, "--masks", binary, "--lesion-label", 1, "--output", tmp_path / "a", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)[0]["lesions"]


def test_run_names_the_output_that_cannot_be_written(cli, study, tmp_path):
    (tmp_path / "file").write_text("")
    told = cli("run", study.axial[0].parent, "--masks", study.truth_labels, "--output", tmp_path / "file" / "out")
    assert told.returncode == 1
    assert "--output" in told.stdout
    assert told.stdout.count("cannot be written") == 1


def test_demo_into_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "salsa_node", "demo", "--output", str(tmp_path / "file" / "out")]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 3
    assert told.stderr.startswith("salsa-node: --output:")
    assert "Traceback" not in told.stderr
