"""A result that is due to some destinations, and a PACS in threads that stores, finds and commits as it is told."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, Comprehensive3DSRStorage, ExplicitVRLittleEndian, SegmentationStorage
from pynetdicom import AE, build_role, evt

from salsa_node import commitment, way_dicom
from salsa_node.association import taking_turns
from salsa_node.settings import Destination
from salsa_node.store import NewInstance, NewObject, Store

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
STUDY = "1.2.3"
SECRET = "Doe^Jane"
SEG, SR = "2.25.1", "2.25.2"


def an_object(sop_class: str, sop_instance_uid: str, syntax: UID = ExplicitVRLittleEndian) -> Dataset:
    """A data set with the modules that an archive insists on."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, sop_instance_uid
    ds.StudyInstanceUID, ds.SeriesInstanceUID = STUDY, f"{STUDY}.{sop_instance_uid}"
    ds.PatientID, ds.PatientName, ds.Modality = "P1", SECRET, "SR"
    return ds


def content_of(ds: Dataset) -> bytes:
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def produce(
    store: Store,
    data_dir: Path,
    destinations: Sequence[str],
    objects: Sequence[tuple[str, Dataset]] = (
        ("SEG", an_object(SegmentationStorage, SEG)),
        ("SR", an_object(Comprehensive3DSRStorage, SR)),
    ),
    calling_ae: str = "CT1",
) -> None:
    """A produced run, the first of the study, whose objects are due to those destinations."""
    new = NewInstance("1.2.3.1.1", "1.2.3.1", STUDY, "1.5", "1.6", "p", "0" * 64, 9, calling_ae)
    store.add_instance(new, T0)
    store.complete_series(T0, T0)
    run = store.queue_run(STUDY, "demo", "d", T0)
    store.claim_run("w", 60, T0)
    made = []
    for kind, ds in objects:
        content = content_of(ds)
        (data_dir / f"{kind}.dcm").write_bytes(content)
        made.append(
            NewObject(kind, ds.SOPInstanceUID, ds.SOPClassUID, f"{kind}.dcm", hashlib.sha256(content).hexdigest())
        )
    store.produce(run.id, "w", made, destinations, "lesions", None, "x", T0)


@dataclass
class Archive:
    """What a PACS holds, and how it behaves.

    loses: SOP Instance UIDs that it takes and does not keep; it forgets each once, and keeps it when it comes again.
    statuses: SOP Instance UID -> status of its C-STORE. find_status: the last status of every C-FIND.
    careless: a C-FIND finds all that it holds, whatever was asked for.
    """

    port: int = 0
    held: set[str] = field(default_factory=set)
    loses: set[str] = field(default_factory=set)
    statuses: dict[str, int] = field(default_factory=dict)
    find_status: int = 0
    careless: bool = False
    taken: list[Dataset] = field(default_factory=list)
    asked: list[Dataset] = field(default_factory=list)
    found: int = 0
    commits: Callable[[evt.Event], None] | None = None
    on_store: Callable[[evt.Event], int] | None = None

    def destination(self, verify: str = "auto", **more: object) -> Destination:
        return Destination("pacs", "PACS", "127.0.0.1", self.port, verify=verify, **more)  # type: ignore[arg-type]

    @property
    def uids(self) -> list[str]:
        return [str(ds.SOPInstanceUID) for ds in self.taken]

    def store(self, event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        status = self.statuses.get(uid, 0)
        ds = event.dataset
        ds.file_meta = event.file_meta
        self.taken.append(ds)
        if uid in self.loses:
            self.loses.discard(uid)
        elif status in (0, 0xB000):
            self.held.add(uid)
        return status

    def find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        self.found += 1
        if self.find_status:
            yield self.find_status, None
            return
        wanted = {str(event.identifier.SOPInstanceUID)}
        for uid in sorted(self.held if self.careless else self.held & wanted):
            match = Dataset()
            match.QueryRetrieveLevel, match.SOPInstanceUID = "IMAGE", uid
            yield 0xFF00, match

    def action(self, event: evt.Event) -> tuple[int, None]:
        self.asked.append(event.action_information)
        if self.commits is not None:
            threading.Thread(target=self.commits, args=(event,), daemon=True).start()
        return 0, None

    def report(self, asked: Dataset) -> tuple[int, Dataset]:
        """Event type and information of the report on what was asked."""
        told = Dataset()
        told.TransactionUID = asked.TransactionUID
        held = [item for item in asked.ReferencedSOPSequence if item.ReferencedSOPInstanceUID in self.held]
        gone = [item for item in asked.ReferencedSOPSequence if item.ReferencedSOPInstanceUID not in self.held]
        for item in gone:
            item.FailureReason = commitment.NO_SUCH_INSTANCE
        if held:
            told.ReferencedSOPSequence = held
        if gone:
            told.FailedSOPSequence = gone
        return 2 if gone else 1, told

    def report_on_new_association(self, port: int) -> int:
        """As most archives do, to the door of who asked: its status."""
        ae = AE("PACS")
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
        ae.add_requested_context(commitment.SOP_CLASS)
        role = build_role(commitment.SOP_CLASS, scu_role=False, scp_role=True)
        handlers = [(evt.EVT_CONN_OPEN, taking_turns)]
        assoc = ae.associate("127.0.0.1", port, ae_title="SALSA_NODE", ext_neg=[role], evt_handlers=handlers)
        assert assoc.is_established
        kind, told = self.report(self.asked[-1])
        status, _ = assoc.send_n_event_report(told, kind, commitment.SOP_CLASS, commitment.SOP_INSTANCE)
        assoc.release()
        return int(status.Status)


@contextmanager
def an_archive(
    classes: Sequence[str] = (SegmentationStorage, Comprehensive3DSRStorage),
    finds: bool = True,
    commits: bool = False,
    syntaxes: Sequence[str] = (ExplicitVRLittleEndian,),
    secure: ssl.SSLContext | None = None,
    ae_title: str = "PACS",
) -> Iterator[Archive]:
    """A PACS that takes those SOP classes in those transfer syntaxes; C-FIND and storage commitment as told."""
    archive = Archive()
    ae = AE(ae_title)
    ae.require_called_aet = True
    for sop_class in classes:
        ae.add_supported_context(sop_class, list(syntaxes))
    ae.add_supported_context("1.2.840.10008.1.1")
    if finds:
        ae.add_supported_context(way_dicom.FIND)
    if commits:
        ae.add_supported_context(commitment.SOP_CLASS)
    handlers: list[evt.EventHandlerType] = [
        (evt.EVT_C_STORE, lambda event: (archive.on_store or archive.store)(event)),
        (evt.EVT_C_FIND, archive.find),
        (evt.EVT_N_ACTION, archive.action),
    ]
    server = ae.start_server(("127.0.0.1", 0), block=False, ssl_context=secure, evt_handlers=handlers)
    assert server is not None
    archive.port = int(server.server_address[1])
    try:
        yield archive
    finally:
        ae.shutdown()
