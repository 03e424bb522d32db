from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    Comprehensive3DSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SegmentationStorage,
)
from pynetdicom import AE, evt
from told import events

from salsa_node import delivery, requestor, way_dicom
from salsa_node.dicom_result import Kind
from salsa_node.errors import DeliveryError, DestinationRefused, StoreError
from salsa_node.outgoing import Outgoing
from salsa_node.settings import SEG_KINDS, DeliverySettings, Destination
from salsa_node.store import Delivery, DeliveryState, NewInstance, NewObject, Store
from salsa_node.way_dicom import DicomWay

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
STUDY = "1.2.3"
SECRET = "Doe^Jane"
SETTINGS = DeliverySettings(first_retry_s=30, max_retry_s=100, max_attempts=4, timeout_s=10, lease_s=300)
SEG, SR, LABELMAP = "2.25.1", "2.25.2", "2.25.3"
LABEL_MAP_STORAGE = UID("1.2.840.10008.5.1.4.1.1.66.7")
BOTH = (SegmentationStorage, Comprehensive3DSRStorage)


def after(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def an_object(sop_class: UID, sop_instance_uid: str) -> bytes:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, sop_instance_uid
    ds.StudyInstanceUID, ds.PatientName = STUDY, SECRET
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.fixture
def produced(store: Store, tmp_path: Path) -> Callable[..., None]:
    """A result of two objects, or three with a label map, that is due to some destinations."""

    def make(*destinations: str, calling_ae: str = "CT1", label_map: bool = False) -> None:
        new = NewInstance("1.2.3.1.1", "1.2.3.1", STUDY, "1.5", "1.6", "p", "0" * 64, 9, calling_ae)
        store.add_instance(new, T0)
        store.complete_series(T0, T0)
        run = store.queue_run(STUDY, "demo", "d", T0)
        store.claim_run("w", 60, T0)
        objects = []
        parts = [("SEG", SegmentationStorage, SEG), ("SR", Comprehensive3DSRStorage, SR)]
        for kind, sop_class, uid in [*parts, *([("LABELMAP", LABEL_MAP_STORAGE, LABELMAP)] if label_map else [])]:
            content = an_object(sop_class, uid)
            (tmp_path / f"{kind}.dcm").write_bytes(content)
            objects.append(NewObject(kind, uid, sop_class, f"{kind}.dcm", hashlib.sha256(content).hexdigest()))
        store.produce(run.id, "w", objects, destinations, "lesions", None, "x", T0)

    return make


@dataclass
class Pacs:
    """A C-STORE provider that answers as told.

    answers: SOP Instance UID -> status; "abort" ends the association instead. seen: what came, in order.
    """

    port: int = 0
    answers: dict[str, int | str] = field(default_factory=dict)
    seen: list[Dataset] = field(default_factory=list)
    associations: int = 0
    on_store: Callable[[], object] = lambda: None
    on_request: Callable[[], object] = lambda: None

    @property
    def destination(self) -> Destination:
        return Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=self.port)

    @property
    def uids(self) -> list[str]:
        return [ds.SOPInstanceUID for ds in self.seen]

    def take(self, event: evt.Event) -> int:
        answer = self.answers.get(event.request.AffectedSOPInstanceUID, 0x0000)
        self.on_store()
        if answer == "abort":
            event.assoc.abort()
            return 0xC000
        self.seen.append(event.dataset)
        assert isinstance(answer, int)
        return answer

    def count(self, _: evt.Event) -> None:
        self.associations += 1


@contextmanager
def a_pacs(
    classes: Sequence[UID | str] = (*BOTH, "1.2.840.10008.1.1"),
    calling: Sequence[str] = (),
    syntax: UID = ExplicitVRLittleEndian,
) -> Iterator[Pacs]:
    pacs = Pacs()
    ae = AE("PACS")
    ae.require_called_aet = True
    ae.require_calling_aet = list(calling)
    for sop_class in classes:
        ae.add_supported_context(sop_class, [syntax, ImplicitVRLittleEndian] if sop_class not in BOTH else syntax)
    handlers: list[evt.EventHandlerType] = [
        (evt.EVT_C_STORE, pacs.take),
        (evt.EVT_ESTABLISHED, pacs.count),
        (evt.EVT_REQUESTED, lambda _: pacs.on_request()),
    ]
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    assert server is not None
    pacs.port = int(server.server_address[1])
    try:
        yield pacs
    finally:
        ae.shutdown()


@pytest.fixture
def step(store: Store, tmp_path: Path) -> Callable[..., tuple[Delivery, ...] | None]:
    def take(now: datetime, *destinations: Destination, **changes: object) -> tuple[Delivery, ...] | None:
        settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
        return delivery.step(store, settings, destinations, tmp_path, "sender-1", now, clock=lambda: now)

    return take


# pynetdicom drops the socket of a connection that was refused without closing it; collecting it closes it.
unreachable = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

Step = Callable[..., tuple[Delivery, ...] | None]
Produced = Callable[..., None]


def states(store: Store) -> list[DeliveryState]:
    return [row.state for row in store.deliveries_of(1)]


SENT, PENDING, GAVE_UP = DeliveryState.SENT, DeliveryState.PENDING, DeliveryState.GAVE_UP
LEFT_OUT = DeliveryState.LEFT_OUT


def test_a_result_goes_out_whole_in_one_association(step: Step, produced: Produced, store: Store) -> None:
    produced("pacs")
    with a_pacs() as pacs:
        done = step(T0, pacs.destination)
        assert step(T0, pacs.destination) is None
    assert done is not None
    assert [(row.state, row.last_status, row.last_error, row.sent_at) for row in done] == [(SENT, 0, None, T0)] * 2
    assert states(store) == [SENT, SENT]
    assert pacs.uids == [SEG, SR]
    assert pacs.seen[0].PatientName == SECRET
    assert pacs.associations == 1


@unreachable
def test_each_destination_has_a_step_of_its_own(step: Step, produced: Produced, store: Store) -> None:
    produced("gone", "pacs")
    with a_pacs() as pacs:
        gone = Destination("gone", "GONE", "127.0.0.1", 9)
        step(T0, gone, pacs.destination)
        step(T0, gone, pacs.destination)
    assert sorted((row.destination, row.state.value) for row in store.deliveries_of(1)) == [
        ("gone", "PENDING"),
        ("gone", "PENDING"),
        ("pacs", "SENT"),
        ("pacs", "SENT"),
    ]


def test_a_warning_is_sent_with_a_note(step: Step, produced: Produced, store: Store) -> None:
    produced("pacs")
    with a_pacs() as pacs:
        pacs.answers = {SEG: 0xB000}
        step(T0, pacs.destination)
    assert states(store) == [SENT, SENT]
    seg = store.deliveries_of(1)[0]
    assert (seg.last_status, seg.last_error) == (0xB000, "taken with a warning: pacs: status 0xB000")


def test_one_failing_object_does_not_hold_back_the_other_and_is_retried_alone(
    step: Step, produced: Produced, store: Store
) -> None:
    produced("pacs")
    with a_pacs() as pacs:
        pacs.answers = {SEG: 0xA700}
        step(T0, pacs.destination)
        assert states(store) == [PENDING, SENT]
        seg = store.deliveries_of(1)[0]
        assert (seg.last_status, seg.last_error, seg.not_before) == (0xA700, "pacs: status 0xA700", after(30))
        assert step(after(29), pacs.destination) is None
        pacs.answers = {}
        step(after(30), pacs.destination)
    assert states(store) == [SENT, SENT]
    assert pacs.uids == [SEG, SR, SEG]


@unreachable
def test_the_wait_doubles_up_to_its_limit_and_ends_after_the_last_attempt(
    step: Step, produced: Produced, store: Store
) -> None:
    produced("pacs")
    nobody = Destination("pacs", "PACS", "127.0.0.1", 9)
    now, waits = T0, []
    while step(now, nobody):
        row = store.deliveries_of(1)[0]
        if row.state is GAVE_UP:
            break
        assert row.not_before is not None
        waits.append((row.not_before - now).total_seconds())
        now = row.not_before
    assert waits == [30, 60, 100]
    assert states(store) == [GAVE_UP, GAVE_UP]
    assert "nobody listens there" in str(store.deliveries_of(1)[0].last_error)
    store.resend(STUDY, None, now)
    with a_pacs() as pacs:
        step(now, pacs.destination)
    assert states(store) == [SENT, SENT]


@unreachable
def test_the_last_attempt_is_made(step: Step, produced: Produced, store: Store) -> None:
    produced("pacs")
    nobody = Destination("pacs", "PACS", "127.0.0.1", 9)
    for attempt in range(1, SETTINGS.max_attempts):
        step(after(1000 * attempt), nobody)
    assert states(store) == [PENDING, PENDING]
    with a_pacs() as pacs:
        step(after(9000), pacs.destination)
    assert states(store) == [SENT, SENT]


def test_a_wait_never_overflows() -> None:
    assert replace(SETTINGS, max_retry_s=3600).wait_s(10_000) == 3600


def test_a_refused_context_gives_up_in_words_and_sends_the_rest(step: Step, produced: Produced, store: Store) -> None:
    produced("pacs")
    with a_pacs([Comprehensive3DSRStorage]) as pacs:
        step(T0, pacs.destination)
    assert states(store) == [GAVE_UP, SENT]
    assert store.deliveries_of(1)[0].last_error == (
        "pacs: does not accept Segmentation Storage as Explicit VR Little Endian, "
        "Implicit VR Little Endian; allow this SOP class there"
    )


def test_where_every_context_is_refused_each_object_says_so_in_each_form(
    step: Step, produced: Produced, store: Store
) -> None:
    produced("pacs")
    with a_pacs(["1.2.840.10008.1.1"]) as pacs:
        while step(T0, pacs.destination):
            pass
    assert states(store) == [GAVE_UP, LEFT_OUT, LEFT_OUT, GAVE_UP]
    assert [str(row.last_error).split(" as ")[0] for row in store.deliveries_of(1)] == [
        "pacs: does not accept Segmentation Storage",
        "pacs: does not accept Comprehensive 3D SR Storage",
        "pacs: does not accept Comprehensive SR Storage",
        "pacs: does not accept Enhanced SR Storage",
    ]


def test_implicit_vr_does_where_nothing_else_is_taken(step: Step, produced: Produced, store: Store) -> None:
    produced("pacs")
    with a_pacs(syntax=ImplicitVRLittleEndian) as pacs:
        step(T0, pacs.destination)
    assert states(store) == [SENT, SENT]
    assert [row.last_error for row in store.deliveries_of(1)] == ["sent as Implicit VR Little Endian"] * 2
    assert pacs.uids == [SEG, SR]


def test_a_peer_that_dies_half_way_keeps_what_it_had_and_gets_the_rest_later(
    step: Step, produced: Produced, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    produced("pacs")
    with a_pacs() as pacs:
        pacs.answers = {SR: "abort"}
        step(T0, pacs.destination)
        assert states(store) == [SENT, PENDING]
        assert "without an answer" in str(store.deliveries_of(1)[1].last_error)
        assert [record.message for record in caplog.records] == [
            "pacs: the association ended without an answer to C-STORE"
        ]
        pacs.answers = {}
        step(after(30), pacs.destination)
    assert pacs.uids == [SEG, SR]
    assert states(store) == [SENT, SENT]


def test_a_peer_that_dies_at_once_gets_everything_later(step: Step, produced: Produced, store: Store) -> None:
    produced("pacs")
    with a_pacs() as pacs:
        pacs.answers = {SEG: "abort"}
        step(T0, pacs.destination)
    assert states(store) == [PENDING, PENDING]


def test_a_rejected_association_says_why_and_is_retried(step: Step, produced: Produced, store: Store) -> None:
    produced("pacs")
    with a_pacs(calling=["SOMEBODY_ELSE"]) as pacs:
        step(T0, pacs.destination)
    assert states(store) == [PENDING, PENDING]
    assert "rejected the association: Rejected Permanent" in str(store.deliveries_of(1)[0].last_error)
    assert "Calling AE title not recognised" in str(store.deliveries_of(1)[0].last_error)


def test_a_host_that_has_no_address_is_retried(step: Step, produced: Produced, store: Store) -> None:
    produced("pacs")
    step(T0, Destination("pacs", "PACS", "no-such-host.invalid", 104))
    assert states(store) == [PENDING, PENDING]
    assert "cannot be reached" in str(store.deliveries_of(1)[0].last_error)


def test_a_sop_class_that_is_not_supported_is_not_tried_again(step: Step, produced: Produced, store: Store) -> None:
    produced("pacs")
    with a_pacs() as pacs:
        pacs.answers = {SEG: 0x0122}
        step(T0, pacs.destination)
    assert states(store) == [GAVE_UP, SENT]


def test_the_sender_is_the_destination_of_that_ae_title(step: Step, produced: Produced, store: Store) -> None:
    produced("sender", calling_ae="PACS")
    with a_pacs() as pacs:
        other = Destination("other", "OTHER", "127.0.0.1", 9)
        step(T0, other, pacs.destination)
    assert states(store) == [SENT, SENT]


def test_the_sender_is_found_by_a_title_that_was_padded(step: Step, produced: Produced, store: Store) -> None:
    produced("sender", calling_ae="PACS")
    with a_pacs() as pacs:
        step(T0, replace(pacs.destination, ae_title=" PACS  "))
    assert states(store) == [SENT, SENT]


def test_each_destination_gets_the_segmentation_in_the_form_it_asks_for(
    step: Step, produced: Produced, store: Store
) -> None:
    produced("pacs", "research", "sender", calling_ae="PACS", label_map=True)
    with a_pacs((*BOTH, LABEL_MAP_STORAGE)) as pacs:
        binary = pacs.destination
        research = replace(binary, name="research", ae_title="PACS", seg="labelmap")
        for expected in ([SEG, SR], [SR, LABELMAP], [SEG, SR]):
            pacs.seen.clear()
            assert step(T0, binary, research) is not None
            assert pacs.uids == expected
        assert step(T0, binary, research) is None
    by_destination = {
        name: [row.state for row in store.deliveries_of(1) if row.destination == name]
        for name in ("pacs", "research", "sender")
    }
    assert by_destination == {
        "pacs": [SENT, SENT, LEFT_OUT],
        "research": [LEFT_OUT, SENT, SENT],
        "sender": [SENT, SENT, LEFT_OUT],
    }
    told = [event.detail for event in store.events_of(STUDY) if event.name == "delivery.left_out"]
    assert "research: not sent: research gets LABELMAP instead (its setting seg)" in told


def test_a_resend_asks_anew_what_the_destination_wants(step: Step, produced: Produced, store: Store) -> None:
    produced("sender", calling_ae="PACS", label_map=True)
    with a_pacs((*BOTH, LABEL_MAP_STORAGE)) as pacs:
        step(T0, pacs.destination)
        assert (pacs.uids, states(store)) == ([SEG, SR], [SENT, SENT, LEFT_OUT])
        for _ in range(2):  # as often as a person likes
            pacs.seen.clear()
            store.resend(STUDY, None, T0)
            assert states(store) == [PENDING] * 3
            step(T0, replace(pacs.destination, seg="labelmap"))
            assert (pacs.uids, states(store)) == ([SR, LABELMAP], [LEFT_OUT, SENT, SENT])
        pacs.seen.clear()
        store.resend(STUDY, "sender", T0)
        step(T0, pacs.destination)
        assert (pacs.uids, states(store)) == ([SEG, SR], [SENT, SENT, LEFT_OUT])


def test_a_result_from_before_the_label_map_was_asked_for_goes_out_as_it_is(
    step: Step, produced: Produced, store: Store
) -> None:
    produced("pacs")
    with a_pacs() as pacs:
        step(T0, replace(pacs.destination, seg="labelmap"))
    assert (pacs.uids, states(store)) == ([SEG, SR], [SENT, SENT])


def test_the_kinds_of_segmentation_are_those_that_are_made() -> None:
    assert set(SEG_KINDS.values()) == {Kind.SEG.value, Kind.LABELMAP.value}
    assert Destination("a", "A", "h", 1).seg == "binary"


def test_an_unknown_sender_says_which_destination_to_add(step: Step, produced: Produced, store: Store) -> None:
    produced("sender", calling_ae="CT1")
    step(T0, Destination("pacs", "PACS", "127.0.0.1", 9))
    assert states(store) == [GAVE_UP, GAVE_UP]
    assert "AE title 'CT1' and no [[destination]] has this ae_title; add one" in str(
        store.deliveries_of(1)[0].last_error
    )


def test_a_destination_that_left_the_config_says_so(step: Step, produced: Produced, store: Store) -> None:
    produced("old")
    step(T0)
    assert states(store) == [GAVE_UP, GAVE_UP]
    assert "no [[destination]] is called 'old' any more" in str(store.deliveries_of(1)[0].last_error)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"something else")])
@pytest.mark.parametrize(("kind", "expected"), [("SEG", [GAVE_UP, SENT]), ("SR", [SENT, GAVE_UP])])
def test_an_object_that_is_not_what_was_produced_stays_here_and_the_other_goes(
    step: Step,
    produced: Produced,
    store: Store,
    tmp_path: Path,
    damage: Callable[[Path], object],
    kind: str,
    expected: list[DeliveryState],
) -> None:
    produced("pacs")
    damage(tmp_path / f"{kind}.dcm")
    with a_pacs() as pacs:
        step(T0, pacs.destination)
    assert states(store) == expected
    assert pacs.uids == [SR if kind == "SEG" else SEG]
    (stays,) = (row for row in store.deliveries_of(1) if row.state is GAVE_UP)
    assert str(stays.last_error).startswith(f"the {kind} of run 1 ")


def test_nobody_is_called_where_nothing_can_be_read(
    step: Step, produced: Produced, store: Store, tmp_path: Path
) -> None:
    produced("pacs")
    for kind in ("SEG", "SR"):
        (tmp_path / f"{kind}.dcm").unlink()
    with a_pacs() as pacs:
        step(T0, pacs.destination)
    assert states(store) == [GAVE_UP, GAVE_UP]
    assert pacs.associations == 0


def test_times_are_those_after_the_answer(produced: Produced, store: Store, tmp_path: Path) -> None:
    produced("pacs")
    with a_pacs() as pacs:
        pacs.answers = {SEG: 0xA700}
        delivery.step(store, SETTINGS, [pacs.destination], tmp_path, "s", T0, clock=lambda: after(200))
    seg, sr = store.deliveries_of(1)
    assert (seg.state, seg.not_before) == (PENDING, after(230))
    assert (sr.state, sr.sent_at) == (SENT, after(200))
    assert {event.at for event in store.events_of(STUDY) if event.subject == "delivery"} == {T0, after(200)}


def test_an_attempt_that_never_came_to_an_end_counts(step: Step, produced: Produced, store: Store) -> None:
    produced("pacs")
    with a_pacs() as pacs:
        pacs.answers = {SEG: 0xA700}
        step(T0, pacs.destination)
        for attempt in range(2, 5):  # the node dies each time
            (claimed,) = store.claim_deliveries("dead", 1, after(1000 * attempt))
            assert claimed.attempt == attempt
        pacs.answers = {}
        done = step(after(9000), pacs.destination)
    assert done == store.deliveries_of(1)[:1]
    assert states(store) == [GAVE_UP, SENT]
    assert store.deliveries_of(1)[0].last_error == "given up after 4 attempts; last: pacs: status 0xA700"
    assert store.deliveries_of(1)[0].last_status == 0xA700
    assert pacs.uids == [SEG, SR]


def test_what_nobody_foresaw_in_one_object_is_retried_and_the_other_goes(
    step: Step, produced: Produced, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = DicomWay.send

    def odd(way: DicomWay, outgoing: Outgoing) -> object:
        if outgoing.sop_instance_uid == SEG:
            raise ZeroDivisionError(f"{SECRET} has no width")
        return plain(way, outgoing)

    monkeypatch.setattr(DicomWay, "send", odd)
    produced("pacs")
    now = T0
    with a_pacs() as pacs:
        while step(now, pacs.destination):
            assert states(store)[1] is SENT
            seg = store.deliveries_of(1)[0]
            now = seg.not_before or now
    assert (seg.state, seg.attempt, pacs.uids) == (GAVE_UP, 4, [SR])
    assert str(seg.last_error).startswith("pacs: sending failed: unforeseen ZeroDivisionError at test_delivery:")
    assert SECRET not in f"{events(store)}"


@pytest.mark.parametrize("place", ["resolve", "read", "opened"])
def test_what_nobody_foresaw_before_the_sending_is_retried(
    step: Step, produced: Produced, store: Store, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    produced("pacs")
    with a_pacs() as pacs:
        with monkeypatch.context() as patch:
            patch.setattr(delivery, place, lambda *_: 1 / 0)
            step(T0, pacs.destination)
        assert states(store) == [PENDING, PENDING]
        assert {row.not_before for row in store.deliveries_of(1)} == {after(30)}
        assert "failed: unforeseen ZeroDivisionError" in str(store.deliveries_of(1)[0].last_error)
        step(after(30), pacs.destination)
    assert states(store) == [SENT, SENT]


@pytest.mark.parametrize("silent", ["on_request", "on_store"])
def test_a_peer_that_falls_silent_is_left_and_tried_again(
    step: Step, produced: Produced, store: Store, silent: str
) -> None:
    produced("pacs")
    left = threading.Event()
    with a_pacs() as pacs:
        setattr(pacs, silent, lambda: left.wait(20))
        try:
            step(T0, pacs.destination, timeout_s=1)
        finally:
            left.set()
    assert states(store) == [PENDING, PENDING]


def test_no_wait_for_a_peer_is_longer_than_the_settings_say(
    step: Step, produced: Produced, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[AE] = []

    class Noted(AE):
        def __init__(self, title: str) -> None:
            super().__init__(title)
            made.append(self)

    monkeypatch.setattr(requestor, "AE", Noted)
    produced("pacs")
    with a_pacs() as pacs:
        step(T0, pacs.destination, timeout_s=7)
    (ae,) = made
    assert [ae.connection_timeout, ae.acse_timeout, ae.dimse_timeout, ae.network_timeout] == [7] * 4


@pytest.mark.parametrize("second_answer", [0x0000, 0x0111])
def test_a_crash_between_sending_and_noting_sends_the_same_object_again(
    step: Step, produced: Produced, store: Store, monkeypatch: pytest.MonkeyPatch, second_answer: int
) -> None:
    def cut(*_: object) -> None:
        raise StoreError("the power is gone")

    produced("pacs")
    with a_pacs() as pacs:
        with monkeypatch.context() as patch:
            patch.setattr(store, "delivered", cut)
            with pytest.raises(StoreError):
                step(T0, pacs.destination)
        assert step(after(299), pacs.destination) is None
        pacs.answers = {SEG: second_answer}
        step(after(300), pacs.destination)
    assert states(store) == [SENT, SENT]
    assert pacs.uids == [SEG, SEG, SR]
    assert an_object(SegmentationStorage, SEG) == an_object(SegmentationStorage, SEG)
    assert pacs.seen[0] == pacs.seen[1]


@pytest.mark.parametrize("last", [0x0000, "abort"])
def test_a_lease_lost_half_way_is_left_to_its_new_owner_and_told_once(
    step: Step, produced: Produced, store: Store, caplog: pytest.LogCaptureFixture, last: int | str
) -> None:
    caplog.set_level(logging.INFO, "salsa_node")
    produced("pacs")
    with a_pacs() as pacs:
        pacs.answers = {SR: last}
        pacs.on_store = lambda: store.release_owner("sender-1", T0)
        done = step(T0, pacs.destination)
    assert done == ()
    assert states(store) == [PENDING, PENDING]
    told = [(vars(record)["event"], vars(record)["delivery"]) for record in caplog.records]
    assert [what for what in told if what[0] == "delivery.lease_lost"] == [
        ("delivery.lease_lost", 1),
        ("delivery.lease_lost", 2),
    ]
    assert "delivery.sent" not in {name for name, _ in told}


def test_nothing_is_due_when_nothing_was_produced(step: Step) -> None:
    assert step(T0) is None


def test_neither_logs_nor_events_hold_patient_identity(
    step: Step, produced: Produced, store: Store, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    produced("pacs")
    with a_pacs() as pacs:
        pacs.answers = {SEG: 0xA700}
        step(T0, pacs.destination)
    logged = " ".join(str(vars(record)) for record in caplog.records)
    assert "delivery.failed" in logged
    assert SECRET not in f"{logged} {capfd.readouterr()} {events(store)}"


@unreachable
def test_echo_reaches_a_peer_or_says_how_far_it_came() -> None:
    with a_pacs() as pacs:
        way_dicom.echo(pacs.destination, 10)
        with pytest.raises(DeliveryError, match="Called AE title not recognised; correct its ae_title"):
            way_dicom.echo(replace(pacs.destination, ae_title="OTHER"), 10)
    with pytest.raises(DeliveryError, match="nobody listens there"):
        way_dicom.echo(pacs.destination, 10)
    with a_pacs(BOTH) as pacs, pytest.raises(DestinationRefused, match="but not C-ECHO"):
        way_dicom.echo(pacs.destination, 10)
