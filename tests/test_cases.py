"""What a researcher names becomes scans: each once, each with a place of its own, and never a result."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from salsa_node import cases, phantom
from salsa_node.errors import ConfigError, SeriesRejected


def scan(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.nifti1.Nifti1Image(np.full((4, 5, 6), -500, np.int16), np.eye(4))
    image.set_sform(np.eye(4), code=1)
    nib.save(image, path)
    return path


def found(*names: object) -> list[tuple[str, str]]:
    return [(case.path.name, case.stem) for case in cases.find(map(str, names))]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("scan.nii.gz", "scan"),
        ("scan.nii", "scan"),
        ("a.b.1.nii.gz", "a.b.1"),
        ("with spaces.nii.gz", "with spaces"),
        ("[1] (2) é.nii", "[1] (2) é"),
        ("UPPER.NII.GZ", "UPPER"),
        (".nii.nii", ".nii"),
    ],
)
def test_a_stem_is_the_name_without_its_suffix_alone(tmp_path: Path, name: str, stem: str) -> None:
    if name.isupper():
        scan(tmp_path / "x.nii.gz").rename(tmp_path / name)
    else:
        scan(tmp_path / name)
    (case,) = cases.find([str(tmp_path / name)])
    ((_, place),) = cases.placed([case], None)
    assert case.stem == stem
    assert case.refusal == ""
    assert place == tmp_path / f"{stem}_SALSA.nii.gz"


def test_a_folder_named_like_a_suffix_stays_what_it_is(tmp_path: Path) -> None:
    scan(tmp_path / "d.nii" / "a.nii")
    ((_, place),) = cases.placed(cases.find([str(tmp_path / "d.nii" / "a.nii")]), None)
    assert place == tmp_path / "d.nii" / "a_SALSA.nii.gz"


def test_relative_names_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan(tmp_path / "a.nii.gz")
    monkeypatch.chdir(tmp_path)
    ((case, place),) = cases.placed(cases.find(["a.nii.gz"]), None)
    assert place == Path("a_SALSA.nii.gz")
    assert cases.read(case).ct.grid.shape == (6, 5, 4)


def test_folders_and_patterns_give_each_scan_once_and_no_results(tmp_path: Path) -> None:
    for name in ("p1/a.nii.gz", "p2/b.nii", "p1/a_SALSA.nii.gz", "p1/a_SALSA/liver.nii.gz", "p1/.x_SALSA.nii.gz"):
        scan(tmp_path / name)
    (tmp_path / "p1" / "a_SALSA.json").write_text("{}")
    both = [("a.nii.gz", "a"), ("b.nii", "b")]
    assert found(tmp_path) == both
    assert found(f"{tmp_path}/*/*.nii*", tmp_path / "p2") == both
    assert found(f"{tmp_path}/**/a.nii.gz") == both[:1]
    (named,) = cases.find([str(tmp_path / "p1" / "a_SALSA.nii.gz")])
    assert "an earlier batch wrote this label map" in named.refusal
    (matched,) = cases.find([f"{tmp_path}/p1/*_SALSA*"])
    assert "nothing but what an earlier batch wrote" in matched.refusal


def test_scans_in_folders_that_are_named_like_results_are_scans(tmp_path: Path) -> None:
    for name in ("trial_SALSA/p1/scan.nii.gz", "x_SALSA.nii.gz", "p2_SALSA/liver.nii.gz", "p2_SALSA/b.nii", "p2.nii"):
        scan(tmp_path / name)
    for one in ("trial_SALSA/p1/scan.nii.gz", "x_SALSA.nii.gz"):
        assert [case.refusal for case in cases.find([str(tmp_path / one)])] == [""]
    assert found(tmp_path / "trial_SALSA") == [("scan.nii.gz", "scan")]
    assert found(f"{tmp_path}/trial_SALSA/*/*.nii.gz") == [("scan.nii.gz", "scan")]
    # in the folder p2_SALSA beside p2.nii only what SALSA keeps there is a result
    assert [path for path, _ in found(tmp_path)] == ["p2.nii", "b.nii", "scan.nii.gz", "x_SALSA.nii.gz"]


def test_results_in_an_output_folder_and_of_dicom_series_are_known_by_what_lies_beside(tmp_path: Path) -> None:
    for name in ("out/a_SALSA.nii.gz", "out/a_SALSA/cropped/mask_0000.nii.gz", "s/axial_SALSA.nii.gz", "s/b.nii.gz"):
        scan(tmp_path / name)
    (tmp_path / "out" / "a_SALSA.json").write_text("{}")
    (tmp_path / "s" / "axial").mkdir()
    assert found(tmp_path) == [("b.nii.gz", "b")]


def test_hidden_files_in_a_folder_are_no_scans(tmp_path: Path) -> None:
    for name in ("._scan.nii.gz", ".snapshot/scan.nii.gz", "scan.nii.gz"):
        scan(tmp_path / name)
    assert found(tmp_path) == [("scan.nii.gz", "scan")]
    assert found(tmp_path / "._scan.nii.gz") == [("._scan.nii.gz", "._scan")]


@pytest.mark.parametrize("name", ["truth", "a_GT", "example_seg", "p1-mask", "labels", "ground truth"])
def test_label_maps_beside_scans_are_left_out_unless_they_are_named(tmp_path: Path, name: str) -> None:
    for file in (f"{name}.nii.gz", "liver.nii.gz", "segment 3.nii"):
        scan(tmp_path / file)
    told = {case.path.name: case.left_out for case in cases.find([str(tmp_path)])}
    assert told == {f"{name}.nii.gz": True, "liver.nii.gz": False, "segment 3.nii": False}
    assert {case.path.name: case.left_out for case in cases.find([f"{tmp_path}/*"])} == told
    (named,) = cases.find([str(tmp_path / f"{name}.nii.gz")])
    assert (named.left_out, named.refusal) == (False, "")


def test_voxels_of_one_byte_are_labels(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.eye(4)), tmp_path / "drawn.nii.gz")
    scan(tmp_path / "scan.nii.gz")
    assert [(case.path.name, case.left_out) for case in cases.find([str(tmp_path)])] == [
        ("drawn.nii.gz", True),
        ("scan.nii.gz", False),
    ]
    assert cases.open_scan(tmp_path).ct.grid.shape == (6, 5, 4)


def test_one_file_called_in_two_ways_is_one_scan(tmp_path: Path) -> None:
    scan(tmp_path / "a" / "x.nii.gz")
    (tmp_path / "b").mkdir()
    both = [str(tmp_path / "a" / "x.nii.gz"), str(tmp_path / "b" / ".." / "a" / "x.nii.gz")]
    (only,) = cases.find(both)
    assert only.refusal == ""


@pytest.mark.parametrize("output", [None, Path("out")])
def test_a_packed_and_a_plain_file_of_one_name_get_a_place_each(tmp_path: Path, output: Path | None) -> None:
    for name in ("x.nii", "x.nii.gz", "y.nii"):
        scan(tmp_path / "s" / name)
    told = cases.placed(cases.find([str(tmp_path / "s")]), output)
    assert [case.refusal for case, _ in told] == ["", "", ""]
    before = "" if output is None else "s_"
    places = {case.path.name: place.name for case, place in told}
    assert places == {
        "x.nii": f"{before}x.nii_SALSA.nii.gz",
        "x.nii.gz": f"{before}x_SALSA.nii.gz",
        "y.nii": "y_SALSA.nii.gz",
    }
    for _, place in told:
        scan(tmp_path / "s" / place.name)
    assert len(cases.find([str(tmp_path / "s")])) == (3 if output is None else 5)  # results beside their scans


@pytest.mark.parametrize("parted_by", [",", ";", "\t", ", "])
def test_columns_are_parted_as_spreadsheets_do(tmp_path: Path, parted_by: str) -> None:
    rows = [parted_by.join(row) for row in (("id", "PATHS"), ("1", "/x/a,b.nii" if parted_by == ";" else "/x/a.nii"))]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    assert cases.listed(tmp_path / "t.csv") == ["/x/a,b.nii" if parted_by == ";" else "/x/a.nii"]


@pytest.mark.parametrize("content", ["PATHS\n", "id,PATHS\n1,\n"])
def test_a_table_that_names_no_scan_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ConfigError, match="no scan is listed; expected a path in the column PATHS"):
        cases.listed(tmp_path / "t.csv")


def test_a_path_that_cannot_be_looked_at_is_a_case_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told, and none ends the search: the scan behind them is found."""
    scan(tmp_path / "open" / "a.nii.gz")
    scan(tmp_path / "data" / "locked" / "b.nii.gz")
    status, listing = os.stat, os.scandir

    def guarded_status(path: object, **options: Any) -> os.stat_result:
        if "secret" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return status(path, **options)  # type: ignore[arg-type]

    def guarded_listing(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "stat", guarded_status)
    monkeypatch.setattr(os, "scandir", guarded_listing)
    (tmp_path / "t.csv").write_text(f"PATHS\n/secret/a.nii.gz\n{'x' * 300}.nii.gz\n~nobody-of-that-name/a.nii\n")
    listed = cases.listed(tmp_path / "t.csv")
    told = cases.find([*listed, str(tmp_path / "data"), str(tmp_path / "open")])
    assert [case.refusal.partition(":")[0] for case in told] == [
        "this user may not look there",
        "cannot be looked at (File name too long)",
        "there is no home folder for ~nobody-of-that-name",
        "this user may not look there",
        "",
    ]
    assert told[3].path == tmp_path / "data" / "locked"


def test_images_that_may_not_be_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "IM1").write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (case,) = cases.find([str(tmp_path)])
    assert "may not read 1 of its files, such as IM1" in case.refusal


def test_what_is_not_there_is_a_case_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    names = ["absent.nii.gz", "empty", "notes.txt", "*.mha"]
    told = [case.refusal for case in cases.find(str(tmp_path / name) for name in names)]
    assert [words.split(" ")[0] for words in told] == ["no", "neither", "expected", "no"]
    with pytest.raises(SeriesRejected, match="no such file or folder"):
        cases.open_scan(tmp_path / "absent.nii.gz")


def test_in_an_output_folder_scans_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("p1/scan.nii", "p2/scan.nii", "p2/other.nii"):
        scan(tmp_path / name)
    places = [place.name for _, place in cases.placed(cases.find([str(tmp_path)]), tmp_path / "out")]
    assert places == ["p1_scan_SALSA.nii.gz", "other_SALSA.nii.gz", "p2_scan_SALSA.nii.gz"]


def test_two_scans_for_one_place_are_not_both_written(tmp_path: Path) -> None:
    scan(tmp_path / "p1" / "ct" / "scan.nii")
    scan(tmp_path / "p2" / "ct" / "scan.nii")
    told = [case.refusal for case, _ in cases.placed(cases.find([str(tmp_path)]), tmp_path / "out")]
    assert told[0] == ""
    assert "would take the place of" in told[1]
    assert "another --output" in told[1]


def test_the_column_paths_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan(tmp_path / "data" / "here.nii")
    table = tmp_path / "data" / "paths.csv"
    table.write_text('﻿ID, PATHS\n1,"/x/with, comma.nii"\n2,  here.nii \n3,\n', encoding="utf-8")
    assert cases.listed(table) == ["/x/with, comma.nii", str(tmp_path / "data" / "here.nii")]
    monkeypatch.chdir(tmp_path / "data")
    assert cases.listed(Path("paths.csv"))[1] == "here.nii"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PATH\nx\n", "expected a column PATHS in its first line, found PATH"),
        (b"", "found nothing"),
        (b"\xff\xfe\x00P", "cannot be read"),
    ],
)
def test_a_table_without_the_column_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        cases.listed(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="cannot be read"):
        cases.listed(tmp_path / "absent.csv")


def test_a_dicom_folder_is_its_axial_series(tmp_path: Path) -> None:
    made = phantom.make(phantom.Recipe(3, shape=(8, 16, 16), spacing_mm=(8.0, 20.0, 20.0)))
    phantom.write_study(made, tmp_path / "study")
    (tmp_path / "study" / "truth.nii.gz").unlink()
    (case,) = cases.find([str(tmp_path / "study")])
    assert case.path == tmp_path / "study" / "axial"
    ((_, place),) = cases.placed([case], None)
    assert place == tmp_path / "study" / "axial_SALSA.nii.gz"
    read = cases.open_scan(tmp_path / "study")
    assert np.array_equal(read.ct.voxels_hu, made.ct.voxels_hu)
    assert read.series is not None
    assert len(read.ct.slice_sop_uids) == 8


def test_studies_that_lie_in_one_folder_are_numbered(tmp_path: Path) -> None:
    for seed in (3, 4):
        made = phantom.make(phantom.Recipe(seed, shape=(8, 16, 16), spacing_mm=(8.0, 20.0, 20.0)))
        phantom.write_study(made, tmp_path / f"s{seed}", study=str(seed))
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in sorted(tmp_path.glob("s*/axial/*")):
        file.rename(flat / f"{file.parent.parent.name}-{file.name}")
    places = [place.name for _, place in cases.placed(cases.find([str(flat)]), None)]
    assert places == ["flat-1_SALSA.nii.gz", "flat-2_SALSA.nii.gz"]
    with pytest.raises(SeriesRejected, match="expected one scan at that path, found 2"):
        cases.open_scan(flat)
