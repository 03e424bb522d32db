"""What monitoring and people are told: figures, health, notifications; by the real protocols on the loopback."""

from __future__ import annotations

import json
import socketserver
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hearing import hearing
from prometheus_client.parser import text_string_to_metric_families
from test_retention import arrive, finish

from salsa_node import monitoring
from salsa_node.config import parse
from salsa_node.errors import ConfigError, DeliveryError, StoreError
from salsa_node.node import Loop
from salsa_node.notification import Notifier
from salsa_node.settings import FIELDS, NotifySettings, WebSettings
from salsa_node.store import Store, StoreSettings
from salsa_node.web import Health, Metric, Web, text

NOW = datetime.now(UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'salsa_node.sqlite'}"), create=True) as opened:
        arrive(opened, tmp_path, "1.2", NOW)
        finish(opened, tmp_path, "1.2", "done", NOW)
        arrive(opened, tmp_path, "1.3", NOW)
        opened.queue_run("1.3", "demo", "d", NOW - timedelta(minutes=5))
        yield opened


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_figures_are_those_of_the_record_and_prometheus_reads_them(store, tmp_path):
    told = text(monitoring.measure(store, tmp_path, NOW))
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(told)
        for sample in family.samples
    }
    assert found["salsa_node_studies",] == 2
    assert found["salsa_node_images",] == 2
    assert found["salsa_node_image_bytes",] == 800
    assert found["salsa_node_runs", "PRODUCED"] == 1
    assert found["salsa_node_runs", "QUEUED"] == 1
    assert found["salsa_node_runs", "FAILED"] == 0
    assert found["salsa_node_deliveries", "SENT"] == 1
    assert found["salsa_node_results_last_day", "lesions"] == 1
    assert found["salsa_node_queue_wait_seconds",] == 300
    assert found["salsa_node_disk_free_bytes",] > 0


def test_labels_are_escaped():
    told = text([Metric("x", "X.", [({"name": 'a"b\\c\nd'}, 1.5)])])
    (family,) = text_string_to_metric_families(told)
    assert family.samples[0].labels == {"name": 'a"b\\c\nd'}
    assert family.samples[0].value == 1.5


def test_the_server_answers_and_ends():
    faults: list[str] = []
    with Web(WebSettings(), lambda: [Metric("x", "X.", [({}, 1)])], lambda: Health(tuple(faults))) as web:
        assert get(web.port, "/metrics")[1].endswith("salsa_node_x 1\n")
        assert get(web.port, "/health") == (200, '{"ok": true, "faults": []}\n')
        faults.append("the disk is full")
        status, body = get(web.port, "/health")
        assert (status, json.loads(body)) == (503, {"ok": False, "faults": ["the disk is full"]})
        assert get(web.port, "/etc/passwd")[0] == 404
        with pytest.raises(ConfigError, match=r"web\.port"):
            Web(WebSettings(port=web.port), list, lambda: Health(())).__enter__()
        port = web.port
    with pytest.raises(urllib.error.URLError):
        get(port, "/health")


def test_health_names_what_keeps_the_node_from_its_work(store, tmp_path):
    ended = Loop("delivery", lambda _: None, 1.0)
    assert monitoring.examine(store, tmp_path, 0.0, ()).faults == ()
    (loop, disk) = monitoring.examine(store, tmp_path, 1e9, (ended,)).faults
    assert "the loop delivery has ended" in loop
    assert "salsa-node purge" in disk


def test_health_names_the_loop_that_fails_until_it_does_not_and_the_folder_that_is_gone(store, tmp_path):
    came = threading.Semaphore(0)
    faults: list[Exception] = [StoreError("the store answered OperationalError: readonly"), ZeroDivisionError()]

    def step(now: datetime) -> None:
        came.release()
        if faults:
            raise faults[0]

    loop = Loop("assembly", step, 0.01)
    loop.start()
    try:
        for told in ("the loop assembly fails: the store answered OperationalError: readonly", "ZeroDivisionError"):
            for _ in range(2):
                assert came.acquire(timeout=60)
            assert told in " ".join(monitoring.examine(store, tmp_path, 0.0, [loop]).faults)
            del faults[0]
        for _ in range(2):
            assert came.acquire(timeout=60)
        assert monitoring.examine(store, tmp_path, 0.0, [loop]).faults == ()
    finally:
        loop.ask_to_stop()
        loop.join(60)
    (gone,) = monitoring.examine(store, tmp_path / "absent", 0.0, ()).faults
    assert "node.data_dir cannot be read" in gone


def test_figures_that_cannot_be_had_are_an_answer(tmp_path):
    def measure() -> list[Metric]:
        raise FileNotFoundError(2, "No such file or directory", str(tmp_path))

    with Web(WebSettings(), measure, lambda: Health(())) as web:
        status, body = get(web.port, "/metrics")
    assert status == 503
    assert "No such file" in body


# ---- notifications ----------------------------------------------------------------------------------


def test_people_are_told_of_what_needs_them_once(store, tmp_path):
    with hearing(json.loads) as (url, told):
        notifier = Notifier(NotifySettings(webhook=url), tmp_path, "node1")
        assert notifier.step(store, NOW) is None  # the past is not told
        store.add_event("run", "7", "run.failed", "no memory", NOW, "1.2")
        store.add_event("node", "here", "node.tested", "nobody's concern", NOW)
        assert notifier.step(store, NOW) == 1
        assert notifier.step(store, NOW) is None
        store.add_event("delivery", "8", "delivery.gave_up", "pacs: refused", NOW, "1.3")
        store.add_event("run", "9", "run.blocked", "mirrored", NOW, "1.3")
        assert Notifier(NotifySettings(webhook=url), tmp_path, "node1").step(store, NOW) == 2  # after a restart
    at = NOW.isoformat(timespec="seconds")
    assert told[0]["text"] == f"salsa-node: run.failed\n{at}  run.failed  no memory  study 1.2"
    assert told[1]["text"].startswith("salsa-node: delivery.gave_up (and 1 more)\n")


def test_templates_are_the_site_s(store, tmp_path):
    with hearing(json.loads) as (url, told):
        words = " ".join(f"${name}" for name in FIELDS)
        notifier = Notifier(NotifySettings(events=("node",), webhook=url, subject="!", text=words), tmp_path, "node1")
        notifier.step(store, NOW)
        store.add_event("node", "here", "node.tested", "a test", NOW)
        notifier.step(store, NOW)
    at = NOW.isoformat(timespec="seconds")
    assert told == [{"text": f"!\n{at} node.tested  node here a test node1"}]


def test_who_cannot_be_told_is_told_later_and_less_often(store, tmp_path, free_port):
    settings = NotifySettings(webhook=f"http://127.0.0.1:{free_port}/")
    notifier = Notifier(settings, tmp_path, "node1")
    notifier.step(store, NOW)
    store.add_event("run", "7", "run.failed", "no memory", NOW, "1.2")
    with pytest.raises(DeliveryError, match=r"notify\.webhook"):
        notifier.step(store, NOW)
    assert notifier.step(store, NOW + timedelta(seconds=59)) is None
    with pytest.raises(DeliveryError):
        notifier.step(store, NOW + timedelta(seconds=61))
    assert notifier.step(store, NOW + timedelta(seconds=120)) is None
    with hearing(json.loads) as (url, told):
        notifier.settings = NotifySettings(webhook=url)
        assert notifier.step(store, NOW + timedelta(seconds=200)) == 1
    assert len(told) == 1


def test_the_wait_of_who_cannot_be_told_ends_at_an_hour(store, tmp_path, free_port):
    notifier = Notifier(NotifySettings(webhook=f"http://127.0.0.1:{free_port}/"), tmp_path, "node1")
    notifier.step(store, NOW)
    store.add_event("run", "7", "run.failed", "no memory", NOW, "1.2")
    now = NOW
    waits = []
    for _ in range(9):
        with pytest.raises(DeliveryError):
            notifier.step(store, now)
        waits.append(round((notifier.not_before - now).total_seconds() / 60))
        now = notifier.not_before
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert notifier.step(store, now - timedelta(minutes=1)) is None


def test_many_events_are_told_in_several_messages_and_none_is_left_out(store, tmp_path):
    with hearing(json.loads) as (url, told):
        notifier = Notifier(NotifySettings(webhook=url, subject="!", text="$number"), tmp_path, "node1")
        notifier.step(store, NOW)
        for n in range(120):
            store.add_event("run", str(n), "run.failed", "no memory", NOW, "1.2")
        store.add_event("node", "here", "node.tested", "nobody's concern", NOW)
        counts = [notifier.step(store, NOW) for _ in range(4)]
    assert counts == [50, 50, 20, None]
    assert " ".join(one["text"] for one in told).replace("(and 49 more)", "").replace("(and 19 more)", "").split() == [
        word for start in (0, 50, 100) for word in ("!", *(str(n) for n in range(start, min(start + 50, 120))))
    ]


def test_what_befell_all_objects_of_a_study_alike_is_one_line(store, tmp_path):
    with hearing(json.loads) as (url, told):
        notifier = Notifier(NotifySettings(webhook=url), tmp_path, "node1")
        notifier.step(store, NOW)
        for n in range(9):
            at = NOW + timedelta(seconds=n)
            store.add_event("delivery", str(n), "delivery.gave_up", "nobody listens there", at, "1.2")
        store.add_event("delivery", "9", "delivery.gave_up", "nobody listens there", NOW, "1.3")
        assert notifier.step(store, NOW) == 10
    at = NOW.isoformat(timespec="seconds")
    assert told == [{
        "text": "salsa-node: delivery.gave_up (and 1 more)\n"
        f"{at}  delivery.gave_up  nobody listens there  study 1.2  (9 times)\n"
        f"{at}  delivery.gave_up  nobody listens there  study 1.3"
    }]  # fmt: skip


def test_a_webhook_is_not_told_again_because_the_e_mail_fails(store, tmp_path, free_port):
    with hearing(json.loads) as (url, told):
        settings = NotifySettings(webhook=url, email_to=("admin@hospital.example",), smtp_port=free_port)
        notifier = Notifier(settings, tmp_path, "node1")
        notifier.step(store, NOW)
        for n in range(2):
            store.add_event("run", str(n), "run.failed", f"reason {n}", NOW, "1.2")
            with pytest.raises(DeliveryError, match=r"notify\.email_to"):
                notifier.step(store, NOW + timedelta(hours=2 * n))
    assert ["reason 0" in one["text"] for one in told] == [True, False]
    assert ["reason 1" in one["text"] for one in told] == [False, True]


def test_a_clock_that_is_set_back_does_not_silence_the_node(store, tmp_path, free_port):
    notifier = Notifier(NotifySettings(webhook=f"http://127.0.0.1:{free_port}/"), tmp_path, "node1")
    notifier.step(store, NOW)
    store.add_event("run", "7", "run.failed", "no memory", NOW, "1.2")
    for then in (NOW, NOW - timedelta(days=1)):
        with pytest.raises(DeliveryError):
            notifier.step(store, then)


def test_what_is_no_http_is_a_failure(store, tmp_path):
    class Babble(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(b"220 this is a mail server\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Babble) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        notifier = Notifier(NotifySettings(webhook=f"http://127.0.0.1:{server.server_address[1]}/"), tmp_path, "node1")
        notifier.step(store, NOW)
        store.add_event("run", "7", "run.failed", "no memory", NOW, "1.2")
        with pytest.raises(DeliveryError, match="BadStatusLine"):
            notifier.step(store, NOW)
        thread.join()


def test_a_webhook_that_refuses_is_a_failure(store, tmp_path):
    with hearing(json.loads, 500) as (url, _):
        notifier = Notifier(NotifySettings(webhook=url), tmp_path, "node1")
        notifier.step(store, NOW)
        store.add_event("run", "7", "run.failed", "no memory", NOW, "1.2")
        with pytest.raises(DeliveryError):
            notifier.step(store, NOW)


class _Mailbox(socketserver.StreamRequestHandler):
    """As much of SMTP as a client that sends one message needs (RFC 5321)."""

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        for line in self.rfile:
            word = line[:4].upper().strip()
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                while (part := self.rfile.readline()) != b".\r\n":
                    self.server.mail.append(part.decode())  # type: ignore[attr-defined]
            self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 fine\r\n")
            if word == b"QUIT":
                return


def test_an_e_mail(store, tmp_path):
    with socketserver.TCPServer(("127.0.0.1", 0), _Mailbox) as server:
        server.mail = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        settings = NotifySettings(email_to=("admin@hospital.example",), smtp_port=server.server_address[1])
        notifier = Notifier(settings, tmp_path, "node1")
        notifier.step(store, NOW)
        store.add_event("run", "7", "run.failed", "no memory", NOW, "1.2")
        assert notifier.step(store, NOW) == 1
        thread.join()
        mail = "".join(server.mail)  # type: ignore[attr-defined]
    assert "To: admin@hospital.example" in mail
    assert "Subject: salsa-node: run.failed" in mail
    assert "no memory" in mail


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ('text = "$patient"', "notify.text"),
        ('subject = "100 $"', "notify.subject"),
        ('webhook = "ftp://x"', "notify.webhook"),
    ],
)
def test_a_notification_that_cannot_work_is_refused_at_the_start(wrong, told):
    with pytest.raises(ConfigError, match=told):
        parse(f"[notify]\n{wrong}\n")
