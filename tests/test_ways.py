"""By DICOMweb, into a folder, behind TLS, at a rate: the ways to a destination beside plain C-STORE."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import orthanc as orthanc_peer
import pydicom
import pytest
from made_delivery import SECRET, SEG, SR, STUDY, T0, an_archive, produce
from made_papers import Papers
from pydicom.uid import Comprehensive3DSRStorage, ComprehensiveSRStorage
from told import events

from salsa_node import delivery, verification, ways
from salsa_node.config import parse
from salsa_node.errors import ConfigError, DeliveryError, DestinationRefused
from salsa_node.settings import DeliverySettings, Destination
from salsa_node.store import Delivery, DeliveryState, Store, StoreSettings

SETTINGS = DeliverySettings(first_retry_s=30, max_attempts=4, timeout_s=10, verify_after_s=10)
SENT, VERIFIED, PENDING, GAVE_UP = (
    DeliveryState.SENT, DeliveryState.VERIFIED, DeliveryState.PENDING, DeliveryState.GAVE_UP
)  # fmt: skip
KEY = "s3cr3t-t0ken"
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pynetdicom's, where it is refused


def after(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True) as opened:
        yield opened


@pytest.fixture
def node(store: Store, tmp_path: Path) -> Callable[[datetime, Destination], tuple[Delivery, ...]]:
    """One turn of both loops."""

    def turn(now: datetime, destination: Destination) -> tuple[Delivery, ...]:
        delivery.step(store, SETTINGS, [destination], tmp_path, "node", now, clock=lambda: now)
        verification.step(store, SETTINGS, [destination], tmp_path, "node", now, clock=lambda: now)
        return store.deliveries_of(1)

    return turn


Turn = Callable[[datetime, Destination], tuple[Delivery, ...]]


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers"))


@dataclass
class Web:
    """A DICOMweb service that answers as told.

    code: of every answer where it is no 200; reasons: SOP Instance UID -> failure reason; warnings: the same.
    careless: QIDO-RS finds all that it holds, whatever was asked for.
    elsewhere: where an answer that is no 200 says to go.
    """

    port: int = 0
    scheme: str = "http"
    code: int = 200
    careless: bool = False
    elsewhere: str = ""
    wants: str = ""
    reasons: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)
    held: dict[str, bytes] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    @property
    def destination(self) -> Destination:
        return Destination("pacs", url=f"{self.scheme}://127.0.0.1:{self.port}/dicom-web/")

    def taken(self, kind: str, body: bytes) -> object:
        """The answer to STOW-RS, PS3.18 table 10.5.3-2."""
        parts = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
        assert 'type="application/dicom"' in kind
        (part,) = parts.get_payload()  # type: ignore[misc]
        content = part.get_payload(decode=True)  # type: ignore[union-attr]
        ds = pydicom.dcmread(BytesIO(content))
        uid = str(ds.SOPInstanceUID)
        item = {"00081155": {"vr": "UI", "Value": [uid]}}
        if uid in self.reasons:
            return {
                "00081198": {"vr": "SQ", "Value": [item | {"00081197": {"vr": "US", "Value": [self.reasons[uid]]}}]}
            }
        if uid in self.warnings:
            item |= {"00081196": {"vr": "US", "Value": [self.warnings[uid]]}}
        self.held[uid] = content
        return {"00081199": {"vr": "SQ", "Value": [item]}}


@contextmanager
def a_web(context: object = None) -> Iterator[Web]:
    web = Web(scheme="https" if context else "http")

    class Service(BaseHTTPRequestHandler):
        def answer(self, code: int, told: object) -> None:
            body = json.dumps(told).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/dicom+json")
            self.send_header("Content-Length", str(len(body)))
            if web.elsewhere:
                self.send_header("Location", web.elsewhere)
            self.end_headers()
            self.wfile.write(body)

        def refused(self) -> bool:
            web.seen.append(f"{self.command} {self.path}")
            if self.headers.get("Authorization", "") != web.wants:
                self.answer(401, [SECRET])
            elif web.code != 200:
                self.answer(web.code, [SECRET])
            else:
                return False
            return True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if not self.refused():
                told = web.taken(self.headers["Content-Type"], body)
                self.answer(409 if "00081198" in str(told) else 200, told)

        def do_GET(self) -> None:
            if not self.refused():
                wanted = parse_qs(urlsplit(self.path).query).get("SOPInstanceUID", [""])[0]
                uids = sorted(web.held) if web.careless else [wanted] if wanted in web.held else []
                self.answer(200, [{"00080018": {"vr": "UI", "Value": [uid]}} for uid in uids])

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A peer that leaves in the middle of a handshake is what some tests are about."""

    server = Server(("127.0.0.1", 0), Service)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)  # type: ignore[attr-defined]
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ---- DICOMweb ---------------------------------------------------------------------------------------


def test_stow_sends_the_very_bytes_and_qido_verifies(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with a_web() as web:
        assert [row.state for row in node(T0, web.destination)] == [SENT, SENT]
        rows = node(after(10), web.destination)
    assert [(row.state, row.proof) for row in rows] == [(VERIFIED, "QIDO-RS")] * 2
    assert web.held == {SEG: (tmp_path / "SEG.dcm").read_bytes(), SR: (tmp_path / "SR.dcm").read_bytes()}
    assert web.seen == [
        "POST /dicom-web/studies",
        "POST /dicom-web/studies",
        f"GET /dicom-web/studies/{STUDY}/series/{STUDY}.{SEG}/instances?SOPInstanceUID={SEG}",
        f"GET /dicom-web/studies/{STUDY}/series/{STUDY}.{SR}/instances?SOPInstanceUID={SR}",
    ]


def test_another_object_than_the_one_asked_for_proves_nothing(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with a_web() as web:
        node(T0, web.destination)
        del web.held[SEG]
        web.careless = True
        rows = node(after(10), web.destination)
    assert [(row.state, row.proof) for row in rows] == [(SENT, ""), (VERIFIED, "QIDO-RS")]


def test_stow_has_a_status_for_each_object(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with a_web() as web:
        web.reasons, web.warnings = {SEG: 0xA700}, {SR: 0xB000}
        seg, sr = node(T0, web.destination)
        assert (seg.state, seg.last_error) == (PENDING, "pacs: failure reason 0xA700")
        assert (sr.state, sr.last_error) == (SENT, "taken with a warning: pacs: status 0xB000")
        web.reasons = {SEG: 0x0111}
        seg, _ = node(after(30), web.destination)
    assert (seg.state, seg.last_error) == (SENT, "it was there already: pacs: status 0x0111")


def test_stow_that_does_not_know_the_class_gets_another_form(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with a_web() as web:
        web.reasons = {SR: 0x0122}
        node(T0, web.destination)
        node(T0, web.destination)
    classes = [pydicom.dcmread(BytesIO(content)).SOPClassUID for content in web.held.values()]
    assert ComprehensiveSRStorage in classes
    assert Comprehensive3DSRStorage not in classes


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        (503, PENDING, "HTTP 503"),
        (401, PENDING, "correct user and secret"),
        (404, PENDING, "about to start"),
        (415, GAVE_UP, "correct its url"),
    ],
)
def test_what_http_says_is_told_with_what_to_do(
    store: Store, tmp_path: Path, node: Turn, code: int, state: DeliveryState, words: str
) -> None:
    produce(store, tmp_path, ["pacs"])
    with a_web() as web:
        web.code = code
        rows = node(T0, web.destination)
    assert [row.state for row in rows] == [state, state]
    assert words in str(rows[0].last_error)
    assert SECRET not in f"{rows} {events(store)}"


@pytest.mark.parametrize("code", [302, 307, 308])
def test_nothing_goes_where_nobody_configured_it(
    store: Store, tmp_path: Path, node: Turn, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Neither where a service would send us on to, nor by way of a proxy of the environment."""
    produce(store, tmp_path, ["pacs"])
    with a_web() as web, a_web() as other:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{other.port}")
        monkeypatch.setenv("no_proxy", "")
        web.code, web.elsewhere = code, f"{other.destination.url}studies"
        rows = node(T0, web.destination)
        assert [row.state for row in rows] == [PENDING, PENDING]
        assert f"HTTP {code} without a word" in str(rows[0].last_error)
        assert (len(web.seen), other.seen) == (2, [])


@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_credentials_come_from_outside_the_config_and_are_never_repeated(
    store: Store,
    tmp_path: Path,
    node: Turn,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    caplog.set_level("DEBUG")
    produce(store, tmp_path, ["pacs"])
    (tmp_path / "token").write_text(f"{KEY}\n")
    monkeypatch.setenv("PACS_SECRET", KEY)
    with a_web() as web:
        if kind == "basic":
            web.wants = "Basic " + base64.b64encode(f"salsa:{KEY}".encode()).decode()
            to = replace(web.destination, user="salsa", secret="env:PACS_SECRET")
        else:
            web.wants = f"Bearer {KEY}"
            to = replace(web.destination, secret=f"file:{tmp_path / 'token'}")
        rows = node(T0, to)
        assert [row.state for row in rows] == [SENT, SENT], rows
        web.wants = "something else"
        store.resend(STUDY, None, T0)
        rows = node(T0, to)
    assert "it does not let us in" in str(rows[0].last_error)
    assert KEY not in f"{[vars(record) for record in caplog.records]} {rows} {events(store)} {to}"


def test_a_secret_that_is_not_there_says_where_it_was_looked_for(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with a_web() as web:
        rows = node(T0, replace(web.destination, secret="env:NO_SUCH_NAME"))
    assert rows[0].state is GAVE_UP
    assert "(env:NO_SUCH_NAME); put it there" in str(rows[0].last_error)
    assert web.seen == []


def test_a_web_that_is_gone_is_tried_again_once_for_all(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with a_web() as web:
        pass
    rows = node(T0, web.destination)
    assert [row.state for row in rows] == [PENDING, PENDING]
    assert "cannot be reached (ConnectionError)" in str(rows[0].last_error)


def test_orthancs_dicomweb_takes_and_proves(store: Store, tmp_path: Path, node: Turn, tool: Callable[..., str]) -> None:
    if not orthanc_peer.DICOMWEB.exists():
        pytest.skip("Orthanc's DICOMweb plugin is not installed (apt-get install orthanc-dicomweb)")
    plugin = {"Plugins": [str(orthanc_peer.DICOMWEB)], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}}
    produce(store, tmp_path, ["pacs"])
    with orthanc_peer.running(tool("Orthanc", "orthanc"), tmp_path / "orthanc", plugin) as pacs:
        to = Destination("pacs", url=f"{pacs.url}/dicom-web")
        assert ways.echo(to, 10) == "DICOMweb"
        node(T0, to)
        rows = node(after(10), to)
        assert [(row.state, row.proof) for row in rows] == [(VERIFIED, "QIDO-RS")] * 2
        (instance, _) = pacs.instances("SR", STUDY)
        assert pacs.fetch(instance, tmp_path).read_bytes()[128:132] == b"DICM"


# ---- TLS --------------------------------------------------------------------------------------------


def test_https_is_only_for_who_can_prove_it(store: Store, tmp_path: Path, node: Turn, papers: Papers) -> None:
    produce(store, tmp_path, ["pacs"])
    with a_web(papers.server()) as web:
        rows = node(T0, web.destination)
        assert "no TLS with it" in str(rows[0].last_error)
        assert "CERTIFICATE_VERIFY_FAILED" in str(rows[0].last_error).upper().replace(" ", "_") or (
            "unable to get local issuer" in str(rows[0].last_error)
        )
        rows = node(after(30), replace(web.destination, authorities=str(papers.authority)))
    assert [row.state for row in rows] == [SENT, SENT]
    with a_web(papers.server("expired")) as web, pytest.raises(DeliveryError, match="certificate has expired"):
        ways.echo(replace(web.destination, authorities=str(papers.authority)), 10)


def test_dicom_goes_out_behind_tls(store: Store, tmp_path: Path, node: Turn, papers: Papers) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive(secure=papers.server()) as pacs:
        to = pacs.destination(tls=True, authorities=str(papers.authority))
        node(T0, to)
        rows = node(after(10), to)
    assert [row.state for row in rows] == [VERIFIED, VERIFIED]


@pytest.mark.parametrize(
    ("certificate", "knows", "words"),
    [
        ("expired", True, "no TLS with it: certificate has expired; have it renewed there"),
        ("server", False, "unable to get local issuer certificate; put the certificate of who signed its own into"),
    ],
)
def test_a_certificate_that_does_not_hold_is_named(
    store: Store, tmp_path: Path, node: Turn, papers: Papers, certificate: str, knows: bool, words: str
) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive(secure=papers.server(certificate)) as pacs:
        rows = node(T0, pacs.destination(tls=True, authorities=str(papers.authority) if knows else ""))
        assert pacs.taken == []
    assert [row.state for row in rows] == [PENDING, PENDING], "the admin renews it, and the delivery goes on by itself"
    assert words in str(rows[0].last_error)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pynetdicom's, where it is refused
def test_each_way_in_which_tls_does_not_come_about_is_told_with_what_to_do(papers: Papers) -> None:
    def told(to: Destination) -> str:
        with pytest.raises(DeliveryError) as caught:
            ways.echo(to, 5)
        return str(caught.value)

    ours = {"tls": True, "authorities": str(papers.authority)}
    with an_archive(secure=papers.server()) as pacs:
        assert "Hostname mismatch" in (why := told(replace(pacs.destination(**ours), host="localhost")))
        assert "give as host a name that its certificate holds" in why
        why = told(pacs.destination())
        assert "does it want TLS (tls)" in why
        assert "nobody listens there" not in why
    with an_archive(secure=papers.server(asks=True)) as pacs:
        assert "does it ask for a certificate of ours (certificate, key)" in told(pacs.destination(**ours))
    with an_archive() as pacs:
        assert "does it speak TLS at that port?" in told(pacs.destination(**ours))
    with a_web(papers.server()) as web:
        why = told(replace(web.destination, authorities=str(papers.authority), url=f"https://localhost:{web.port}"))
        assert "give as host a name that its certificate holds" in why


def test_an_authority_that_is_no_file_is_named(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        rows = node(T0, pacs.destination(tls=True, authorities=str(tmp_path / "none.pem")))
    assert rows[0].state is GAVE_UP
    assert "none.pem holds no certificate" in str(rows[0].last_error)


# ---- a folder ---------------------------------------------------------------------------------------


def test_what_a_folder_s_disk_does_not_take_wholly_is_not_there(
    store: Store, tmp_path: Path, node: Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    produce(store, tmp_path, ["share"])
    share = tmp_path / "share"
    share.mkdir()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    rows = node(T0, Destination("share", folder=str(share)))
    assert [row.state for row in rows] == [PENDING, PENDING]
    assert "No space left on device" in str(rows[0].last_error)
    assert [path for path in share.rglob("*") if path.is_file()] == []


def test_a_folder_gets_the_very_files(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["share"])
    share = tmp_path / "share"
    to = Destination("share", folder=str(share))
    rows = node(T0, to)
    assert [row.state for row in rows] == [PENDING, PENDING]
    assert str(rows[0].last_error).endswith("is not there; make it, or mount it")
    share.mkdir()
    node(after(30), to)
    (share / STUDY / f"{SR}.dcm").unlink()  # lost there: found out, and written again
    for at in (40, 60, 100, 220, 230):
        rows = node(after(at), to)
    assert [(row.state, row.proof) for row in rows] == [(VERIFIED, "file")] * 2
    assert (share / STUDY / f"{SR}.dcm").read_bytes() == (tmp_path / "SR.dcm").read_bytes()
    assert ways.echo(to, 1) == "folder"


# ---- rate and config --------------------------------------------------------------------------------


def test_a_rate_spreads_a_result_over_minutes(store: Store, tmp_path: Path, node: Turn) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        to = pacs.destination("off", per_minute=1)
        rows = node(T0, to)
        assert [(row.state, row.attempt) for row in rows] == [(SENT, 1), (PENDING, 0)]
        assert rows[1].last_error == "pacs gets 1 objects a minute"
        node(after(59), to)
        assert pacs.uids == [SEG]
        rows = node(after(60), to)
    assert [row.state for row in rows] == [SENT, SENT]


def test_what_waits_for_its_minute_is_told_once_and_a_clock_that_is_set_back_stops_nothing(
    store: Store, tmp_path: Path, node: Turn
) -> None:
    produce(store, tmp_path, ["pacs"])
    with an_archive() as pacs:
        to = pacs.destination("off", per_minute=1)
        node(T0, to)
        for row in store.claim_deliveries("node", 60, after(60)):  # as a minute that another result has used up
            store.postpone(row.id, "node", str(row.last_error), after(120), after(60))
        assert [(row.attempt, row.lease_owner) for row in store.deliveries_of(1)] == [(1, None), (0, None)]
        told = [event.detail for event in events(store) if event.name == "delivery.pending"]
        assert told[-2:] == ["pacs", "pacs: pacs gets 1 objects a minute"]
        assert store.sent_between("pacs", T0 - timedelta(days=1), T0) == 1
        assert store.sent_between("pacs", T0 - timedelta(days=1), after(-1)) == 0, "it lies in the future"


WEB = "[[destination]]\nname = 'w'\nurl = 'https://h/dicom-web'\n"
DICOM = "[[destination]]\nname = 'd'\nae_title = 'D'\nhost = 'h'\nport = 104\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{WEB}folder = '/x'", "found more than one of them"),
        (f"{DICOM}url = 'http://h'", "found more than one of them"),
        ("[[destination]]\nname = 'a'", r"destination\[0\].ae_title: missing; or give a url"),
        (f"{WEB}certificate = 'c.pem'", "certificate and key go together"),
        (f"{WEB}tls = true", "with a url write https"),
        (f"{DICOM}secret = 'env:X'", "is for a url"),
        (f"{WEB}secret = 'hunter2'", r"destination\[0\].secret: expected text of the form"),
        ("[[destination]]\nname = 'a'\nurl = 'http://h'\nsecret = 'env:X'", "unencrypted; use https"),
        ("[[destination]]\nname = 'a'\nurl = 'https://me:pw@h'", "url: expected text"),
        (DICOM.replace("'h'", "'localhost'").replace("104", "11112"), "is this node itself"),
    ],
)
def test_a_destination_that_makes_no_sense_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(text)


def test_a_destination_of_each_kind_is_taken() -> None:
    config = parse(f"{WEB}secret = 'file:/run/secret'\n{DICOM}tls = true\n[[destination]]\nname = 'f'\nfolder = '/x'\n")
    assert [one.where for one in config.destination] == ["https://h/dicom-web", "D at h:104", "/x"]


def test_a_secret_of_two_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a\nb")
    with pytest.raises(DestinationRefused, match="not one line"):
        ways.echo(Destination("w", url="https://h", secret=f"file:{tmp_path / 'token'}"), 1)
