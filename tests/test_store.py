from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from postgres import a_database
from told import events

from salsa_node import store as store_module
from salsa_node.errors import ContentConflict, IllegalTransition, LeaseLost, StoreError, UnknownStudy
from salsa_node.store import (
    DeliveryState,
    NewInstance,
    NewObject,
    Run,
    RunState,
    SeriesState,
    Sought,
    Store,
    StoreSettings,
)
from salsa_node.store_rows import TRANSITIONS
from salsa_node.store_transaction import transaction

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
STUDY, SERIES = "1.2.3", "1.2.3.1"
OBJECTS = [
    NewObject("SEG", "2.25.1", "1.9.1", "r/seg.dcm", "a" * 64),
    NewObject("SR", "2.25.2", "1.9.2", "r/sr.dcm", "b" * 64),
]


def after(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of each kind: what follows holds for both."""
    return f"sqlite:///{tmp_path / 'record.sqlite'}" if request.param == "sqlite" else a_database(request)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(StoreSettings(url), create=True) as opened:
        yield opened


def an_instance(number: int = 1, **changes: object) -> NewInstance:
    plain = NewInstance(
        sop_instance_uid=f"1.2.3.1.{number}",
        series_uid=SERIES,
        study_uid=STUDY,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        path=f"studies/{STUDY}/{SERIES}/{number}.dcm",
        digest=f"{number:032x}",
        size_bytes=1000,
        calling_ae="CT1",
        modality="CT",
        series_number=2,
        accession_number="ACC7",
        patient_id="P7",
        study_date="20260101",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def arrived(store: Store, count: int = 3, now: datetime = T0) -> None:
    for number in range(1, count + 1):
        store.add_instance(an_instance(number), now)


def looked_at(store: Store, study_uid: str = STUDY, now: datetime = T0) -> None:
    """As assembly does when all is quiet."""
    while store.complete_series(now, now):
        pass
    store.study_assembled(store.study(study_uid), "looked at", now)


def queued(store: Store, digest: str = "d1", now: datetime = T0, **more: object) -> Run:
    looked_at(store, now=now)
    return store.queue_run(STUDY, "demo", digest, now, series_uid=SERIES, **more)  # type: ignore[arg-type]


def produced(store: Store, owner: str = "w", now: datetime = T0, destinations: tuple[str, ...] = ("pacs",)) -> Run:
    run = store.claim_run(owner, 60, now)
    assert run is not None
    return store.produce(run.id, owner, OBJECTS, destinations, "lesions", {"lesions": 2}, f"run{run.id}", now)


def names(store: Store) -> list[str]:
    return [event.name for event in store.events_of(STUDY)]


# ---- the drawing --------------------------------------------------------------------------------


def test_the_drawing_in_the_docstring_is_the_transition_table() -> None:
    drawn: dict[tuple[str, str], set[str]] = {}
    kind = ""
    for line in (store_module.__doc__ or "").splitlines():
        match = re.fullmatch(r" {4}(\w*) +(\w+) -> ([A-Z_ |]+)", line)
        if match:
            kind = match[1] or kind
            drawn[kind, match[2]] = set(match[3].split(" | "))
    table = {
        (type(state).__name__.removesuffix("State"), state.value): {after.value for after in nexts}
        for state, nexts in TRANSITIONS.items()
        if nexts
    }
    assert drawn == table
    assert {state for states in (SeriesState, RunState, DeliveryState) for state in states} == set(TRANSITIONS)


def test_a_state_is_not_left_against_the_drawing(store: Store) -> None:
    arrived(store)
    with pytest.raises(IllegalTransition, match="is RECEIVING, which leads to COMPLETE, not to REJECTED"):
        store.reject_series(SERIES, "why", T0)
    queued(store, "d1")
    queued(store, "d2")
    cancelled = store.runs_of(STUDY)[0]
    with (
        pytest.raises(IllegalTransition, match="is CANCELLED, which leads to nothing"),
        transaction(store._writer) as t,
    ):
        t.become_run(cancelled, RunState.CANCELLED, T0, "again")
    assert names(store).count("run.cancelled") == 1


def test_a_failed_transaction_leaves_nothing(store: Store) -> None:
    arrived(store)
    before = events(store)
    with pytest.raises(ContentConflict):
        store.add_instance(an_instance(9, series_uid=SERIES, study_uid="9.9"), T0)
    assert events(store) == before
    assert [study.study_uid for study in store.studies()] == [STUDY]


# ---- arriving -----------------------------------------------------------------------------------


def test_an_instance_makes_its_study_and_series(store: Store) -> None:
    arrival = store.add_instance(an_instance(), T0)
    assert arrival.is_new
    assert store.instance("1.2.3.1.1") == arrival.instance
    assert store.instances_of(STUDY, SERIES) == (arrival.instance,)
    study, series = store.study(STUDY), store.series_of(STUDY)[0]
    assert (study.patient_id, study.calling_ae, study.instances, study.first_at) == ("P7", "CT1", 1, T0)
    assert (series.state, series.modality, series.series_number, series.instances) == (
        SeriesState.RECEIVING,
        "CT",
        2,
        1,
    )
    assert names(store) == ["study.new", "series.receiving"]


def test_the_same_again_is_a_duplicate_noted_once(store: Store) -> None:
    store.add_instance(an_instance(), T0)
    for second in (1, 2):
        assert not store.add_instance(an_instance(), after(second)).is_new
    assert len(store.instances_of(STUDY)) == 1
    series = store.series_of(STUDY)[0]
    assert (series.duplicates, series.instances, series.last_instance_at) == (2, 1, after(2))
    assert names(store).count("series.duplicate") == 1


@pytest.mark.parametrize("change", [{"digest": "f" * 32}, {"series_uid": "9.1"}, {"study_uid": "9"}])
def test_the_same_uid_with_other_content_is_a_conflict(store: Store, change: dict[str, str]) -> None:
    first = store.add_instance(an_instance(), T0).instance
    with pytest.raises(ContentConflict):
        store.add_instance(an_instance(**change), T0)
    assert store.instance(first.sop_instance_uid) == first


@pytest.mark.parametrize("rejected", [False, True])
def test_a_late_instance_reopens_the_series(store: Store, rejected: bool) -> None:
    arrived(store)
    store.complete_series(T0, after(30))
    if rejected:
        assert store.reject_series(SERIES, "a gap", after(31)).reason == "a gap"
    store.add_instance(an_instance(4), after(40))
    series = store.series_of(STUDY)[0]
    assert (series.state, series.reason, series.instances) == (SeriesState.RECEIVING, "", 4)
    assert store.events_of(STUDY)[-1].detail == "a late instance"


def test_a_duplicate_does_not_reopen_the_series(store: Store) -> None:
    arrived(store)
    store.complete_series(T0, after(30))
    store.add_instance(an_instance(1), after(40))
    assert store.series_of(STUDY)[0].state is SeriesState.COMPLETE


def test_no_event_holds_patient_identity(store: Store) -> None:
    arrived(store)
    queued(store)
    produced(store)
    told = " ".join(f"{event.subject_id} {event.detail}" for event in events(store))
    assert "P7" not in told
    assert "ACC7" not in told


# ---- assembling ---------------------------------------------------------------------------------


def test_a_series_is_complete_once_it_is_quiet(store: Store) -> None:
    arrived(store, now=after(10))
    assert store.complete_series(after(9), after(39)) is None
    complete = store.complete_series(after(10), after(40))
    assert complete is not None
    assert complete.state is SeriesState.COMPLETE
    assert store.complete_series(after(50), after(80)) is None


def test_a_study_waits_until_no_series_is_receiving_and_is_looked_at_once(store: Store) -> None:
    arrived(store)
    store.add_instance(an_instance(9, series_uid="1.2.3.2"), after(20))
    store.complete_series(after(1), after(30))
    assert store.study_to_assemble() is None
    store.complete_series(after(20), after(50))
    study = store.study_to_assemble()
    assert study is not None
    store.add_instance(an_instance(10, series_uid="1.2.3.2"), after(51))
    store.study_assembled(study, "looked at", after(52))
    assert store.study_to_assemble() is None, "a series is receiving again"
    store.complete_series(after(51), after(90))
    again = store.study_to_assemble()
    assert again is not None
    assert (again.instances, again.assembled_instances) == (5, 4)
    store.study_assembled(again, "looked at", after(91))
    assert store.study_to_assemble() is None


# ---- running ------------------------------------------------------------------------------------


def test_the_same_work_is_queued_once(store: Store) -> None:
    arrived(store)
    first = queued(store, options={"a": 1, "b": 2})
    assert queued(store, options={"b": 2, "a": 1}) == first
    assert queued(store, options={"a": 3}).id != first.id


def test_a_person_asking_always_gets_a_new_run_and_assembly_does_not_undo_it(store: Store) -> None:
    arrived(store)
    queued(store)
    produced(store)
    forced = queued(store, force=True, masks_path="m.nii", masks_sha256="c" * 64)
    corrected = produced(store)
    assert corrected.id == forced.id
    assert queued(store).state is RunState.SUPERSEDED, "the same input again, say after a late localizer"
    assert store.current_runs(STUDY) == (corrected,)


@pytest.mark.parametrize("state", [RunState.QUEUED, RunState.RUNNING, RunState.PRODUCED])
def test_a_late_image_does_not_take_the_place_of_a_persons_masks(store: Store, state: RunState) -> None:
    arrived(store)
    queued(store, "d1")
    produced(store)
    masks = queued(store, "d1", force=True, masks_path="m.nii", masks_sha256="c" * 64)
    if state is RunState.RUNNING:
        store.claim_run("w", 60, T0)
    elif state is RunState.PRODUCED:
        produced(store)
    held = store.run(masks.id)
    assert held.state is state
    assert queued(store, "d2") == held
    assert [run.id for run in store.runs_of(STUDY)] == [1, masks.id]
    last = store.events_of(STUDY)[-1]
    assert (last.name, last.subject_id) == ("run.kept", str(masks.id))
    assert "salsa-node rerun" in last.detail
    assert queued(store, "d2", force=True).supersedes_id is not None, "a person asks"
    assert queued(store, "d3").state is RunState.QUEUED, "and gave up the masks"


def test_masks_that_failed_keep_nothing_out(store: Store) -> None:
    arrived(store)
    masks = queued(store, "d1", force=True, masks_path="m.nii", masks_sha256="c" * 64)
    store.claim_run("w", 60, T0)
    store.fail_run(masks.id, "w", "other shape", T0)
    assert queued(store, "d2").id != masks.id


def test_a_changed_input_is_work_even_where_it_changed_back(store: Store) -> None:
    arrived(store)
    first = queued(store, "d1")
    second = queued(store, "d2")
    assert queued(store, "d1").id not in {first.id, second.id}


def test_a_stat_study_goes_first_and_the_rest_in_the_order_of_their_waiting(store: Store) -> None:
    for number, sender in enumerate(("CT1", "CT2", "CT_ER"), start=1):
        study, uid = f"7.{number}", f"7.{number}.1"
        image = an_instance(study_uid=study, series_uid=uid, sop_instance_uid=f"{uid}.1", calling_ae=sender)
        store.add_instance(image, after(number))
        looked_at(store, study, after(number))
        store.queue_run(study, "demo", "d", after(number), series_uid=uid)
    claimed = [store.claim_run("w", 60, after(9), ["CT_ER"]) for _ in range(4)]
    assert [run and run.study_uid for run in claimed] == ["7.3", "7.1", "7.2", None]


def test_what_was_queued_in_the_same_moment_goes_in_the_order_of_queueing(store: Store) -> None:
    for study in ("7.1", "7.2", "7.3"):
        image = an_instance(study_uid=study, series_uid=f"{study}.1", sop_instance_uid=f"{study}.1.1")
        store.add_instance(image, T0)
        looked_at(store, study)
        store.queue_run(study, "demo", "d", T0)
    first = store.claim_run("dead", 5, T0)
    claimed = [store.claim_run("w", 60, after(9)) for _ in range(3)]
    assert [run and run.study_uid for run in (first, *claimed)] == ["7.1", "7.1", "7.2", "7.3"]


def test_a_newer_run_cancels_what_waits_and_what_runs(store: Store) -> None:
    arrived(store)
    waiting = queued(store, "d1")
    running = queued(store, "d2")
    assert store.run(waiting.id).state is RunState.CANCELLED
    claimed = store.claim_run("w", 60, T0)
    assert claimed is not None
    assert claimed.id == running.id
    newest = queued(store, "d3")
    assert store.run(running.id).state is RunState.CANCELLED
    with pytest.raises(LeaseLost):
        store.heartbeat(running.id, "w", 60, T0)
    with pytest.raises(LeaseLost):
        store.produce(running.id, "w", OBJECTS, ["pacs"], "lesions", None, "x", T0)
    assert store.objects_of(running.id) == ()
    assert produced(store).id == newest.id


def test_a_produced_run_supersedes_the_one_before_and_withdraws_its_deliveries(store: Store) -> None:
    arrived(store)
    queued(store, "d1")
    old = produced(store, destinations=("pacs", "archive"))
    sent = store.claim_deliveries("d", 60, T0)
    store.delivered(sent[0].id, "d", 0, None, T0)
    store.delivery_failed(sent[1].id, "d", 0xA700, "full", after(5), T0)
    new = queued(store, "d2")
    assert new.supersedes_id == old.id
    assert store.current_runs(STUDY) == (old,), "until the new one is produced"
    produced(store)
    assert store.run(old.id).state is RunState.SUPERSEDED
    states = sorted(delivery.state.value for delivery in store.deliveries_of(old.id))
    assert states == ["SENT", "WITHDRAWN", "WITHDRAWN", "WITHDRAWN"]
    while claimed := store.claim_deliveries("d", 60, after(10)):
        assert {delivery.run_id for delivery in claimed} == {new.id}
    assert [run.state for run in store.runs_of(STUDY)].count(RunState.PRODUCED) == 1


def test_what_is_going_out_while_superseded_is_settled_truthfully(store: Store) -> None:
    arrived(store)
    queued(store, "d1")
    old = produced(store)
    first, second = store.claim_deliveries("d", 60, T0)
    queued(store, "d2")
    produced(store)
    assert store.delivered(first.id, "d", 0, None, T0).state is DeliveryState.SENT
    store.delivery_failed(second.id, "d", None, "gone", after(1), T0)
    store.claim_deliveries("d", 60, after(2))
    assert [delivery.state for delivery in store.deliveries_of(old.id)] == [DeliveryState.SENT, DeliveryState.WITHDRAWN]


def test_runs_are_claimed_oldest_first_and_not_before_their_time(store: Store) -> None:
    arrived(store)
    store.add_instance(an_instance(1, sop_instance_uid="5.1", series_uid="5.5", study_uid="5"), T0)
    older = queued(store)
    looked_at(store, "5")
    newer = store.queue_run("5", "demo", "e", after(1))
    first = store.claim_run("w", 60, after(2))
    assert first is not None
    assert (first.id, first.state, first.attempt, first.lease_until) == (older.id, RunState.RUNNING, 1, after(62))
    returned = store.return_run(older.id, "w", "the card is full", after(100), after(3))
    assert (returned.state, returned.error, returned.lease_owner) == (RunState.QUEUED, "the card is full", None)
    second = store.claim_run("w", 600, after(4))
    assert second is not None
    assert second.id == newer.id
    assert store.claim_run("w", 60, after(99)) is None
    third = store.claim_run("w", 60, after(100))
    assert third is not None
    assert (third.id, third.attempt) == (older.id, 2)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("died", [False, True])
def test_no_run_is_claimed_while_its_study_is_arriving_again(store: Store, forced: bool, died: bool) -> None:
    arrived(store)
    store.add_instance(an_instance(1, sop_instance_uid="5.1", series_uid="5.5", study_uid="5"), T0)
    run = queued(store, force=forced)
    if died:
        store.claim_run("dead", 1, T0)
    store.add_instance(an_instance(4), after(5))
    assert store.claim_run("w", 60, after(6)) is None
    looked_at(store, "5")
    other = store.queue_run("5", "demo", "e", after(7))
    claimed = store.claim_run("w", 60, after(8))
    assert claimed is not None
    assert claimed.id == other.id, "another study goes on"
    store.complete_series(after(5), after(35))
    assert store.claim_run("w", 60, after(36)) is None, "assembly may be about to take its place"
    looked_at(store, now=after(37))
    claimed = store.claim_run("w", 60, after(38))
    assert claimed is not None
    assert claimed.id == run.id


def test_a_run_that_a_person_asked_for_half_way_waits_for_the_series(store: Store) -> None:
    arrived(store)
    store.queue_run(STUDY, "demo", "d", T0, force=True)
    assert store.claim_run("w", 60, T0) is None
    store.complete_series(T0, T0)
    assert store.claim_run("w", 60, T0) is not None


def test_an_attempt_that_was_not_the_runs_fault_does_not_count(store: Store) -> None:
    arrived(store)
    run = queued(store)
    store.claim_run("w", 60, T0)
    assert store.return_run(run.id, "w", "stopped", T0, T0, counts=False).attempt == 0


def test_a_lease_that_ran_out_returns_the_work(store: Store) -> None:
    arrived(store)
    run = queued(store)
    store.claim_run("dead", 60, T0)
    store.heartbeat(run.id, "dead", 60, after(30))
    assert store.claim_run("alive", 60, after(89)) is None
    again = store.claim_run("alive", 60, after(90))
    assert again is not None
    assert (again.id, again.attempt, again.lease_owner) == (run.id, 2, "alive")
    for late in (
        lambda: store.heartbeat(run.id, "dead", 60, after(91)),
        lambda: store.produce(run.id, "dead", OBJECTS, ["pacs"], "lesions", None, "x", after(91)),
        lambda: store.return_run(run.id, "dead", "x", T0, after(91)),
        lambda: store.fail_run(run.id, "dead", "x", after(91)),
    ):
        with pytest.raises(LeaseLost):
            late()
    assert names(store)[-3:] == ["run.running", "run.queued", "run.running"]


def test_a_dead_owner_is_released_at_once(store: Store) -> None:
    arrived(store)
    run = queued(store)
    store.claim_run("dead", 600, T0)
    assert [released.id for released in store.release_owner("dead", after(1))] == [run.id]
    assert store.release_owner("dead", after(1)) == ()
    produced(store, "alive", after(2))
    store.claim_deliveries("dead", 600, after(3))
    store.release_owner("dead", after(4))
    assert len(store.claim_deliveries("alive", 60, after(4))) == 2


def test_a_node_that_starts_frees_every_lease(store: Store) -> None:
    arrived(store)
    queued(store)
    produced(store)
    store.claim_deliveries("dead sender", 600, T0)
    run = queued(store, "d2")
    store.claim_run("dead worker", 600, T0)
    assert [released.id for released in store.release_owner(None, after(1))] == [run.id]
    assert len(store.claim_deliveries("alive", 60, after(1))) == 2
    assert store.claim_run("alive", 60, after(1)) is not None


def test_a_produced_run_holds_what_the_worker_said(store: Store) -> None:
    arrived(store)
    queued(store)
    run = produced(store, destinations=("pacs", "archive", "pacs"))
    assert (run.state, run.outcome, run.findings, run.lease_owner) == (
        RunState.PRODUCED,
        "lesions",
        {"lesions": 2},
        None,
    )
    assert [item.kind for item in store.objects_of(run.id)] == ["SEG", "SR"]
    assert len(store.deliveries_of(run.id)) == 4, "twice the same destination is one destination"
    assert store.is_result("2.25.1")
    assert not store.is_result("1.2.3.1.1")


def test_a_failed_run_stays_failed(store: Store) -> None:
    arrived(store)
    run = queued(store)
    store.claim_run("w", 60, T0)
    assert store.fail_run(run.id, "w", "no weights", after(1)).error == "no weights"
    assert store.claim_run("w", 60, after(1000)) is None
    assert store.runs_in(RunState.FAILED)[0].id == run.id


# ---- delivering ---------------------------------------------------------------------------------


def test_deliveries_of_one_destination_are_claimed_together_and_once(store: Store) -> None:
    arrived(store)
    queued(store)
    produced(store, destinations=("pacs", "archive"))
    first, second = store.claim_deliveries("d", 60, T0), store.claim_deliveries("e", 60, T0)
    assert [[d.destination for d in claimed] for claimed in (first, second)] == [["pacs"] * 2, ["archive"] * 2]
    assert store.claim_deliveries("f", 60, after(59)) == ()
    with pytest.raises(LeaseLost):
        store.delivered(first[0].id, "e", 0, None, T0)
    assert [d.attempt for d in store.claim_deliveries("f", 60, after(60))] == [2, 2]


def test_a_delivery_is_retried_given_up_and_sent_again_when_asked(store: Store) -> None:
    arrived(store)
    queued(store)
    produced(store)
    seg, sr = store.claim_deliveries("d", 60, T0)
    assert store.delivered(seg.id, "d", 0xB000, "coerced", T0).last_error == "coerced"
    assert store.delivery_failed(sr.id, "d", 0xA700, "full", after(30), T0).last_status == 0xA700
    assert store.claim_deliveries("d", 60, after(29)) == ()
    (again,) = store.claim_deliveries("d", 60, after(30))
    assert (again.id, again.attempt) == (sr.id, 2)
    assert store.give_up(sr.id, "d", None, "refused", after(30)).state is DeliveryState.GAVE_UP
    assert store.claim_deliveries("d", 60, after(9999)) == ()
    resent = store.resend(STUDY, None, after(10000))
    assert [(d.state, d.attempt) for d in resent] == [(DeliveryState.PENDING, 0)] * 2
    assert len(store.claim_deliveries("d", 60, after(10000))) == 2


def test_a_retry_has_all_its_attempts_again_and_goes_at_once(store: Store) -> None:
    arrived(store)
    queued(store)
    produced(store)
    for row in store.claim_deliveries("s", 60, T0):
        store.delivery_failed(row.id, "s", None, "nobody listens", after(1000), T0)
    for row in store.claim_deliveries("s", 60, after(1000)):
        assert row.attempt == 2
        store.give_up(row.id, "s", None, "nobody listens", after(1000))
    assert store.claim_deliveries("s", 60, after(9999)) == ()
    _, due = store.retry(STUDY, T0)
    assert len(due) == len(OBJECTS)
    assert [row.attempt for row in store.claim_deliveries("s", 60, T0)] == [1] * len(OBJECTS)


def test_resend_reaches_a_destination_that_was_not_there_before(store: Store) -> None:
    arrived(store)
    queued(store)
    produced(store)
    assert [d.destination for d in store.resend(STUDY, "research", T0)] == ["research"] * 2
    assert len(store.resend(STUDY, "research", T0)) == 2


def test_resend_does_not_wait_for_the_backoff(store: Store) -> None:
    arrived(store)
    queued(store)
    produced(store)
    for delivery in store.claim_deliveries("d", 60, T0):
        store.delivery_failed(delivery.id, "d", None, "down", after(3600), T0)
    store.resend(STUDY, "pacs", after(1))
    assert len(store.claim_deliveries("d", 60, after(1))) == 2


@pytest.mark.parametrize("held", [False, True])
def test_resend_gives_a_delivery_that_was_interrupted_all_its_attempts_again(store: Store, held: bool) -> None:
    arrived(store)
    queued(store)
    produced(store)
    for _ in range(3):
        store.claim_deliveries("dead", 60, T0)
        store.release_owner("dead", T0)
    store.claim_deliveries("dead", 60, T0)
    resent = store.resend(STUDY, None, after(59 if held else 60))
    assert [d.attempt for d in resent] == ([4, 4] if held else [0, 0])


def test_the_delivery_that_is_due_longest_goes_first(store: Store) -> None:
    arrived(store)
    queued(store)
    produced(store, destinations=("pacs", "archive"))
    for wait in (50, 20):
        for delivery in store.claim_deliveries("d", 60, T0):
            store.delivery_failed(delivery.id, "d", None, "down", after(wait), T0)
    order = [{d.destination for d in store.claim_deliveries("d", 60, after(60))} for _ in range(2)]
    assert order == [{"archive"}, {"pacs"}]


def test_resend_without_a_result_says_so(store: Store) -> None:
    arrived(store)
    with pytest.raises(UnknownStudy, match="no result to send"):
        store.resend(STUDY, None, T0)


@pytest.mark.parametrize("earlier", [False, True])
def test_resend_sends_no_older_result_where_a_guard_keeps_the_latest(store: Store, earlier: bool) -> None:
    arrived(store)
    queued(store)
    if earlier:
        produced(store)
        for delivery in store.claim_deliveries("d", 60, T0):
            store.delivered(delivery.id, "d", 0, None, T0)
        queued(store, "d2")
    run = store.claim_run("w", 60, T0)
    assert run is not None
    store.block_run(run.id, "w", OBJECTS, "lesions", {}, "run2", "The masks are mirrored.", T0)
    with pytest.raises(UnknownStudy, match=r"kept here.*The masks are mirrored\. Mend the cause and rerun"):
        store.resend(STUDY, None, T0)
    assert store.claim_deliveries("d", 60, T0) == ()


# ---- asking -------------------------------------------------------------------------------------


def test_an_accession_number_begins_alike_in_capitals_or_not(store: Store) -> None:
    store.add_instance(an_instance(), T0)
    assert [len(store.find_studies(Sought(accession=text))) for text in ("ACC", "acc7", "CC", "a_c")] == [1, 1, 0, 0]


def test_what_was_never_tried_goes_before_what_failed(store: Store) -> None:
    arrived(store)
    queued(store)
    run = produced(store)
    for failed in store.claim_deliveries("s", 60, T0):
        store.delivery_failed(failed.id, "s", None, "nobody listens", after(1), T0)
    store.resend(run.study_uid, "other", T0)
    claimed = store.claim_deliveries("s", 60, after(10))
    assert [(item.destination, item.not_before) for item in claimed] == [("other", None)] * 2


def test_a_study_is_found_by_uid_beginning_or_accession_number(store: Store) -> None:
    arrived(store)
    store.add_instance(
        an_instance(1, sop_instance_uid="1.9.1", series_uid="1.9.9", study_uid="1.9", accession_number="B"), after(1)
    )
    assert store.study("1.2").study_uid == STUDY
    assert store.study("ACC7").study_uid == STUDY
    assert [study.study_uid for study in store.studies()] == ["1.9", STUDY]
    with pytest.raises(UnknownStudy, match="more than one"):
        store.study("1.")
    for nothing in ("7.7", "", "%", "ACC"):
        with pytest.raises(UnknownStudy, match="no study goes by"):
            store.study(nothing)


def test_times_are_aware_utc_and_naive_ones_are_refused(store: Store) -> None:
    store.add_instance(an_instance(), datetime(2026, 11, 20, 14, 0, tzinfo=UTC).astimezone())
    assert store.study(STUDY).first_at == datetime(2026, 11, 20, 14, 0, tzinfo=UTC)
    with pytest.raises(StoreError, match="naive"):
        store.add_instance(an_instance(2), datetime(2026, 11, 20))  # noqa: DTZ001


# ---- several processes --------------------------------------------------------------------------


def _claim_everything(url: str, owner: str, ready: Connection) -> None:
    with Store.open(StoreSettings(url)) as store:
        ready.send(None)
        ready.recv()
        claimed = []
        while (run := store.claim_run(owner, 600, T0)) is not None:
            claimed.append(run.id)
        ready.send(claimed)


def _claim_and_hang(url: str, ready: Connection) -> None:
    with Store.open(StoreSettings(url)) as store:
        run = store.claim_run("hangs", 60, T0)
        assert run is not None
        ready.send(run.id)
        ready.recv()


def test_two_processes_never_claim_the_same_run(store: Store, url: str) -> None:
    for number in range(40):
        uid = f"7.{number}"
        store.add_instance(an_instance(number, sop_instance_uid=f"{uid}.2", series_uid=f"{uid}.1", study_uid=uid), T0)
        looked_at(store, uid)
        store.queue_run(uid, "demo", "d", T0)
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(2)]
    children = [
        context.Process(target=_claim_everything, args=(url, f"w{n}", there)) for n, (_, there) in enumerate(pairs)
    ]
    for child, (_, there) in zip(children, pairs, strict=True):
        child.start()
        there.close()  # so that a child that dies is heard of
    for here, _ in pairs:
        here.recv()
    for here, _ in pairs:
        here.send(None)
    claims = [here.recv() for here, _ in pairs]
    for child in children:
        child.join()
    assert sorted(claims[0] + claims[1]) == list(range(1, 41))
    assert all(run.attempt == 1 for run in store.runs_in(RunState.RUNNING))


def test_the_work_of_a_killed_process_returns(store: Store, url: str) -> None:
    arrived(store)
    run = queued(store)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_claim_and_hang, args=(url, there))
    child.start()
    there.close()
    assert here.recv() == run.id
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert store.claim_run("next", 60, after(59)) is None
    again = store.claim_run("next", 60, after(60))
    assert again is not None
    assert again.id == run.id
