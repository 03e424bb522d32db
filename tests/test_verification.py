"""A destination is asked whether it holds what it took, and gets again what it lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import orthanc as orthanc_peer
import pytest
from made_delivery import SECRET, SEG, SR, STUDY, T0, an_archive, produce
from pydicom.dataset import Dataset
from pynetdicom import evt
from told import events

from salsa_node import commitment, delivery, loopback, verification
from salsa_node.errors import LeaseLost
from salsa_node.listener import Listener
from salsa_node.settings import DeliverySettings, Destination, ListenerSettings
from salsa_node.store import DeliveryState, Store, StoreSettings

SETTINGS = DeliverySettings(
    first_retry_s=30, max_retry_s=100, max_attempts=4, timeout_s=10, verify_after_s=10, max_checks=5, commitment_s=60
)
SENT, VERIFIED, PENDING, GAVE_UP = (
    DeliveryState.SENT, DeliveryState.VERIFIED, DeliveryState.PENDING, DeliveryState.GAVE_UP
)  # fmt: skip
unreachable = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pynetdicom's, where it is refused


def after(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True) as opened:
        yield opened


@pytest.fixture
def node(store: Store, tmp_path: Path) -> Callable[[datetime, Destination], None]:
    """One turn of both loops."""

    def turn(now: datetime, destination: Destination) -> None:
        delivery.step(store, SETTINGS, [destination], tmp_path, "node", now, clock=lambda: now)
        verification.step(store, SETTINGS, [destination], tmp_path, "node", now, clock=lambda: now)

    return turn


Turn = Callable[[datetime, Destination], None]


def standing(store: Store) -> list[tuple[DeliveryState, str]]:
    return [(row.state, row.proof) for row in store.deliveries_of(1)]


def told(store: Store, name: str) -> list[str]:
    return [event.detail for event in events(store) if event.name == name]


def test_what_a_query_finds_is_verified(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        node(T0, pacs.destination())
        assert standing(store) == [(SENT, ""), (SENT, "")]
        node(after(9), pacs.destination())
        assert pacs.found == 0
        node(after(10), pacs.destination())
        node(after(1000), pacs.destination())
    assert standing(store) == [(VERIFIED, "C-FIND")] * 2
    assert (pacs.found, pacs.uids) == (2, [SEG, SR])
    assert told(store, "delivery.verified") == ["pacs: it is there: C-FIND"] * 2


def test_another_object_than_the_one_asked_for_proves_nothing(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        pacs.loses, pacs.careless = {SEG}, True
        node(T0, pacs.destination())
        node(after(10), pacs.destination())
    assert standing(store) == [(SENT, ""), (VERIFIED, "C-FIND")]


def test_what_was_taken_and_lost_is_found_out_and_sent_again(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        pacs.loses = {SEG}
        for at in (0, 10, 30, 70):  # it may only be slow: asked three times
            node(after(at), pacs.destination())
        assert standing(store) == [(PENDING, ""), (VERIFIED, "C-FIND")]
        lost = store.deliveries_of(1)[0]
        assert lost.last_error == "pacs: took it and does not hold it; it is sent again"
        node(after(129), pacs.destination())  # a wait longer than after the first attempt
        assert pacs.uids == [SEG, SR]
        node(after(130), pacs.destination())
        node(after(140), pacs.destination())
    assert standing(store) == [(VERIFIED, "C-FIND")] * 2
    assert pacs.uids == [SEG, SR, SEG]


def test_what_is_lost_again_and_again_is_given_up(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        now = T0
        for _ in range(60):
            pacs.loses = {SEG, SR}
            node(now, pacs.destination())
            now += timedelta(seconds=50)
    assert [row.state for row in store.deliveries_of(1)] == [GAVE_UP, GAVE_UP]
    assert pacs.uids == [SEG, SR] * 4
    assert "given up after 4 attempts; last: pacs: took it and does not hold it" in str(
        store.deliveries_of(1)[0].last_error
    )


def test_an_archive_that_indexes_late_gets_nothing_twice(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        node(T0, pacs.destination())
        pacs.held.clear()
        for at in (10, 30):  # absent twice is not lost yet
            node(after(at), pacs.destination())
        pacs.held = {SEG, SR}
        node(after(70), pacs.destination())
    assert pacs.found == 6
    assert standing(store) == [(VERIFIED, "C-FIND")] * 2
    assert pacs.uids == [SEG, SR]


def test_where_nothing_can_be_asked_it_stays_sent_unverified(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive(finds=False) as pacs:
        node(T0, pacs.destination())
        node(after(10), pacs.destination())
    assert standing(store) == [(SENT, "unverified")] * 2
    assert (
        told(store, "delivery.unverified")
        == ["pacs: sent, unverified: it offers neither storage commitment nor a query"] * 2
    )
    assert store.claim_checks("x", 1, after(1e6)) == ()


@pytest.mark.parametrize("mode", ["find fails", "gone"])
@unreachable
def test_no_answer_is_asked_for_so_often_and_then_stays_unverified(
    store: Store, tmp_path: Path, node: Turn, mode: str
) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        node(T0, pacs.destination())
        pacs.find_status = 0xC001
        to = pacs.destination() if mode == "find fails" else replace(pacs.destination(), port=9)
        for at in range(10, 2000, 50):
            node(after(at), to)
    assert standing(store) == [(SENT, "unverified")] * 2
    assert pacs.uids == [SEG, SR], "no answer is no loss"
    assert "asked 5 times" in told(store, "delivery.unverified")[0]
    assert pacs.found == (5 if mode == "find fails" else 0)


def test_the_time_between_two_questions_doubles_up_to_its_limit(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    asked = []
    with an_archive() as pacs:
        node(T0, pacs.destination())
        pacs.find_status = 0xC001
        while (due := store.deliveries_of(1)[0].check_at) is not None:
            asked.append((due - T0).total_seconds())
            node(due - timedelta(seconds=1), pacs.destination())
            node(due, pacs.destination())
            assert pacs.found == len(asked)
    assert asked == [10, 30, 70, 150, 250]


def test_a_peer_that_refuses_the_query_for_now_is_asked_again(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        node(T0, pacs.destination())
        pacs.find_status = 0xA700
        node(after(10), pacs.destination())
        assert standing(store) == [(SENT, "")] * 2
        pacs.find_status = 0
        node(after(30), pacs.destination())
    assert standing(store) == [(VERIFIED, "C-FIND")] * 2


def test_verify_off_asks_nobody(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive(commits=True) as pacs:
        for at in (0, 10, 100):
            node(after(at), pacs.destination("off"))
    assert standing(store) == [(SENT, "unverified")] * 2
    assert (pacs.found, pacs.asked) == (0, [])


def test_storage_commitment_on_the_same_association(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive(commits=True) as pacs:

        def report(event: evt.Event) -> None:
            kind, ds = pacs.report(event.action_information)
            event.assoc.send_n_event_report(ds, kind, commitment.SOP_CLASS, commitment.SOP_INSTANCE)

        pacs.commits = report
        node(T0, pacs.destination())
        node(after(10), pacs.destination())
    assert standing(store) == [(VERIFIED, "storage commitment")] * 2
    assert [item.ReferencedSOPInstanceUID for item in pacs.asked[0].ReferencedSOPSequence] == [SEG, SR]
    assert pacs.found == 0


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_SAME_ASSOCIATION_S", 0.1)


@pytest.mark.usefixtures("no_wait")
def test_storage_commitment_reported_to_the_door(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    door = ListenerSettings(port=0, min_free_gib=0.0)
    with an_archive(commits=True) as pacs, Listener(door, store, tmp_path, clock=lambda: after(20)) as listener:
        pacs.loses = {SEG}
        node(T0, pacs.destination("commitment"))
        node(after(10), pacs.destination("commitment"))
        assert standing(store) == [(SENT, ""), (SENT, "")]
        assert pacs.report_on_new_association(listener.port) == commitment.SUCCESS
        assert standing(store) == [(SENT, "disowned"), (VERIFIED, "storage commitment")]
        assert pacs.report_on_new_association(listener.port) == commitment.INVALID_ARGUMENT, "nobody waits for it"
        node(after(20), pacs.destination("commitment"))
        assert standing(store)[0][0] is PENDING
        node(after(80), pacs.destination("commitment"))
        node(after(90), pacs.destination("commitment"))
        pacs.report_on_new_association(listener.port)
    assert standing(store) == [(VERIFIED, "storage commitment")] * 2
    assert pacs.uids == [SEG, SR, SEG]
    assert pacs.found == 0


@pytest.mark.usefixtures("no_wait")
def test_a_report_that_never_comes_is_replaced_by_a_query(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive(commits=True) as pacs:
        node(T0, pacs.destination())
        node(after(10), pacs.destination())
        node(after(69), pacs.destination())
        assert (len(pacs.asked), pacs.found) == (1, 0)
        node(after(70), pacs.destination())
    assert standing(store) == [(VERIFIED, "C-FIND")] * 2
    assert len(pacs.asked) == 1


def test_a_check_that_somebody_else_has_by_now_is_theirs(store: Store, tmp_path: Path) -> None:
    produce(store, tmp_path, ["pacs"])
    for item in store.claim_deliveries("s", 60, T0):
        store.delivered(item.id, "s", 0, None, T0, check_at=T0)
    first, _ = store.claim_checks("slow", 60, T0)
    assert store.claim_checks("other", 60, after(59)) == ()
    assert len(store.claim_checks("other", 60, after(61))) == 2
    for late in (
        lambda: store.verified(first.id, "slow", "C-FIND", after(62)),
        lambda: store.check_later(first.id, "slow", "no answer", after(99), after(62)),
        lambda: store.lost(first.id, "slow", "it is gone", after(99), after(62)),
        lambda: store.commitment_asked([first.id], "slow", "1.2.3"),
    ):
        with pytest.raises(LeaseLost):
            late()
    assert standing(store) == [(SENT, "")] * 2
    assert store.verified(first.id, "other", "C-FIND", after(62)).state is VERIFIED


def test_a_report_about_an_earlier_sending_proves_nothing_of_the_later_one(store: Store, tmp_path: Path) -> None:
    produce(store, tmp_path, ["pacs"])
    for uid in ("1.2.3.4", ""):
        for item in store.claim_deliveries("s", 60, T0):
            store.delivered(item.id, "s", 0, None, T0, check_at=T0)
        if uid:
            store.commitment_asked([item.id for item in store.claim_checks("s", 60, T0)], "s", uid)
            store.resend(STUDY, None, T0)
    assert store.commitment_answered("1.2.3.4", {SEG, SR}, set(), T0) == ()
    assert standing(store) == [(SENT, "")] * 2


def test_a_report_that_contradicts_itself_proves_nothing(store: Store, tmp_path: Path) -> None:
    produce(store, tmp_path, ["pacs"])
    for item in store.claim_deliveries("s", 60, T0):
        store.delivered(item.id, "s", 0, None, T0, check_at=T0)
    asked = [item.id for item in store.claim_checks("s", 60, T0)]
    store.commitment_asked(asked, "s", "1.2.3.4")
    store.commitment_answered("1.2.3.4", {SEG, SR}, {SEG}, T0)
    assert standing(store) == [(SENT, "disowned"), (VERIFIED, "storage commitment")]


def test_a_report_of_nobodys_request_is_refused(store: Store) -> None:
    report = Dataset()
    assert commitment.take_report(store, report, T0) == commitment.INVALID_ARGUMENT
    report.TransactionUID = "1.2.3.4"
    assert commitment.take_report(store, report, T0) == commitment.INVALID_ARGUMENT


def test_a_file_that_is_gone_here_stays_unverified(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        node(T0, pacs.destination())
        (tmp_path / "SEG.dcm").unlink()
        node(after(10), pacs.destination())
    assert standing(store) == [(SENT, "unverified"), (VERIFIED, "C-FIND")]


def test_a_resend_asks_for_proof_anew(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        node(T0, pacs.destination())
        node(after(10), pacs.destination())
        store.resend(STUDY, None, after(20))
        node(after(20), pacs.destination())
        assert standing(store) == [(SENT, "")] * 2
        node(after(30), pacs.destination())
    assert standing(store) == [(VERIFIED, "C-FIND")] * 2


def test_nothing_that_was_told_holds_the_patient(
    store: Store, tmp_path: Path, node: Turn, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        pacs.loses = {SEG}
        for at in (0, 10, 30, 70):
            node(after(at), pacs.destination())
    logged = " ".join(str(vars(record)) for record in caplog.records)
    assert "delivery.lost" in logged
    assert SECRET not in f"{logged} {events(store)}"


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("mode", ["commitment", "query"])
def test_orthanc_proves_what_it_holds_and_what_it_lost(
    store: Store, tmp_path: Path, tool: Callable[..., str], node: Turn, mode: str
) -> None:
    """Orthanc reports on an association of its own, to our door."""
    door = ListenerSettings(port=loopback.free_port(), min_free_gib=0.0)
    modalities = {"DicomModalities": {"salsa": ["SALSA_NODE", "127.0.0.1", door.port]}}
    produce(store, tmp_path, ["pacs"])
    with (
        orthanc_peer.running(tool("Orthanc", "orthanc"), tmp_path / "orthanc", modalities) as pacs,
        Listener(door, store, tmp_path, clock=lambda: T0),
    ):
        to = Destination("pacs", orthanc_peer.AE_TITLE, "127.0.0.1", pacs.dicom_port, verify=mode)

        def until(wanted: set[DeliveryState], start: float) -> float:
            for at in range(200):
                now = after(start + 50 * at)
                node(now, to)
                time.sleep(0.05)
                if {row.state for row in store.deliveries_of(1)} == wanted:
                    return start + 50 * at
            raise AssertionError(store.deliveries_of(1))

        at = until({SENT}, 0)
        (instance,) = pacs.instances("SR", STUDY)[:1]
        pacs.delete(f"/instances/{instance}")
        at = until({VERIFIED, PENDING}, at + 50)
        at = until({VERIFIED}, at + 50)
        assert len(pacs.instances("SR", STUDY)) == 2
    proof = {"commitment": "storage commitment", "query": "C-FIND"}[mode]
    assert standing(store) == [(VERIFIED, proof)] * 2
