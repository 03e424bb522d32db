"""Where a study stands, in one word, for every combination of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from test_store import OBJECTS, STUDY, an_instance

from salsa_node import console, overview
from salsa_node.errors import IllegalTransition
from salsa_node.overview import Standing
from salsa_node.store import Store, StoreSettings

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True) as opened:
        opened.add_instance(an_instance(accession_number="A\x1b[31m1"), T0)
        yield opened


def standing(store: Store) -> Standing:
    return overview.glance(store, store.study(STUDY)).standing


def assembled(store: Store) -> None:
    store.complete_series(T0, T0)
    store.study_assembled(store.study(STUDY), "looked at", T0)


def produced(store: Store) -> int:
    assembled(store)
    run = store.queue_run(STUDY, "demo", "digest", T0)
    store.claim_run("worker", 60, T0)
    store.produce(run.id, "worker", OBJECTS, ["pacs"], "lesions", {"lesions": [], "caveat": "Careful."}, "d", T0)
    return run.id


def test_from_the_first_image_to_the_run(store):
    assert standing(store) is Standing.RECEIVING
    store.complete_series(T0, T0)
    assert standing(store) is Standing.WAITING
    store.study_assembled(store.study(STUDY), "looked at", T0)
    assert standing(store) is Standing.NOTHING
    store.queue_run(STUDY, "demo", "digest", T0)
    assert standing(store) is Standing.QUEUED
    run = store.claim_run("worker", 60, T0)
    assert standing(store) is Standing.RUNNING
    store.fail_run(run.id, "worker", "no memory", T0)
    assert standing(store) is Standing.FAILED
    assert overview.row(overview.glance(store, store.study(STUDY)))["error"] == "no memory"


def test_from_the_result_to_the_destination(store):
    produced(store)
    assert standing(store) is Standing.SENDING
    first, second = store.claim_deliveries("sender", 60, T0)
    store.delivered(first.id, "sender", 0, None, T0)
    assert standing(store) is Standing.SENDING
    store.give_up(second.id, "sender", 0xA900, "refused", T0)
    assert standing(store) is Standing.NOT_DELIVERED
    store.resend(STUDY, None, T0)
    for delivery in store.claim_deliveries("sender", 60, T0 + timedelta(seconds=1)):
        store.delivered(delivery.id, "sender", 0, None, T0)
    assert standing(store) is Standing.DONE


def test_the_page_of_a_study_is_json_and_readable(store, capsys):
    run = produced(store)
    page = overview.detail(store, overview.glance(store, store.study(STUDY)))
    assert json.loads(json.dumps(page)) == page
    assert [item["kind"] for item in page["runs"][0]["objects"]] == ["SEG", "SR"]
    console.put_detail(page)
    told = capsys.readouterr().out
    assert f"Run {run}: Careful." in told
    for item in page["runs"][0]["objects"]:  # where the words on a blocked run send their reader
        assert any({str(item["id"]), item["kind"], item["path"]} <= set(line.split()) for line in told.splitlines())
    assert "run.produced" in told


def test_the_page_names_what_is_in_quarantine(store, capsys):
    store.quarantine(an_instance(path="quarantine/1/1.dcm"), "another Patient ID", T0)
    page = overview.detail(store, overview.glance(store, store.study(STUDY)))
    assert [item["reason"] for item in page["quarantine"]] == ["another Patient ID"]
    console.put_detail(page)
    told = capsys.readouterr().out
    assert "Quarantine" in told
    assert "quarantine/1/1.dcm" in told


def test_tables_say_what_to_do_next_and_let_no_control_character_through(store, capsys):
    assembled(store)
    run = store.queue_run(STUDY, "demo", "digest", T0)
    store.claim_run("worker", 60, T0)
    store.fail_run(run.id, "worker", "no memory", T0)
    seen = overview.glance(store, store.study(STUDY))
    console.put_studies([overview.row(seen)])
    told = capsys.readouterr().out
    assert "failed: salsa-node retry STUDY" in told
    assert "\x1b" not in told
    console.put_detail(overview.detail(store, seen))
    assert "next: salsa-node retry STUDY" in capsys.readouterr().out
    console.put_studies([])
    assert capsys.readouterr().out == "no study has arrived yet\n"


def test_studies_say_whether_what_was_sent_is_verified(store):
    def told() -> object:
        return overview.row(overview.glance(store, store.study(STUDY)))["proof"]

    produced(store)
    assert told() is None, "nothing was taken yet"
    first, second = store.claim_deliveries("n", 60, T0)
    store.delivered(first.id, "n", 0, None, T0, T0)
    assert told() == "to be verified"
    store.claim_checks("n", 60, T0)
    store.verified(first.id, "n", "C-FIND", T0)
    assert told() == "verified"
    store.delivered(second.id, "n", 0, None, T0)
    assert told() == "partly verified"
    store.resend(STUDY, None, T0)
    for delivery in store.claim_deliveries("n", 60, T0):
        store.delivered(delivery.id, "n", 0, None, T0)
    assert told() == "unverified"


def test_a_result_whose_files_were_purged_is_not_sent_again_and_says_what_to_do(store):
    produced(store)
    for delivery in store.claim_deliveries("n", 60, T0):
        store.delivered(delivery.id, "n", 0, None, T0)
    store.purge(STUDY, "by hand", T0, lambda _: None, results=True)
    with pytest.raises(IllegalTransition, match=f"salsa-node rerun {STUDY} fetches the images"):
        store.resend(STUDY, None, T0)
    assert standing(store) is Standing.DONE, "nothing was made due"
