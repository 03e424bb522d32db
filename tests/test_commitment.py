"""Storage commitment: what the node holds is said to be held, on the association that asked or on a new one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import raw_scu
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.association import Association
from told import events

from salsa_node import commitment
from salsa_node.association import taking_turns
from salsa_node.errors import StoreError
from salsa_node.listener import Listener
from salsa_node.settings import DeliverySettings, Destination, ListenerSettings
from salsa_node.store import NewInstance, Store

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
HELD, OTHER_CLASS, LOST, UNKNOWN = (f"2.25.8.1.{number}" for number in (1, 2, 3, 9))
MR = "1.2.840.10008.5.1.4.1.1.4"


@dataclass
class Reports:
    """The reports that a peer got, and how it answers them."""

    status: int = 0
    got: list[tuple[int, Dataset]] = field(default_factory=list)
    came: threading.Event = field(default_factory=threading.Event)

    def take(self, event: evt.Event) -> tuple[int, Dataset | None]:
        self.got.append((event.event_type, event.event_information))
        self.came.set()
        return self.status, None


@pytest.fixture
def port(store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A door that holds three images, of which one lost its file."""
    monkeypatch.setattr(commitment, "SAME_ASSOCIATION_S", 0.05)
    settings = ListenerSettings(port=0, min_free_gib=0.0)
    with Listener(settings, store, data_dir, clock=lambda: T0) as listener:
        with raw_scu.Association(listener.port) as assoc:
            assert [assoc.store(image) for image in raw_scu.images(8, 3, 8)] == [0, 0, 0]
        next(data_dir.rglob(f"{LOST}.dcm")).unlink()
        yield listener.port


def action(*instances: tuple[str, str], transaction_uid: str = "1.2.3.4") -> Dataset:
    ds = Dataset()
    ds.TransactionUID = transaction_uid
    ds.ReferencedSOPSequence = []
    for sop_class, instance in instances:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
        ds.ReferencedSOPSequence.append(item)
    return ds


def everything() -> Dataset:
    return action((raw_scu.CT, HELD), (MR, OTHER_CLASS), (raw_scu.CT, LOST), (raw_scu.CT, UNKNOWN))


@contextmanager
def asking(port: int, reports: Reports, calling: str = "CT1") -> Iterator[Association]:
    ae = AE(calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
    ae.add_requested_context(commitment.SOP_CLASS, ExplicitVRLittleEndian)
    handlers = [(evt.EVT_N_EVENT_REPORT, reports.take), (evt.EVT_CONN_OPEN, taking_turns)]
    assoc = ae.associate("127.0.0.1", port, ae_title="SALSA_NODE", evt_handlers=handlers)
    assert assoc.is_established
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()


def asked(assoc: Association, ds: Dataset, kind: int = 1, instance: str = commitment.SOP_INSTANCE) -> int:
    status, _ = assoc.send_n_action(ds, kind, commitment.SOP_CLASS, instance)
    return int(status.Status)


def failures(told: Dataset) -> dict[str, int]:
    return {item.ReferencedSOPInstanceUID: item.FailureReason for item in told.get("FailedSOPSequence", [])}


def reported(store: Store) -> list[str]:
    """The events about commitment, once the report has gone out or failed."""
    for _ in range(200):
        found = [f"{event.name} {event.detail}" for event in events(store) if event.name.startswith("commitment")]
        if len(found) > 1:
            return found
        threading.Event().wait(0.05)
    return found


def test_who_waits_is_told_on_the_same_association(port: int, store: Store) -> None:
    reports = Reports()
    with asking(port, reports) as assoc:
        assert asked(assoc, everything()) == commitment.SUCCESS
        assert reports.came.wait(20)
        assert reported(store) == ["commitment.asked 4 instances, by CT1", "commitment.reported 3 of 4 not held"]
    ((kind, told),) = reports.got
    assert kind == commitment.SOME_NOT_HELD
    assert told.TransactionUID == "1.2.3.4"
    assert [item.ReferencedSOPInstanceUID for item in told.ReferencedSOPSequence] == [HELD]
    assert failures(told) == {
        OTHER_CLASS: commitment.CONFLICT, LOST: commitment.NO_SUCH_INSTANCE, UNKNOWN: commitment.NO_SUCH_INSTANCE
    }  # fmt: skip
    assert store.due_commitment(T0 + timedelta(days=1)) is None


def test_all_held_is_said_as_such(port: int) -> None:
    reports = Reports()
    with asking(port, reports) as assoc:
        assert asked(assoc, action((raw_scu.CT, HELD))) == commitment.SUCCESS
        assert reports.came.wait(20)
    ((kind, told),) = reports.got
    assert (kind, "FailedSOPSequence" in told) == (commitment.ALL_HELD, False)


def test_images_and_requests_share_an_association(port: int, store: Store) -> None:
    """Of the two ways in, each takes its own messages."""
    reports, ds = Reports(), action((raw_scu.CT, "2.25.8.1.4"))
    ae = AE("CT1")
    ae.add_requested_context(commitment.SOP_CLASS, ExplicitVRLittleEndian)
    ae.add_requested_context(raw_scu.CT, ExplicitVRLittleEndian)
    handlers = [(evt.EVT_N_EVENT_REPORT, reports.take), (evt.EVT_CONN_OPEN, taking_turns)]
    assoc = ae.associate("127.0.0.1", port, ae_title="SALSA_NODE", evt_handlers=handlers)
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = raw_scu.CT, "2.25.8.1.4"
    image.StudyInstanceUID, image.SeriesInstanceUID, image.PatientID = "2.25.8", "2.25.8.1", "MADE"
    image.file_meta = Dataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    assert assoc.send_c_store(image).Status == 0
    assert asked(assoc, ds) == commitment.SUCCESS
    assert reports.came.wait(20)
    assert reported(store)[-1] == "commitment.reported 0 of 1 not held"
    reports.came.clear()
    assert asked(assoc, ds) == commitment.SUCCESS
    image.SOPInstanceUID = "2.25.8.1.5"
    assert assoc.send_c_store(image).Status == 0
    assert reports.came.wait(20)
    for _ in range(200):
        if [event.name for event in events(store)].count("commitment.reported") == 2:
            break
        threading.Event().wait(0.05)
    else:
        pytest.fail("the answer to the second report went astray")
    image.SOPInstanceUID = "2.25.8.1.6"
    assert assoc.send_c_store(image).Status == 0
    assoc.release()


def test_a_transaction_has_a_uid_of_at_most_64_characters() -> None:
    with disable_value_validation():
        longest, too_long = (action((raw_scu.CT, HELD), transaction_uid="1." + "2" * n) for n in (62, 63))
        assert len(commitment.requested(longest)[0]) == 64
        with pytest.raises(ValueError, match="names no transaction"):
            commitment.requested(too_long)


@pytest.mark.parametrize(
    ("ds", "kind", "instance", "status"),
    [
        (everything(), 1, "1.2.3", commitment.NO_SUCH_INSTANCE),
        (everything(), 2, commitment.SOP_INSTANCE, commitment.NO_SUCH_ACTION),
        (action(), 1, commitment.SOP_INSTANCE, commitment.INVALID_ARGUMENT),
        (action((raw_scu.CT, HELD), transaction_uid=""), 1, commitment.SOP_INSTANCE, commitment.INVALID_ARGUMENT),
        (action((raw_scu.CT, "")), 1, commitment.SOP_INSTANCE, commitment.INVALID_ARGUMENT),
    ],
)
def test_what_is_no_request_is_refused(
    port: int, store: Store, ds: Dataset, kind: int, instance: str, status: int
) -> None:
    with asking(port, Reports()) as assoc:
        assert asked(assoc, ds, kind, instance) == status
    assert store.due_commitment(T0 + timedelta(days=1)) is None


def test_a_record_that_cannot_be_written_is_no_success(
    port: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object) -> None:
        raise StoreError("locked")

    monkeypatch.setattr(store, "ask_commitment", locked)
    with asking(port, Reports()) as assoc:
        assert asked(assoc, everything()) == commitment.PROCESSING_FAILURE


# ---- on a new association -----------------------------------------------------------------------


@pytest.fixture
def peer() -> Iterator[Callable[[Reports], Destination]]:
    """Whoever asked, as it listens for reports."""
    servers = []

    def listen(reports: Reports) -> Destination:
        ae = AE("CT1")
        ae.add_supported_context(commitment.SOP_CLASS, [ImplicitVRLittleEndian], scu_role=False, scp_role=True)
        server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, reports.take)])
        assert server is not None
        servers.append(server)
        return Destination("ct", "CT1", "127.0.0.1", server.server_address[1])

    yield listen
    for server in servers:
        server.shutdown()


def step(store: Store, data_dir: Path, now: datetime, destinations: Sequence[Destination] = ()) -> bool:
    settings = DeliverySettings(first_retry_s=10, max_attempts=3, timeout_s=10)
    return commitment.step(store, settings, destinations, data_dir, now) is not None


def test_who_has_hung_up_is_told_on_a_new_association(
    port: int, store: Store, data_dir: Path, peer: Callable[[Reports], Destination]
) -> None:
    with asking(port, Reports()) as assoc:
        assert asked(assoc, everything()) == commitment.SUCCESS
    for _ in range(200):
        if store.due_commitment(T0) is not None:
            break
        threading.Event().wait(0.05)
    reports = Reports()
    assert step(store, data_dir, T0, [peer(reports)])
    ((kind, told),) = reports.got
    assert (kind, len(failures(told))) == (commitment.SOME_NOT_HELD, 3)
    assert not step(store, data_dir, T0 + timedelta(days=1), []), "what was reported is not reported again"


def test_a_request_survives_a_restart(store: Store, data_dir: Path, peer: Callable[[Reports], Destination]) -> None:
    store.ask_commitment("1.2", "CT1", [(raw_scu.CT, UNKNOWN)], T0 + timedelta(seconds=60), T0)
    reports = Reports()
    destination = peer(reports)
    assert not step(store, data_dir, T0 + timedelta(seconds=59), [destination])
    assert step(store, data_dir, T0 + timedelta(seconds=60), [destination])
    assert reports.got[0][0] == commitment.SOME_NOT_HELD


def test_a_report_that_is_not_taken_is_tried_again_and_given_up(
    store: Store, data_dir: Path, peer: Callable[[Reports], Destination]
) -> None:
    store.ask_commitment("1.2", "CT1", [(raw_scu.CT, UNKNOWN)], T0, T0)
    refusing = peer(Reports(status=0x0110))
    for at, is_due in ((0, True), (9, False), (10, True), (29, False), (30, True), (10_000, False)):
        assert step(store, data_dir, T0 + timedelta(seconds=at), [refusing]) is is_due
    assert [event.name for event in events(store)] == ["commitment.asked", "commitment.gave_up"]
    assert "status 0x0110" in events(store)[-1].detail


def test_without_a_destination_the_report_is_given_up_at_once(store: Store, data_dir: Path) -> None:
    store.ask_commitment("1.2", "CT9", [(raw_scu.CT, UNKNOWN)], T0, T0)
    assert step(store, data_dir, T0)
    assert "no [[destination]] has the AE title 'CT9'" in events(store)[-1].detail
    assert not step(store, data_dir, T0 + timedelta(days=1))


def test_a_file_that_the_disk_does_not_show_is_not_promised(store: Store, data_dir: Path) -> None:
    path = f"studies/{'x' * 300}.dcm"  # a name for which every disk answers an error
    (data_dir / "studies").mkdir(parents=True)
    row = NewInstance("2.25.8.2.1", "2.25.8.2", "2.25.8", raw_scu.CT, ExplicitVRLittleEndian, path, "digest", 8, "CT1")
    store.add_instance(row, T0)
    request = store.ask_commitment("1.2.3", "CT1", [(raw_scu.CT, "2.25.8.2.1")], T0, T0)
    kind, told = commitment.report(store, data_dir, request)
    assert (kind, failures(told)) == (commitment.SOME_NOT_HELD, {"2.25.8.2.1": commitment.NO_SUCH_INSTANCE})


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pynetdicom drops a refused connection's socket
def test_nobody_there_is_tried_again(store: Store, data_dir: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = Destination("ct", "CT1", "127.0.0.1", closed.getsockname()[1])
        store.ask_commitment("1.2", "CT1", [(raw_scu.CT, UNKNOWN)], T0, T0)
        assert step(store, data_dir, T0, [nobody])
    due = store.due_commitment(T0 + timedelta(seconds=10))
    assert due is not None
    assert due.attempt == 1
    assert "no association: nobody listens there" in due.last_error
