"""From the first byte of an instance to its row: each receiver syncs its own file, one of them commits for all.

Order: the bytes under a name that means nothing; their own name, where it is free, and fsync; then, for all
instances that wait together, the rows. Only then is any of them answered. A file whose name was taken keeps
the other until its row is certain; where nodes share a store, and the data folder, every file does.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import xxhash
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
from salsa_node.transcoding import Comparison

log = logging.getLogger(__name__)

INCOMING = "incoming"  #: folder of the data folder for what is on its way in
_TOGETHER = 64  # instances in one commit at most
_LOCKS = 1024
_COMMIT_S = 120.0  # a disk that takes longer is one that cannot write


@dataclass(frozen=True, slots=True)
class Request:
    """What a C-STORE request says of the instance that follows.

    context_sop_class_uid: the abstract syntax under which it comes; sender, called: the calling and called AE titles.
    """

    sop_class_uid: str
    sop_instance_uid: str
    context_sop_class_uid: str
    transfer_syntax: UID
    sender: str
    called: str


@dataclass(frozen=True, slots=True)
class Bound:
    """How much the quarantine keeps at most."""

    files: int = 10_000
    size_bytes: float = 10.0 * (1 << 30)


DEFAULT_BOUND = Bound()


class Incoming:
    """One instance on its way in: `write` what comes, then hand it to `Intake.take`, whatever happened before."""

    def __init__(self, request: Request, folder: Path) -> None:
        self.request = request
        self._folder = folder
        self._hash = xxhash.xxh3_128()
        self._head = b""
        self._size = 0
        self._staged: durable.Staged | None = None
        self._failed: Refused | None = None
        self._prefix = b""
        if not (uid_or_nothing(request.sop_class_uid) and uid_or_nothing(request.sop_instance_uid)):
            self._fail(Refused(CANNOT_UNDERSTAND, "the request names no SOP class or no SOP instance"))
            return
        if request.sop_class_uid != request.context_sop_class_uid:
            self._fail(Refused(SOP_CLASS_NOT_SUPPORTED, "this SOP class was not agreed upon for this context"))
            return
        self._prefix = file_head(request.sop_class_uid, request.sop_instance_uid, request.transfer_syntax)

    def write(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Take the next parts of the encoded data set; after a failure they are let go, `Intake.take` says why."""
        self._size += sum(map(len, pieces))
        if self._failed is not None:
            return
        try:
            if self._staged is None:
                self._staged = durable.Staged(self._folder)
                self._staged.write([self._prefix, *pieces])
            else:
                self._staged.write(pieces)
        except OSError as error:
            self._fail(Refused(OUT_OF_RESOURCES, f"cannot write: {error.strerror}"))
            return
        for piece in pieces:
            self._hash.update(piece)
            if len(self._head) < HEAD_BYTES:
                self._head += bytes(piece[: HEAD_BYTES - len(self._head)])

    def discard(self) -> None:
        """Leave nothing behind; harmless at any time."""
        if self._staged is not None:
            self._staged.discard()

    def described(self) -> NewInstance:
        """The row that it asks for. Raises Refused, OSError."""
        if self._failed is not None or self._staged is None:
            raise self._failed or Refused(CANNOT_UNDERSTAND, "the data set is empty")
        request, staged = self.request, self._staged
        whole = self._size <= len(self._head)
        header = header_of_file(staged.path, len(self._prefix), self._head, whole, request.transfer_syntax)
        if header.sop_instance_uid != request.sop_instance_uid:
            raise Refused(DOES_NOT_MATCH, "SOP Instance UID differs between request and data set")
        if header.sop_class_uid != request.sop_class_uid:
            raise Refused(DOES_NOT_MATCH, "SOP Class UID differs between request and data set")
        return _row(request, header, self._hash.hexdigest(), staged.size)

    def settle(self, path: Path | None) -> Path:
        """Put it on disk; its name, which is `path` where nothing had that. Raises OSError."""
        assert self._staged is not None, "only what is described is settled"
        return path if self._staged.settle(path) and path is not None else self._staged.path

    def _fail(self, refused: Refused) -> None:
        self._failed = refused
        self.discard()


def _row(request: Request, header: Header, digest: str, size_bytes: int) -> NewInstance:
    return NewInstance(
        sop_instance_uid=header.sop_instance_uid,
        series_uid=header.series_uid,
        study_uid=header.study_uid,
        sop_class_uid=header.sop_class_uid,
        transfer_syntax_uid=str(request.transfer_syntax),
        path=f"studies/{header.study_uid}/{header.series_uid}/{header.sop_instance_uid}.dcm",
        digest=digest,
        size_bytes=size_bytes,
        calling_ae=request.sender,
        called_ae=request.called,
        modality=header.modality,
        series_number=header.series_number,
        accession_number=header.accession_number,
        patient_id=header.patient_id,
        study_date=header.study_date,
    )


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(slots=True, eq=False)
class _Waiting:
    """An instance that lies on disk and waits for the next commit; then it has a verdict, or what went wrong.

    file: where it lies; path: where its row will say that it does.
    called: released when it is over, or when it is its receiver's turn to commit.
    """

    file: Path
    path: Path
    new: NewInstance
    verdict: Verdict = None
    error: Exception | None = None
    is_over: bool = False
    has_turn: bool = False
    called: threading.Lock = field(default_factory=_locked)


class Intake:
    """Keeps what comes in; one for all associations of a door."""

    def __init__(
        self,
        store: Store,
        data_dir: Path,
        notes: Notes,
        clock: Callable[[], datetime],
        bound: Bound = DEFAULT_BOUND,
    ) -> None:
        self._store = store
        self._data_dir = data_dir.absolute()
        self._notes = notes
        self._clock = clock
        self._bound = bound
        self._comparison = Comparison()
        self._gathering = threading.Lock()  # of the next two
        self._waiting: deque[_Waiting] = deque()
        self._is_committing = False
        self._locks = tuple(threading.Lock() for _ in range(_LOCKS))

    def close(self) -> None:
        """End what it has started; harmless at any time."""
        self._comparison.close()

    def begin(self, request: Request) -> Incoming:
        """A place for the instance that `request` announces."""
        return Incoming(request, self._data_dir / INCOMING)

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
        new = incoming.described()
        path = self._data_dir / new.path
        with self._locks[hash(new.sop_instance_uid) % _LOCKS]:  # two that ask for one name, one after the other
            # Another node has locks of its own; between the two only the writer's turn keeps order.
            file = incoming.settle(None if self._store.is_shared else path)
            waiting = _Waiting(file, path, new)
            try:
                verdict = self._committed(waiting)
            except Exception:
                if waiting.is_over:  # else its row may yet come, and must find its file
                    waiting.file.unlink(missing_ok=True)
                raise
            if isinstance(verdict, ContentConflict) and self._is_transcoded(waiting.file, verdict):
                waiting.file.unlink()
                self._store.count_transcoded(new, self._clock())
                return SUCCESS, ""
            if isinstance(verdict, ContentConflict):
                self._quarantine(waiting.file, new, verdict)
                is_patient = isinstance(verdict, PatientConflict)
                return PATIENT_CONFLICT if is_patient else CONTENT_CONFLICT, verdict.brief
            if verdict is None:
                waiting.file.unlink()
                detail = f"a result of this node came back from {new.calling_ae}; not taken as input"
                self._notes.note("instance", new.sop_instance_uid, "instance.own_result", detail, new.study_uid)
                return SUCCESS, ""
            if not verdict.is_new:
                self._restore(waiting.file, self._data_dir / verdict.instance.path)
        if log.isEnabledFor(logging.DEBUG):
            extra = {"event": "instance.stored", "sop_instance_uid": new.sop_instance_uid, "is_new": verdict.is_new}
            log.debug("instance stored", extra=extra)
        return SUCCESS, ""

    @staticmethod
    def _restore(again: Path, kept: Path) -> None:
        """Content that came again is needed only where the file of its row was lost."""
        if again == kept:
            return  # it was, or the name would not have been free
        if kept.exists():
            again.unlink(missing_ok=True)
        else:
            durable.publish([(again, kept)])

    def _is_transcoded(self, again: Path, conflict: ContentConflict) -> bool:
        """Whether what came is what is kept under its UID, in another encoding: an archive sends as it likes."""
        kept = self._data_dir / conflict.path
        return bool(conflict.path) and kept.exists() and self._comparison.is_same(kept, again)

    def _quarantine(self, file: Path, new: NewInstance, conflict: ContentConflict) -> None:
        """Keep beside the first what contradicts it: file, then row."""
        path = f"quarantine/{new.study_uid}/{new.sop_instance_uid}.{new.digest[:16]}.dcm"
        durable.publish([(file, self._data_dir / path)])
        self._store.quarantine(replace(new, path=path), conflict.brief, self._clock())
        extra = {"event": "instance.quarantined", "sop_instance_uid": new.sop_instance_uid}
        log.warning(conflict.brief, extra=extra)
        bound = self._bound
        gone = self._store.bound_quarantine(bound.files, bound.size_bytes, self._clock(), self._remove)
        if gone:
            full = {"event": "quarantine.let_go", "files": len(gone), "most": bound.files}
            log.warning("the quarantine is full, what was set aside first is let go", extra=full)

    def _remove(self, paths: Sequence[str]) -> None:
        durable.remove(self._data_dir, paths)

    # ---- one commit for all that wait ---------------------------------------------------------------

    def _committed(self, mine: _Waiting) -> Verdict:
        """The verdict on an instance. Raises what the commit raised, StoreError where none comes in time.

        One receiver at a time commits: its own instance and all that have gathered. Then it calls the first of those
        that came meanwhile, which commits next, so that no answer waits for a commit that it has no part in.
        """
        with self._gathering:
            self._waiting.append(mine)
            mine.has_turn, self._is_committing = not self._is_committing, True
        if not (mine.has_turn or mine.called.acquire(timeout=_COMMIT_S)):
            self._give_up(mine)
        if mine.has_turn:
            self._commit_gathered(mine)
        if mine.error is not None:
            raise mine.error
        return mine.verdict

    def _give_up(self, mine: _Waiting) -> None:
        """Wait no longer, unless its turn came this moment. Raises StoreError."""
        with self._gathering:
            if mine.has_turn or mine.is_over:
                return
            if mine in self._waiting:  # else its row may yet come
                self._waiting.remove(mine)
                mine.is_over = True
        raise StoreError(f"the record was not written within {_COMMIT_S:g} s")

    def _commit_gathered(self, mine: _Waiting) -> None:
        with self._gathering:
            batch = [self._waiting.popleft() for _ in range(min(_TOGETHER, len(self._waiting)))]
        try:
            self._commit(batch)
        finally:
            with self._gathering:
                following = self._waiting[0] if self._waiting else None
                self._is_committing = following is not None
                if following is not None:
                    following.has_turn = True
            for each in (following, *batch):
                if each is not None and each is not mine:
                    each.called.release()

    def _commit(self, batch: Sequence[_Waiting]) -> None:
        unnamed = {id(waiting.new): (waiting.file, waiting.path) for waiting in batch if waiting.file != waiting.path}

        def publish(new: Sequence[NewInstance]) -> None:
            if unnamed:
                durable.publish([unnamed[id(each)] for each in new if id(each) in unnamed])

        try:
            verdicts = self._store.add_instances([waiting.new for waiting in batch], self._clock(), publish)
        except Exception as error:  # noqa: BLE001 - it goes to whoever waits
            if len(batch) == 1:
                batch[0].error, batch[0].is_over = error, True
                return
            for waiting in batch:  # one that fails must not take the others with it
                self._commit([waiting])
            return
        for waiting, verdict in zip(batch, verdicts, strict=True):
            waiting.verdict, waiting.is_over = verdict, True
