"""Several acquisitions, directions or kinds of images under one Series Instance UID: told apart, or refused."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest
from made_series import AXIAL, HEADER, ORIENTATIONS, edit, files
from pydicom.uid import generate_uid

from salsa_node import assembly, cases, offline
from salsa_node.analysis import Lineage, Outcome, Terms, analyse, check
from salsa_node.candidate import read_candidate
from salsa_node.dicom_ct import write
from salsa_node.dicom_result import Kind
from salsa_node.pipelines import Masks, Observer, Provenance, unobserved
from salsa_node.selection import VolumeChoice, choose_volume
from salsa_node.series import inspect
from salsa_node.settings import PipelineChoice
from salsa_node.stacks import apart
from salsa_node.store import NewInstance, Store, StoreSettings
from salsa_node.volume import CtVolume, Grid, LabelVolume

T0 = datetime(2026, 3, 4, 12, tzinfo=UTC)
Change = Callable[[pydicom.Dataset, int], object]


def lay(
    folder: Path, slices: int = 6, *, first_mm: float = 0.0, step_mm: float = 2.5, axes: np.ndarray = AXIAL,
    change: Change = lambda ds, n: None,
) -> list[Path]:  # fmt: skip
    """Images of the one series of these tests, with UIDs of their own; change: made to each, and its number."""
    affine = np.eye(4)
    affine[:3, :3] = axes * (step_mm, 0.7, 0.9)
    affine[:3, 3] = np.array((-100.25, 20.125, 900.5)) + axes[:, 0] * first_mm
    ct = CtVolume(np.full((slices, 12, 10), 40, np.int16), Grid((slices, 12, 10), affine, "2.25.3"))
    paths = list(write(ct, folder, HEADER))
    for n, path in enumerate(paths):

        def put(ds: pydicom.Dataset, n: int = n) -> None:
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            change(ds, n)

        edit(path, put)
    return paths


def acquired(number: int, time: str = "101112", **also: object) -> Change:
    def change(ds: pydicom.Dataset, n: int) -> None:
        ds.AcquisitionNumber, ds.AcquisitionTime, ds.InstanceNumber = number, time, 100 * number + n
        for keyword, value in also.items():
            setattr(ds, keyword, value)

    return change


def chosen(paths: list[Path]) -> VolumeChoice:
    return choose_volume([read_candidate(paths)])


def told(paths: list[Path]) -> str:
    choice = chosen(paths)
    assert not choice.volumes
    return choice.verdicts[0].reason


def test_two_phases_in_one_series_are_two_candidates_and_the_portal_venous_one_is_chosen(tmp_path: Path) -> None:
    late = lay(tmp_path / "b", change=acquired(2, "101213", SeriesDescription="portal venous"))
    early = lay(tmp_path / "a", change=acquired(1, "101130", SeriesDescription="arterial"))
    shuffled = [path for pair in zip(early, late, strict=True) for path in pair]
    choice = chosen(shuffled)
    assert choice.chosen is not None
    assert set(choice.chosen.paths) == set(late)
    first, second = sorted(choice.verdicts, key=lambda verdict: verdict.candidate.part)
    assert (first.candidate.part, second.candidate.part) == ("1 of 2", "2 of 2")
    assert first.reason.startswith("passed over for series 1, stack 2 of 2: ")
    assert second.reason.startswith("chosen: ")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"ConvolutionKernel": "B30f"}, {"ConvolutionKernel": "B70f"}),
        ({"KVP": 80}, {"KVP": 140}),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}, {"ImageType": ["DERIVED", "SECONDARY", "MPR"]}),
        ({"TemporalPositionIndex": 1}, {"TemporalPositionIndex": 2}),
        ({"AcquisitionDateTime": "20240506101112"}, {"AcquisitionDateTime": "20240506101212"}),
    ],
    ids=lambda said: next(iter(said)),
)
def test_what_headers_say_of_reconstructions_and_rounds_tells_them_apart(one, other, tmp_path) -> None:
    paths = [
        *lay(tmp_path / "a", change=acquired(1, **one)),
        *lay(tmp_path / "b", change=acquired(1, **other)),
    ]
    assert [len(part.paths) for part in apart(read_candidate(paths))] == [6, 6]
    assert chosen(paths).volumes


def test_rounds_are_told_apart_by_the_time_of_each_image(tmp_path: Path) -> None:
    """As a perfusion scanner writes them: each image its own time, one acquisition number."""

    def at(start_s: int) -> Change:
        return lambda ds, n: setattr(ds, "AcquisitionTime", f"1011{start_s + n:02}")

    paths = [*lay(tmp_path / "a", change=at(10)), *lay(tmp_path / "b", change=at(30))]
    parts = apart(read_candidate(paths))
    assert [set(part.paths) for part in parts] == [set(paths[:6]), set(paths[6:])]
    mixed = [*lay(tmp_path / "c", change=at(10)), *lay(tmp_path / "d", change=at(13))]
    assert apart(read_candidate(mixed)) == (), "the rounds run into each other"
    assert told(mixed) == "6 of 12 slices lie where another one lies; expected one slice at each position"


def test_axial_images_are_found_among_a_localizer_and_coronal_ones(tmp_path: Path) -> None:
    axial = lay(tmp_path / "a", slices=9)
    coronal = lay(tmp_path / "b", axes=ORIENTATIONS["coronal"])

    def scout(ds: pydicom.Dataset, n: int) -> None:
        ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        ds.InstanceNumber = n

    localizer = lay(tmp_path / "c", slices=1, axes=ORIENTATIONS["sagittal"], change=scout)
    for paths in ([*localizer, *axial, *coronal], [*coronal, *axial, *localizer], [*axial, *localizer]):
        choice = chosen(paths)
        assert choice.chosen is not None
        assert set(choice.chosen.paths) == set(axial)
    reasons = [verdict.reason for verdict in chosen([*localizer, *axial, *coronal]).verdicts]
    assert any("not axial" in reason for reason in reasons)
    assert any("LOCALIZER" in reason for reason in reasons)


def test_blocks_of_other_thickness_are_two_stacks_and_a_hole_is_never_taken_for_a_border(tmp_path: Path) -> None:
    chest = lay(tmp_path / "a", step_mm=5.0, change=acquired(1))
    belly = lay(tmp_path / "b", slices=20, first_mm=30.0, change=acquired(2))
    choice = chosen([*chest, *belly])
    assert choice.chosen is not None
    assert set(choice.chosen.paths) == set(belly)
    low = lay(tmp_path / "c", slices=8, change=acquired(1))
    high = lay(tmp_path / "d", slices=8, first_mm=22.5, change=acquired(2))
    assert told([*low, *high]).startswith("1 of 17 slices missing: gap of 5.0 mm between images ")


def test_one_acquisition_with_a_hole_does_not_keep_the_other_back(tmp_path: Path) -> None:
    holed = lay(tmp_path / "a", slices=9, change=acquired(1))
    whole = lay(tmp_path / "b", slices=9, change=acquired(2))
    choice = chosen([*holed[:4], *holed[5:], *whole])
    assert choice.chosen is not None
    assert set(choice.chosen.paths) == set(whole)


@pytest.mark.parametrize("keyword", ["PatientID", "StudyInstanceUID", "PatientBirthDate"])
def test_images_of_two_patients_are_never_sorted_apart(keyword: str, tmp_path: Path) -> None:
    paths = [*lay(tmp_path / "a", change=acquired(1)), *lay(tmp_path / "b", change=acquired(2))]
    other = "2.25.99" if keyword.endswith("UID") else "19700101"
    for path in paths[6:]:
        edit(path, lambda ds: setattr(ds, keyword, other))
    assert apart(read_candidate(paths)) == ()
    assert "in one series; expected one" in told(paths)


def test_what_is_one_volume_is_never_sorted_apart_and_public_oddities_stay_refused(tmp_path, testdata) -> None:
    paths = lay(tmp_path / "a", slices=9, change=lambda ds, n: setattr(ds, "AcquisitionNumber", n // 3))
    choice = chosen(paths)
    assert [len(volume.candidate.paths) for volume in choice.volumes] == [9]
    for folder in ("04_ge_tilt_variable_spacing", "06_ct_bad_geometry/sliceincrement/001"):
        assert apart(read_candidate(files(testdata / folder))) == ()


class Corner:
    """A pipeline that marks one block."""

    provenance = Provenance("corner", "1")

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
        labels = np.zeros(ct.grid.shape, np.uint8)
        labels[1:4, 2:8, 2:8] = 1
        return Masks(None, LabelVolume(labels, ct.grid), self.provenance)

    def unload(self) -> None: ...


def test_results_lie_on_the_images_of_the_stack_alone_and_say_so(tmp_path: Path) -> None:
    early = lay(tmp_path / "a", change=acquired(1, "101130"))
    late = lay(tmp_path / "b", change=acquired(2, "101213"))
    terms = Terms(stack="2 of 2")
    born = Lineage(T0)
    result = analyse(late, Corner(), terms, lambda _: born)
    assert result.outcome is Outcome.LESIONS
    contents = []
    for made in result.objects:
        made.ds.save_as(tmp_path / "made.dcm", enforce_file_format=True)
        contents.append((tmp_path / "made.dcm").read_bytes())
    check(contents, late, result)
    [report] = result.of(Kind.SR)
    words = " ".join(str(e.value) for e in report.iterall() if e.keyword == "TextValue")
    assert "this result is of stack 2 of 2 alone, 6 images" in words
    others = {str(pydicom.dcmread(path).SOPInstanceUID) for path in early}
    named = {str(e.value) for made in result.objects for e in made.ds.iterall() if e.VR == "UI" and e.VM == 1}
    assert not others & named
    assert analyse(late, Corner(), Terms(), lambda _: born).run_digest != result.run_digest


def test_a_batch_and_a_script_read_the_best_stack(tmp_path: Path) -> None:
    lay(tmp_path / "ct" / "a", change=acquired(1, SeriesDescription="arterial"))
    late = lay(tmp_path / "ct" / "b", change=acquired(2, SeriesDescription="portal venous"))
    [case] = cases.find([str(tmp_path / "ct")])
    assert set(case.files) == set(late)
    assert cases.open_scan(tmp_path / "ct").ct.grid.shape == (6, 12, 10)
    assert offline.Case((), tmp_path).stack == ""


def test_the_node_gives_the_worker_the_images_of_the_stack(tmp_path: Path) -> None:
    early = lay(tmp_path / "a", change=acquired(1, SeriesDescription="arterial"))
    late = lay(tmp_path / "b", change=acquired(2, SeriesDescription="portal venous"))
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True) as store:
        for path in (*early, *late):
            ds = pydicom.dcmread(path)
            new = NewInstance(
                ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.SOPClassUID,
                ds.file_meta.TransferSyntaxUID, path.relative_to(tmp_path).as_posix(), "0" * 64, 1, "CT1", "CT", 1,
            )  # fmt: skip
            store.add_instance(new, T0)
        later = datetime(2026, 3, 4, 13, tzinfo=UTC)
        while assembly.step(store, tmp_path, PipelineChoice("demo"), later) is not None:
            pass
        [run] = store.runs_of("2.25.1")
        assert (run.series_uid, run.part, run.refusal) == ("2.25.2", "2 of 2", None)
        assert run.images is not None
        assert set(run.images) == {str(pydicom.dcmread(path).SOPInstanceUID) for path in late}
        assert run.source_digest == inspect(late).source_digest
        [look] = store.looks_of("2.25.1")
        assert {(line["part"], line["chosen"]) for line in look.scores} == {("1 of 2", False), ("2 of 2", True)}
        [series] = store.series_of("2.25.1")
        assert series.reason == ""
