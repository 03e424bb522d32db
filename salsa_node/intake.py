"""From the first byte of an instance to its row: each receiver writes and syncs its own file, one thread commits all.

Order: the bytes under a name that means nothing, fsync; then, for all instances that wait together, the
files get their names, the folders are synced, the rows are committed. Only then is any of them answered.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from pydicom.uid import UID

from salsa_node import durable
from salsa_node.errors import ContentConflict, PatientConflict, StoreError
from salsa_node.instance_header import (
    CANNOT_UNDERSTAND,
    CONTENT_CONFLICT,
    DOES_NOT_MATCH,
    HEAD_BYTES,
    NODE_FAILED,
    OUT_OF_RESOURCES,
    PATIENT_CONFLICT,
    SOP_CLASS_NOT_SUPPORTED,
    SUCCESS,
    Header,
    Refused,
    file_head,
    header_of_file,
    uid_or_nothing,
)
from salsa_node.log import unforeseen
from salsa_node.notes import Notes
from salsa_node.store import NewInstance, Store, Verdict

log = logging.getLogger(__name__)

_TOGETHER = 64  # instances in one commit at most
_COMMIT_S = 120.0  # a disk that takes longer is one that cannot write


@dataclass(frozen=True, slots=True)
class Request:
    """What a C-STORE request says of the instance that follows.

    context_sop_class_uid: the abstract syntax under which it comes; sender: the calling AE title.
    """

    sop_class_uid: str
    sop_instance_uid: str
    context_sop_class_uid: str
    transfer_syntax: UID
    sender: str


class Incoming:
    """One instance on its way in: `write` what comes, then hand it to `Intake.take`, whatever happened before."""

    def __init__(self, request: Request, folder: Path) -> None:
        self.request = request
        self._hash = hashlib.sha256()
        self._head = bytearray()
        self._size = 0
        self._staged: durable.Staged | None = None
        self._failed: Refused | None = None
        self._offset = 0
        if not (uid_or_nothing(request.sop_class_uid) and uid_or_nothing(request.sop_instance_uid)):
            self._fail(Refused(CANNOT_UNDERSTAND, "the request names no SOP class or no SOP instance"))
            return
        if request.sop_class_uid != request.context_sop_class_uid:
            self._fail(Refused(SOP_CLASS_NOT_SUPPORTED, "this SOP class was not agreed upon for this context"))
            return
        prefix = file_head(request.sop_class_uid, request.sop_instance_uid, request.transfer_syntax)
        self._offset = len(prefix)
        try:
            self._staged = durable.Staged(folder)
            self._staged.write(prefix)
        except OSError as error:
            self._fail(Refused(OUT_OF_RESOURCES, f"cannot write: {error.strerror}"))

    def write(self, chunk: bytes | memoryview) -> None:
        """Take a part of the encoded data set; after a failure it is let go, `Intake.take` says why."""
        self._size += len(chunk)
        if self._staged is None:
            return
        try:
            self._staged.write(chunk)
        except OSError as error:
            self._fail(Refused(OUT_OF_RESOURCES, f"cannot write: {error.strerror}"))
            return
        self._hash.update(chunk)
        if len(self._head) < HEAD_BYTES:
            self._head += chunk[: HEAD_BYTES - len(self._head)]

    def discard(self) -> None:
        """Leave nothing behind; harmless at any time."""
        if self._staged is not None:
            self._staged.discard()

    def synced(self) -> tuple[Path, NewInstance]:
        """The staged file, on disk, and the row that it asks for. Raises Refused, OSError."""
        if self._failed is not None or self._staged is None:
            raise self._failed or Refused(NODE_FAILED, "nothing was staged")
        request, staged = self.request, self._staged
        whole = self._size <= len(self._head)
        header = header_of_file(staged.path, self._offset, bytes(self._head), whole, request.transfer_syntax)
        if header.sop_instance_uid != request.sop_instance_uid:
            raise Refused(DOES_NOT_MATCH, "SOP Instance UID differs between request and data set")
        if header.sop_class_uid != request.sop_class_uid:
            raise Refused(DOES_NOT_MATCH, "SOP Class UID differs between request and data set")
        staged.sync()
        return staged.path, _row(request, header, self._hash.hexdigest(), staged.size)

    def _fail(self, refused: Refused) -> None:
        self._failed = refused
        self.discard()
        self._staged = None


def _row(request: Request, header: Header, sha256: str, size_bytes: int) -> NewInstance:
    return NewInstance(
        sop_instance_uid=header.sop_instance_uid,
        series_uid=header.series_uid,
        study_uid=header.study_uid,
        sop_class_uid=header.sop_class_uid,
        transfer_syntax_uid=str(request.transfer_syntax),
        path=f"studies/{header.study_uid}/{header.series_uid}/{header.sop_instance_uid}.dcm",
        sha256=sha256,
        size_bytes=size_bytes,
        calling_ae=request.sender,
        modality=header.modality,
        series_number=header.series_number,
        accession_number=header.accession_number,
        patient_id=header.patient_id,
        study_date=header.study_date,
    )


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An instance that lies on disk and waits for the next commit."""

    staged: Path
    new: NewInstance
    verdict: Future[Verdict]


class Intake:
    """Keeps what comes in; one for all associations of a door. `start` before the first instance, `stop` after."""

    def __init__(self, store: Store, data_dir: Path, notes: Notes, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._data_dir = data_dir
        self._notes = notes
        self._clock = clock
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to commit."""
        self._thread = threading.Thread(target=self._commit_all, name="intake", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Commit what waits, then end."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def begin(self, request: Request) -> Incoming:
        """A place for the instance that `request` announces."""
        return Incoming(request, self._data_dir / "incoming")

    def take(self, incoming: Incoming) -> tuple[int, str]:
        """Keep an instance that has come wholly; the status that the sender gets and, unless Success, why.

        Never raises: whatever happens, the sender must hear of it. When this returns Success, file and row are on disk.
        """
        try:
            status, reason = self._keep(incoming)
        except Refused as refused:
            status, reason = refused.status, refused.reason
        except OSError as error:
            status, reason = OUT_OF_RESOURCES, f"cannot write: {error.strerror}"
        except StoreError as error:
            log.error("instance failed", extra={"event": "instance.failed", "error": str(error)})
            status, reason = OUT_OF_RESOURCES, "the node's record cannot be written"
        except Exception as error:  # noqa: BLE001 - see above
            log.error("instance failed", extra={"event": "instance.failed", "error": unforeseen(error)})
            status, reason = NODE_FAILED, "unexpected failure, see the node's log"
        finally:
            incoming.discard()
        if status not in (SUCCESS, CONTENT_CONFLICT, PATIENT_CONFLICT):
            request = incoming.request
            uid = uid_or_nothing(request.sop_instance_uid)
            self._notes.note("instance", uid, "instance.refused", f"0x{status:04X} {reason}, from {request.sender}")
        return status, reason[:64]

    def _keep(self, incoming: Incoming) -> tuple[int, str]:
        staged, new = incoming.synced()
        waiting = _Waiting(staged, new, Future())
        self._queue.put(waiting)
        try:
            verdict = waiting.verdict.result(_COMMIT_S)
        except ContentConflict as conflict:
            self._quarantine(staged, new, conflict)
            is_patient = isinstance(conflict, PatientConflict)
            return PATIENT_CONFLICT if is_patient else CONTENT_CONFLICT, conflict.brief
        if verdict is None:
            detail = f"a result of this node came back from {new.calling_ae}; not taken as input"
            self._notes.note("instance", new.sop_instance_uid, "instance.own_result", detail, new.study_uid)
            return SUCCESS, ""
        assert not isinstance(verdict, ContentConflict), "conflicts are raised"
        file = self._data_dir / verdict.instance.path
        if not verdict.is_new and not file.exists():  # lost since, and here it is again
            durable.publish([(staged, file)])
        log.debug(
            "instance stored",
            extra={"event": "instance.stored", "sop_instance_uid": new.sop_instance_uid, "is_new": verdict.is_new},
        )
        return SUCCESS, ""

    def _quarantine(self, staged: Path, new: NewInstance, conflict: ContentConflict) -> None:
        """Keep beside the first what contradicts it: file, then row."""
        path = f"quarantine/{new.study_uid}/{new.sop_instance_uid}.{new.sha256[:16]}.dcm"
        durable.publish([(staged, self._data_dir / path)])
        self._store.quarantine(replace(new, path=path), conflict.brief, self._clock())
        extra = {"event": "instance.quarantined", "sop_instance_uid": new.sop_instance_uid}
        log.warning(conflict.brief, extra=extra)

    # ---- the one thread that commits ------------------------------------------------------------

    def _commit_all(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            ending = False
            while len(batch) < _TOGETHER and not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    ending = True
                    break
                batch.append(more)
            self._commit(batch)
            if ending:
                return

    def _commit(self, batch: Sequence[_Waiting]) -> None:
        staged = {id(waiting.new): waiting.staged for waiting in batch}

        def publish(new: Sequence[NewInstance]) -> None:
            durable.publish([(staged[id(each)], self._data_dir / each.path) for each in new])

        try:
            verdicts = self._store.add_instances([waiting.new for waiting in batch], self._clock(), publish)
        except Exception as error:  # noqa: BLE001 - it goes to those who wait, and the thread must outlive it
            if len(batch) == 1:
                batch[0].verdict.set_exception(error)
                return
            for waiting in batch:  # one that fails must not take the others with it
                self._commit([waiting])
            return
        for waiting, verdict in zip(batch, verdicts, strict=True):
            if isinstance(verdict, ContentConflict):
                waiting.verdict.set_exception(verdict)
            else:
                waiting.verdict.set_result(verdict)
