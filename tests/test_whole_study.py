"""Whole studies through the real door, in any order over ten associations: one series is chosen, one result leaves."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import CTImageStorage, XRayRadiationDoseSRStorage
from pynetdicom import AE, evt

from salsa_node import assembly, delivery, dicom_ct, loopback, phantom, pipelines
from salsa_node.anatomy import LesionSpec
from salsa_node.association import taking_turns
from salsa_node.config import Config, parse
from salsa_node.listener import Listener
from salsa_node.pipelines import Masks, Observer, Provenance, unobserved
from salsa_node.settings import ListenerSettings, NodeSettings
from salsa_node.store import DeliveryState, RunState, SeriesState, Store, StoreSettings
from salsa_node.uids import derive
from salsa_node.volume import CtVolume, LabelVolume
from salsa_node.worker import Worker

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
WHOLE = T0 + timedelta(seconds=31)
SENDERS = 10
PHASES = {
    "native": "Abdomen nativ",
    "arterial": "Abdomen arterial",
    "portal_venous": "Abdomen portal venous",
    "delayed": "Abdomen delayed 5 min",
}
KERNELS = {"soft": "B30f", "sharp": "B70f"}
LESION = LesionSpec((-55.0, -5.0, 15.0), (22.0, 22.0, 22.0))
RECIPE = phantom.Recipe(21, shape=(40, 24, 24), spacing_mm=(5.0, 14.0, 14.0), lesions=(LESION,))
DOSE_PAGE = ("DERIVED", "SECONDARY", "OTHER", "DOSE_INFO")
REFORMAT = ("DERIVED", "SECONDARY", "MPR")


@dataclass(frozen=True)
class Examination:
    """Images of one study. chosen: the Series Instance UID of the one to be analysed; names: UID -> what it is."""

    study_uid: str
    images: tuple[pydicom.Dataset, ...]
    chosen: str
    names: dict[str, str]


@pytest.fixture(scope="module")
def examination(tmp_path_factory: pytest.TempPathFactory) -> Examination:
    """The phantom in four phases, two kernels and two slice distances, with reformats, scouts and a page of doses."""
    folder = tmp_path_factory.mktemp("examination")
    recipe = RECIPE
    study = phantom.write_study(phantom.make(recipe), folder)
    header = dicom_ct.CtHeader(study.study_uid, "", "Phantom^21", "PHANTOM-21", T0)
    names = {study.localizer_uid: "localizer"}
    images = [pydicom.dcmread(path) for path in study.localizer]

    def add(name: str, scanned: phantom.Recipe, kernel: str = "B30f", keep: slice = slice(None), **said: object) -> str:
        uid = derive(study.study_uid, name)
        names[uid] = name
        ct = replace(phantom.make(scanned).ct, slice_sop_uids=None)
        number = 90 - len(names)  # the best comes neither first nor last
        paths = dicom_ct.write(ct, folder / name, replace(header, series_uid=uid, series_number=number, **said))
        for path in paths[keep]:
            ds = pydicom.dcmread(path)
            ds.ConvolutionKernel = kernel
            images.append(ds)
        return uid

    for phase, description in PHASES.items():
        for kernel, name in KERNELS.items():
            thin = replace(recipe, phase=phase)
            add(f"{phase} {kernel} thin", thin, name, series_description=description)
            thick = replace(thin, shape=(20, 24, 24), spacing_mm=(10.0, 14.0, 14.0))
            add(f"{phase} {kernel} thick", thick, name, series_description=description)
    for plane, orientation in (("coronal", "AIL"), ("sagittal", "LIP")):
        turned = replace(recipe, orientation=orientation, shape=(24, 40, 24), spacing_mm=(14.0, 5.0, 14.0))
        add(plane, turned, image_type=REFORMAT, series_description=f"Abdomen portal venous {plane}")
    axial_again = replace(recipe, shape=(80, 24, 24), spacing_mm=(2.5, 14.0, 14.0))  # thinner than what was scanned
    add("MIP", axial_again, image_type=(*REFORMAT[:2], "MIP"), series_description="Abdomen portal venous MIP")
    add("dose page", recipe, keep=slice(1), image_type=DOSE_PAGE, series_description="Patient Protocol")
    images.append(dose_report(images[0], derive(study.study_uid, "dose report")))
    chosen = derive(study.study_uid, "portal_venous soft thin")
    return Examination(study.study_uid, tuple(images), chosen, names)


def dose_report(like: pydicom.Dataset, series_uid: str) -> pydicom.Dataset:
    """A radiation dose report of the same study; its content does not matter here."""
    ds = pydicom.dcmread(like.filename, stop_before_pixels=True)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = XRayRadiationDoseSRStorage
    ds.SeriesInstanceUID, ds.Modality, ds.SeriesNumber = series_uid, "SR", 997
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = derive(series_uid, "1")
    return ds


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = f"""
        [delivery]
        to = ["viewer"]
        [[destination]]
        name = "viewer"
        ae_title = "{loopback.RECEIVER_AE}"
        host = "127.0.0.1"
        port = {loopback.free_port()}
        verify = "off"
    """
    return replace(parse(text), node=NodeSettings(data_dir=tmp_path / "data"))


@pytest.fixture
def store(config: Config) -> Iterator[Store]:
    config.node.data_dir.mkdir()
    with Store.open(StoreSettings(config.store_url), create=True) as opened:
        yield opened


def send_all(images: Sequence[pydicom.Dataset], store: Store, config: Config, seed: int, copies: int = 1) -> int:
    """Deal the images, shuffled, `copies` of each, to ten associations at once; how many were answered with Success."""
    dealt = [image for image in images for _ in range(copies)]
    random.Random(seed).shuffle(dealt)
    settings = ListenerSettings(port=0, min_free_gib=0.0, max_associations=SENDERS)
    with Listener(settings, store, config.node.data_dir, clock=lambda: T0) as door:

        def send(number: int) -> int:
            mine = dealt[number::SENDERS]
            ae = AE("CT1")
            ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 120  # a machine may be busy
            for syntax in {ds.file_meta.TransferSyntaxUID for ds in mine}:
                ae.add_requested_context(CTImageStorage, syntax)
                ae.add_requested_context(XRayRadiationDoseSRStorage, syntax)
            handlers = [(evt.EVT_CONN_OPEN, taking_turns)]
            assoc = ae.associate("127.0.0.1", door.port, ae_title="SALSA_NODE", evt_handlers=handlers)
            assert assoc.is_established
            try:
                return sum(assoc.send_c_store(ds).Status == 0 for ds in mine)
            finally:
                assoc.release()

        with ThreadPoolExecutor(SENDERS) as pool:
            return sum(pool.map(send, range(SENDERS)))


def assemble(store: Store, config: Config) -> None:
    for _ in range(200):
        if assembly.step(store, config.node.data_dir, config.pipeline, WHOLE) is None:
            return
    raise AssertionError("assembly does not come to rest")


@pytest.mark.parametrize("seed", range(3))
def test_the_thin_portal_venous_series_is_chosen_whatever_comes_first(seed, examination, store, config):
    assert send_all(examination.images, store, config, seed) == len(examination.images)
    assemble(store, config)
    [run] = store.runs_of(examination.study_uid)
    assert (examination.names[run.series_uid], run.refusal) == ("portal_venous soft thin", None)
    [look] = store.looks_of(examination.study_uid)
    why = {examination.names[str(score["series_uid"])]: str(score["reason"]) for score in look.scores}
    assert set(why) == set(examination.names.values()), "every CT series has its line, and the dose report none"
    assert why["portal_venous soft thin"].startswith("chosen: ")
    for name, said in (
        ("portal_venous soft thick", "slices 10 mm apart"),
        ("portal_venous sharp thin", "kernel lung or bone +0"),
        ("native soft thin", "non-contrast +0, not portal venous +40"),
        ("arterial soft thin", "arterial +10, not portal venous +40"),
        ("delayed soft thin", "delayed +15, not portal venous +40"),
    ):
        assert why[name].startswith("passed over for series "), why[name]
        assert said in why[name], why[name]
    for name, said in (
        ("localizer", "Image Type LOCALIZER"),
        ("coronal", "not axial"),
        ("sagittal", "not axial"),
        ("MIP", "Image Type MIP"),
        ("dose page", "Image Type DOSE_INFO"),
    ):
        assert said in why[name], why[name]
    rejected = {examination.names[row.series_uid] for row in store.series_of(examination.study_uid)
                if row.state is SeriesState.REJECTED}  # fmt: skip
    assert rejected == {"localizer", "coronal", "sagittal", "MIP", "dose page"}


@pytest.fixture(scope="module")
def abdomen(testdata: Path) -> Examination:
    """A public abdomen of Siemens's, JPEG 2000, as if it had been scanned in four phases with two kernels."""
    slices = [
        pydicom.dcmread(path)
        for path in sorted((testdata / "01_abdomen_ct_siemens_j2k" / "example_ct_dicom").iterdir())
    ]
    study_uid = derive("abdomen", "study")  # its own UIDs are blank
    images, names = [], {}
    for number, (name, changes) in enumerate(
        [
            *(
                (f"{phase} {kernel}", {"SeriesDescription": description, "ConvolutionKernel": kernel_name})
                for phase, description in PHASES.items()
                for kernel, kernel_name in KERNELS.items()
            ),
            ("localizer", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
            ("MIP", {"ImageType": [*REFORMAT[:2], "MIP"]}),
            ("dose page", {"ImageType": list(DOSE_PAGE)}),
        ]
    ):
        uid = derive(study_uid, name)
        names[uid] = name
        for source in slices[:2] if name in ("localizer", "dose page") else slices:
            ds = pydicom.dcmread(source.filename)
            ds.SOPClassUID, ds.StudyInstanceUID = ds.file_meta.MediaStorageSOPClassUID, study_uid
            ds.SeriesInstanceUID, ds.SeriesNumber = uid, 20 - number
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = derive(uid, str(source.InstanceNumber))
            ds.ProtocolName = "Abdomen"
            for keyword in ("ContrastBolusStartTime", "ContrastBolusAgent"):
                if keyword in ds:
                    delattr(ds, keyword)
            for keyword, value in changes.items():
                setattr(ds, keyword, value)
            images.append(ds)
    return Examination(study_uid, tuple(images), derive(study_uid, "portal_venous soft"), names)


def test_of_a_real_abdomen_the_portal_venous_soft_series_is_chosen(abdomen, store, config):
    assert send_all(abdomen.images, store, config, seed=5) == len(abdomen.images)
    assemble(store, config)
    [run] = store.runs_of(abdomen.study_uid)
    assert abdomen.names[run.series_uid] == "portal_venous soft"
    [look] = store.looks_of(abdomen.study_uid)
    why = {abdomen.names[str(score["series_uid"])]: str(score["reason"]) for score in look.scores}
    assert "arterial +10, not portal venous +40" in why["arterial soft"]
    assert "kernel lung or bone +0" in why["portal_venous sharp"]
    assert "Image Type MIP" in why["MIP"]


# ---- to the end of the street -------------------------------------------------------------------


class Known:
    """A pipeline without a network: it knows where the phantom's liver and lesions lie."""

    provenance = Provenance("known", "1")

    def __init__(self) -> None:
        made = phantom.make(RECIPE)
        self._liver, self._lesions = made.liver.labels, made.lesion_labels.labels

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
        del observer
        lesions = LabelVolume(self._lesions, ct.grid)
        return Masks(LabelVolume(self._liver, ct.grid), lesions, self.provenance, lesion_per_value=True)

    def unload(self) -> None:
        """Nothing to let go of."""


def test_ten_senders_with_everything_twice_make_one_run_and_one_result(
    examination, store, config, monkeypatch, tmp_path
):
    """Door, assembly, worker, delivery: each object of one result arrives once; sent again it changes nothing."""
    monkeypatch.setattr(pipelines, "load", lambda *_: Known())
    study_uid, images = examination.study_uid, examination.images

    def settled() -> None:
        assemble(store, config)
        one = Worker(store, config, "worker", clock=lambda: WHOLE)
        while one.step(WHOLE) is not None:
            pass
        while delivery.step(store, config.delivery, config.destination, config.node.data_dir, "sender", WHOLE):
            pass

    with loopback.receiver(config.destination[0].port, tmp_path / "results") as received:
        assert send_all(images, store, config, seed=8, copies=3) == 3 * len(images)
        study = store.study(study_uid)
        assert study.instances == len(store.instances_of(study_uid)) == len(images)
        rows = store.series_of(study_uid)
        assert sum(row.instances for row in rows) == len(images)
        assert sum(row.duplicates for row in rows) == 2 * len(images)
        assert store.quarantined_of(study_uid) == ()
        settled()
        first = sorted(path.name for path in received)
        assert send_all(images, store, config, seed=9) == len(images)
        settled()
    [run] = store.runs_of(study_uid)
    assert (run.state, run.error, run.attempt) == (RunState.PRODUCED, None, 1)
    assert examination.names[run.series_uid] == "portal_venous soft thin"
    assert sorted(path.name for path in received) == first == sorted(set(first))
    kinds = [name.partition("-")[0] for name in first]
    assert (kinds.count("SEG"), kinds.count("SR")) == (2, 2)  # by class and by lesion; the report and its lines
    assert {row.state for row in store.deliveries_of(run.id)} == {DeliveryState.SENT}
