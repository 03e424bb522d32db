"""What leaves, and when: a review hold, a shadow, and results of ours that come back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from made_delivery import SEG, SR, STUDY, T0, an_archive, produce
from test_store import an_instance
from told import events

from salsa_node import config, delivery, overview
from salsa_node.errors import UnknownStudy
from salsa_node.overview import Standing
from salsa_node.settings import DeliverySettings, Destination
from salsa_node.store import DeliveryState, Store, StoreSettings

SETTINGS = DeliverySettings(timeout_s=10)
HELD = replace(SETTINGS, hold=True)
Step = Callable[..., list[DeliveryState]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True) as opened:
        yield opened


@pytest.fixture
def step(store: Store, tmp_path: Path) -> Step:
    """One step, and the states of the first run's deliveries."""

    def turn(settings: DeliverySettings, *destinations: Destination) -> list[DeliveryState]:
        delivery.step(store, settings, destinations, tmp_path, "node", T0, clock=lambda: T0)
        return [row.state for row in store.deliveries_of(1)]

    return turn


def standing(store: Store) -> Standing:
    return overview.glance(store, store.study(STUDY)).standing


def looked_at(store: Store) -> None:
    store.study_assembled(store.study(STUDY), "", T0)


def test_what_is_held_leaves_when_a_person_says_so(store: Store, tmp_path: Path, step: Step) -> None:
    produce(store, tmp_path, ["pacs"])
    looked_at(store)
    with an_archive() as pacs:
        assert step(HELD, pacs.destination()) == [DeliveryState.HELD] * 2
        assert standing(store) is Standing.HELD
        store.resend(STUDY, None, T0)  # which is no way round
        assert step(HELD, pacs.destination()) == [DeliveryState.HELD] * 2
        assert pacs.taken == []
        assert [row.attempt for row in store.deliveries_of(1)] == [0, 0]
        assert len(store.release_study(STUDY, T0)) == 2
        assert step(HELD, pacs.destination()) == [DeliveryState.SENT] * 2
        assert pacs.uids == [SEG, SR]
        store.resend(STUDY, None, T0)
        assert step(HELD, pacs.destination()) == [DeliveryState.SENT] * 2, "released is released"
    assert [event.name for event in events(store) if event.name.startswith("study.released_")] == [
        "study.released_result"
    ]


def test_a_later_result_is_held_anew_and_the_held_one_is_withdrawn(store: Store, tmp_path: Path, step: Step) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        step(HELD, pacs.destination())
        run = store.queue_run(STUDY, "demo", "e", T0, force=True)
        store.claim_run("w", 60, T0)
        store.produce(run.id, "w", [], ["pacs"], "lesions", None, "y", T0)
        assert step(HELD, pacs.destination()) == [DeliveryState.WITHDRAWN] * 2
        assert store.is_held(store.run(2), True)
        store.release_study(STUDY, T0)
        assert not store.is_held(store.run(2), True)
        assert store.is_held(store.run(1), True)
        assert pacs.taken == []


def test_a_clock_that_is_set_back_releases_nothing(store: Store, tmp_path: Path) -> None:
    produce(store, tmp_path, ["pacs"])
    looked_at(store)
    store.release_study(STUDY, T0)
    assert not store.is_held(store.run(1), True)
    earlier = T0 - timedelta(days=1)
    run = store.queue_run(STUDY, "demo", "e", earlier, force=True)
    store.claim_run("w", 60, earlier)
    store.produce(run.id, "w", [], ["pacs"], "lesions", None, "y", earlier)
    assert store.is_held(store.run(run.id), True), "nobody has seen it"
    store.release_study(STUDY, earlier)
    assert not store.is_held(store.run(run.id), True)


def test_a_person_holds_one_study_before_its_result_is_there(store: Store, tmp_path: Path, step: Step) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        assert len(store.hold_study(STUDY, T0)) == 2
        assert step(SETTINGS, pacs.destination()) == [DeliveryState.HELD] * 2
        run = store.queue_run(STUDY, "demo", "e", T0, force=True)
        assert store.is_held(run, False)
        assert pacs.taken == []
        store.release_study(STUDY, T0)
        assert step(SETTINGS, pacs.destination()) == [DeliveryState.SENT] * 2


def test_what_failed_before_it_was_held_goes_at_once_when_it_is_released(store: Store, tmp_path: Path) -> None:
    produce(store, tmp_path, ["pacs"])
    for row in store.claim_deliveries("s", 60, T0):
        store.delivery_failed(row.id, "s", None, "nobody listens", T0 + timedelta(hours=1), T0)
    store.hold_study(STUDY, T0)
    assert len(store.release_study(STUDY, T0)) == 2
    assert [row.attempt for row in store.claim_deliveries("s", 60, T0)] == [1, 1]


def test_nothing_can_be_released_before_there_is_a_result(store: Store, tmp_path: Path) -> None:
    produce(store, tmp_path, ["pacs"])
    with pytest.raises(UnknownStudy):
        store.release_study("1.9.9", T0)
    with pytest.raises(UnknownStudy):
        store.hold_study("1.9.9", T0)


def test_a_hold_before_there_is_a_result_can_be_taken_back(store: Store) -> None:
    store.add_instance(an_instance(), T0)
    store.complete_series(T0, T0)
    store.study_assembled(store.study("1.2.3"), "looked at", T0)
    run = store.queue_run("1.2.3", "demo", "d", T0)
    with pytest.raises(UnknownStudy, match="no result that could be released"):
        store.release_study("1.2.3", T0)
    assert store.hold_study("1.2.3", T0) == ()
    assert store.is_held(run, False)
    assert store.release_study("1.2.3", T0) == ()
    assert not store.is_held(run, False)
    assert store.is_held(run, True), "a result that nobody has seen"


def test_in_the_shadow_only_research_gets_results(store: Store, tmp_path: Path, step: Step) -> None:
    produce(store, tmp_path, ["pacs", "lab"])
    shadow = replace(SETTINGS, shadow=True, research=("lab",))
    with an_archive() as pacs, an_archive() as lab:
        both = pacs.destination(), replace(lab.destination(), name="lab")
        step(shadow, *both)
        step(shadow, *both)
        assert (pacs.taken, lab.uids) == ([], [SEG, SR])
        by_name = {row.destination: row for row in store.deliveries_of(1)}
        assert by_name["pacs"].state is DeliveryState.LEFT_OUT
        assert "delivery.shadow" in str(by_name["pacs"].last_error)
        store.resend(STUDY, "pacs", T0)
        step(SETTINGS, *both)
        assert pacs.uids == [SEG, SR], "out of the shadow a resend brings it"


def test_in_the_shadow_nobody_is_asked_to_configure_a_sender_who_would_get_nothing(
    store: Store, tmp_path: Path, step: Step
) -> None:
    produce(store, tmp_path, ["sender"])
    with an_archive() as lab:
        known = replace(lab.destination(), name="lab", ae_title="LAB")
        assert step(replace(SETTINGS, shadow=True, research=("lab",)), known) == [DeliveryState.LEFT_OUT] * 2
        assert lab.taken == []
    assert "delivery.shadow" in str(store.deliveries_of(1)[0].last_error)


def test_in_the_shadow_a_sender_that_is_for_research_gets_its_results(store: Store, tmp_path: Path, step: Step) -> None:
    produce(store, tmp_path, ["sender"])
    calling = store.study(STUDY).calling_ae
    with an_archive(ae_title=calling) as lab:
        known = replace(lab.destination(), name="lab", ae_title=calling)
        assert step(replace(SETTINGS, shadow=True, research=("lab",)), known) == [DeliveryState.SENT] * 2


def test_in_the_shadow_without_research_nothing_is_sent(store: Store, tmp_path: Path, step: Step) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        assert step(replace(SETTINGS, shadow=True), pacs.destination()) == [DeliveryState.LEFT_OUT] * 2
        assert pacs.taken == []


def test_in_the_shadow_research_gets_what_goes_elsewhere_by_light() -> None:
    text = "[delivery]\nto = ['pacs']\nresearch = ['lab']\nshadow = {}\n" + "".join(
        f"[[destination]]\nname = '{name}'\nae_title = 'A'\nhost = 'h'\nport = 1\n" for name in ("pacs", "lab")
    )
    assert config.parse(text.format("true")).destinations_for("") == ("pacs", "lab")
    assert config.parse(text.format("false")).destinations_for("") == ("pacs",)


def test_hold_and_release_on_the_command_line(store: Store, tmp_path: Path, step: Step) -> None:
    produce(store, tmp_path, ["pacs"])
    looked_at(store)
    (tmp_path / "node.toml").write_text(
        f'[node]\ndata_dir = "{tmp_path}"\nstore_url = "sqlite:///{tmp_path / "record.sqlite"}"\n'
    )

    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salsa_node", *arguments, "--config", str(tmp_path / "node.toml")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    held = cli("hold", STUDY, "--json")
    assert (held.returncode, json.loads(held.stdout)) == (0, {"study_uid": STUDY, "held": [1, 2]}), held.stderr
    shown = cli("show", STUDY).stdout
    assert "held" in shown
    assert "salsa-node release STUDY" in shown
    released = cli("release", STUDY)
    assert (released.returncode, released.stdout) == (0, "2 deliveries are due; a running node sends them\n")
    assert cli("release", STUDY).returncode == 1
    assert cli("hold", STUDY).returncode == 0
    lifted = cli("release", STUDY)
    assert (lifted.returncode, "2 deliveries are due" in lifted.stdout) == (0, True)
    assert cli("release", "1.9.9").returncode == 4
    with an_archive() as pacs:
        assert step(SETTINGS, pacs.destination()) == [DeliveryState.SENT] * 2
    assert cli("release", STUDY).returncode == 1, "nothing was held"
    assert cli("hold", STUDY).returncode == 0
    lifted = cli("release", STUDY)
    assert (lifted.returncode, lifted.stdout) == (0, "it is held no longer; nothing of it waited\n")
