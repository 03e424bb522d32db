"""What leaves the record: studies of which no file is kept, wholly and alone."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from test_retention import STANDINGS, arrive, days, finish
from test_store import url as url  # SQLite and PostgreSQL, by turns

from salsa_node import retention
from salsa_node.errors import IllegalTransition, UnknownStudy
from salsa_node.settings import RetentionSettings
from salsa_node.store import Store, StoreSettings

ENDED = RetentionSettings(
    done_days=1, failed_days=1, blocked_days=1, nothing_days=1, cancelled_days=1, results_days=3, record_days=30
)


@pytest.fixture
def store(url: str):
    with Store.open(StoreSettings(url), create=True) as opened:
        yield opened


def purged(store: Store, data_dir: Path, uid: str, how: str = "done") -> None:
    """A study that came, ended so, and whose files are gone; another one after it has the newest numbers."""
    arrive(store, data_dir, uid)
    finish(store, data_dir, uid, how)
    store.purge(uid, "by hand", days(1), lambda paths: None, results=True)
    newer(store, data_dir, f"7.{uid}")


def newer(store: Store, data_dir: Path, uid: str) -> None:
    arrive(store, data_dir, uid, days(40))
    finish(store, data_dir, uid, "sending", days(40))


def nothing_left_of(url: str, uid: str) -> bool:
    """Whether no row of any table names the study or anything of it."""
    engine = sa.create_engine(url)
    with engine.connect() as db:
        rows = [str(row) for name in sa.inspect(engine).get_table_names()
                for row in db.execute(sa.select(sa.text("*")).select_from(sa.table(name)))]  # fmt: skip
    engine.dispose()
    return not any(f"'{uid}'" in row or f"'{uid}.1" in row or f"2.25.{uid}'" in row for row in rows)


@pytest.mark.parametrize("how", ["done", "failed", "nothing", "cancelled"])
def test_nothing_is_left_of_a_study_but_that_one_was_forgotten(store, url, tmp_path, how):
    purged(store, tmp_path, "1.2", how)
    kept = store.runs_of("7.1.2")
    store.forget("1.2", days(50), lambda paths: None)
    with pytest.raises(UnknownStudy):
        store.study("1.2")
    assert nothing_left_of(url, "1.2")
    assert store.runs_of("7.1.2") == kept
    (told,) = store.find_events(name="node.forgot")
    assert (told.study_uid, told.subject_id) == (None, "record")


@pytest.mark.parametrize("how", STANDINGS)
def test_the_rule_waits_for_its_days_and_for_the_files_to_be_gone(store, tmp_path, how):
    arrive(store, tmp_path, "1.2")
    finish(store, tmp_path, "1.2", how)
    newer(store, tmp_path, "1.3")
    files_stay = how in ("not_delivered", "sending", "held", "blocked")  # a blocked result has no rule of its own
    for after in (2, 4, 29, 29):
        retention.step(store, tmp_path, ENDED, days(after))
    assert store.study("1.2").study_uid == "1.2"
    assert retention.step(store, tmp_path, ENDED, days(31)) == (None if files_stay else "1.2")
    assert {study.study_uid for study in store.studies(10)} == ({"1.2", "1.3"} if files_stay else {"1.3"})
    assert sorted(path.name for path in tmp_path.glob("studies/*")) == (["1.2", "1.3"] if files_stay else ["1.3"])
    if not files_stay:
        assert not (tmp_path / "results" / "1.2").exists()
    assert retention.step(store, tmp_path, ENDED, days(31)) is None


def test_without_the_rule_the_record_keeps_everything(store, tmp_path):
    purged(store, tmp_path, "1.2")
    assert retention.step(store, tmp_path, RetentionSettings(done_days=1000), days(900)) is None
    assert store.study("1.2").study_uid == "1.2"


def test_a_study_whose_files_are_kept_is_not_forgotten(store, tmp_path):
    arrive(store, tmp_path, "1.2")
    finish(store, tmp_path, "1.2", "done")
    newer(store, tmp_path, "1.3")
    with pytest.raises(IllegalTransition, match="purge --results"):
        store.forget("1.2", days(50), lambda paths: None)
    store.purge("1.2", "by hand", days(1), lambda paths: None)
    with pytest.raises(IllegalTransition, match="purge --results"):  # its result is still there
        store.forget("1.2", days(50), lambda paths: None)
    assert store.without_files(days(50), 10) == ()


def test_the_number_of_an_event_is_never_given_again(store, tmp_path):
    arrive(store, tmp_path, "1.2")
    finish(store, tmp_path, "1.2", "done")
    store.purge("1.2", "by hand", days(1), lambda paths: None, results=True)
    newest = store.find_events(limit=1)[0].id
    store.forget("1.2", days(50), lambda paths: None)
    assert store.find_events(limit=1)[0].id > newest


def test_masks_go_with_the_last_study_that_used_them(store, tmp_path):
    for n, uid in enumerate(("1.2", "1.3")):
        arrive(store, tmp_path, uid)
        for digest in ("shared", f"alone-{uid}"):
            store.queue_run(
                uid, "given_masks", f"{digest}{n}", days(0), masks_path=f"masks/{digest}.nii", masks_sha256="0" * 64
            )
            store.cancel(uid, days(0))
        store.purge(uid, "by hand", days(1), lambda paths: None, results=True)
    newer(store, tmp_path, "1.4")
    removed: list[str] = []
    store.forget("1.2", days(50), removed.extend)
    assert removed == ["masks/alone-1.2.nii"]
    store.forget("1.3", days(50), removed.extend)
    assert sorted(removed[1:]) == ["masks/alone-1.3.nii", "masks/shared.nii"]


def test_what_cannot_be_removed_keeps_the_rows(store, tmp_path):
    purged(store, tmp_path, "1.2")

    def refuse(paths: object) -> None:
        raise PermissionError("read-only")

    with pytest.raises(PermissionError):
        store.forget("1.2", days(50), refuse)
    assert store.study("1.2").study_uid == "1.2"


def test_what_the_node_said_of_itself_goes_but_for_the_newest(store, tmp_path):
    for n in range(3):
        store.add_event("node", "here", "node.started", "", days(n))
    purged(store, tmp_path, "1.2")
    assert store.forget_own(days(2)) == 2
    assert [event.at for event in store.find_events(name="node.started")] == [days(2)]
    assert store.forget_own(days(100)) == 1
    store.add_event("node", "here", "node.started", "", days(60) + timedelta(hours=1))
    newest = store.find_events(limit=1)[0].id
    assert store.forget_own(days(100)) == 0
    assert store.find_events(limit=1)[0].id == newest
