"""The door of a running node as a PACS admin tries it: DCMTK's tools, with and without TLS, and noise."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest
import raw_scu
from pydicom.uid import UID, EnhancedCTImageStorage, ExplicitVRLittleEndian
from test_listener import a_slice
from test_tls import Papers
from told import events

from salsa_node import loopback
from salsa_node.store import Store, StoreSettings
from salsa_node.uids import derive

Tool = Callable[[str], str]
IDLE_S = 5.0
UNCOMPRESSED = {"1.2.840.10008.1.2": "-xi", "1.2.840.10008.1.2.1": "-xe", "1.2.840.10008.1.2.2": "-xb"}


@dataclass(frozen=True)
class Node:
    """A node that serves: where its doors and its record are."""

    folder: Path
    port: int
    tls_port: int

    def store(self) -> Store:
        return Store.open(StoreSettings(f"sqlite:///{self.folder / 'data' / 'salsa_node.sqlite'}"))

    @property
    def log(self) -> str:
        return (self.folder / "node.log").read_text()

    def noted(self, rejection: str) -> None:
        """That rejection is an event and a line of the log; they are written after the caller has its answer."""
        deadline = time.monotonic() + 60
        while True:
            with self.store() as store:
                told = [event.detail for event in events(store) if event.name == "node.association_rejected"]
            if rejection in told and rejection in self.log:
                return
            assert time.monotonic() < deadline, told
            time.sleep(0.1)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers"))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, papers: Papers) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("node")
    port, tls_port = loopback.free_port(), loopback.free_port()
    config = folder / "site.toml"
    config.write_text(
        f"""
[node]
data_dir = "{folder / "data"}"
[listener]
port = {port}
max_associations = 2
idle_timeout_s = {IDLE_S}
min_free_gib = 0.0
allowed = [
    {{ ae_title = "CT1", address = "127.0.0.1" }},
    {{ ae_title = "{loopback.SENDER_AE}", address = "127.0.0.0/8" }},
    {{ ae_title = "ELSEWHERE", address = "192.0.2.0/24" }},
]
[listener.tls]
port = {tls_port}
certificate = "{papers.folder / "node.pem"}"
key = "{papers.folder / "node.key"}"
authorities = "{papers.folder / "known.pem"}"
[assembly]
quiet_s = 3600.0
[pipeline]
name = "demo"
"""
    )
    with loopback.node(config, folder / "node.log", port):
        yield Node(folder, port, tls_port)


def asked(command: list[str], port: int, calling: str = "CT1", called: str = "SALSA_NODE") -> tuple[int, str]:
    """Exit code and words of one of DCMTK's tools; files come last in `command`."""
    tool, *options = command
    flags = [option for option in options if not option.endswith(".dcm")]
    files = [option for option in options if option.endswith(".dcm")]
    to = ["-v", "-aet", calling, "-aec", called, *flags, "127.0.0.1", str(port), *files]
    done = subprocess.run([tool, *to], capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


def a_file(folder: Path, name: str, **changes: object) -> Path:
    """An image of a study of its own."""
    uids = {"StudyInstanceUID": derive(name), "SeriesInstanceUID": derive(name, "1")}
    ds = a_slice(1, **(uids | {"SOPInstanceUID": derive(name, "1", "1")} | changes))
    ds.save_as(folder / f"{name}.dcm", enforce_file_format=True)
    return folder / f"{name}.dcm"


def test_whom_the_node_knows_is_answered_and_nobody_else(node: Node, tool: Tool) -> None:
    echoscu = tool("echoscu")
    code, told = asked([echoscu], node.port)
    assert code == 0, told
    for calling, called, words in (
        ("STRANGER", "SALSA_NODE", "Calling AE Title Not Recognized"),
        ("ELSEWHERE", "SALSA_NODE", "Calling AE Title Not Recognized"),
        ("CT1", "ANY", "Called AE Title Not Recognized"),
    ):
        code, told = asked([echoscu], node.port, calling, called)
        assert code != 0
        assert words in told
    for line in (
        "'STRANGER' from 127.0.0.1: not in listener.allowed",
        "'ELSEWHERE' from 127.0.0.1: not in listener.allowed",
        "'CT1' from 127.0.0.1: it called 'ANY', we are 'SALSA_NODE'; correct it there, or add a [[profile]] for it",
    ):
        node.noted(line)


def test_a_third_at_once_is_told_to_come_again_and_a_silent_one_gives_its_place_back(node: Node, tool: Tool) -> None:
    held = [raw_scu.Association(node.port, calling="CT1", timeout_s=60) for _ in range(2)]
    code, told = asked([tool("echoscu")], node.port)
    assert code != 0
    assert "Local Limit Exceeded" in told
    for one in held:
        with pytest.raises(raw_scu.Refused):  # an abort, or the end of the connection
            one.response()
        one.connection.close()
    deadline = time.monotonic() + 60
    while asked([tool("echoscu")], node.port)[0] != 0:
        assert time.monotonic() < deadline
    node.noted("'CT1' from 127.0.0.1: more than 2 associations at once")


def test_one_ct_in_every_transfer_syntax_is_taken_and_kept_as_it_came(
    node: Node, tool: Tool, testdata: Path, tmp_path: Path
) -> None:
    sent = {}
    for number, path in enumerate(sorted((testdata / "07_ct_one_image_all_syntaxes").glob("CTImage.dcm_*"))):
        ds = pydicom.dcmread(path)
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = derive("every syntax", str(number))
        ds.StudyInstanceUID, ds.SeriesInstanceUID = derive("every syntax"), derive("every syntax", "1")
        ds.save_as(tmp_path / f"{number}.dcm")
        sent[str(ds.SOPInstanceUID)] = (str(ds.file_meta.TransferSyntaxUID), ds.PixelData)
        first = UNCOMPRESSED.get(ds.file_meta.TransferSyntaxUID)  # else the tool converts it to what it proposes first
        how = [tool("dcmsend"), "-dn"] if first is None else [tool("storescu"), "-R", first]
        code, told = asked([*how, str(tmp_path / f"{number}.dcm")], node.port)
        assert code == 0, told
    assert len({syntax for syntax, _ in sent.values()}) == len(sent) >= 14
    with node.store() as store:
        rows = {row.sop_instance_uid: row for row in store.instances_of(derive("every syntax"))}
    assert {uid: row.transfer_syntax_uid for uid, row in rows.items()} == {uid: sent[uid][0] for uid in sent}
    for uid, row in rows.items():
        assert pydicom.dcmread(node.folder / "data" / row.path).PixelData == sent[uid][1], UID(sent[uid][0]).name


def test_enhanced_ct_and_what_else_a_study_holds_is_taken(node: Node, tool: Tool, tmp_path: Path) -> None:
    dose_report = "1.2.840.10008.5.1.4.1.1.88.67"
    files = [
        a_file(tmp_path, "enhanced", SOPClassUID=EnhancedCTImageStorage),
        a_file(tmp_path, "dose", SOPClassUID=dose_report, Modality="SR"),
    ]
    code, told = asked([tool("dcmsend"), *map(str, files)], node.port)
    assert code == 0, told
    with node.store() as store:
        assert [row.sop_class_uid for row in store.instances_of(derive("enhanced"))] == [EnhancedCTImageStorage]
        assert [row.sop_class_uid for row in store.instances_of(derive("dose"))] == [dose_report]


def test_the_same_again_is_success_and_another_content_is_refused_by_its_own_status(
    node: Node, tool: Tool, tmp_path: Path
) -> None:
    first = a_file(tmp_path, "first")
    for _ in range(2):
        code, told = asked([tool("storescu"), "-R", str(first)], node.port)
        assert (code, "Response (Success)" in told) == (0, True), told
    other = tmp_path / "other.dcm"
    ds = pydicom.dcmread(first)
    ds.PixelData = bytes(len(ds.PixelData))
    ds.save_as(other)
    code, told = asked([tool("storescu"), "-R", "-d", str(other)], node.port)
    assert "stored already under this UID with other content" in told
    assert "(Success)" not in told
    with node.store() as store:
        [row] = store.quarantined_of(derive("first"))
        assert store.series_of(derive("first"))[0].duplicates == 1
    assert (node.folder / "data" / row.path).is_file()


def test_what_is_no_dicom_ends_its_connection_and_nothing_else(node: Node, tool: Tool) -> None:
    for noise in (
        b"GET / HTTP/1.1\r\nHost: node\r\n\r\n",
        os.urandom(4096),
        b"\x01\0\xff\xff\xff\xff" + bytes(64),
        b"\0",
    ):
        with socket.create_connection(("127.0.0.1", node.port), timeout=60) as connection:
            try:
                connection.sendall(noise)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
            except ConnectionError:
                continue
    code, told = asked([tool("echoscu")], node.port)
    assert code == 0, told
    assert "Traceback" not in node.log


# ---- behind TLS ---------------------------------------------------------------------------------


def test_a_known_certificate_echoes_and_stores_behind_tls(
    node: Node, tool: Tool, papers: Papers, tmp_path: Path
) -> None:
    secure = [
        "+tls",
        f"{papers.folder}/scanner.key",
        f"{papers.folder}/scanner.pem",
        "+cf",
        f"{papers.folder}/known.pem",
    ]
    code, told = asked([tool("echoscu"), *secure], node.tls_port)
    assert code == 0, told
    path = a_file(tmp_path, "secure")
    code, told = asked([tool("storescu"), *secure, str(path)], node.tls_port)
    assert code == 0, told
    with node.store() as store:
        [row] = store.instances_of(derive("secure"))
    assert row.transfer_syntax_uid == ExplicitVRLittleEndian
    code, told = asked([tool("echoscu"), *secure], node.tls_port, calling="STRANGER")
    assert "Calling AE Title Not Recognized" in told, "a certificate is no allow-list"


def test_without_a_certificate_or_with_one_of_another_authority_nobody_comes_in(
    node: Node, tool: Tool, papers: Papers, tmp_path: Path
) -> None:
    trusted = ["+cf", f"{papers.folder}/known.pem"]
    stranger = ["+tls", f"{papers.folder}/stranger.key", f"{papers.folder}/stranger.pem", *trusted]
    path = a_file(tmp_path, "insecure")
    for how in (["+tla", "-ic"], stranger, ["-tls"]):
        for command in ([tool("echoscu"), *how], [tool("storescu"), *how, str(path)]):
            code, told = asked(command, node.tls_port)
            assert code != 0, told
    misled = [
        "+tls",
        f"{papers.folder}/scanner.key",
        f"{papers.folder}/scanner.pem",
        "+cf",
        f"{papers.folder}/unknown.pem",
    ]
    code, told = asked([tool("echoscu"), *misled], node.tls_port)
    assert code != 0, "a sender that does not know our authority turns away"
    with node.store() as store:
        assert store.instances_of(derive("insecure")) == ()
    secure = ["+tls", f"{papers.folder}/scanner.key", f"{papers.folder}/scanner.pem", *trusted]
    assert asked([tool("echoscu"), *secure], node.tls_port)[0] == 0, "the door stays open for others"
    assert "Traceback" not in node.log
