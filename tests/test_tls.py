"""The door behind TLS: peers with a certificate that a known authority signed come in, nobody else."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.uid import CTImageStorage
from pynetdicom import AE, evt
from pynetdicom.association import Association
from test_listener import a_slice

from salsa_node import config, loopback, tls
from salsa_node.association import let_go, taking_turns
from salsa_node.errors import ConfigError
from salsa_node.listener import Listener
from salsa_node.settings import ListenerSettings, TlsSettings
from salsa_node.store import Store, StoreSettings

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pynetdicom's, where it is refused


class Papers:
    """Certificates of two authorities, made by the openssl program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for authority in ("known", "unknown"):
            self.run(
                "req",
                "-x509",
                *self.key(authority),
                "-subj",
                f"/CN={authority}",
                "-days",
                "2",
                "-out",
                f"{authority}.pem",
            )
        for name, authority in (("node", "known"), ("scanner", "known"), ("stranger", "unknown")):
            self.run("req", *self.key(name), "-subj", f"/CN={name}", "-out", f"{name}.csr")
            self.run("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem", "-CAkey", f"{authority}.key",
                     "-CAcreateserial", "-days", "2", "-out", f"{name}.pem")  # fmt: skip

    @staticmethod
    def key(name: str) -> tuple[str, ...]:
        return "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key"

    def run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)

    def settings(self, port: int) -> TlsSettings:
        at = self.folder
        return TlsSettings(port=port, certificate=f"{at}/node.pem", key=f"{at}/node.key", authorities=f"{at}/known.pem")

    def peer(self, name: str | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.folder / "known.pem"))
        context.check_hostname = False
        if name is not None:
            context.load_cert_chain(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        return context


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers"))


@pytest.fixture(params=[True, False], ids=["fast", "plain"])
def secure_port(tmp_path: Path, papers: Papers, request: pytest.FixtureRequest) -> Iterator[int]:
    port = loopback.free_port()
    settings = ListenerSettings(port=0, min_free_gib=0.0, fast=request.param, tls=papers.settings(port))
    with (
        Store.open(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True) as store,
        Listener(settings, store, tmp_path / "data") as door,
    ):
        assert door.port != port
        yield port


def associated(port: int, context: ssl.SSLContext) -> Association:
    ae = AE("CT1")
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
    ae.add_requested_context(CTImageStorage, "1.2.840.10008.1.2.1")
    handlers = [(evt.EVT_CONN_OPEN, taking_turns)]
    return ae.associate("127.0.0.1", port, ae_title="SALSA_NODE", tls_args=(context, "node"), evt_handlers=handlers)


def test_a_known_peer_stores_images(secure_port: int, papers: Papers) -> None:
    assoc = associated(secure_port, papers.peer("scanner"))
    assert assoc.is_established
    assert [assoc.send_c_store(a_slice(number)).Status for number in (1, 2, 2)] == [0, 0, 0]
    big = a_slice(3)
    big.Rows = big.Columns = 512
    big.PixelData = bytes(2 * 512 * 512)
    assert assoc.send_c_store(big).Status == 0
    assoc.release()
    assert assoc.is_released


@pytest.mark.parametrize(
    ("who", "why"),
    [("stranger", "no TLS with 127.0.0.1: unable to get local issuer"), (None, "PEER_DID_NOT_RETURN_A_CERTIFICATE")],
)
def test_nobody_else_comes_in_and_the_log_says_why(
    secure_port: int, papers: Papers, who: str | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    refused = associated(secure_port, papers.peer(who))
    assert not refused.is_established
    let_go(refused)
    until = time.monotonic() + 30
    while not any(why in record.getMessage() for record in caplog.records):
        assert time.monotonic() < until, [record.getMessage() for record in caplog.records]
        time.sleep(0.02)
    assoc = associated(secure_port, papers.peer("scanner"))
    assert assoc.is_established, "the door stays open for others"
    assoc.release()


def test_who_speaks_no_tls_is_let_go(secure_port: int) -> None:
    with socket.create_connection(("127.0.0.1", secure_port), timeout=30) as plain:
        plain.sendall(b"\x01\0\0\0\0\4" + bytes(4))
        try:
            assert plain.recv(1000)[:1] in (b"", b"\x15"), "at most a TLS alert"
        except ConnectionError:
            return


def test_a_peer_that_never_shakes_hands_holds_up_nobody(secure_port: int, papers: Papers) -> None:
    silent = [socket.create_connection(("127.0.0.1", secure_port)) for _ in range(3)]
    assoc = associated(secure_port, papers.peer("scanner"))
    assert assoc.is_established
    assoc.release()
    for connection in silent:
        connection.close()
    for thread in threading.enumerate():
        if isinstance(thread, Association) and thread.is_acceptor:
            thread.join(30)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"certificate": "nosuch.pem"}, r"listener\.tls: nosuch\.pem and .*No such file"),
        ({"key": "scanner.key"}, r"not a certificate and its key"),
        ({"authorities": "node.key"}, r"listener\.tls\.authorities: .*node\.key holds no certificate"),
    ],
)
def test_papers_that_are_none_stop_the_start(papers: Papers, change: dict[str, str], words: str) -> None:
    at = {name: file if file == "nosuch.pem" else str(papers.folder / file) for name, file in change.items()}
    with pytest.raises(ConfigError, match=words):
        tls.server_context(replace(papers.settings(2762), **at))


def test_a_key_with_a_password_is_refused_without_asking(papers: Papers) -> None:
    papers.run("ec", "-in", "node.key", "-aes256", "-passout", "pass:secret", "-out", "locked.key")
    with pytest.raises(ConfigError, match="asks for a password"):
        tls.server_context(replace(papers.settings(2762), key=str(papers.folder / "locked.key")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[listener.tls]\nport = 2762\ncertificate = 'a'\nkey = 'b'", "listener.tls.authorities: expected a PEM file"),
        ("[listener.tls]\nport = 11112\ncertificate = 'a'\nkey = 'b'\nauthorities = 'c'", "the port of the plain door"),
        ("[listener.tls]\nprot = 1", "listener.tls.prot"),
    ],
)
def test_half_a_configuration_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.parse(text)
