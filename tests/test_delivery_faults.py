"""What can go wrong at a PACS: what `show` then says, what the admin does, and that everything arrives in the end.

The table of deploy/faults.md holds the same: a fault, the words on the screen, the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event

import fault_table
import pytest
from made_delivery import STUDY, T0, Archive, an_archive, an_object, produce
from made_papers import Papers
from pydicom.uid import Comprehensive3DSRStorage, SegmentationStorage
from pynetdicom import evt

from salsa_node import console, delivery, loopback, overview, verification
from salsa_node.settings import DeliverySettings, Destination
from salsa_node.store import DeliveryState, Store

SETTINGS = DeliverySettings(first_retry_s=30, max_retry_s=60, max_attempts=3, timeout_s=5, verify_after_s=10)
OBJECTS = [
    ("SEG" if number == 1 else f"SR{number}", an_object(kind, f"2.25.{number}"))
    for number, kind in enumerate([SegmentationStorage, *[Comprehensive3DSRStorage] * 5], start=1)
]
UIDS = [str(ds.SOPInstanceUID) for _, ds in OBJECTS]
SENT, VERIFIED, PENDING, GAVE_UP = (
    DeliveryState.SENT, DeliveryState.VERIFIED, DeliveryState.PENDING, DeliveryState.GAVE_UP
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pynetdicom's, where it is refused


@dataclass
class Node:
    """Both loops of a node whose result of six objects is due, with a clock that a test sets."""

    store: Store
    data_dir: Path
    now: datetime = T0
    screen: Callable[[], str] = field(default=lambda: "")

    def turn(self, destination: Destination, seconds: float = 0) -> None:
        self.now += timedelta(seconds=seconds)
        delivery.step(self.store, SETTINGS, [destination], self.data_dir, "n", self.now, clock=lambda: self.now)
        verification.step(self.store, SETTINGS, [destination], self.data_dir, "n", self.now, clock=lambda: self.now)

    def turns(self, destination: Destination, number: int = 12) -> None:
        for _ in range(number):
            self.turn(destination, 65)

    @property
    def states(self) -> list[DeliveryState]:
        return [row.state for row in self.store.deliveries_of(1)]

    def show(self) -> str:
        """The page of `salsa-node show`, on one line."""
        console.put_detail(overview.detail(self.store, overview.glance(self.store, self.store.study(STUDY))))
        return " ".join(self.screen().split())


@pytest.fixture
def node(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Node:
    produce(store, tmp_path, ["pacs"], OBJECTS)
    store.study_assembled(store.study(STUDY), "", T0)
    return Node(store, tmp_path, screen=lambda: capsys.readouterr().out)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers"))


def all_arrived_once(node: Node, pacs: Archive) -> None:
    assert node.states == [VERIFIED] * 6, node.store.deliveries_of(1)
    assert pacs.held == set(UIDS)
    assert f"study {STUDY}: done" in node.show()


@contextmanager
def lasting(node: Node, destination: Destination, words: str) -> Iterator[None]:
    """A fault that ends with every delivery given up: sending, then not delivered, then the admin's retry."""
    node.turn(destination)
    assert set(node.states) == {PENDING}
    shown = node.show()
    assert f"study {STUDY}: sending" in shown
    assert words in str(node.store.deliveries_of(1)[0].last_error)
    node.turns(destination, 3)
    assert set(node.states) == {GAVE_UP}
    shown = node.show()
    assert f"study {STUDY}: not delivered" in shown
    assert "next: do what the last error says (salsa-node echo NAME tries the way), then" in shown
    yield
    _, due = node.store.retry(STUDY, node.now)
    assert len(due) == 6


def test_pacs_down(node: Node) -> None:
    fault_table.told("PACS down", "nobody listens there", "salsa-node retry")
    with ExitStack() as stack:
        closed = Destination("pacs", "PACS", "127.0.0.1", loopback.free_port())
        with lasting(node, closed, "nobody listens there"):
            pacs = stack.enter_context(an_archive())
        node.turns(pacs.destination())
        all_arrived_once(node, pacs)


def test_name_server_gone(node: Node) -> None:
    fault_table.told("name server gone", "cannot be reached (gaierror", "salsa-node retry")
    with an_archive() as pacs:
        with lasting(node, replace(pacs.destination(), host="no-such-host.invalid"), "cannot be reached (gaierror"):
            pass
        node.turns(pacs.destination())
        all_arrived_once(node, pacs)


def test_certificate_expired(node: Node, papers: Papers) -> None:
    fault_table.told("certificate expired", "certificate has expired", "salsa-node retry")
    more = {"tls": True, "authorities": str(papers.authority)}
    with (
        an_archive(secure=papers.server("expired")) as old,
        lasting(node, old.destination(**more), "no TLS with it: certificate has expired"),
    ):
        pass
    with an_archive(secure=papers.server()) as renewed:
        node.turns(renewed.destination(**more))
        all_arrived_once(node, renewed)


def test_slow(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    fault_table.told("PACS too slow", "ended without an answer to C-STORE", "delivery.timeout_s")
    left = Event()
    with an_archive() as pacs:
        plain = Archive.store

        def slow(archive: Archive, event: evt.Event) -> int:
            if len(archive.taken) == 2:
                left.wait(20)
            return plain(archive, event)

        with monkeypatch.context() as patch:
            patch.setattr(f"{__name__}.SETTINGS", replace(SETTINGS, timeout_s=1))
            pacs.on_store = lambda event: slow(pacs, event)
            try:
                node.turn(pacs.destination())
            finally:
                left.set()
        assert node.states == [SENT, SENT, PENDING, PENDING, PENDING, PENDING]
        assert "ended without an answer to C-STORE" in str(node.store.deliveries_of(1)[2].last_error)
        assert "sending" in node.show()
        pacs.on_store = lambda event: plain(pacs, event)
        node.turns(pacs.destination())
        all_arrived_once(node, pacs)


def test_every_third_refused(node: Node) -> None:
    fault_table.told("some objects refused", "status 0xA700", "by themselves")
    with an_archive() as pacs:
        pacs.statuses = {UIDS[2]: 0xA700, UIDS[5]: 0xA700}
        node.turn(pacs.destination())
        assert node.states == [SENT, SENT, PENDING, SENT, SENT, PENDING]
        shown = node.show()
        assert f"study {STUDY}: sending" in shown
        assert "pacs: status 0xA700" in shown
        pacs.statuses, came = {}, len(pacs.taken)
        node.turns(pacs.destination())
        assert pacs.uids[came:] == [UIDS[2], UIDS[5]], "only what was refused goes again"
        all_arrived_once(node, pacs)


def test_warnings(node: Node) -> None:
    fault_table.told("taken with warnings", "taken with a warning", "nothing")
    with an_archive() as pacs:
        pacs.statuses = dict.fromkeys(UIDS, 0xB000)
        node.turns(pacs.destination(), 2)
        assert pacs.uids == UIDS, "a warning is no error"
        assert "taken with a warning: pacs: status 0xB000" in node.show()
        all_arrived_once(node, pacs)


def test_accepted_then_lost(node: Node) -> None:
    fault_table.told("taken and lost", "took it and does not hold it", "by itself")
    with an_archive() as pacs:
        pacs.loses = {UIDS[3]}
        for seconds in (0, 10, 20, 40):
            node.turn(pacs.destination(), seconds)
        assert node.states == [VERIFIED, VERIFIED, VERIFIED, PENDING, VERIFIED, VERIFIED]
        shown = node.show()
        assert f"study {STUDY}: sending" in shown
        assert "pacs: took it and does not hold it; it is sent again" in shown
        node.turns(pacs.destination())
        assert pacs.uids == [*UIDS, UIDS[3]]
        all_arrived_once(node, pacs)


def test_closing_in_the_middle(node: Node) -> None:
    fault_table.told("closes in the middle", "ended without an answer to C-STORE", "by themselves")
    with an_archive() as pacs:

        def abort(event: evt.Event) -> int:
            if len(pacs.taken) == 4:
                event.assoc.abort()
                return 0xC000
            return pacs.store(event)

        pacs.on_store = abort
        node.turn(pacs.destination())
        assert node.states == [SENT, SENT, SENT, SENT, PENDING, PENDING]
        assert "the association ended without an answer to C-STORE" in str(node.store.deliveries_of(1)[4].last_error)
        assert "sending" in node.show()
        pacs.on_store = pacs.store
        node.turns(pacs.destination())
        assert pacs.uids == UIDS, "each object once"
        all_arrived_once(node, pacs)


def test_a_kind_refused_for_good(node: Node) -> None:
    fault_table.told("SOP class refused", "does not accept", "salsa-node resend")
    with an_archive([SegmentationStorage]) as pacs:
        node.turns(pacs.destination(), 3)
        shown = node.show()
    assert f"study {STUDY}: not delivered" in shown
    assert "allow this SOP class there" in shown
    assert node.states[0] is VERIFIED


def test_no_proof_to_be_had(node: Node) -> None:
    fault_table.told("cannot be asked", "unverified", "verify")
    with an_archive(finds=False) as pacs:
        node.turns(pacs.destination(), 2)
    assert node.states == [SENT] * 6
    shown = node.show()
    assert f"study {STUDY}: done" in shown
    assert "sent, unverified: it offers neither storage commitment nor a query" in shown
