"""A batch: the right labels on the right grid, one bad case beside good ones, and nothing done twice."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from itertools import permutations
from pathlib import Path
from typing import IO

import nibabel as nib
import numpy as np
import pytest

from salsa_node import batch, cases, nifti, phantom, pipelines
from salsa_node.batch import Result, Wanted
from salsa_node.criteria import Criteria, Rule
from salsa_node.errors import ConfigError, OrganNotFound
from salsa_node.limits import Limits
from salsa_node.pipelines import DEMO_NOTICE, Masks, Observer, Provenance, unobserved
from salsa_node.volume import CtVolume, LabelVolume

LIVER_HU, LESION_HU = 100, 40
RAS = np.diag([1.0, 1.0, 2.0, 1.0])
RAS[:3, 3] = (-20.0, 30.0, 400.0)


class ByDensity:
    """A pipeline that calls a density a liver and another one a lesion, and counts how often it was asked."""

    def __init__(self, notice: str = "") -> None:
        self.provenance = Provenance("by-density", "1", {"weights": "0" * 64}, notice=notice)
        self.asked = 0

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
        self.asked += 1
        lesions = ct.voxels_hu == LESION_HU
        liver = (ct.voxels_hu == LIVER_HU) | lesions
        if not liver.any():
            raise OrganNotFound("found 0 ml of liver")
        observer("liver", LabelVolume(liver.astype(np.uint8), ct.grid))
        affine = ct.grid.affine_lps_mm.copy()
        affine[:3, 3] = ct.grid.to_lps_mm((2, 3, 4))
        crop = replace(ct.grid, shape=(4, 5, 6), affine_lps_mm=affine)
        observer("cropped/scan_0000", CtVolume(ct.voxels_hu[2:6, 3:8, 4:10], crop))
        return Masks(LabelVolume(liver.astype(np.uint8), ct.grid), LabelVolume(lesions.astype(np.uint8), ct.grid),
                     self.provenance)  # fmt: skip

    def unload(self) -> None:
        return


def voxels() -> np.ndarray:
    """(x, y, z) at 1 x 1 x 2 mm: a liver with a lesion of 12 x 12 x 12 mm and, apart, one of 3 x 3 x 4 mm."""
    hu = np.full((48, 40, 20), -1000, np.int16)
    hu[4:44, 4:36, 2:18] = LIVER_HU
    hu[8:20, 8:20, 4:10] = LESION_HU
    hu[30:33, 25:28, 12:14] = LESION_HU
    return hu


def save(path: Path, hu: np.ndarray | None = None, affine: np.ndarray = RAS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.nifti1.Nifti1Image(voxels() if hu is None else hu, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nib.save(image, path)
    return path


def run(
    *paths: object,
    wanted: Wanted = Wanted(),  # noqa: B008 - frozen
    output: Path | None = None,
    pipeline: ByDensity | None = None,
    rule: Rule = Rule.DIAMETER,
) -> list[Result]:
    placed = cases.placed(cases.find(map(str, paths)), output)
    return list(batch.run(placed, pipeline or ByDensity(), Criteria(rule), Limits(), wanted))


def labels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_measurable_is_one_and_the_rest_is_two_on_the_source_grid(tmp_path: Path) -> None:
    source = save(tmp_path / "scan.nii.gz")
    (result,) = run(source)
    assert (result.state, result.told) == ("done", "2 candidate lesions")
    written = nib.load(tmp_path / "scan_SALSA.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(written.affine, nib.load(source).affine)
    expected = np.zeros((48, 40, 20), np.uint8)
    expected[8:20, 8:20, 4:10] = 1
    expected[30:33, 25:28, 12:14] = 2
    assert np.array_equal(np.asarray(written.dataobj), expected)
    record = json.loads((tmp_path / "scan_SALSA.json").read_text())
    assert record["labels"] == {"1": "measurable", "2": "non-measurable"}
    assert [lesion["voxels"] for lesion in record["lesions"]] == [12 * 12 * 6, 18]
    assert record["pipeline"]["weights_sha256"] == {"weights": "0" * 64}
    assert record["caveat"].startswith("AI candidate findings")


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_whatever_the_axes_the_map_lies_voxel_on_voxel(tmp_path: Path, order: tuple[int, int, int]) -> None:
    turned = np.deg2rad(15)
    oblique = np.eye(4)
    oblique[:2, :2] = [[np.cos(turned), -np.sin(turned)], [np.sin(turned), np.cos(turned)]]
    hu = voxels().transpose(order)
    source = save(tmp_path / "scan.nii", hu, (oblique @ RAS)[:, [*order, 3]])
    (result,) = run(source)
    assert result.state == "done"
    written = nib.load(result.place)
    assert np.array_equal(np.asarray(written.dataobj) > 0, hu == LESION_HU)
    assert np.allclose(written.affine, nib.load(source).affine)


@pytest.mark.parametrize(
    ("wanted", "values"),
    [
        (Wanted(recist=False), {0, 1}),
        (Wanted(instances=True), {0, 1, 2}),
        (Wanted(instances=True, recist=False), {0, 1, 2}),
    ],
)
def test_binary_and_instances(tmp_path: Path, wanted: Wanted, values: set[int]) -> None:
    run(save(tmp_path / "scan.nii.gz"), wanted=wanted)
    found = labels(tmp_path / "scan_SALSA.nii.gz")
    assert set(np.unique(found)) == values
    assert found.dtype == np.uint8
    assert np.array_equal(found > 0, voxels() == LESION_HU)


def test_more_than_255_lesions_are_numbered_beyond_255(tmp_path: Path) -> None:
    hu = voxels()
    hu[8:20, 8:20, 4:10] = LIVER_HU
    hu[5:43:2, 5:35:2, 4] = LESION_HU
    (result,) = run(save(tmp_path / "scan.nii.gz", hu), wanted=Wanted(instances=True))
    found = labels(result.place)
    assert found.dtype == np.uint16
    assert len(np.unique(found)) == 19 * 15 + 1 + 1
    (result,) = run(tmp_path / "scan.nii.gz")
    assert labels(result.place).dtype == np.uint8


def test_the_rule_decides_what_is_measurable(tmp_path: Path) -> None:
    """A lesion of 14 x 8 x 4 mm, 448 mm3: long enough for RECIST's 10 mm, too small for SALSA's 523.6 mm3."""
    hu = np.where(voxels() == LESION_HU, LIVER_HU, voxels()).astype(np.int16)
    hu[8:22, 8:16, 4:6] = LESION_HU
    source = save(tmp_path / "scan.nii.gz", hu)
    assert set(np.unique(labels(run(source, rule=Rule.DIAMETER)[0].place))) == {0, 1}
    assert set(np.unique(labels(run(source, rule=Rule.VOLUME)[0].place))) == {0, 2}


def test_without_a_lesion_the_map_is_empty_and_says_nothing_more(tmp_path: Path) -> None:
    hu = np.where(voxels() == LESION_HU, LIVER_HU, voxels()).astype(np.int16)
    (result,) = run(save(tmp_path / "scan.nii.gz", hu))
    assert (result.state, result.told) == ("done", "the algorithm found no candidate lesion")
    assert not labels(result.place).any()


def four_dimensional() -> np.ndarray:
    return np.stack([voxels(), voxels()], axis=-1)


def with_nan() -> np.ndarray:
    hu = voxels().astype(np.float32)
    hu[0, 0, 0] = np.nan
    return hu


@pytest.mark.parametrize(
    ("hu", "words"),
    [
        (with_nan, "1 of 38400 voxels are not finite"),
        (four_dimensional, "expected three dimensions"),
        (lambda: (voxels() + 1000).astype(np.uint16), "no Hounsfield units"),
        (lambda: np.full((48, 40, 20), -1000, np.int16), "found 0 ml of liver"),
        (lambda: voxels().astype(np.complex64), "one real number each"),
    ],
)
def test_one_bad_case_is_told_and_the_rest_go_on(tmp_path: Path, hu: Callable[[], np.ndarray], words: str) -> None:
    save(tmp_path / "a.nii.gz")
    save(tmp_path / "b.nii.gz", hu())
    save(tmp_path / "c.nii.gz", voxels().astype(np.float64))
    (tmp_path / "d.nii.gz").write_bytes(b"\x1f\x8b broken")
    results = run(tmp_path)
    assert [result.state for result in results] == ["done", "failed", "done", "failed"]
    assert words in results[1].told
    assert "cannot be read as NIfTI" in results[3].told
    assert sorted(path.name for path in tmp_path.glob("*_SALSA.nii.gz")) == ["a_SALSA.nii.gz", "c_SALSA.nii.gz"]
    assert not list(tmp_path.glob(".*"))  # nothing unfinished stays


def test_an_error_that_nobody_foresaw_is_told_without_its_words(tmp_path: Path) -> None:
    class Odd(ByDensity):
        def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
            if ct.grid.shape[0] == 20:
                raise ZeroDivisionError("Doe^Jane")
            return super().segment(ct, observer)

    save(tmp_path / "a.nii.gz")
    save(tmp_path / "b.nii.gz", voxels()[:, :, :19])
    results = run(tmp_path, pipeline=Odd())
    assert [result.state for result in results] == ["failed", "done"]
    assert "ZeroDivisionError" in results[0].told
    assert "Doe" not in results[0].told


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz")
    pipeline = ByDensity()
    (first,) = run(tmp_path, pipeline=pipeline)
    (second,) = run(tmp_path, pipeline=pipeline)
    assert (pipeline.asked, second.state) == (1, "there")
    assert second.lesions == first.lesions
    (third,) = run(tmp_path, pipeline=pipeline, wanted=Wanted(again=True))
    assert (pipeline.asked, third.state) == (2, "done")


@pytest.mark.parametrize("change", ["scan", "rule", "wanted", "pipeline"])
def test_it_is_done_again_when_what_decides_it_changed(tmp_path: Path, change: str) -> None:
    source = save(tmp_path / "a.nii.gz")
    run(source)
    pipeline = ByDensity()
    if change == "scan":
        hu = voxels()
        hu[0, 0, 0] = -999
        save(source, hu)
    if change == "pipeline":
        pipeline.provenance = replace(pipeline.provenance, weights_sha256={"weights": "1" * 64})
    rule = Rule.VOLUME if change == "rule" else Rule.DIAMETER
    (result,) = run(source, pipeline=pipeline, rule=rule, wanted=Wanted(recist=change != "wanted"))
    assert (pipeline.asked, result.state) == (1, "done")


def test_a_batch_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii.gz")
    (result,) = run(source)
    (tmp_path / "a_SALSA.json").unlink()  # as if the power went between the map and its JSON
    (again,) = run(source)
    assert again.state == "done"
    result.place.unlink()
    (again,) = run(source)
    assert again.state == "done"


def test_a_second_run_with_other_wishes_that_was_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a.nii.gz")
    run(source)

    def cut_off(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(batch.durable, "write", cut_off)  # the map is in its place, the JSON is not
        with pytest.raises(KeyboardInterrupt):
            run(source, wanted=Wanted(instances=True))
    (result,) = run(source, wanted=Wanted(instances=True))
    assert result.state == "done"
    assert set(np.unique(labels(result.place))) == {0, 1, 2}


@pytest.mark.parametrize(
    ("recipe", "state"),
    [
        (phantom.Recipe(43, (3, 40, 40), (5.0, 7.0, 7.0)), "done"),
        (phantom.Recipe(43, (16, 32, 32), (10.0, 10.0, 10.0)), "done"),
        (phantom.Recipe(43, (12, 24, 24), (0.3, 0.3, 0.3), center_lps_mm=(-70.0, 8.0, -4.0)), "failed"),
        (phantom.Recipe(43, (12, 24, 24), (5.0, 5.0, 5.0), center_lps_mm=(-90.0, 0.0, 40.0)), "done"),
    ],
    ids=["three slices", "10 mm", "0.3 mm", "liver cut off"],
)
def test_an_odd_scan_gets_labels_or_a_worded_refusal(tmp_path: Path, recipe: phantom.Recipe, state: str) -> None:
    made = phantom.make(recipe)
    nifti.write_ct(made.ct, tmp_path / "scan.nii.gz")
    pipeline = pipelines.load("demo", pipelines.PipelineSettings("cpu"))
    placed = cases.placed(cases.find([str(tmp_path / "scan.nii.gz")]), None)
    (result,) = batch.run(placed, pipeline, Criteria(), Limits(), Wanted())
    assert result.state == state, result.told
    if state == "failed":
        assert "ml of liver" in result.told
    else:
        assert nifti.read_labels(result.place).grid.shape == recipe.shape
        flags = result.record["flags"]
        assert isinstance(flags, list)
        assert flags  # each of them is odd, and says so


def test_what_a_killed_batch_left_is_swept(tmp_path: Path) -> None:
    source = save(tmp_path / "[a].nii.gz")
    left = [tmp_path / f".{name}.[a]_SALSA" for name in ("old", "new")]
    for folder, age_s in zip(left, (90_000, 60), strict=True):
        save(folder / "[a]_SALSA.nii.gz")
        os.utime(folder, (time.time() - age_s,) * 2)
    run(source)
    assert [folder.exists() for folder in left] == [False, True]
    assert [case.path for case in cases.find([str(tmp_path)])] == [source]


def test_a_map_that_somebody_changed_or_brought_is_not_overwritten(tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii.gz")
    brought = save(tmp_path / "a_SALSA.nii.gz", np.zeros((2, 2, 2), np.uint8))
    content = brought.read_bytes()
    (result,) = run(source)
    assert result.state == "failed"
    assert "move it away, or add --again" in result.told
    assert brought.read_bytes() == content
    (result,) = run(source, wanted=Wanted(again=True))
    assert result.state == "done"
    brought.write_bytes(content)
    assert run(source)[0].state == "failed"


def test_a_scan_that_cannot_be_read_is_not_called_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(batch, "sha256_of", refused)
    (result,) = run(save(tmp_path / "a.nii.gz"))
    assert (result.state, result.told) == ("failed", "the scan cannot be read (Permission denied)")


def test_the_record_says_that_the_contrast_phase_is_that_of_the_headers(tmp_path: Path) -> None:
    """A pipeline's own estimate is a flag, and may be another one."""
    (result,) = run(save(tmp_path / "a.nii.gz"))
    assert result.record["contrast_phase_in_headers"] == "unknown"
    assert "contrast_phase" not in result.record


def test_a_label_map_beside_scans_is_told_and_is_no_failure(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz")
    save(tmp_path / "a_GT.nii.gz", np.zeros((4, 4, 4), np.int16))
    pipeline = ByDensity()
    results = list(batch.run(cases.placed(cases.find([str(tmp_path)]), None), pipeline, Criteria(), Limits(), Wanted()))
    assert [(result.state, result.as_json()["record"] is None) for result in results] == [
        ("done", False),
        ("left out", True),
    ]
    assert pipeline.asked == 1
    batch.write_tables(results, tmp_path / "out")
    with (tmp_path / "out" / "salsa_scans.csv").open(newline="", encoding="utf-8") as file:
        assert [(row["state"], row["result"] != "") for row in csv.DictReader(file)] == [
            ("done", True),
            ("left out", False),
        ]


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii.gz")
    (tmp_path / "file").write_text("")
    pipeline = ByDensity()
    (result,) = run(source, output=tmp_path / "file", pipeline=pipeline)
    assert (result.state, pipeline.asked) == ("failed", 0)
    assert "see --output" in result.told


def test_a_read_only_folder_of_scans_works_with_an_output_folder(tmp_path: Path) -> None:
    source = save(tmp_path / "read only" / "a.b.nii")
    before = sorted((tmp_path / "read only").iterdir())
    source.parent.chmod(0o500)
    try:
        (result,) = run(source, output=tmp_path / "out")
    finally:
        source.parent.chmod(0o700)
    assert result.state == "done"
    assert result.place == tmp_path / "out" / "a.b_SALSA.nii.gz"
    assert sorted((tmp_path / "read only").iterdir()) == before


def test_intermediates_lie_where_they_lie_in_the_patient(tmp_path: Path) -> None:
    source = save(tmp_path / "scan.1.nii.gz")
    (tmp_path / "scan.1_SALSA").mkdir()
    (tmp_path / "scan.1_SALSA" / "mask_resampled.nii.gz").write_bytes(b"of an earlier run")
    (tmp_path / "scan.1_SALSA" / "notes.txt").write_text("mine")
    run(source, wanted=Wanted(keep_intermediates=True), pipeline=ByDensity(DEMO_NOTICE))
    folder = tmp_path / "scan.1_SALSA"
    marked = nifti.read_description(folder / "liver.nii.gz")
    assert marked == "salsa_node batch, liver; DEMO, NOT FOR CLINICAL USE"
    kept = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert kept == ["cropped/scan_0000.nii.gz", "liver.nii.gz", "notes.txt"]
    crop = nifti.read_ct(folder / "cropped" / "scan_0000.nii.gz")
    whole = nifti.read_ct(source)
    assert crop.grid.to_lps_mm((0, 0, 0)) == pytest.approx(whole.grid.to_lps_mm((2, 3, 4)))
    assert np.array_equal(crop.voxels_hu, whole.voxels_hu[2:6, 3:8, 4:10])
    liver = nifti.read_labels(folder / "liver.nii.gz")
    assert liver.grid.matches(whole.grid)
    assert [case.path for case in cases.find([str(tmp_path)])] == [source]  # they are no scans of the next batch


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_nothing_of_an_earlier_run_stays_beside_new_labels(tmp_path: Path) -> None:
    source = save(tmp_path / "scan.nii.gz")
    run(source, wanted=Wanted(keep_intermediates=True, overlay="png"))
    assert {"scan_SALSA.png", "scan_SALSA/liver.nii.gz", "scan_SALSA/cropped"} <= set(files_in(tmp_path))
    run(source, wanted=Wanted(overlay="gif"))
    assert files_in(tmp_path) == ["scan.nii.gz", "scan_SALSA.gif", "scan_SALSA.json", "scan_SALSA.nii.gz"]


def test_a_scan_that_fails_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    class Failing(ByDensity):
        def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
            super().segment(ct, observer)
            raise OrganNotFound("found 0 ml of liver")

    wishes = Wanted(keep_intermediates=True, overlay="png")
    source = save(tmp_path / "scan.nii.gz")
    run(source, wanted=wishes, pipeline=Failing())
    assert files_in(tmp_path) == ["scan.nii.gz"]
    run(source, wanted=wishes)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files_in(tmp_path)}
    (result,) = run(source, wanted=replace(wishes, again=True), pipeline=Failing())
    assert result.state == "failed"
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files_in(tmp_path)} == before


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_an_overlay_lies_beside_the_map(tmp_path: Path, kind: str) -> None:
    source = save(tmp_path / "scan.nii")
    content = source.read_bytes()
    run(source, wanted=Wanted(overlay=kind))
    assert (tmp_path / f"scan_SALSA.{kind}").stat().st_size > 1000
    assert source.read_bytes() == content


def test_an_overlay_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="--overlay: expected gif or png, found 'jpg'"):
        Wanted(overlay="jpg")


def test_the_header_says_what_the_values_mean_and_that_it_was_a_demo(tmp_path: Path) -> None:
    source = save(tmp_path / "scan.nii")
    (result,) = run(source)
    assert nifti.read_description(result.place) == "salsa_node batch, by-density: 1 measurable 2 not"
    (result,) = run(source, pipeline=ByDensity(DEMO_NOTICE), wanted=Wanted(instances=True))
    assert nifti.read_description(result.place).endswith("n lesion n; DEMO, NOT FOR CLINICAL USE")


def test_a_dicom_series_gets_its_map_beside_its_folder(tmp_path: Path) -> None:
    made = phantom.make(phantom.Recipe(3, shape=(10, 24, 24), spacing_mm=(8.0, 14.0, 14.0)))
    hu = np.where(made.liver.labels == 1, LIVER_HU, -500).astype(np.int16)
    hu[tuple(np.argwhere(made.liver.labels == 1)[0])] = LESION_HU
    phantom.write_study(replace(made, ct=replace(made.ct, voxels_hu=hu)), tmp_path / "study")
    (tmp_path / "study" / "truth.nii.gz").unlink()
    (result,) = run(tmp_path / "study")
    assert result.state == "done"
    found = nifti.read_labels(tmp_path / "study" / "axial_SALSA.nii.gz")
    assert found.grid.matches(made.ct.grid)
    assert np.array_equal(found.labels > 0, hu == LESION_HU)
    assert result.lesions[0]["slice_sop_uid"]


def test_tables_hold_every_lesion_and_every_scan(tmp_path: Path) -> None:
    save(tmp_path / "a, 1.nii.gz")
    save(tmp_path / "b.nii.gz", with_nan())
    results = run(tmp_path)
    paths = batch.write_tables(results, tmp_path / "tables")
    with paths[0].open(newline="") as file:
        lesions = list(csv.DictReader(file))
    assert [(Path(row["scan"]).name, row["lesion"], row["disease"]) for row in lesions] == [
        ("a, 1.nii.gz", "1", "measurable"),
        ("a, 1.nii.gz", "2", "non-measurable"),
    ]
    with paths[1].open(newline="") as file:
        scans = list(csv.DictReader(file))
    assert [(row["state"], row["lesions"], row["measurable"]) for row in scans] == [
        ("done", "2", "1"),
        ("failed", "", ""),
    ]
    assert float(scans[0]["lesions_ml"]) == pytest.approx((12 * 12 * 6 + 18) * 2 / 1000)
    everything = json.loads(paths[2].read_text())
    assert [entry["state"] for entry in everything] == ["done", "failed"]
    assert everything[0]["record"]["lesions"][0]["volume_ml"] == pytest.approx(1.728)
    with pytest.raises(ConfigError, match="see --output"):
        batch.write_tables(results, paths[0])


def test_a_batch_without_lesions_still_has_a_table(tmp_path: Path) -> None:
    paths = batch.write_tables([], tmp_path)
    assert [path.read_text().strip() for path in paths] == ["scan", "scan", "[]"]


class ByMask(ByDensity):
    """Answers with a mask that somebody else made."""

    def __init__(self, mask: Path) -> None:
        super().__init__()
        self._mask = mask

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
        found = nifti.read_labels(self._mask)
        return Masks(None, LabelVolume((found.labels > 0).astype(np.uint8), ct.grid), self.provenance)


def test_salsas_own_result_comes_out_of_salsas_own_mask(tmp_path: Path, testdata: Path) -> None:
    """Set 12: stored to the left, front and head; two lesions, both measurable; three in the truth: 1, 1, 2."""
    demo = testdata / "12_salsa_demo_scan1"
    theirs = nib.load(demo / "scan1_SALSA.nii.gz")
    source = save(tmp_path / "scan1.nii.gz", np.full(theirs.shape, -50, np.int16), theirs.affine)
    (result,) = run(source, pipeline=ByMask(demo / "scan1_SALSA.nii.gz"), rule=Rule.VOLUME)
    ours = nib.load(tmp_path / "scan1_SALSA.nii.gz")
    assert ours.get_data_dtype() == theirs.get_data_dtype() == np.uint8
    assert np.array_equal(ours.affine, theirs.affine)
    assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
    (result,) = run(source, pipeline=ByMask(demo / "scan1_GT.nii.gz"), rule=Rule.VOLUME, wanted=Wanted(again=True))
    assert [row["disease"] for row in result.lesions] == ["measurable", "measurable", "non-measurable"]
    written = labels(result.place)
    numbered = labels(demo / "scan1_GT.nii.gz") > 0
    assert np.array_equal(written > 0, numbered)
    assert (written == 2).sum() == result.lesions[2]["voxels"]


def test_tables_go_where_they_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "data" / "paths.csv"
    table.parent.mkdir()
    table.write_text("PATHS\n")
    assert batch.tables_folder(None, table) == table.parent
    assert batch.tables_folder(tmp_path / "new" / "folder", table) == tmp_path / "new" / "folder"
    assert (tmp_path / "new" / "folder").is_dir()
    os.mkfifo(tmp_path / "data" / "pipe")
    assert batch.tables_folder(None, tmp_path / "data" / "pipe") == Path()  # nothing lies beside a pipe
    locked = [table.parent]

    def probe(*, dir: Path) -> IO[bytes]:  # noqa: A002 - tempfile's own word
        if dir in locked:
            raise PermissionError(13, "Permission denied")
        return BytesIO()

    monkeypatch.setattr(batch.tempfile, "TemporaryFile", probe)
    assert batch.tables_folder(None, table) == Path()
    locked.append(Path())
    with pytest.raises(ConfigError, match=r"data and .* cannot be written, where the tables go; give --output"):
        batch.tables_folder(None, table)
