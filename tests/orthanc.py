"""Debian's Orthanc as the PACS of a test, on free ports of the loopback.

It binds to every interface whatever it is told; its configuration here lets nobody but the loopback in.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from salsa_node import loopback

AE_TITLE = "ORTHANC"
DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


class Pacs:
    """A running Orthanc, asked over its REST interface."""

    def __init__(self, http_port: int, dicom_port: int) -> None:
        self.url = f"http://127.0.0.1:{http_port}"
        self.dicom_port = dicom_port

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def json(self, path: str, body: object | None = None) -> object:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def delete(self, path: str) -> None:
        urllib.request.urlopen(urllib.request.Request(self.url + path, method="DELETE"), timeout=30).close()

    def upload(self, path: Path) -> None:
        headers = {"Content-Type": "application/dicom"}
        request = urllib.request.Request(self.url + "/instances", path.read_bytes(), headers)
        urllib.request.urlopen(request, timeout=60).close()

    def instances(self, modality: str, study_uid: str) -> list[str]:
        query = {"Level": "Instance", "Query": {"Modality": modality, "StudyInstanceUID": study_uid}}
        found = self.json("/tools/find", query)
        assert isinstance(found, list)
        return found

    def fetch(self, instance: str, folder: Path) -> Path:
        path = folder / f"{instance}.dcm"
        path.write_bytes(self.get(f"/instances/{instance}/file"))
        return path


@contextmanager
def running(program: str, folder: Path, more: Mapping[str, object]) -> Iterator[Pacs]:
    """An Orthanc of its own below `folder`, with `more` keys in its configuration, until the block ends."""
    http_port, dicom_port = loopback.free_port(), loopback.free_port()
    folder.mkdir()
    settings = {
        "Name": "test PACS",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "HttpPort": http_port,
        "RemoteAccessAllowed": False,
        "DicomPort": dicom_port,
        "DicomAet": AE_TITLE,
        "DicomAlwaysAllowStore": False,
        "DicomCheckModalityHost": True,
        **more,
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
        try:
            pacs = Pacs(http_port, dicom_port)
            deadline = time.monotonic() + 60
            while True:
                try:
                    pacs.json("/system")
                    break
                except OSError:
                    assert process.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < deadline, (folder / "log").read_text()
                    time.sleep(0.2)
            yield pacs
        finally:
            process.terminate()
            process.wait(30)
