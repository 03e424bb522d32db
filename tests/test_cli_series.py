"""`select` and `show` print the table of scores from a store that holds a study of two series."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from typer.testing import CliRunner

from salsa_node import assembly, nifti, phantom
from salsa_node.audit import Trail
from salsa_node.cli import app
from salsa_node.errors import SalsaNodeError
from salsa_node.series import inspect, read_volume
from salsa_node.settings import PipelineChoice
from salsa_node.store import NewInstance, Store, StoreSettings

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> phantom.Study:
    recipe = phantom.Recipe(3, shape=(14, 32, 32), spacing_mm=(15.0, 10.0, 10.0))
    return phantom.write_study(phantom.make(recipe), tmp_path_factory.mktemp("study"))


@pytest.fixture
def config(tmp_path: Path, study: phantom.Study) -> Path:
    """The config of a node whose store holds the study and was assembled once by the default rules."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    file = tmp_path / "site.toml"
    file.write_text(f'[node]\ndata_dir = "{data_dir}"\n[pipeline]\nname = "demo"\n')
    with Store.open(StoreSettings(f"sqlite:///{data_dir / 'salsa_node.sqlite'}"), create=True) as record:
        for number, said in ((2, "Abdomen portal venous"), (3, "Abdomen arterial")):
            for source in study.axial:
                _keep(record, data_dir, source, number, said)
        for source in study.localizer:
            _keep(record, data_dir, source, 1, "Scout")
        later = T0 + timedelta(minutes=5)
        while assembly.step(record, data_dir, PipelineChoice("demo"), later) is not None:
            pass
    return file


def _keep(record: Store, data_dir: Path, source: Path, number: int, said: str) -> None:
    ds = pydicom.dcmread(source)
    ds.SeriesInstanceUID, ds.SeriesNumber, ds.SeriesDescription = f"2.25.5.{number}", number, said
    ds.SOPInstanceUID = f"{ds.SOPInstanceUID[:60]}.{number}"
    path = f"{number}-{source.parent.name}-{source.name}"
    ds.save_as(data_dir / path)
    new = NewInstance(
        ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.SOPClassUID,
        ds.file_meta.TransferSyntaxUID, path, "0" * 64, 1, "CT1", ds.Modality, number,
    )  # fmt: skip
    record.add_instance(new, T0)


def _called(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_select_says_why_one_series_and_not_the_other(config: Path, study: phantom.Study) -> None:
    told = json.loads(_called("select", study.study_uid, "--config", config, "--dry-run", "--json"))
    assert told["run"] is None
    assert [(line["rank"], line["series_number"]) for line in told["scores"]] == [(1, 2), (2, 3), (None, 1)]
    first, second, scout = told["scores"]
    assert first["reason"].startswith("chosen: ")
    assert "arterial +10, not portal venous +40" in second["reason"]
    assert (scout["points"], scout["reasons"]) == (None, [])
    assert sum(reason["points"] for reason in first["reasons"]) == pytest.approx(first["points"])
    table = _called("select", study.study_uid, "--config", config, "--dry-run")
    for words in ("Scores", "+40", "series 1: Image Type LOCALIZER", "series 3: passed over for series 2"):
        assert words in table


def test_select_queues_a_run_only_where_the_rules_lead_to_another_series(config: Path, study: phantom.Study) -> None:
    url = StoreSettings(f"sqlite:///{config.parent / 'data' / 'salsa_node.sqlite'}")
    same = json.loads(_called("select", study.study_uid, "--config", config, "--json"))
    with Store.open(url) as record:
        (run,) = record.runs_of(study.study_uid)
        assert (run.id, run.series_uid) == (same["run"], "2.25.5.2")
    config.write_text(config.read_text() + "[selection]\narterial = 90\n")
    assert "is QUEUED" in _called("select", study.study_uid, "--config", config)
    with Store.open(url) as record:
        assert [run.series_uid for run in record.runs_of(study.study_uid)] == ["2.25.5.2", "2.25.5.3"]
        looks = record.looks_of(study.study_uid)
    assert [look.run_id for look in looks] == [1, 1, 2]
    assert [entry.action for entry in Trail(config.parent / "data").entries()] == ["command.select"] * 2
    assert [look.scores[0]["series_number"] for look in looks] == [2, 2, 3]


def test_where_every_series_is_ruled_out_words_stand_in_place_of_an_empty_table(
    config: Path, study: phantom.Study
) -> None:
    config.write_text(config.read_text() + '[selection]\nnever = ["ORIGINAL", "LOCALIZER"]\n')
    table = _called("select", study.study_uid, "--config", config, "--dry-run")
    assert "Scores: none; every series is ruled out" in table
    assert "rank" not in table
    for number in (1, 2, 3):
        assert f"series {number}: Image Type" in table


def test_show_prints_the_scores_of_the_latest_look(config: Path, study: phantom.Study) -> None:
    page = json.loads(_called("show", study.study_uid, "--config", config, "--json"))
    assert page["looks"][0]["scores"][0]["series_number"] == 2
    shown = _called("show", study.study_uid, "--config", config)
    assert "series 3: passed over for series 2" in shown


def test_export_writes_the_analysed_series_voxel_for_voxel_and_nobodys_name(
    config: Path, study: phantom.Study, tmp_path: Path
) -> None:
    file = tmp_path / "out" / "ct.nii.gz"
    told = json.loads(_called("export", study.study_uid, "--config", config, "--output", file, "--json"))
    assert (told["series_uid"], told["resampled"]) == ("2.25.5.2", False)
    (entry,) = Trail(tmp_path / "data").entries()
    assert (entry.action, entry.study_uid, entry.detail) == ("access.export", study.study_uid, "series 2.25.5.2")
    expected = read_volume(inspect(sorted((tmp_path / "data").glob("2-*"))))
    written = nifti.read_ct(file)
    assert written.grid.matches(expected.grid)
    assert np.array_equal(written.voxels_hu, expected.voxels_hu)
    image = SimpleITK.ReadImage(str(file))  # another reader finds the same number at the same place
    at = image.TransformPhysicalPointToIndex(expected.grid.to_lps_mm((9, 20, 12)))
    assert image.GetPixel(*at) == expected.voxels_hu[9, 20, 12]
    name = str(pydicom.dcmread(study.axial[0]).PatientName)
    assert name
    assert name.encode() not in gzip.decompress(file.read_bytes())


def test_export_takes_a_series_by_number_and_says_what_is_in_the_way(
    config: Path, study: phantom.Study, tmp_path: Path
) -> None:
    file = tmp_path / "three.nii"
    assert "three.nii: a grid of 14 x 32 x 32" in _called(
        "export", study.study_uid, "--config", config, "--series", 3, "--output", file
    ).replace("\n", "")
    for wrong, words in (
        (["--series", 3, "--output", file], "is there already; --force writes over it"),
        (["--series", 4], "0 series are called '4'; the study holds"),
        (["--series", 1, "--output", tmp_path / "scout.nii"], "image(s)"),
        (["--output", tmp_path / "ct.mha"], "ends in .nii or .nii.gz"),
    ):
        result = CliRunner().invoke(app, ["export", study.study_uid, "--config", str(config), *map(str, wrong)])
        assert isinstance(result.exception, SalsaNodeError)
        assert words in str(result.exception)
    _called("export", study.study_uid, "--config", config, "--series", 3, "--output", file, "--force")


def test_export_resamples_tilted_slices_where_the_rules_say_so(
    config: Path, study: phantom.Study, tmp_path: Path
) -> None:
    for n, path in enumerate(sorted((tmp_path / "data").glob("2-*"))):
        ds = pydicom.dcmread(path)
        x, y, z = (float(mm) for mm in ds.ImagePositionPatient)
        ds.ImagePositionPatient = [x, y + n * 5, z]
        ds.save_as(path)
    file = tmp_path / "ct.nii"
    result = CliRunner().invoke(app, ["export", study.study_uid, "--config", str(config), "--output", str(file)])
    assert "gantry tilt" in str(result.exception)
    config.write_text(config.read_text() + '[series]\ntilt = "resample"\n')
    told = json.loads(_called("export", study.study_uid, "--config", config, "--output", file, "--json"))
    assert told["resampled"]
    assert nifti.read_ct(file).grid.spacing_mm == pytest.approx(told["spacing_mm"])


def test_export_takes_one_stack_of_a_series_that_holds_several(
    config: Path, study: phantom.Study, tmp_path: Path
) -> None:
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'data' / 'salsa_node.sqlite'}")) as record:
        for round_ in (1, 2):
            for n, source in enumerate(study.axial[: 8 + round_]):
                ds = pydicom.dcmread(source)
                ds.SeriesInstanceUID, ds.SeriesNumber, ds.AcquisitionNumber = "2.25.5.6", 6, round_
                ds.InstanceNumber = 100 * round_ + n
                ds.SOPInstanceUID = f"{ds.SOPInstanceUID[:58]}.6{round_}"
                name = f"6-{round_}-{n}.dcm"
                ds.save_as(tmp_path / "data" / name)
                new = NewInstance(
                    ds.SOPInstanceUID, "2.25.5.6", ds.StudyInstanceUID, ds.SOPClassUID,
                    ds.file_meta.TransferSyntaxUID, name, "0" * 64, 1, "CT1", "CT", 6,
                )  # fmt: skip
                record.add_instance(new, T0)
    wanted = ["export", study.study_uid, "--config", config, "--series", 6, "--output", tmp_path / "ct.nii"]
    for arguments in (wanted, [*wanted, "--stack", 3]):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert str(result.exception) == (
            "the series holds several stacks of images (1: 9 images, 2: 10 images); name one with --stack"
        )
    assert json.loads(_called(*wanted, "--stack", 2, "--json"))["shape"] == [10, 32, 32]
