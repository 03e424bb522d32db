"""The commands about studies through the real process, beside a store that another process holds open."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from test_store import OBJECTS

from salsa_node import console
from salsa_node.store import NewInstance, RunState, Store, StoreSettings

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
NOW = datetime.now(UTC)
FAILED, GIVEN_UP, QUEUED, DONE = "1.2.1", "1.2.2", "1.2.3", "1.2.4"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Four studies of three images each: a failed run, a delivery given up, a run that waits, one that is done."""
    (tmp_path / "data").mkdir()
    (tmp_path / "site.toml").write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n')
    url = f"sqlite:///{tmp_path / 'data' / 'salsa_node.sqlite'}"
    with Store.open(StoreSettings(url), create=True) as record:
        for day, uid in enumerate((FAILED, GIVEN_UP, QUEUED, DONE), 1):
            then = NOW - timedelta(days=day)
            _arrive(record, tmp_path / "data", uid, then)
            run = record.queue_run(uid, "demo", "d" * 64, then)
            if uid == QUEUED:
                continue
            assert record.claim_run("w", 60, then) is not None
            if uid == FAILED:
                record.fail_run(run.id, "w", "no memory", then)
                continue
            made = [item.__class__(item.kind, f"2.25.{uid}.{item.kind}", item.sop_class_uid, f"results/{uid}/{item.kind}", item.sha256) for item in OBJECTS]  # fmt: skip # noqa: E501
            for item in made:
                (tmp_path / "data" / item.path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "data" / item.path).write_bytes(b"result")
            findings = {"lesions": [], "caveat": "Careful.", "pipeline": {
                "name": "demo", "version": "1", "device": "cpu", "weights_sha256": {"fold_0": "ab" * 32},
                "parameters": {"mirroring": False}, "libraries": {"torch": "2.13"}, "notice": ""}}  # fmt: skip
            then += timedelta(seconds=30)
            record.produce(run.id, "w", made, ["pacs"], "no_candidate", findings, "d", then)
            for delivery in record.claim_deliveries("s", 60, then):
                if uid == DONE:
                    record.delivered(delivery.id, "s", 0, None, then)
                else:
                    record.give_up(delivery.id, "s", None, "nobody listens", then)
        yield record


def _arrive(record: Store, data_dir: Path, uid: str, then: datetime) -> None:
    for number in range(3):
        new = NewInstance(
            f"{uid}.1.{number}", f"{uid}.1", uid, "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1",
            f"studies/{uid}/{uid}.1/{number}.dcm", "0" * 32, 5, f"CT{uid[-1]}", "CT", 1, f"ACC{uid[-1]}",
            "P", f"2026010{uid[-1]}",
        )  # fmt: skip
        (data_dir / new.path).parent.mkdir(parents=True, exist_ok=True)
        (data_dir / new.path).write_bytes(b"image")
        record.add_instance(new, then)
    record.complete_series(then, then)
    record.study_assembled(record.study(uid), "looked at", then)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    def of(*words: str) -> list[str]:
        return [sys.executable, "-m", "salsa_node", *words, "--config", str(tmp_path / "site.toml")]

    return of


@pytest.fixture
def cli(command: Callable[..., list[str]]) -> Cli:
    def run(*words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*words), capture_output=True, text=True, check=False, input=typed, timeout=120)

    return run


def listed(told: subprocess.CompletedProcess[str]) -> list[str]:
    assert told.returncode == 0, told.stderr
    return told.stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ((), [FAILED, GIVEN_UP, QUEUED, DONE]),
        (("--reverse", "--limit", "2"), [DONE, QUEUED]),
        (("--state", "failed", "--state", "not-delivered"), [FAILED, GIVEN_UP]),
        (("--since", "60h"), [FAILED, GIVEN_UP]),
        (("--until", "3d", "--sort", "from"), [QUEUED, DONE]),
        (("--date", "20260102-20260103", "--sort", "accession"), [GIVEN_UP, QUEUED]),
        (("--ae", "CT4"), [DONE]),
        (("--accession", "ACC2"), [GIVEN_UP]),
        (("--called", "NOBODY"), []),
    ],
)
def test_studies_are_found_by_what_is_known_of_them(store, cli, words, found):
    assert listed(cli("studies", "--uids", *words)) == found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--state", "lost"), "not delivered"),
        (("--sort", "size"), "accession"),
        (("--date", "2026"), "20260131"),
        (("--date", "20261301"), "20260131"),
        (("--date", "20260131-20260101"), "20260131"),
        (("--date", "20260101-20260199"), "20260131"),
        (("--since", "0001-01-01T00:00+14:00"), "24h"),
        (("--since", "yesterday"), "24h"),
    ],
)
def test_a_filter_that_means_nothing_is_wrong_usage(store, cli, words, told):
    answer = cli("studies", *words)
    assert answer.returncode == 2
    assert told in re.sub(r"[│\s]+", " ", answer.stderr)


@contextmanager
def going_on(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command that ends by Ctrl-C, which the background work of a shell ignores and hands down."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_watch_prints_again_what_changed_and_ends_by_ctrl_c(store, command):
    with going_on(command("studies", "--uids", "--state", "failed", "--watch", "--every", "0.1")) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().strip() == FAILED
        store.retry(FAILED, NOW)
        assert watching.stdout.readline() == "\n"  # what is no terminal gets an empty line between two looks
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0


def test_show_tells_what_made_the_result_and_what_to_do(store, cli):
    told = cli("show", "ACC2").stdout
    assert "next: do what the last error says (salsa-node echo NAME tries the way), then salsa-node retry STUDY" in told
    assert "made by: demo 1 on cpu" in told
    assert "weights: fold_0 abababababababab" in told
    assert "delivery.gave_up" in told


def test_cancel_asks_and_stops_what_waits(store, cli):
    told = cli("cancel", QUEUED)  # nobody answers
    assert told.returncode == 1
    assert store.runs_of(QUEUED)[0].state is RunState.QUEUED
    told = cli("cancel", QUEUED, typed="y\n")
    assert told.returncode == 0
    assert store.runs_of(QUEUED)[0].state is RunState.CANCELLED
    assert f"salsa-node rerun {QUEUED}" in told.stdout
    assert cli("cancel", QUEUED, "--yes").returncode == 1
    assert cli("cancel", QUEUED, "--json").returncode == 2


def test_cancel_says_how_to_keep_here_what_is_still_being_sent(store, cli):
    assert cli("cancel", GIVEN_UP, "--yes").stdout == "nothing is under way\n"
    store.retry(GIVEN_UP, NOW)
    told = cli("cancel", GIVEN_UP, "--yes", "--deliveries")
    assert told.returncode == 1
    assert told.stdout == f"no run is under way; 2 deliveries go on: salsa-node hold {GIVEN_UP} keeps them here\n"


def test_retry_tries_again_what_failed_and_what_was_given_up(store, cli):
    told = json.loads(cli("retry", "--all", "--json").stdout)
    assert [(line["study_uid"], bool(line["run"]), len(line["deliveries"])) for line in told] == [
        (FAILED, True, 0),
        (GIVEN_UP, False, 2),
    ]
    run = store.runs_of(FAILED)[0]
    assert (run.state, run.attempt, run.error) == (RunState.QUEUED, 0, None)
    again = store.claim_run("w", 60, NOW)
    assert again is not None
    assert again.attempt == 1
    assert len(store.claim_deliveries("s", 60, NOW)) == 2
    assert cli("retry", DONE).returncode == 1
    assert cli("retry").returncode == 2
    assert cli("retry", "1.9").returncode == 4


def test_stats_count_and_time(store, cli):
    figures = json.loads(cli("stats", "--json").stdout)
    assert (figures["studies"], figures["images"]) == (4, 12)
    assert figures["runs"] == {"FAILED": 1, "PRODUCED": 2, "QUEUED": 1}
    assert figures["deliveries"] == {"GAVE_UP": 2, "SENT": 2}
    assert figures["outcomes"] == {"no_candidate": 2}
    assert figures["run_s"] == {"count": 3, "p50": 30.0, "p95": 30.0, "max": 30.0}
    assert figures["oldest_queued_at"] == (NOW - timedelta(days=3)).isoformat(timespec="seconds")
    recent = json.loads(cli("stats", "--json", "--since", "36h").stdout)
    assert recent["run_s"] == {"count": 1, "p50": 0.0, "p95": 0.0, "max": 0.0}
    told = cli("stats").stdout
    assert "Runs: FAILED 1, PRODUCED 2, QUEUED 1" in told


def test_logs_are_filtered(store, cli):
    lines = [
        json.loads(line) for line in cli("logs", "--json", "--event", "run.", "--study", "ACC1").stdout.splitlines()
    ]
    assert [line["name"] for line in lines] == ["run.queued", "run.running", "run.failed"]
    told = cli("logs", "--subject", "delivery", "--since", "60h", "--limit", "1").stdout
    assert re.fullmatch(rf"\S+  delivery\.gave_up +delivery \d+  pacs: nobody listens  study={GIVEN_UP}\n", told)


def test_logs_follow_what_happens_next(store, command):
    with going_on(command("logs", "--follow", "--json", "--every", "0.1", "--limit", "1")) as following:
        assert following.stdout is not None
        last = json.loads(following.stdout.readline())
        store.add_event("node", "here", "node.tested", "a test", NOW)
        after = json.loads(following.stdout.readline())
        assert (after["id"], after["name"]) == (last["id"] + 1, "node.tested")
        following.send_signal(signal.SIGINT)
        assert following.wait(30) == 0


def test_purge_lets_images_go_and_keeps_what_is_needed(store, cli, tmp_path):
    data = tmp_path / "data"
    assert cli("purge", DONE).returncode == 1  # nobody said yes
    assert len(list((data / "studies" / DONE).rglob("*.dcm"))) == 3
    told = cli("purge", DONE, "--yes", "--json")
    assert json.loads(told.stdout) == [{"study_uid": DONE, "files": 3, "image_bytes": 15}]
    assert not list((data / "studies" / DONE).rglob("*.dcm"))
    assert len(list((data / "results" / DONE).iterdir())) == 2
    assert store.instances_of(DONE) == ()
    assert store.events_of(DONE)[-1].detail == "by hand: 3 images (15 bytes), 0 result files"
    told = cli("purge", DONE, "--yes", "--results", "--json")
    assert json.loads(told.stdout)[0]["files"] == 2
    assert not list((data / "results" / DONE).iterdir())
    assert store.is_result(f"2.25.{DONE}.SEG")  # what comes back is still known for ours
    for needed, why in ((QUEUED, "is QUEUED"), (GIVEN_UP, "has not reached")):
        told = cli("purge", needed, "--yes")
        assert told.returncode == 4
        assert why in told.stderr
        assert len(list((data / "studies" / needed).rglob("*.dcm"))) == 3


def test_what_a_destination_never_took_is_withdrawn_by_a_person_and_can_go(store, cli):
    assert "not reached" in cli("purge", GIVEN_UP, "--yes").stderr
    told = cli("cancel", GIVEN_UP, "--yes")
    assert (told.returncode, told.stdout) == (1, "nothing is under way\n")
    told = cli("cancel", GIVEN_UP, "--yes", "--deliveries")
    assert told.returncode == 0
    assert "is withdrawn" in told.stdout
    assert "GAVE_UP" not in {one.state.name for run in store.runs_of(GIVEN_UP) for one in store.deliveries_of(run.id)}
    assert json.loads(cli("show", GIVEN_UP, "--json").stdout)["standing"] == "done"
    assert cli("resend", GIVEN_UP).returncode == 0  # minds change
    assert "is PENDING" in cli("purge", GIVEN_UP, "--yes").stderr
    for due in store.claim_deliveries("s", 60, NOW + timedelta(days=1)):
        store.give_up(due.id, "s", None, "never", NOW)
    assert cli("cancel", GIVEN_UP, "--yes", "--deliveries").returncode == 0
    assert cli("purge", GIVEN_UP, "--yes").returncode == 0
    told = cli("cancel", GIVEN_UP, "--yes", "--deliveries")
    assert (told.returncode, told.stdout) == (1, "nothing is under way, and nothing was given up\n")


def test_purge_forgets_a_study_wholly_when_told_to(store, cli, tmp_path):
    data = tmp_path / "data"
    assert cli("purge", QUEUED, "--yes", "--forget").returncode == 4
    told = cli("purge", DONE, "--yes", "--forget", "--json")
    assert (told.returncode, json.loads(told.stdout)[0]["files"]) == (0, 5)
    assert cli("show", DONE).returncode == 4
    assert store.events_of(DONE) == ()
    assert not (data / "studies" / DONE).exists()
    assert not (data / "results" / DONE).exists()
    assert store.study(QUEUED).instances == 3
    assert (data / "studies" / QUEUED).exists()


def test_a_study_with_images_in_quarantine_keeps_all_it_has_where_it_cannot_be_forgotten(store, cli, tmp_path):
    aside = tmp_path / "data" / "quarantine.dcm"
    aside.write_bytes(b"1234")
    new = NewInstance(f"{DONE}.1.1", f"{DONE}.1", DONE, "1.5", "1.6", "quarantine.dcm", "1" * 64, 4, "CT1")
    store.quarantine(new, "says something else", NOW)
    told = cli("purge", QUEUED, DONE, "--yes", "--forget")
    assert (told.returncode, told.stdout) == (4, "")
    assert f"images of study {DONE} are in quarantine" in told.stderr
    assert "nothing was removed" in told.stderr
    assert store.study(DONE).instances == 3
    assert len(list((tmp_path / "data" / "studies" / DONE).rglob("*.dcm"))) == 3
    assert cli("purge", DONE, "--yes").returncode == 0
    assert aside.exists()


def test_a_purge_names_what_it_removed_before_a_study_that_may_not_go_and_a_study_once(store, cli):
    told = cli("purge", "--yes", "--json", FAILED, QUEUED, DONE)
    assert told.returncode == 4
    assert [line["study_uid"] for line in json.loads(told.stdout)] == [FAILED]
    assert len(store.instances_of(DONE)) == 3
    told = cli("purge", "--yes", "--forget", DONE, "ACC4", DONE)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.count(DONE) == 1


def test_images_that_come_again_after_a_purge_are_kept_and_looked_at(store, tmp_path):
    data = tmp_path / "data"
    store.purge(DONE, "by hand", NOW, lambda paths: None)
    _arrive(store, data, DONE, NOW)
    assert (store.study(DONE).instances, store.study(DONE).assembled_instances) == (3, 3)
    assert len(store.instances_of(DONE)) == 3


def test_a_purge_that_breaks_off_is_finished_by_another(store, tmp_path):
    def breaks_off(paths: object) -> None:
        raise PermissionError("pulled the plug")

    with pytest.raises(PermissionError):
        store.purge(DONE, "by hand", NOW, breaks_off)
    assert len(store.instances_of(DONE)) == 3
    assert store.purge(DONE, "by hand", NOW, lambda paths: None) == (3, 15)


def test_a_terminal_is_asked(store, command):
    master, slave = pty.openpty()
    with subprocess.Popen(command("purge", DONE), stdin=slave, stdout=slave, stderr=slave) as asking:
        os.close(slave)
        os.write(master, b"n\n")
        assert asking.wait(60) == 1
    os.close(master)
    assert len(store.instances_of(DONE)) == 3


@pytest.mark.parametrize("heavy", ["torch", "numpy", "pydicom", "pynetdicom", "alembic", "requests"])
def test_asking_imports_nothing_heavy(heavy):
    code = f"import sys, salsa_node.cli, salsa_node.overview, salsa_node.store; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_command_that_asks_no_record_does_not_import_one():
    code = "import sys, salsa_node.cli; sys.exit('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_loaded_for_a_command_is_never_looked_through_for_garbage():
    code = """
import gc, os, sys
from salsa_node.__main__ import main
sys.argv = ["salsa-node", "--version"]
os._exit = lambda code: print(code, gc.isenabled(), gc.get_freeze_count() > 10_000)
main()
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.stdout.splitlines()[1:] == ["0 True True"], told.stderr


def test_a_command_that_nobody_reads_any_more_ends_quietly(store, command):
    with subprocess.Popen(command("studies"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as unread:
        assert unread.stdout is not None
        assert unread.stderr is not None
        unread.stdout.close()
        assert unread.wait(60) == 1
        assert unread.stderr.read() == b""


def test_a_list_that_was_cut_short_says_so(store, cli):
    told = cli("studies", "--uids", "--limit", "2")
    assert (len(told.stdout.split()), told.stderr) == (2, "there may be more than these 2: --limit\n")
    assert cli("studies", "--uids", "--limit", "5").stderr == ""


def test_a_table_says_what_is_there_and_draws_nothing(capsys):
    console.put_table({"ae": "from"}, [{"ae": ":bell:"}, {"ae": "[red]"}])
    told = capsys.readouterr().out
    assert ":bell:" in told
    assert "[red]" in told


@pytest.mark.parametrize(("encoding", "drawn"), [("utf-8", "────"), ("ascii", "----"), ("latin-1", "----")])
def test_a_terminal_of_few_letters_gets_what_it_can_print(store, command, encoding, drawn):
    store.add_event("study", QUEUED, "study.held", "one – 肝臓", NOW, QUEUED)
    there = {**os.environ, "PYTHONIOENCODING": encoding}
    told = subprocess.run(command("show", QUEUED), env=there, capture_output=True, check=False)
    assert (told.returncode, told.stderr) == (0, b"")
    shown = told.stdout.decode(encoding)
    assert drawn in shown
    assert ("one – 肝臓" if encoding == "utf-8" else "one - ??") in shown


def test_the_shell_completes_commands(command):
    environment = {
        **os.environ,
        "_SALSA_NODE_COMPLETE": "complete_bash",
        "COMP_WORDS": "salsa-node stu",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv = ['salsa-node']; from salsa_node.cli import main; main()"
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert told.stdout.split() == ["studies"]


def test_the_time_line_tells_objects_that_went_together_in_one_line(store, cli):
    now = datetime.now(UTC)
    for n in range(3):
        for name in ("pacs", "web"):
            store.add_event("delivery", f"{n} {name}", "delivery.pending", name, now, QUEUED)
    for n in range(3):
        store.add_event("delivery", str(n), "delivery.sent", "pacs", now, QUEUED)
    store.add_event("delivery", "9", "delivery.sent", "web", now, QUEUED)
    for _ in range(2):  # two attempts at both objects
        for n in range(2):
            store.add_event("delivery", str(n), "delivery.pending", "pacs: nobody listens", now, QUEUED)
    store.add_event("study", QUEUED, "study.held", "", now, QUEUED)
    store.add_event("study", QUEUED, "study.held", "", now, QUEUED)
    shown = cli("show", QUEUED).stdout.split("Time line")[1]
    assert (shown.count("delivery.pending"), shown.count("delivery.sent")) == (3, 1)
    assert shown.count("nobody listens (2 objects)") == 2
    assert "pacs (3 objects); web (3 objects)" in shown
    assert "pacs (3 objects); web\n" in shown.split("delivery.sent")[1]
    assert shown.count("study.held") == 2
    events = json.loads(cli("show", QUEUED, "--json").stdout)["events"]
    assert [event["name"] for event in events].count("delivery.pending") == 10
