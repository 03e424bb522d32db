from __future__ import annotations

import errno
import logging
import random
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pydicom
import pytest
import xxhash
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ComprehensiveSRStorage,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
)
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dsutils import encode
from told import events

from salsa_node import durable, intake, notes
from salsa_node import listener as listener_module
from salsa_node.association import taking_turns
from salsa_node.errors import ConfigError, StoreError
from salsa_node.instance_header import (
    CANNOT_UNDERSTAND,
    CONTENT_CONFLICT,
    DOES_NOT_MATCH,
    NODE_FAILED,
    OUT_OF_RESOURCES,
    PATIENT_CONFLICT,
    SOP_CLASS_NOT_SUPPORTED,
    SUCCESS,
)
from salsa_node.listener import Listener
from salsa_node.settings import ListenerSettings, Peer, invalid_peer
from salsa_node.store import NewObject, SeriesState, Store

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
STUDY, SERIES = "1.2.3", "1.2.3.1"
IDENTITY = ("Doe^Jane", "ID-OF-JANE", "19700101")


@contextmanager
def listening(store: Store, data_dir: Path, **settings: object) -> Iterator[Listener]:
    settings.setdefault("min_free_gib", 0.0)
    with Listener(ListenerSettings(port=0, **settings), store, data_dir, clock=lambda: T0) as door:  # type: ignore[arg-type]
        yield door


@pytest.fixture
def listener(store: Store, data_dir: Path) -> Iterator[Listener]:
    with listening(store, data_dir) as door:
        yield door


def a_slice(number: int = 1, syntax: UID = ExplicitVRLittleEndian, **changes: object) -> Dataset:
    """A small CT image; a change to None leaves the element out."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = f"{SERIES}.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = STUDY, SERIES
    ds.StudyDate, ds.Modality, ds.AccessionNumber = "20260101", "CT", "ACC7"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = IDENTITY
    ds.SeriesNumber, ds.InstanceNumber = 2, number
    ds.Rows = ds.Columns = 4
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = 15, 1, 1, "MONOCHROME2"
    ds.add_new("PixelData", "OW", bytes([number % 256]) * 32)
    for keyword, value in changes.items():
        delattr(ds, keyword)
        if value is not None:
            setattr(ds, keyword, value)
    return ds


def on_the_wire(ds: Dataset) -> bytes:
    syntax = ds.file_meta.TransferSyntaxUID
    content = encode(ds, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    assert content is not None
    return content


@contextmanager
def associated(
    port: int, *contexts: tuple[UID, UID], calling: str = "CT1", called: str = "SALSA_NODE"
) -> Iterator[Association]:
    ae = AE(calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
    for sop_class, syntax in contexts or [(CTImageStorage, ExplicitVRLittleEndian)]:
        ae.add_requested_context(sop_class, syntax)
    assoc = ae.associate("127.0.0.1", port, ae_title=called, evt_handlers=[(evt.EVT_CONN_OPEN, taking_turns)])
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()


def sent(port: int, *images: Dataset) -> list[int]:
    contexts = {(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID) for ds in images}
    with associated(port, *contexts) as assoc:
        assert assoc.is_established
        return [assoc.send_c_store(ds).Status for ds in images]


@pytest.fixture
def send_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bytes], Dataset]:
    """Send any bytes as the data set of a C-STORE request that names a_slice()."""

    def send(port: int, content: bytes) -> Dataset:
        with monkeypatch.context() as patch, associated(port) as assoc:
            patch.setattr("pynetdicom.association.encode", lambda *_: content)
            return assoc.send_c_store(a_slice())

    return send


def kept(data_dir: Path) -> list[str]:
    return sorted(path.relative_to(data_dir).as_posix() for path in data_dir.rglob("*") if path.is_file())


def told(store: Store) -> list[str]:
    for thread in threading.enumerate():  # a rejection is noted after the caller has heard of it
        if isinstance(thread, Association) and thread.is_acceptor and not thread.is_established:
            thread.join(20)
    return [f"{event.name} {event.detail}" for event in events(store)]


# ---- what comes in ------------------------------------------------------------------------------


def test_an_image_is_on_disk_and_in_the_store_when_the_sender_hears_success(
    listener: Listener, store: Store, data_dir: Path
) -> None:
    ds = a_slice()
    assert sent(listener.port, ds) == [SUCCESS]
    row = store.instance(ds.SOPInstanceUID)
    assert row is not None
    assert row.path == f"studies/{STUDY}/{SERIES}/{SERIES}.1.dcm"
    assert kept(data_dir) == [row.path]
    content = (data_dir / row.path).read_bytes()
    assert content.endswith(on_the_wire(ds)), "the bytes are those that came"
    assert row.size_bytes == len(content)
    assert row.digest == xxhash.xxh3_128_hexdigest(on_the_wire(ds))
    assert (row.sop_class_uid, row.transfer_syntax_uid) == (CTImageStorage, ExplicitVRLittleEndian)
    read = pydicom.dcmread(data_dir / row.path)
    assert (read.PatientID, read.InstanceNumber) == ("ID-OF-JANE", 1)
    assert read.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
    study, series = store.study(STUDY), store.series_of(STUDY)[0]
    assert (study.calling_ae, study.accession_number, study.patient_id, study.study_date) == (
        "CT1",
        "ACC7",
        "ID-OF-JANE",
        "20260101",
    )
    assert (series.modality, series.series_number, series.state, series.last_instance_at) == (
        "CT",
        2,
        SeriesState.RECEIVING,
        T0,
    )


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_every_encoding_is_kept_as_it_came(listener: Listener, store: Store, data_dir: Path, syntax: UID) -> None:
    ds = a_slice(syntax=syntax)
    assert sent(listener.port, ds) == [SUCCESS]
    row = store.instances_of(STUDY)[0]
    assert row.transfer_syntax_uid == syntax
    assert (data_dir / row.path).read_bytes().endswith(on_the_wire(ds))
    assert pydicom.dcmread(data_dir / row.path).PixelData == ds.PixelData


def test_a_compressed_image_is_kept_as_it_came(listener: Listener, data_dir: Path) -> None:
    ds = a_slice(syntax=JPEG2000Lossless)
    frame = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51 not decoded here"])
    ds.PixelData = frame
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    assert sent(listener.port, ds) == [SUCCESS]
    assert pydicom.dcmread(data_dir / kept(data_dir)[0]).PixelData == frame


@pytest.mark.parametrize(("sop_class", "modality"), [(MRImageStorage, "MR"), (ComprehensiveSRStorage, "SR")])
def test_what_else_a_routed_study_holds_is_taken(
    listener: Listener, store: Store, sop_class: UID, modality: str
) -> None:
    ds = a_slice(SOPClassUID=sop_class, Modality=modality, PixelData=None)
    assert sent(listener.port, ds) == [SUCCESS]
    assert store.series_of(STUDY)[0].modality == modality


def test_odd_values_beside_the_identifiers_do_not_matter(listener: Listener, store: Store) -> None:
    ds = a_slice(Modality=None, AccessionNumber=None, SeriesNumber=None, PatientID=None, StudyDate=None)
    ds.add_new("PatientID", "LO", "Müller".encode("latin-1").decode("latin-1"))
    ds.SpecificCharacterSet = "ISO_IR 100"
    assert sent(listener.port, ds) == [SUCCESS]
    assert store.study(STUDY).patient_id == "Müller"
    assert store.series_of(STUDY)[0].series_number is None


def test_dcmtk_sends_and_echoes(listener: Listener, store: Store, tmp_path: Path, tool: Callable[[str], str]) -> None:
    called = ["-aec", "SALSA_NODE", "127.0.0.1", str(listener.port)]
    assert subprocess.run([tool("echoscu"), *called], check=False, capture_output=True).returncode == 0
    for number in range(1, 6):
        ds = a_slice(number)
        ds.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    files = [str(tmp_path / f"{number}.dcm") for number in range(1, 6)]
    done = subprocess.run([tool("dcmsend"), "-v", *called, *files], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(store.instances_of(STUDY)) == 5


# ---- the same again -----------------------------------------------------------------------------


def test_a_duplicate_is_success_and_no_second_copy(listener: Listener, store: Store, data_dir: Path) -> None:
    assert sent(listener.port, a_slice(), a_slice()) == [SUCCESS, SUCCESS]
    assert len(kept(data_dir)) == 1
    assert store.series_of(STUDY)[0].duplicates == 1


@pytest.mark.parametrize("change", [{"Rows": 2}, {"SeriesInstanceUID": "9.1"}, {"StudyInstanceUID": "9"}])
def test_other_content_under_a_known_uid_is_set_aside_and_overwrites_nothing(
    listener: Listener, store: Store, data_dir: Path, change: dict[str, object]
) -> None:
    other = a_slice(**change)
    assert sent(listener.port, a_slice(), other, other) == [SUCCESS, CONTENT_CONFLICT, CONTENT_CONFLICT]
    (row,) = store.instances_of(STUDY)
    assert (data_dir / row.path).read_bytes().endswith(on_the_wire(a_slice()))
    (aside,) = store.quarantined_of(other.StudyInstanceUID)
    assert (aside.sop_instance_uid, aside.times) == (row.sop_instance_uid, 2)
    assert (data_dir / aside.path).read_bytes().endswith(on_the_wire(other))
    assert aside.digest == xxhash.xxh3_128_hexdigest(on_the_wire(other))
    assert kept(data_dir) == sorted([row.path, aside.path])
    assert [line.split()[0] for line in told(store)].count("instance.quarantined") == 1


def test_a_series_does_not_move_to_another_study(listener: Listener, store: Store, data_dir: Path) -> None:
    assert sent(listener.port, a_slice(1), a_slice(2, StudyInstanceUID="9")) == [SUCCESS, CONTENT_CONFLICT]
    assert [path.split("/")[0] for path in kept(data_dir)] == ["quarantine", "studies"]
    assert [study.study_uid for study in store.studies()] == [STUDY]
    assert any("this series is stored already under another study" in line for line in told(store))


def test_one_study_under_two_patient_ids_is_kept_apart(listener: Listener, store: Store, data_dir: Path) -> None:
    images = a_slice(1), a_slice(2, PatientID="ID-OF-JOHN"), a_slice(3, PatientID=None), a_slice(4)
    assert sent(listener.port, *images) == [SUCCESS, PATIENT_CONFLICT, SUCCESS, SUCCESS]
    assert [row.sop_instance_uid[-1] for row in store.instances_of(STUDY)] == ["1", "3", "4"]
    (aside,) = store.quarantined_of(STUDY)
    assert aside.reason == "this study is stored already under another Patient ID"
    assert pydicom.dcmread(data_dir / aside.path).PatientID == "ID-OF-JOHN"
    assert not any("ID-OF" in line for line in told(store))


def test_the_first_patient_id_that_comes_is_the_study_s(listener: Listener, store: Store) -> None:
    images = a_slice(1, PatientID=None), a_slice(2), a_slice(3, PatientID="ID-OF-JOHN")
    assert sent(listener.port, *images) == [SUCCESS, SUCCESS, PATIENT_CONFLICT]
    assert store.study(STUDY).patient_id == "ID-OF-JANE"


def test_a_sop_class_that_was_not_agreed_upon_is_not_supported(
    listener: Listener, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with associated(listener.port) as assoc:
        monkeypatch.setattr(assoc, "_get_valid_context", lambda *_, **__: assoc.accepted_contexts[0])
        assert assoc.send_c_store(a_slice(SOPClassUID=MRImageStorage)).Status == SOP_CLASS_NOT_SUPPORTED
    assert store.studies() == ()


def test_two_senders_with_one_uid_at_once_leave_file_and_row_of_one(
    listener: Listener, store: Store, data_dir: Path
) -> None:
    images = [a_slice(1, Rows=rows) for rows in (1, 2, 3, 4)]
    with ThreadPoolExecutor(4) as pool:
        statuses = [answers[0] for answers in pool.map(lambda ds: sent(listener.port, ds), images)]
    assert sorted(statuses) == [SUCCESS] + [CONTENT_CONFLICT] * 3
    (row,) = store.instances_of(STUDY)
    winner = on_the_wire(images[statuses.index(SUCCESS)])
    assert (data_dir / row.path).read_bytes().endswith(winner)
    assert row.digest == xxhash.xxh3_128_hexdigest(winner)
    assert len(store.quarantined_of(STUDY)) == 3


def test_many_senders_of_one_study_shuffled_and_doubled_make_one_study(
    listener: Listener, store: Store, data_dir: Path
) -> None:
    def shuffled(seed: int) -> list[Dataset]:
        images = [a_slice(number, InstanceNumber=number) for number in (*range(1, 31), seed + 1, seed + 2)]
        random.Random(seed).shuffle(images)
        return images

    with ThreadPoolExecutor(10) as pool:
        statuses = list(pool.map(lambda seed: sent(listener.port, *shuffled(seed)), range(10)))
    assert {status for answers in statuses for status in answers} == {SUCCESS}
    assert store.study(STUDY).instances == len(store.instances_of(STUDY)) == len(kept(data_dir)) == 30
    (series,) = store.series_of(STUDY)
    assert (series.instances, series.duplicates) == (30, 10 * 32 - 30)


def test_a_disk_nearly_full_refuses_associations_until_there_is_room(
    store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [0.9]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0] * (1 << 30)))
    with listening(store, data_dir, min_free_gib=1.0) as door:
        with associated(door.port) as assoc:
            assert assoc.is_rejected
            assert (assoc.acceptor.primitive.result, assoc.acceptor.primitive.diagnostic) == (0x02, 0x01)
        free[0] = 1.1
        assert sent(door.port, a_slice()) == [SUCCESS]
    assert any("0.9 GiB are free, listener.min_free_gib is not" in line for line in told(store))


def test_a_file_that_a_crash_left_without_a_row_is_replaced(listener: Listener, store: Store, data_dir: Path) -> None:
    orphan = data_dir / "studies" / STUDY / SERIES / f"{SERIES}.1.dcm"
    durable.write(orphan, [b"half a story"])
    assert sent(listener.port, a_slice()) == [SUCCESS]
    assert orphan.read_bytes().endswith(on_the_wire(a_slice()))
    assert len(store.instances_of(STUDY)) == 1


def test_a_file_that_was_lost_comes_back_with_the_same_content(
    listener: Listener, store: Store, data_dir: Path
) -> None:
    sent(listener.port, a_slice())
    file = data_dir / store.instances_of(STUDY)[0].path
    file.unlink()
    assert sent(listener.port, a_slice()) == [SUCCESS]
    assert file.read_bytes().endswith(on_the_wire(a_slice()))


def test_our_own_results_are_taken_without_becoming_input(listener: Listener, store: Store, data_dir: Path) -> None:
    sent(listener.port, a_slice())
    store.complete_series(T0, T0)
    run = store.queue_run(STUDY, "demo", "d", T0)
    store.claim_run("w", 60, T0)
    store.produce(run.id, "w", [NewObject("SEG", "2.25.7", "1.9", "p", "0" * 64)], [], "lesions", None, "x", T0)
    assert sent(listener.port, a_slice(SOPInstanceUID="2.25.7", SeriesInstanceUID="2.25.8")) == [SUCCESS]
    assert len(store.instances_of(STUDY)) == len(kept(data_dir)) == 1
    assert told(store)[-1].startswith("instance.own_result")


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
def test_a_missing_uid_is_refused(
    listener: Listener, send_bytes: Callable[[int, bytes], Dataset], store: Store, keyword: str
) -> None:
    answer = send_bytes(listener.port, on_the_wire(a_slice(**{keyword: None})))
    assert answer.Status == CANNOT_UNDERSTAND
    assert answer.ErrorComment.endswith("UID is missing")
    assert store.studies() == ()


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_a_uid_that_could_name_a_path_is_refused(
    listener: Listener, send_bytes: Callable[[int, bytes], Dataset], data_dir: Path, store: Store, keyword: str
) -> None:
    content = on_the_wire(a_slice(**{keyword: "7.7.7.7.77"}))
    for bad in (b"../../../a", b"/etc/passw", b"1.2.3..4.5", b"1.2.3/4.56", b"..........", b"1.2.\x003.456"):
        answer = send_bytes(listener.port, content.replace(b"7.7.7.7.77", bad))
        assert answer.Status == CANNOT_UNDERSTAND, bad
        assert answer.ErrorComment.endswith("is not digits and dots, at most 64")
    assert kept(data_dir) == []
    assert store.studies() == ()


@pytest.mark.filterwarnings("ignore:Expected explicit VR")  # pydicom says so of noise before it gives up
def test_what_ends_too_early_or_is_no_data_set_is_refused_and_the_node_goes_on(
    listener: Listener, send_bytes: Callable[[int, bytes], Dataset], data_dir: Path
) -> None:
    whole = on_the_wire(a_slice())
    for content in (whole[:40], whole[:61], b"\xff" * 300, b"GET / HTTP/1.1\r\n" * 9, bytes(300)):
        answer = send_bytes(listener.port, content)
        assert answer.Status == CANNOT_UNDERSTAND, content[:20]
        assert kept(data_dir) == []
    assert sent(listener.port, a_slice()) == [SUCCESS]


def test_a_data_set_that_cannot_be_inflated_is_refused(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    with associated(listener.port, (CTImageStorage, DeflatedExplicitVRLittleEndian)) as assoc:
        monkeypatch.setattr("pynetdicom.association.encode", lambda *_: b"\x07 this was never deflated")
        assert assoc.send_c_store(a_slice(syntax=DeflatedExplicitVRLittleEndian)).Status == CANNOT_UNDERSTAND


@pytest.mark.parametrize("change", [{"SOPInstanceUID": "1.2.3.1.99"}, {"SOPClassUID": MRImageStorage}])
def test_a_data_set_that_is_not_what_the_request_named_is_refused(
    listener: Listener, send_bytes: Callable[[int, bytes], Dataset], store: Store, change: dict[str, str]
) -> None:
    assert send_bytes(listener.port, on_the_wire(a_slice(**change))).Status == DOES_NOT_MATCH
    assert store.studies() == ()


def test_more_senders_than_pynetdicom_lets_wait_need_not_try_again_after_a_second(listener: Listener) -> None:
    (server,) = listener._servers
    assert server.socket is not None
    longest = struct.unpack_from("I", server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32), 28)[0]
    assert longest >= 4 * 20, "of a listening socket Linux tells here how many connections may wait"


def test_noise_on_the_port_does_not_end_the_node(listener: Listener) -> None:
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x01\x00\xff\xff\xff\xff", b""):
        with socket.create_connection(("127.0.0.1", listener.port)) as raw:
            raw.sendall(noise)
    assert sent(listener.port, a_slice()) == [SUCCESS]


# ---- what can fail here -------------------------------------------------------------------------


def test_a_full_disk_is_told_to_the_sender_and_leaves_nothing(
    listener: Listener, store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.Staged, "settle", full)
        assert sent(listener.port, a_slice()) == [OUT_OF_RESOURCES]
    assert store.studies() == ()
    assert told(store) == ["instance.refused 0xA700 cannot write: No space left on device, from CT1"]
    assert sent(listener.port, a_slice()) == [SUCCESS]


def test_a_folder_that_became_a_file_is_told_to_the_sender(listener: Listener, data_dir: Path) -> None:
    shutil.rmtree(data_dir / "incoming", ignore_errors=True)
    (data_dir / "incoming").touch()
    assert sent(listener.port, a_slice()) == [OUT_OF_RESOURCES]


def test_a_store_that_fails_is_told_to_the_sender_who_may_try_again(
    listener: Listener, store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object) -> None:
        raise StoreError("the store answered OperationalError: database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(store, "add_instances", locked)
        patch.setattr(store, "add_event", locked)
        assert sent(listener.port, a_slice()) == [OUT_OF_RESOURCES]
    assert sent(listener.port, a_slice()) == [SUCCESS]
    assert len(store.instances_of(STUDY)) == len(kept(data_dir)) == 1


def test_a_fault_of_our_own_is_told_to_the_sender(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(intake, "header_of_file", lambda *_: 1 / 0)
        assert sent(listener.port, a_slice()) == [NODE_FAILED]
    assert sent(listener.port, a_slice()) == [SUCCESS]


def test_neither_events_nor_logs_hold_patient_identity(
    listener: Listener,
    store: Store,
    send_bytes: Callable[[int, bytes], Dataset],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    sent(listener.port, a_slice(), a_slice(), a_slice(Rows=2))
    send_bytes(listener.port, on_the_wire(a_slice(SeriesInstanceUID=None)))
    monkeypatch.setattr(durable.Staged, "settle", lambda *_: 1 / 0)
    sent(listener.port, a_slice(5))
    out, err = capfd.readouterr()
    logged = " ".join(str(vars(record)) for record in caplog.records)
    assert "instance.refused" in logged
    for secret in IDENTITY:
        assert secret not in f"{out} {err} {logged} {told(store)}"


# ---- who may come in ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "calling", "welcome"),
    [
        (Peer("*", "127.0.0.1"), "ANYBODY", True),
        (Peer("CT1", "127.0.0.0/8"), "CT1", True),
        (Peer("CT1", "*"), "CT1", True),
        (Peer("CT1", "*"), "CT2", False),
        (Peer("*", "192.0.2.1"), "CT1", False),
        (Peer("CT1", "192.0.2.0/24"), "CT1", False),
        (Peer("*", "::1"), "CT1", False),
        (None, "CT1", False),
    ],
)
def test_only_who_is_allowed_gets_an_association(
    store: Store, data_dir: Path, allowed: Peer | None, calling: str, welcome: bool
) -> None:
    with listening(store, data_dir, allowed=() if allowed is None else (allowed,)) as door:
        with associated(door.port, calling=calling) as assoc:
            assert assoc.is_established is welcome
            assert assoc.is_rejected is not welcome
        assert any("node.association_rejected" in line and calling in line for line in told(store)) is not welcome


@pytest.mark.parametrize("any_title", [False, True])
def test_a_caller_must_call_us_by_our_name_unless_any_will_do(store: Store, data_dir: Path, any_title: bool) -> None:
    with (
        listening(store, data_dir, any_called_ae_title=any_title) as door,
        associated(door.port, called="OTHER") as assoc,
    ):
        assert assoc.is_established is any_title


@pytest.mark.parametrize("fast", [True, False])
def test_a_study_keeps_the_name_by_which_its_sender_called_us(store: Store, data_dir: Path, fast: bool) -> None:
    settings = ListenerSettings(port=0, min_free_gib=0.0, fast=fast)
    with Listener(settings, store, data_dir, clock=lambda: T0, also_called=["SALSA_TEST"]) as door:
        with associated(door.port, called="SALSA_TEST") as assoc:
            assert assoc.send_c_store(a_slice()).Status == SUCCESS
        assert store.study(STUDY).called_ae == "SALSA_TEST"
        assert sent(door.port, a_slice(2)) == [SUCCESS]
        assert store.study(STUDY).called_ae == "SALSA_NODE"
        with associated(door.port, called="OTHER") as assoc:
            assert assoc.is_rejected


def test_bare_connections_give_their_places_back_soon(
    store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "REQUEST_S", 0.3)
    with listening(store, data_dir, max_associations=2) as door:
        idle = [socket.create_connection(("127.0.0.1", door.port)) for _ in range(6)]
        gone = threading.Event()
        for _ in range(200):
            with associated(door.port) as assoc:
                if assoc.is_established:
                    break
            gone.wait(0.1)
        else:
            pytest.fail("connections that never asked for an association kept every place")
        for connection in idle:
            connection.close()


def test_a_door_closes_on_connections_that_are_no_association(
    store: Store, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(store, data_dir, max_associations=3) as door, associated(door.port) as established:
        assert established.is_established
        bare = [socket.create_connection(("127.0.0.1", door.port)) for _ in range(2)]
        with associated(door.port) as rejected:
            assert rejected.is_rejected
        door.stop()
        for connection in bare:
            connection.settimeout(10)
            assert connection.recv(1) == b""
            connection.close()
    assert "Invalid event" not in caplog.text


def test_more_associations_than_allowed_are_rejected(store: Store, data_dir: Path) -> None:
    with listening(store, data_dir, max_associations=1) as door:
        with associated(door.port) as first, associated(door.port) as second:
            assert first.is_established
            assert second.is_rejected
        assert "more than 1 associations at once" in told(store)[-1]
        assert sent(door.port, a_slice()) == [SUCCESS]


def test_a_rejection_does_not_wait_for_the_store(store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = threading.Event()
    monkeypatch.setattr(store, "add_event", lambda *_: heard.wait(60))
    with listening(store, data_dir, allowed=()) as door:
        try:
            with associated(door.port) as assoc:
                assert assoc.is_rejected
        finally:
            heard.set()
        told(store)


def test_who_knocks_in_vain_again_and_again_is_noted_once_an_hour(
    store: Store, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "salsa_node.notes")
    now = [T0]
    with Listener(ListenerSettings(port=0, allowed=()), store, data_dir, clock=lambda: now[0]) as door:

        def knock(calling: str, seconds: float) -> int:
            now[0] = T0 + timedelta(seconds=seconds)
            with associated(door.port, calling=calling) as assoc:
                assert assoc.is_rejected
            return len(told(store))

        assert [knock("CT1", at) for at in (0, 1, 3599)] == [1, 1, 1]
        assert knock("CT2", 3599) == 2
        assert [knock("CT1", at) for at in (3600, 3601)] == [3, 3]
    levels = [record.levelno for record in caplog.records if "listener.allowed" in record.message]
    assert (levels.count(logging.WARNING), levels.count(logging.DEBUG)) == (3, 3)


def test_what_is_noted_in_an_hour_is_bounded_for_each_kind_of_note(
    store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "_NOTES_AN_HOUR", 2)
    with listening(store, data_dir, allowed=(Peer("CT1"),)) as door:
        assert sent(door.port, *(a_slice(number) for number in range(1, 5))) == [SUCCESS] * 4
        assert sent(door.port, *(a_slice(n, StudyInstanceUID=None) for n in range(1, 5))) == [CANNOT_UNDERSTAND] * 4
        assert [line.split()[0] for line in told(store)].count("instance.refused") == 2
        for calling in ("A", "B", "C"):
            with associated(door.port, calling=calling) as assoc:
                assert assoc.is_rejected
        assert [line.split()[0] for line in told(store)].count("node.association_rejected") == 2


@pytest.mark.parametrize(
    ("address", "welcome"), [("::ffff:127.0.0.1", True), ("::ffff:192.0.2.1", False), ("::1%lo", False)]
)
def test_an_ipv4_caller_of_an_ipv6_port_is_known_by_its_ipv4_address(address: str, welcome: bool) -> None:
    assert listener_module._is_from(Peer("CT1", "127.0.0.0/8"), "CT1", address) is welcome


def test_only_this_user_can_look_into_the_folder_of_images(listener: Listener, data_dir: Path) -> None:
    assert (data_dir / "studies").stat().st_mode & 0o777 == 0o700


def test_peers_can_be_checked_without_a_listener() -> None:
    assert invalid_peer([Peer(), Peer("*", "*"), Peer("*", "2001:db8::/32"), Peer("CT1", "192.0.2.7/24")]) is None
    assert str(invalid_peer([Peer(), Peer("*", "10.0.0")])).endswith("or '*', found '10.0.0'")


def test_an_address_that_is_none_is_refused_before_the_start(store: Store, data_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"listener.allowed: expected an IP address.*found 'pacs.local'"):
        Listener(ListenerSettings(allowed=(Peer("*", "pacs.local"),)), store, data_dir)


# ---- starting and stopping ----------------------------------------------------------------------


def test_a_port_in_use_is_named(store: Store, data_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use; stop the program"):
            Listener(ListenerSettings(port=port), store, data_dir).start()


def test_a_data_folder_that_is_a_file_is_named(store: Store, data_dir: Path) -> None:
    data_dir.touch()
    with pytest.raises(ConfigError, match=r"set node\.data_dir to a folder"):
        Listener(ListenerSettings(port=0), store, data_dir).start()


def test_stopping_ends_associations_and_frees_the_port(store: Store, data_dir: Path) -> None:
    door = Listener(ListenerSettings(port=0), store, data_dir)
    with pytest.raises(ConfigError, match="before it is started"):
        _ = door.port
    door.start()
    port = door.port
    with associated(port) as assoc:
        assert assoc.send_c_store(a_slice()).Status == SUCCESS
        door.stop()
        assoc.join(timeout=20)
        assert not assoc.is_established
    with Listener(ListenerSettings(port=port), store, data_dir) as again:
        assert sent(again.port, a_slice(2)) == [SUCCESS]
