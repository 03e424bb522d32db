"""A node process and its neighbours on the loopback: what the demo and the tests run against.

The receiver keeps what a destination would get; the sender is a modality that sends a study.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pydicom
from pydicom.uid import CTImageStorage
from pynetdicom import AE, evt

from salsa_node.association import VERIFICATION, taking_turns
from salsa_node.errors import DeliveryError, PipelineError

RECEIVER_AE = "VIEWER"
SENDER_AE = "DEMO"
NODE_AE = "SALSA_NODE"
START_S = 60.0
STOP_S = 60.0
#: The SOP classes of everything that a result consists of.
RESULTS: Final = (
    pydicom.uid.SegmentationStorage,
    pydicom.uid.Comprehensive3DSRStorage,
    pydicom.uid.ComprehensiveSRStorage,
    pydicom.uid.SecondaryCaptureImageStorage,
    pydicom.uid.EncapsulatedPDFStorage,
    pydicom.uid.KeyObjectSelectionDocumentStorage,
)


def free_port() -> int:
    """A TCP port on the loopback that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def receiver(port: int, folder: Path) -> Iterator[list[Path]]:
    """A C-STORE destination that keeps every object as `MODALITY-UID.dcm`; the list grows by each arrival.

    An object that comes twice stands in the list twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    received: list[Path] = []

    def keep(event: evt.Event) -> int:
        ds = event.dataset
        ds.file_meta = event.file_meta
        path = folder / f"{ds.Modality}-{ds.SOPInstanceUID}.dcm"
        ds.save_as(path, enforce_file_format=True)
        received.append(path)
        return 0x0000

    ae = AE(ae_title=RECEIVER_AE)
    for context in (VERIFICATION, *RESULTS):
        ae.add_supported_context(context)
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)])
    assert server is not None, "start_server gives a server when it does not block"
    try:
        yield received
    finally:
        server.shutdown()


@contextmanager
def node(config_path: Path, log: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`salsa-node serve` as a process of its own, answering C-ECHO, until the block ends.

    log: its standard output and error are appended. Raises PipelineError where it does not start.
    """
    with log.open("ab") as sink:
        command = [sys.executable, "-m", "salsa_node", "serve", "--config", str(config_path)]
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
        try:
            deadline = time.monotonic() + START_S
            while not echoes(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise PipelineError(f"the node did not start; its log is {log}")
                time.sleep(0.1)
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM and wait; SIGKILL when that does not help. The exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        return process.wait()


def echoes(port: int) -> bool:
    """Whether a node on that port answers C-ECHO."""
    with socket.socket() as sock:
        if sock.connect_ex(("127.0.0.1", port)) != 0:
            return False
    ae = AE(ae_title=SENDER_AE)
    ae.add_requested_context(VERIFICATION)
    association = ae.associate("127.0.0.1", port, ae_title=NODE_AE, evt_handlers=[(evt.EVT_CONN_OPEN, taking_turns)])
    if not association.is_established:
        return False
    status = association.send_c_echo()
    association.release()
    return "Status" in status and status.Status == 0x0000


def send(
    paths: Iterable[Path], port: int, *, host: str = "127.0.0.1", called: str = NODE_AE, calling: str = SENDER_AE
) -> None:
    """C-STORE of CT images in explicit VR little endian. Raises DeliveryError for any answer but 0x0000.

    called, calling: the AE titles of the node and of the sender.
    """
    ae = AE(ae_title=calling)
    ae.add_requested_context(CTImageStorage, pydicom.uid.ExplicitVRLittleEndian)
    association = ae.associate(host, port, ae_title=called, evt_handlers=[(evt.EVT_CONN_OPEN, taking_turns)])
    if not association.is_established:
        raise DeliveryError(
            f"the node {called} at {host}:{port} took no association from {calling}; does it run, and does "
            "listener.allowed have that AE title?"
        )
    try:
        for path in paths:
            answer = association.send_c_store(path)
            status = answer.Status if "Status" in answer else None
            if status != 0x0000:
                told = "nothing" if status is None else f"0x{status:04X}"
                raise DeliveryError(f"the node answered {told} to an image", status)
    finally:
        association.release()
