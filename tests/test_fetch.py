"""Studies come back from an archive, whichever way it offers, and a run of what was purged finds its images."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path

import orthanc as orthanc_peer
import pydicom
import pytest
import typer
from made_series import HEADER, made
from orthanc import Pacs
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    KeyObjectSelectionDocumentStorage,
    RawDataStorage,
    XRayRadiationDoseSRStorage,
    generate_uid,
)
from pynetdicom import AE, build_context, evt

from salsa_node import cli_fetch, fetch, loopback, way_web
from salsa_node.audit import Trail
from salsa_node.config import Config
from salsa_node.errors import ConfigError, DeliveryError, DestinationRefused
from salsa_node.fetch import Brought, Wanted
from salsa_node.intake import Intake
from salsa_node.listener import Listener
from salsa_node.notes import Notes
from salsa_node.settings import Destination, ListenerSettings, NodeSettings, QuerySettings
from salsa_node.store import NewInstance, Store, StoreSettings
from salsa_node.way_dicom import FIND

T0 = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
LATER = T0 + timedelta(days=30000)
STUDY = HEADER.study_uid


@pytest.fixture
def intake(store: Store, data_dir: Path) -> Intake:
    return Intake(store, data_dir, Notes(store, lambda: T0), lambda: T0)


@pytest.fixture
def door() -> ListenerSettings:
    return ListenerSettings(port=loopback.free_port(), min_free_gib=0.0)


@pytest.fixture
def pacs(tmp_path: Path, tool: Callable[..., str], door: ListenerSettings) -> Iterator[Pacs]:
    """Orthanc with a CT study in it."""
    if not orthanc_peer.DICOMWEB.exists():
        pytest.skip("Orthanc's DICOMweb plugin is not installed (apt-get install orthanc-dicomweb)")
    more = {
        "DicomModalities": {
            "salsa": {"AET": "SALSA_NODE", "Host": "127.0.0.1", "Port": door.port, "AllowGet": True, "AllowMove": True}
        },
        "Plugins": [str(orthanc_peer.DICOMWEB)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    with orthanc_peer.running(tool("Orthanc", "orthanc"), tmp_path / "orthanc", more) as running:
        yield running


@pytest.fixture
def sent(pacs: Pacs, tmp_path: Path) -> dict[str, bytes]:
    """SOP Instance UID -> file, of a study of six images that the archive holds."""
    _, paths = made(tmp_path / "sent")
    for path in paths:
        pacs.upload(path)
    return {str(pydicom.dcmread(path).SOPInstanceUID): path.read_bytes() for path in paths}


def by_dicom(pacs: Pacs) -> Destination:
    return Destination("archive", orthanc_peer.AE_TITLE, "127.0.0.1", pacs.dicom_port)


def by_web(pacs: Pacs) -> Destination:
    return Destination("archive", url=f"{pacs.url}/dicom-web")


def kept(store: Store, data_dir: Path) -> dict[str, bytes]:
    """SOP Instance UID -> data set of every image here, as it lies on disk."""
    return {
        image.sop_instance_uid: data_set((data_dir / image.path).read_bytes()) for image in store.instances_of(STUDY)
    }


def data_set(content: bytes) -> bytes:
    return content[way_web.meta_of(content)[1] :]


def test_what_is_there_is_found_in_either_way(pacs: Pacs, sent: dict[str, bytes]) -> None:
    for source in (by_dicom(pacs), by_web(pacs)):
        for wanted in (Wanted(study_uid=STUDY), Wanted(patient_id="X-1", study_date="20240501-20240531")):
            (found,) = fetch.find(source, wanted, 10)
            assert (found.study_uid, found.study_date, found.images) == (STUDY, "20240506", len(sent))
        assert fetch.find(source, Wanted(patient_id="X-1", study_date="20250101-"), 10) == ()
        assert fetch.find(source, Wanted(accession_number="none"), 10) == ()


@pytest.mark.parametrize("way", ["C-GET", "WADO-RS"])
def test_a_study_comes_back_byte_for_byte(
    pacs: Pacs, sent: dict[str, bytes], store: Store, data_dir: Path, intake: Intake, way: str
) -> None:
    source = by_web(pacs) if way == "WADO-RS" else by_dicom(pacs)
    for _ in range(2):  # the second time everything is here
        assert fetch.bring(source, STUDY, intake, "SALSA_NODE", 10) == Brought(way, len(sent), 0)
    assert kept(store, data_dir) == {uid: data_set(content) for uid, content in sent.items()}
    (lost, *_) = store.instances_of(STUDY)
    (data_dir / lost.path).unlink()
    fetch.bring(source, STUDY, intake, "SALSA_NODE", 10)
    assert kept(store, data_dir) == {uid: data_set(content) for uid, content in sent.items()}


@pytest.mark.parametrize("way", ["C-GET", "C-MOVE", "WADO-RS"])
def test_what_else_the_study_holds_stays_there(
    pacs: Pacs,
    sent: dict[str, bytes],
    store: Store,
    data_dir: Path,
    intake: Intake,
    door: ListenerSettings,
    tmp_path: Path,
    way: str,
) -> None:
    """Our own results, a dose report: Orthanc ends a C-GET at the first object that has no context."""
    others = [(KeyObjectSelectionDocumentStorage, "KO"), (XRayRadiationDoseSRStorage, "SR")]
    for sop_class, modality in others:
        pacs.upload(beside(sent, tmp_path, sop_class, modality))
    source = by_web(pacs) if way == "WADO-RS" else by_dicom(pacs)
    with Listener(door, store, data_dir):
        brought = fetch.bring(source, STUDY, intake, "SALSA_NODE", 10, by="move" if way == "C-MOVE" else "auto")
    assert brought == Brought(way, len(sent), 0)
    assert kept(store, data_dir) == {uid: data_set(content) for uid, content in sent.items()}


def test_a_series_that_does_not_come_leaves_the_others(
    pacs: Pacs, sent: dict[str, bytes], store: Store, data_dir: Path, intake: Intake, tmp_path: Path
) -> None:
    pacs.upload(beside(sent, tmp_path, RawDataStorage, "CT"))
    assert fetch.bring(by_dicom(pacs), STUDY, intake, "SALSA_NODE", 10) == Brought("C-GET", len(sent), 1)
    assert kept(store, data_dir) == {uid: data_set(content) for uid, content in sent.items()}


def test_a_study_without_ct_is_told(pacs: Pacs, sent: dict[str, bytes], intake: Intake, tmp_path: Path) -> None:
    (study,) = pacs.json("/tools/find", {"Level": "Study", "Query": {"StudyInstanceUID": STUDY}})  # type: ignore[misc]
    path = beside(sent, tmp_path, KeyObjectSelectionDocumentStorage, "KO")
    pacs.delete(f"/studies/{study}")
    for source in (by_dicom(pacs), by_web(pacs)):
        with pytest.raises(DestinationRefused, match="no series of it"):
            fetch.bring(source, STUDY, intake, "SALSA_NODE", 10)
    pacs.upload(path)
    for source in (by_dicom(pacs), by_web(pacs)):
        with pytest.raises(DestinationRefused, match="holds KO of it, and no CT"):
            fetch.bring(source, STUDY, intake, "SALSA_NODE", 10)


def beside(sent: dict[str, bytes], folder: Path, sop_class: str, modality: str) -> Path:
    """The file of another object in the same study, in a series of its own."""
    ds = pydicom.dcmread(BytesIO(next(iter(sent.values()))))
    del ds.PixelData
    ds.Modality, ds.SOPClassUID = modality, sop_class
    ds.SeriesInstanceUID, ds.SOPInstanceUID = generate_uid(), generate_uid()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = sop_class, ds.SOPInstanceUID
    path = folder / f"{modality}-{ds.SOPInstanceUID}.dcm"
    ds.save_as(path)
    return path


def test_c_move_brings_it_to_our_door(
    pacs: Pacs, sent: dict[str, bytes], store: Store, data_dir: Path, intake: Intake, door: ListenerSettings
) -> None:
    with Listener(door, store, data_dir):
        brought = fetch.bring(by_dicom(pacs), STUDY, intake, "SALSA_NODE", 10, by="move")
    assert brought == Brought("C-MOVE", len(sent), 0)
    assert kept(store, data_dir) == {uid: data_set(content) for uid, content in sent.items()}
    with pytest.raises(DeliveryError, match="C-MOVE to NOBODY"):
        fetch.bring(by_dicom(pacs), STUDY, intake, "NOBODY", 10, by="move")


def test_rerun_of_a_purged_study_fetches_its_images(
    pacs: Pacs, sent: dict[str, bytes], store: Store, data_dir: Path, intake: Intake, tmp_path: Path
) -> None:
    """By the commands, as an admin would."""
    (tmp_path / "node.toml").write_text(
        f"""
[node]
data_dir = "{data_dir}"
store_url = "sqlite:///{tmp_path / "record.sqlite"}"
[pipeline]
name = "demo"
[query]
ae_title = "{orthanc_peer.AE_TITLE}"
host = "127.0.0.1"
port = {pacs.dicom_port}
"""
    )

    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salsa_node", *arguments, "--config", str(tmp_path / "node.toml")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    there = cli("fetch", "--patient", "X-1", "--dry-run", "--json")
    assert [row["images"] for row in json.loads(there.stdout)] == [len(sent)]
    assert store.studies() == ()
    got = cli("fetch", "--study", STUDY, "--json")
    assert (got.returncode, json.loads(got.stdout)[0]["taken"]) == (0, len(sent)), got.stderr
    assert "Nobody" not in got.stdout + got.stderr
    assert cli("fetch", "--accession", "none").returncode == 1
    assert cli("fetch").returncode == 2
    for wrong in (["--study", "1.2.*"], ["--study", STUDY, "--date", "1999"], ["--study", STUDY, "--by", "post"]):
        refused = cli("fetch", *wrong)
        assert (refused.returncode, "expected" in refused.stderr) == (2, True), refused.stderr

    store.complete_series(LATER, LATER)
    store.study_assembled(store.study(STUDY), "", LATER)
    assert cli("purge", STUDY, "--yes").returncode == 0
    assert store.instances_of(STUDY) == ()
    again = cli("rerun", STUDY)
    assert again.returncode == 0, again.stderr
    assert "they are fetched from query" in again.stderr
    assert kept(store, data_dir) == {uid: data_set(content) for uid, content in sent.items()}
    assert "study.fetched" in [event.name for event in store.events_of(STUDY)]
    assert [(entry.action, entry.study_uid) for entry in Trail(data_dir).entries()] == [
        (f"command.{word}", STUDY) for word in ("fetch", "purge", "fetch", "rerun")
    ]


def test_an_archive_that_offers_nothing_says_what_to_allow(intake: Intake) -> None:
    ae = AE("ARCHIVE")
    ae.add_supported_context("1.2.840.10008.1.1")

    def answer(event: evt.Event) -> Iterator[tuple[int, pydicom.Dataset | None]]:
        series = pydicom.Dataset()
        series.SeriesInstanceUID = "1.2.3"
        yield 0xFF00, series

    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_FIND, answer)])
    assert server is not None
    source = Destination("archive", "ARCHIVE", "127.0.0.1", server.server_address[1])
    try:
        with pytest.raises(DestinationRefused, match="offers no C-FIND; allow our AE title"):
            fetch.find(source, Wanted(study_uid=STUDY), 10)
        server.contexts = [*server.contexts, build_context(FIND)]
        with pytest.raises(DestinationRefused, match="offers no C-GET; try --by move"):
            fetch.bring(source, STUDY, intake, "SALSA_NODE", 10, by="get")
        with pytest.raises(DestinationRefused, match="neither C-GET nor C-MOVE"):
            fetch.bring(source, STUDY, intake, "SALSA_NODE", 10)
    finally:
        ae.shutdown()


STUDIES = [
    {"StudyInstanceUID": "1.2.1", "AccessionNumber": "A1", "PatientID": "P1", "StudyDate": "20260131"},
    {"StudyInstanceUID": "1.2.2", "AccessionNumber": "A2", "PatientID": "P2", "StudyDate": "20260201"},
    {"StudyInstanceUID": "1.2.3", "AccessionNumber": "", "PatientID": "P10 ", "StudyDate": ""},
]


@contextmanager
def careless(way: str) -> Iterator[Destination]:
    """An archive that names all of `STUDIES`, whatever it is asked for."""
    named = [pydicom.Dataset() for _ in STUDIES]
    for ds, values in zip(named, STUDIES, strict=True):
        for keyword, value in values.items():
            setattr(ds, keyword, value)
    if way == "C-FIND":
        ae = AE("ARCHIVE")
        ae.add_supported_context(FIND)
        handlers = [(evt.EVT_C_FIND, lambda _: ((0xFF00, ds) for ds in named))]
        server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)  # type: ignore[arg-type]
        assert server is not None
        yield Destination("archive", "ARCHIVE", "127.0.0.1", server.server_address[1])
        ae.shutdown()
        return

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps([ds.to_json_dict() for ds in named]).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield Destination("archive", url=f"http://127.0.0.1:{web.server_port}")
        web.shutdown()
        thread.join()


@pytest.mark.parametrize("way", ["C-FIND", "QIDO-RS"])
def test_what_an_archive_names_unasked_is_left_there(way: str) -> None:
    """Nobody else's prior comes because a service passes over a key that it does not know."""
    found = {
        Wanted(study_uid="1.2.1"): ["1.2.1"],
        Wanted(accession_number="A2"): ["1.2.2"],
        Wanted(accession_number="A?"): ["1.2.1", "1.2.2"],
        Wanted(patient_id="P1"): ["1.2.1"],
        Wanted(patient_id="P1*"): ["1.2.3", "1.2.1"],
        Wanted(patient_id="P1*", study_date="20260131"): ["1.2.1"],
        Wanted(patient_id="P*", study_date="20260201-"): ["1.2.2"],
        Wanted(patient_id="P*", study_date="-20260131"): ["1.2.1"],
        Wanted(patient_id="P*", study_date="20260101-20260131"): ["1.2.1"],
    }
    with careless(way) as source:
        for wanted, uids in found.items():
            assert [one.study_uid for one in fetch.find(source, wanted, 10)] == uids, wanted
        with pytest.raises(DestinationRefused, match="named 3 studies and none that was asked for") as refused:
            fetch.find(source, Wanted(patient_id="P"), 10)
    assert "P1" not in str(refused.value)


def test_many_studies_are_asked_about_and_a_machine_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(fetch.Found(f"1.2.{n}", "", "", 1) for n in range(cli_fetch.MANY + 1))
    monkeypatch.setattr(fetch, "find", lambda *_: found)
    (tmp_path / "node.toml").write_text(f'[node]\ndata_dir = "{tmp_path}"\n[query]\nae_title = "X"\n')
    Store.open(StoreSettings(f"sqlite:///{tmp_path / 'salsa_node.sqlite'}"), create=True).close()
    with pytest.raises(typer.BadParameter, match="add --yes"):
        cli_fetch.fetch(patient="P", config_file=tmp_path / "node.toml", as_json=True)
    asked: list[str] = []
    monkeypatch.setattr(typer, "confirm", lambda question, **_: asked.append(question))
    monkeypatch.setattr(cli_fetch, "bring", lambda *_: Brought("C-GET", 1, 0))
    cli_fetch.fetch(patient="P", config_file=tmp_path / "node.toml")
    assert asked == ["fetch 11 studies from query?"]
    cli_fetch.fetch(patient="P", config_file=tmp_path / "node.toml", dry_run=True)
    monkeypatch.setattr(fetch, "find", lambda *_: found[1:])
    cli_fetch.fetch(patient="P", config_file=tmp_path / "node.toml")
    assert len(asked) == 1
    monkeypatch.setattr(cli_fetch, "bring", lambda *_: Brought("C-GET", 5, 1))
    with pytest.raises(SystemExit) as ended:
        cli_fetch.fetch(patient="P", config_file=tmp_path / "node.toml")
    assert ended.value.code == 1, "not all of it came"


def test_a_rerun_fetches_what_is_gone_and_does_with_what_is_left_where_there_is_no_archive(
    store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_instance(NewInstance("1.2.1.1", "1.2.1", "1.2", "1.5", "1.6", "kept.dcm", "0" * 32, 4, "CT1"), T0)
    study = store.study("1.2")
    alone = replace(Config(), node=NodeSettings(data_dir))
    beside_an_archive = replace(alone, query=QuerySettings("ARCHIVE"))
    asked: list[str] = []
    monkeypatch.setattr(cli_fetch, "bring", lambda settings, record, archive, uid: asked.append(uid))
    data_dir.mkdir(exist_ok=True)
    (data_dir / "kept.dcm").write_bytes(b"here")
    assert cli_fetch.brought_back(beside_an_archive, store, study) == study
    assert asked == []
    (data_dir / "kept.dcm").unlink()
    assert cli_fetch.brought_back(alone, store, study) == study
    assert asked == []
    assert cli_fetch.brought_back(beside_an_archive, store, study) == study
    assert asked == ["1.2"]
    store.complete_series(LATER, LATER)
    store.study_assembled(study, "", LATER)
    store.purge("1.2", "by hand", LATER, lambda _: None)
    with pytest.raises(ConfigError, match=r"were purged here; no archive to fetch from: configure \[query\]"):
        cli_fetch.brought_back(alone, store, store.study("1.2"))


def test_what_an_archive_could_not_send_is_counted() -> None:
    def ask(_: pydicom.Dataset) -> Iterator[tuple[pydicom.Dataset, None]]:
        for status, went, missed in ((0xFF00, 3, 0), (0xFF00, 3, 1), (0xB000, 4, 2)):
            told = pydicom.Dataset()
            told.Status = status
            told.NumberOfCompletedSuboperations, told.NumberOfFailedSuboperations = went, missed
            yield told, None

    series = [fetch._CtSeries("1.1", 6), fetch._CtSeries("1.2", 6)]
    source = Destination("archive", "ARCHIVE", "127.0.0.1", 104)
    assert fetch._retrieved(source, "C-MOVE", STUDY, series, ask) == (8, 4)


def test_what_we_did_not_keep_is_counted_though_the_archive_does_not_say_so(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By C-GET: an archive's own count may pass over what it was refused."""
    ae = AE("ARCHIVE")
    ae.add_supported_context(fetch.GET)
    ae.add_supported_context(CTImageStorage, ExplicitVRLittleEndian, scu_role=True, scp_role=True)

    def send(_: evt.Event) -> Iterator[object]:
        yield 1
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, "1.2.3"  # of no study
        yield 0xFF00, ds

    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_GET, send)])  # type: ignore[arg-type]
    assert server is not None
    source = Destination("archive", "ARCHIVE", "127.0.0.1", server.server_address[1])

    def careless_count(*words: object) -> tuple[int, int]:
        ds = pydicom.Dataset()
        ds.QueryRetrieveLevel, ds.StudyInstanceUID = "STUDY", STUDY
        return len(list(words[-1](ds))), 0  # type: ignore[operator]

    monkeypatch.setattr(fetch, "_retrieved", careless_count)
    brought = fetch._by_get(source, STUDY, [fetch._CtSeries("1.1", 1)], intake, "SALSA_NODE", 10)
    ae.shutdown()
    assert brought == Brought("C-GET", 0, 1)


def test_a_series_of_another_study_is_left_there(intake: Intake) -> None:
    """And only it: an archive need not name the study again."""
    asked: list[str] = []
    ae = AE("ARCHIVE")
    for uid in (FIND, fetch.MOVE):
        ae.add_supported_context(uid)

    def name(_: evt.Event) -> Iterator[tuple[int, pydicom.Dataset]]:
        for study_uid, series_uid in ((STUDY, "1.1"), ("1.2.9", "1.2"), ("", "1.3")):
            ds = pydicom.Dataset()
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality = study_uid, series_uid, "CT"
            yield 0xFF00, ds

    def move(event: evt.Event) -> Iterator[object]:
        asked.append(event.identifier.SeriesInstanceUID)
        yield None, None

    handlers = [(evt.EVT_C_FIND, name), (evt.EVT_C_MOVE, move)]
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)  # type: ignore[arg-type]
    assert server is not None
    source = Destination("archive", "ARCHIVE", "127.0.0.1", server.server_address[1])
    with pytest.raises(DeliveryError, match="does not know where that is"):
        fetch.bring(source, STUDY, intake, "SALSA_NODE", 10)
    ae.shutdown()
    assert asked == ["1.1", "1.3"]


def test_a_folder_is_no_archive(intake: Intake) -> None:
    with pytest.raises(DestinationRefused, match="from a folder"):
        fetch.bring(Destination("share", folder="/x"), STUDY, intake, "SALSA_NODE", 10)
