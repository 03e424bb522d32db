"""The axial CT series of a study is chosen, and every other one is told why not."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isfinite
from pathlib import Path

import numpy as np
import pydicom
import pytest

from salsa_node import phantom
from salsa_node.candidate import BodyPart, Candidate, Kernel, by_series, read_candidate
from salsa_node.contrast_phase import ContrastPhase, Phase
from salsa_node.errors import SeriesRejected
from salsa_node.selection import choose, choose_volume
from salsa_node.selection_rules import SelectionRules
from salsa_node.series import inspect

AXIAL = Candidate(
    study_uid="2.25.1",
    series_uid="2.25.2",
    series_number=2,
    paths=tuple(Path(f"{n}.dcm") for n in range(40)),
    image_types=frozenset({"ORIGINAL", "PRIMARY", "AXIAL"}),
    normal_lps=(0.0, 0.0, 1.0),
    slice_thickness_mm=5.0,
    faults=(),
    step_mm=5.0,
    extent_mm=195.0,
    phase=ContrastPhase(Phase.PORTAL_VENOUS),
    acquisition=("2.25.9", "1"),
)


def other(**changes) -> Candidate:
    return replace(AXIAL, series_uid="2.25.3", **changes)


@pytest.mark.parametrize(
    ("worse", "why"),
    [
        (other(paths=AXIAL.paths[:39]), "as many points (139.11), and 39 slices, not 40"),
        (other(slice_thickness_mm=6.0), "declared thicker"),
        (other(slice_thickness_mm=None), "no thickness is declared"),
        (other(series_number=3), "the lower series number goes first"),
        (other(series_number=None), "the lower series number goes first"),
        (other(), "the first Series Instance UID goes first"),
        (other(step_mm=6.0), "40 slices 6 mm apart +8.89, not 40 slices 5 mm apart +11.11"),
        (other(extent_mm=95.0), "100 mm long +30, not 200 mm long +60"),
        (other(image_types=frozenset({"DERIVED", "SECONDARY"}), paths=AXIAL.paths * 2), "secondary +0, not original"),
        (other(image_types=frozenset({"DERIVED", "PRIMARY"})), "derived +15, not original +20"),
        (other(phase=ContrastPhase(Phase.ARTERIAL)), "arterial +10, not portal venous +40"),
        (other(phase=ContrastPhase(Phase.UNKNOWN)), "phase unknown +20, not portal venous +40"),
        (other(kernel=Kernel.SHARP), "kernel lung or bone +0, not kernel unknown +8"),
        (other(body_part=BodyPart.ELSEWHERE), "body part another part of the body -40, not body part unknown +0"),
        (other(lossy=True), "with loss -5, not without loss +0"),
        (other(acquisition=("2.25.9", "1"), series_number=3), "the same acquisition; as many points"),
    ],
)  # fmt: skip
def test_the_better_series_is_chosen_whatever_the_order(worse, why):
    for candidates in ((AXIAL, worse), (worse, AXIAL)):
        choice = choose(candidates)
        assert choice.chosen is AXIAL
        verdicts = dict(zip(candidates, choice.verdicts, strict=True))
        assert verdicts[AXIAL].reason.startswith("chosen: 139.11 points: portal venous +40, original +20")
        assert verdicts[worse].reason.startswith("passed over for series 2: ")
        assert why in verdicts[worse].reason
        assert verdicts[worse].accepted
        assert (verdicts[AXIAL].rank, verdicts[worse].rank) == (1, 2)


def test_the_rules_decide():
    thin = other(step_mm=1.0, phase=ContrastPhase(Phase.ARTERIAL))
    assert choose([AXIAL, thin]).chosen is AXIAL
    assert choose([AXIAL, thin], SelectionRules(portal_venous=0, arterial=30)).chosen is thin
    assert choose([AXIAL], SelectionRules(never=("AXIAL",))).chosen is None
    turned_a_little = other(normal_lps=(0.0, 0.26, 0.966))
    assert choose([turned_a_little]).chosen is turned_a_little
    assert choose([turned_a_little], SelectionRules(max_tilt_degrees=10)).chosen is None


def test_no_series_is_chosen_where_none_can_be_analysed():
    choice = choose([other(faults=("modality MR, expected CT", "2 image(s)"))])
    assert choice.chosen is None
    assert [(v.accepted, v.reason) for v in choice.verdicts] == [(False, "modality MR, expected CT; 2 image(s)")]
    assert choose([]).chosen is None


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> phantom.Study:
    recipe = phantom.Recipe(seed=1, shape=(6, 32, 32), spacing_mm=(5.0, 10.0, 10.0))
    return phantom.write_study(phantom.make(recipe), tmp_path_factory.mktemp("study"))


def test_the_phantoms_axial_series_is_chosen_and_its_localizer_is_not(study):
    candidates = [read_candidate(paths) for paths in by_series([*study.localizer, *study.axial]).values()]
    choice = choose(candidates)
    assert choice.chosen is not None
    assert set(choice.chosen.paths) == set(study.axial)
    assert [v.accepted for v in choice.verdicts] == [False, True]
    assert choice.verdicts[0].reason == "Image Type LOCALIZER: no slices of a volume"
    assert inspect(choice.chosen.paths).grid.shape == (6, 32, 32)


def without_one_slice(study: phantom.Study, folder: Path) -> list[Path]:
    """The axial series again as a series of its own that ranks higher by its number, with a slice missing."""
    copies = []
    for path in (path for n, path in enumerate(study.axial) if n != 2):
        ds = pydicom.dcmread(path)
        ds.SeriesInstanceUID, ds.SeriesNumber, ds.SliceThickness = "2.25.8", 1, 1
        copies.append(folder / path.name)
        ds.save_as(copies[-1])
    return copies


def test_the_best_series_that_is_one_volume_is_chosen(study, tmp_path):
    broken = without_one_slice(study, tmp_path)
    whole = [path for n, path in enumerate(study.axial) if n < 5]  # five slices each
    candidates = [read_candidate(paths) for paths in (study.localizer, broken, whole)]
    assert choose(candidates).chosen is candidates[1]
    choice = choose_volume(candidates)
    assert choice.chosen is candidates[2]
    assert choice.series is not None
    assert choice.series.grid.shape == (5, 32, 32)
    assert choice.best_refused is candidates[1]
    assert [verdict.accepted for verdict in choice.verdicts] == [False, False, True]
    assert (
        choice.verdicts[1].reason == "1 of 6 slices missing: gap of 10.0 mm between images 2 and 4, spacing is 5.0 mm; "
        'to have it resampled set series.irregular = "resample"'
    )
    assert choice.verdicts[2].reason.startswith("chosen: ")


def test_where_no_series_is_a_volume_the_best_refused_one_is_known():
    candidates = [other(series_number=5), AXIAL, other(faults=("modality MR, expected CT",))]
    seen = []

    def look(paths):
        seen.append(paths)
        raise SeriesRejected(f"refused {len(seen)}")

    choice = choose_volume(candidates, look)
    assert (choice.chosen, choice.series) == (None, None)
    assert choice.best_refused is AXIAL
    assert [(v.accepted, v.reason) for v in choice.verdicts] == [
        (False, "refused 2"),
        (False, "refused 1"),
        (False, "modality MR, expected CT"),
    ]
    assert choose_volume([]).best_refused is None


def turned(degrees: float) -> list[float]:
    return [1, 0, 0, 0, float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))]


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("Modality", "MR", "modality MR, expected CT"),
        ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7", "expected CT Image Storage"),
        ("NumberOfFrames", 2, "multi-frame"),
        ("ImageType", ["DERIVED", "SECONDARY", "SCREEN SAVE"], "Image Type SCREEN SAVE"),
        ("ImageOrientationPatient", None, "no Image Orientation (Patient)"),
        ("ImageOrientationPatient", turned(31), "not axial"),
        ("ImageOrientationPatient", [1, 0, 0, 0, 0, -1], "not axial"),
        ("ImageOrientationPatient", turned(29), None),
        ("ImageOrientationPatient", [-1, 0, 0, 0, 1, 0], None),
        ("SeriesNumber", None, None),
        ("SeriesInstanceUID", "", "no Series Instance UID"),
    ],
)
def test_header_facts_decide(keyword, value, words, study, tmp_path):
    paths = []
    for path in study.axial:
        ds = pydicom.dcmread(path)
        setattr(ds, keyword, value)
        paths.append(tmp_path / path.name)
        ds.save_as(paths[-1])
    (verdict,) = choose([read_candidate(paths)]).verdicts
    faults = verdict.score.faults
    assert faults == () if words is None else words in faults[0]


def test_too_few_images_or_unreadable_ones_are_no_volume(study, tmp_path):
    assert read_candidate(study.axial[:2]).faults == ("2 image(s); a volume needs at least 3",)
    text = tmp_path / "notes.txt"
    text.write_text("liver")
    assert read_candidate([*study.axial, text]).faults == ("file 7 of 7 cannot be read as DICOM",)
    assert text not in {p for paths in by_series([*study.axial, text]).values() for p in paths}


@pytest.mark.parametrize(
    ("element", "value"),
    [("ImagePositionPatient", [0.0, 0.0, "nan"]), ("SliceThickness", "nan")],
)  # fmt: skip
def test_a_number_that_is_none_brings_no_other_series_out_of_order(element, value, study, tmp_path):
    """What cannot be compared would otherwise part the series before it from those behind it."""
    paths = []
    for n, path in enumerate(study.axial):
        ds = pydicom.dcmread(path)
        if n == 0 or element == "SliceThickness":
            setattr(ds, element, value)
        paths.append(tmp_path / path.name)
        ds.save_as(paths[-1])
    odd = read_candidate(paths)
    [verdict] = choose([odd]).verdicts
    assert all(isfinite(reason.points) for reason in verdict.score.reasons)
    twin = replace(odd, series_uid="2.25.5")
    worse, better = replace(odd, slice_thickness_mm=9.0), replace(odd, slice_thickness_mm=1.0)
    assert choose([worse, twin, better]).chosen is better
    assert json.dumps(verdict.as_json(), allow_nan=False)


def test_of_the_head_study_the_axial_series_is_the_only_volume(testdata):
    paths = sorted((testdata / "05_philips_head_study_localizer_dose").rglob("I*"))
    choice = choose([read_candidate(files) for files in by_series(paths).values()])
    assert choice.chosen is not None
    assert {path.parent.name for path in choice.chosen.paths} == {"S2010"}
    assert sorted(v.reason.split(":")[0] for v in choice.verdicts) == [
        "Image Type LOCALIZER",
        "SOP class 1.2.840.10008.5.1.4.1.1.7, expected CT Image Storage",
        "chosen",
    ]


def test_of_two_stacks_that_are_worth_the_same_the_first_goes_first_and_the_reason_says_so():
    first, second = (replace(AXIAL, part=f"{n} of 2") for n in (1, 2))
    choice = choose((first, second))
    assert choice.chosen is first
    why = "as many points (139.11), and the stack whose images come first goes first"
    assert choice.verdicts[1].reason.endswith(why)
