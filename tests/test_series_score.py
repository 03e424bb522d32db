"""Synthetic studies as hospitals send them: the thin portal venous series is chosen, the others hear why not."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, evt

from salsa_node import assembly, phantom
from salsa_node.association import taking_turns, without_delay
from salsa_node.candidate import BodyPart, Kernel, by_series, read_candidate
from salsa_node.contrast_phase import Phase
from salsa_node.listener import Listener
from salsa_node.selection import choose_volume
from salsa_node.settings import ListenerSettings, PipelineChoice
from salsa_node.store import Store, StoreSettings

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)

PHASES = {
    "Abdomen nativ": "120000",
    "Abdomen arteriell 35s": "120105",
    "Abdomen portalvenoes 70s": "120140",
    "Abdomen delayed 5min": "120530",
}
KERNELS = {"B30f": "soft", "B70f": "sharp"}
STEP_MM = 7.5


def _series(phantom_study: phantom.Study, folder: Path, number: int, **header: object) -> list[Path]:
    """The phantom's axial series once more, under another series number and header."""
    folder.mkdir()
    paths = []
    every = int(str(header.pop("every", 1)))
    for n, path in enumerate(phantom_study.axial[::every]):
        ds = pydicom.dcmread(path)
        ds.SeriesNumber, ds.SeriesInstanceUID = number, f"2.25.77.{number}"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"2.25.77.{number}.{n + 1}"
        for keyword, value in header.items():
            setattr(ds, keyword, value)
        paths.append(folder / f"{n}.dcm")
        ds.save_as(paths[-1])
    return paths


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """4 phases x 2 kernels, thick copies, a coronal reformat, a MIP, an axial copy, a head, scouts and a dose page."""
    folder = tmp_path_factory.mktemp("hospital")
    recipe = phantom.Recipe(seed=1, shape=(28, 16, 16), spacing_mm=(STEP_MM, 20.0, 20.0), lesions=())
    study = phantom.write_study(phantom.make(recipe), folder / "phantom")
    coronal = replace(recipe, shape=(16, 28, 16), spacing_mm=(20.0, STEP_MM, 20.0), orientation="AIL")
    reformat = phantom.write_study(phantom.make(coronal), folder / "coronal")
    files = [*study.localizer]
    number = 10
    for description, time in PHASES.items():
        said = {"SeriesDescription": description, "AcquisitionTime": time, "ContrastBolusStartTime": "120030"}
        if "nativ" in description:
            said.pop("ContrastBolusStartTime")
        for kernel in KERNELS:
            files += _series(study, folder / str(number), number, ConvolutionKernel=kernel, **said)
            number += 1
        files += _series(study, folder / str(number), number, ConvolutionKernel="B30f", every=2, **said)
        number += 1
    venous = {"SeriesDescription": "Abdomen portalvenoes", "ConvolutionKernel": "B30f"}
    derived = ["DERIVED", "SECONDARY", "REFORMATTED"]
    files += _series(reformat, folder / "30", 30, ImageType=derived, **venous)
    files += _series(study, folder / "31", 31, ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"], **venous)
    files += _series(study, folder / "32", 32, ImageType=["DERIVED", "SECONDARY", "AXIAL"], **venous)
    files += _series(study, folder / "33", 33, BodyPartExamined="HEAD", **venous)
    page = _series(study, folder / "99", 99, ImageType=["DERIVED", "SECONDARY", "OTHER", "DOSE_INFO"], **venous)
    files += page[:1]
    return [_same_study(path, study.study_uid) for path in files]


def _same_study(path: Path, study_uid: str) -> Path:
    ds = pydicom.dcmread(path)
    ds.StudyInstanceUID = study_uid
    ds.save_as(path)
    return path


@pytest.mark.parametrize("seed", range(6))
def test_the_thin_portal_venous_soft_axial_series_is_chosen_in_any_order_of_arrival(
    hospital: list[Path], seed: int
) -> None:
    arrived = random.Random(seed).sample(hospital, len(hospital))
    candidates = [read_candidate(files) for files in by_series(arrived).values()]
    choice = choose_volume(candidates)
    assert choice.chosen is not None
    assert choice.chosen.series_number == 16
    assert (choice.chosen.phase.phase, choice.chosen.kernel) == (Phase.PORTAL_VENOUS, Kernel.SOFT)
    assert choice.series is not None
    assert choice.series.grid.shape == (28, 16, 16)
    told = {verdict.candidate.series_number: verdict for verdict in choice.verdicts}
    assert told[16].reason == (
        "chosen: 145.56 points: portal venous +40, original +20, kernel soft tissue +15, 28 slices 7.5 mm apart +5.56, "
        "210 mm long +60, body part abdomen +5, without loss +0"
    )
    assert "the same acquisition; 130.56 of its 145.56 points (kernel lung or bone +0" in told[17].reason
    assert "14 slices 15 mm apart +0" in told[18].reason
    assert "non-contrast +0, not portal venous +40" in told[10].reason
    assert "arterial +10, not portal venous +40" in told[13].reason
    assert "delayed +15, not portal venous +40" in told[19].reason
    assert "secondary +0, not original +20" in told[32].reason
    assert "body part another part of the body -40" in told[33].reason
    assert told[30].reason.startswith("not axial")
    assert told[31].reason == "Image Type MIP: no slices of a volume in Hounsfield units"
    assert told[1].reason == "Image Type LOCALIZER: no slices of a volume"
    assert told[99].score.faults[0].startswith("1 image(s)")
    assert {n for n, verdict in told.items() if not verdict.accepted} == {1, 30, 31, 99}


def test_ten_associations_at_once_with_duplicates_make_one_run_of_that_series(
    hospital: list[Path], tmp_path: Path
) -> None:
    chance = random.Random(11)
    shuffled = chance.sample(hospital, len(hospital))
    again = chance.sample(hospital, 40)
    shares = [[*shuffled[n::10], *again[n::10]] for n in range(10)]
    data_dir = tmp_path / "data"
    with (
        Store.open(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True) as record,
        Listener(ListenerSettings(port=0, min_free_gib=0.0), record, data_dir, clock=lambda: T0) as door,
    ):
        with ThreadPoolExecutor(10) as senders:
            answers = [status for sent in senders.map(partial(_sent, door.port), shares) for status in sent]
        assert answers == [0] * (len(hospital) + 40)
        [study] = record.studies()
        assert study.instances == len(hospital)
        assert sum(series.duplicates for series in record.series_of(study.study_uid)) == 40
        later = T0 + timedelta(minutes=1)
        while assembly.step(record, data_dir, PipelineChoice("demo"), later) is not None:
            pass
        [run] = record.runs_of(study.study_uid)
        [look] = record.looks_of(study.study_uid)
    assert (run.series_uid, run.refusal) == ("2.25.77.16", None)
    assert str(look.scores[0]["reason"]).startswith("chosen: 145.56 points: portal venous +40")
    of_chosen = {line["kind"]: line["weight"] for line in look.evidence if line["about"] == "2.25.77.16"}
    assert of_chosen == {"quiet": "weak", "numbers": "weak", "positions": "weak"}


def _sent(port: int, paths: list[Path]) -> list[int]:
    """The statuses of one association that sends these files."""
    ae = AE("CT1")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    handlers = [(evt.EVT_CONN_OPEN, without_delay), (evt.EVT_CONN_OPEN, taking_turns)]
    assoc = ae.associate("127.0.0.1", port, ae_title="SALSA_NODE", evt_handlers=handlers)
    assert assoc.is_established
    try:
        return [assoc.send_c_store(path).Status for path in paths]
    finally:
        assoc.release()


def test_without_the_portal_venous_series_the_next_best_is_chosen(hospital: list[Path]) -> None:
    candidates = [read_candidate(files) for files in by_series(hospital).values()]
    rest = [c for c in candidates if c.phase.phase is not Phase.PORTAL_VENOUS]
    chosen = choose_volume(rest).chosen
    assert chosen is not None
    assert chosen.series_number == 19  # delayed, thin, soft


@pytest.mark.parametrize(
    ("kernel", "description", "kind"),
    [
        ("B30f", "", Kernel.SOFT),
        (["I31f", "3"], "", Kernel.SOFT),
        ("Br40d", "", Kernel.SOFT),
        ("Bl57", "", Kernel.SHARP),
        ("B70s", "", Kernel.SHARP),
        ("STANDARD", "", Kernel.SOFT),
        ("SOFT", "", Kernel.SOFT),
        ("LUNG", "", Kernel.SHARP),
        ("BONEPLUS", "", Kernel.SHARP),
        ("FC08", "", Kernel.SOFT),
        ("FC18-H", "", Kernel.SOFT),
        ("FC30", "", Kernel.SHARP),
        ("FC51", "", Kernel.SHARP),
        ("FC26", "", Kernel.UNKNOWN),
        ("B", "", Kernel.SOFT),
        ("YA", "", Kernel.SHARP),
        ("B_VSHARP_C", "", Kernel.SHARP),
        ("", "Thorax Lunge 1.0", Kernel.SHARP),
        ("", "Abdomen", Kernel.UNKNOWN),
        (None, "", Kernel.UNKNOWN),
    ],
)
def test_kernels_are_known_by_their_vendors_names(kernel, description, kind, tmp_path, hospital):
    ds = pydicom.dcmread(hospital[-2])
    ds.ConvolutionKernel, ds.SeriesDescription = kernel, description
    ds.save_as(tmp_path / "one.dcm")
    assert read_candidate([tmp_path / "one.dcm"]).kernel is kind


@pytest.mark.parametrize(
    ("named", "part"),
    [
        ("ABDOMEN", BodyPart.ABDOMEN),
        ("CHESTABDPELVIS", BodyPart.ABDOMEN),
        ("LIVER", BodyPart.ABDOMEN),
        ("CHEST", BodyPart.NEAR),
        ("HEAD", BodyPart.ELSEWHERE),
        ("LSPINE", BodyPart.ELSEWHERE),
        ("", BodyPart.UNKNOWN),
        ("OTHER", BodyPart.UNKNOWN),
    ],
)
def test_body_parts_are_sorted_by_their_distance_from_the_liver(named, part, tmp_path, hospital):
    ds = pydicom.dcmread(hospital[-2])
    ds.BodyPartExamined = named
    ds.save_as(tmp_path / "one.dcm")
    assert read_candidate([tmp_path / "one.dcm"]).body_part is part


def test_slices_in_two_phases_name_none(tmp_path, hospital):
    ds = pydicom.dcmread(hospital[-2])
    for n, said in enumerate(("portal venous", "portal venous", "arterial")):
        ds.SeriesDescription = said
        ds.save_as(tmp_path / f"{n}.dcm")
    assert read_candidate(sorted(tmp_path.glob("*.dcm"))).phase.phase is Phase.UNKNOWN
