"""Nothing that names a patient leaves the node but by DICOM: a whole study, planted with names, through a real one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom
from hearing import hearing
from pydicom.dataset import Dataset
from pynetdicom import AE, evt

from salsa_node import loopback, overview, phantom
from salsa_node.association import taking_turns
from salsa_node.overview import Standing
from salsa_node.store import Store, StoreSettings

WAIT_S = 240.0
ACCESSION = "PLANTEDACC7"
PLANTED = {
    "PatientName": "Plantedname^Alice", "PatientID": "PLANTEDPID", "PatientBirthDate": "19470213",
    "InstitutionName": "Planted Hospital", "InstitutionAddress": "Planted Street 5",
    "ReferringPhysicianName": "Plantedreferrer^Bob", "OperatorsName": "Plantedoperator^Eve",
    "StationName": "PLANTEDCT", "PatientComments": "plantedcomment", "OtherPatientNames": "Plantedother^Alice",
    "PatientAddress": "Planted Lane 9", "PatientTelephoneNumbers": "plantedphone", "AccessionNumber": ACCESSION,
}  # fmt: skip
FORBIDDEN = (b"planted", b"19470213", b"alice")


def plant(path: Path, **more: str) -> None:
    ds = pydicom.dcmread(path)
    for keyword, value in (PLANTED | more).items():
        setattr(ds, keyword, value)
    ds.add_new(0x00091001, "LO", "plantedprivate")
    ds.save_as(path)


@contextmanager
def indiscreet_archive() -> Iterator[int]:
    """A destination that refuses everything and quotes the patient while it does."""

    def refuse(event: evt.Event) -> Dataset:
        answer = Dataset()
        answer.Status = 0xA700
        answer.ErrorComment = "no room for Plantedname^Alice PLANTEDPID"
        return answer

    ae = AE("INDISCREET")
    for context in loopback.RESULTS:
        ae.add_supported_context(context)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, refuse)])
    assert server is not None
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()


def clean(what: str, content: bytes, but: bytes = b"") -> None:
    lowered = content.lower()
    if but:
        lowered = lowered.replace(but.lower(), b"")
    for word in FORBIDDEN:
        at = lowered.find(word)
        assert at < 0, f"{what} names the patient: ...{lowered[max(0, at - 80) : at + 80]!r}"


def test_the_words_that_are_looked_for_would_be_found():
    for keyword, value in PLANTED.items():
        assert any(word in value.lower().encode() for word in FORBIDDEN), keyword


def test_no_byte_that_leaves_names_the_patient(tmp_path):
    port, web_port, receiver_port = (loopback.free_port() for _ in range(3))
    study = phantom.write_study(
        phantom.make(phantom.Recipe(4, shape=(24, 64, 64), spacing_mm=(8.0, 4.5, 4.5))), tmp_path / "study", study="1"
    )
    files = [*study.localizer, *study.axial]
    for path in files:
        plant(path)
    other = tmp_path / "other.dcm"
    other.write_bytes(files[-1].read_bytes())
    plant(other, PatientID="PLANTEDOTHER")
    ds = pydicom.dcmread(other)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ds.SOPInstanceUID[:50]}.99"
    ds.save_as(other)
    with (
        hearing(bytes) as (hook, heard),
        indiscreet_archive() as archive_port,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as syslog,
    ):
        syslog.bind(("127.0.0.1", 0))
        syslog.settimeout(0.5)
        config = tmp_path / "site.toml"
        config.write_text(
            f"""
[node]
data_dir = "{tmp_path / "data"}"
log_level = "debug"
log_format = "json"
[listener]
port = {port}
[assembly]
quiet_s = 1.0
poll_s = 0.1
[pipeline]
name = "demo"
[web]
port = {web_port}
[audit]
syslog = "udp://127.0.0.1:{syslog.getsockname()[1]}"
poll_s = 0.2
[notify]
events = ["run", "delivery", "instance", "study", "series", "node"]
webhook = "{hook}"
poll_s = 0.2
[delivery]
to = ["viewer", "indiscreet"]
max_attempts = 1
poll_s = 0.1
[[destination]]
name = "viewer"
ae_title = "VIEWER"
host = "127.0.0.1"
port = {receiver_port}
verify = "off"
[[destination]]
name = "indiscreet"
ae_title = "INDISCREET"
host = "127.0.0.1"
port = {archive_port}
verify = "off"
"""
        )
        node_log = tmp_path / "node.log"
        with loopback.receiver(receiver_port, tmp_path / "got") as received, loopback.node(config, node_log, port):
            loopback.send(files, port)
            refused = AE("DEMO")
            refused.add_requested_context(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID)
            handlers = [(evt.EVT_CONN_OPEN, taking_turns)]
            assoc = refused.associate("127.0.0.1", port, ae_title="SALSA_NODE", evt_handlers=handlers)
            assert assoc.send_c_store(other).Status != 0  # another patient under the same study
            assoc.release()
            url = f"sqlite:///{tmp_path / 'data' / 'salsa_node.sqlite'}"
            with Store.open(StoreSettings(url)) as store:
                deadline = time.monotonic() + WAIT_S
                while overview.glance(store, store.study(study.study_uid)).standing is not Standing.NOT_DELIVERED:
                    assert time.monotonic() < deadline, overview.glance(store, store.study(study.study_uid)).standing
                    time.sleep(0.2)
                quarantined = store.quarantined_of(study.study_uid)
            for path in ("/metrics", "/health"):
                with urllib.request.urlopen(f"http://127.0.0.1:{web_port}{path}", timeout=10) as answer:
                    clean(path, answer.read())
            time.sleep(1.0)  # what is still on its way to the webhook and the collector
        datagrams = bytearray()
        try:
            while True:
                datagrams += syslog.recv(65536)
        except TimeoutError:
            pass
    assert len(quarantined) == 1
    names = {str(pydicom.dcmread(path, stop_before_pixels=True).PatientName) for path in received}
    assert names == {PLANTED["PatientName"]}  # DICOM itself does name the patient
    clean("standard output or error of serve", node_log.read_bytes())
    assert b"run.produced" in node_log.read_bytes()
    clean("the webhook", b"".join(heard))
    assert b"delivery.gave_up" in b"".join(heard)
    clean("syslog", bytes(datagrams))
    assert b"AuditMessage" in datagrams
    clean("the audit trail", (tmp_path / "data" / "audit" / "audit.jsonl").read_bytes())
    for path in (tmp_path / "data").rglob("*"):
        clean("a file name", str(path.relative_to(tmp_path)).encode())
    for words in (
        ("studies", "--json"), ("show", study.study_uid), ("show", study.study_uid, "--json"), ("stats", "--json"),
        ("logs", "--json", "--limit", "1000"), ("verify",), ("audit", "show"), ("select", study.study_uid), ("doctor",),
        ("rerun", study.study_uid, "--json"), ("purge", study.study_uid, "--yes"),
    ):  # fmt: skip
        told = subprocess.run(
            [sys.executable, "-m", "salsa_node", *words, "--config", str(config)], capture_output=True, check=False
        )
        allowed = ACCESSION.encode() if words[0] in ("studies", "show") else b""
        clean(f"salsa-node {words[0]}", told.stdout + told.stderr, but=allowed)
    assert json.loads(told.stdout or b"null") is None  # the purge was refused: its result is not delivered
