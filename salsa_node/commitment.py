"""Storage commitment (PS3.4 annex J): say of each instance that somebody asks about whether the node holds it.

A request is a row before it is answered. The report goes out on the association that asked, where that is
still open a moment later, else on a new one to the destination that has the AE title of who asked.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from stat import S_ISREG
from typing import Final

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_role
from pynetdicom.association import Association

from salsa_node.errors import DeliveryError
from salsa_node.requestor import associated
from salsa_node.settings import DeliverySettings, Destination
from salsa_node.store import Commitment, Store

log = logging.getLogger(__name__)

SOP_CLASS: Final = "1.2.840.10008.1.20.1"
SOP_INSTANCE: Final = "1.2.840.10008.1.20.1.1"
SUCCESS: Final = 0x0000
PROCESSING_FAILURE: Final = 0x0110
NO_SUCH_INSTANCE: Final = 0x0112
INVALID_ARGUMENT: Final = 0x0115
CONFLICT: Final = 0x0119  # the instance is there with another SOP class
NO_SUCH_ACTION: Final = 0x0123
ALL_HELD, SOME_NOT_HELD = 1, 2  # event types
REQUEST = 1  # the only action type
_REPORTED: Final = ("ReferencedSOPSequence", "FailedSOPSequence")
SAME_ASSOCIATION_S = 1.0  # whoever waits on the association that asked has it still open after this
NEW_ASSOCIATION_S = 60.0  # after this a new association reports, whatever became of the other


def requested(action: Dataset) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Transaction UID, and SOP class and instance of each reference. Raises ValueError where something is missing."""
    transaction_uid = str(action.get("TransactionUID") or "")
    references = [
        (str(item.get("ReferencedSOPClassUID") or ""), str(item.get("ReferencedSOPInstanceUID") or ""))
        for item in action.get("ReferencedSOPSequence") or ()
    ]
    if not transaction_uid or len(transaction_uid) > 64 or not references or not all(map(all, references)):
        raise ValueError("the request names no transaction, or no instance, or one in part")
    return transaction_uid, tuple(references)


def take_report(store: Store, told: Dataset, now: datetime) -> int:
    """Write down what a destination says of what we asked it to commit to; the status of its N-EVENT-REPORT.

    Raises StoreError.
    """
    try:
        held, failed = ({str(item.ReferencedSOPInstanceUID) for item in told.get(key) or ()} for key in _REPORTED)
        transaction_uid = str(told.TransactionUID)
    except (AttributeError, TypeError, ValueError):
        return INVALID_ARGUMENT
    return SUCCESS if store.commitment_answered(transaction_uid, held, failed, now) else INVALID_ARGUMENT


def report(store: Store, data_dir: Path, commitment: Commitment) -> tuple[int, Dataset]:
    """Event type and event information: each requested instance is held, or not and why (PS3.4 table J.3-2)."""
    held: list[Dataset] = []
    failed: list[Dataset] = []
    for sop_class, sop_instance in commitment.requested:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_instance
        row = store.instance(sop_instance)
        if row is None or _size_bytes(data_dir / row.path) != row.size_bytes:
            item.FailureReason = NO_SUCH_INSTANCE
        elif row.sop_class_uid != sop_class:
            item.FailureReason = CONFLICT
        (failed if "FailureReason" in item else held).append(item)
    told = Dataset()
    told.TransactionUID = commitment.transaction_uid
    if held:
        told.ReferencedSOPSequence = DicomSequence(held)
    if failed:
        told.FailedSOPSequence = DicomSequence(failed)
    return SOME_NOT_HELD if failed else ALL_HELD, told


def _size_bytes(file: Path) -> int | None:
    """None where no file can be read there, which is no promise to keep one."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size if S_ISREG(found.st_mode) else None


def send(store: Store, data_dir: Path, commitment: Commitment, assoc: Association, now: datetime) -> None:
    """Report on an open association. Raises DeliveryError where the answer is not taken."""
    kind, told = report(store, data_dir, commitment)
    try:
        status, _ = assoc.send_n_event_report(told, kind, SOP_CLASS, SOP_INSTANCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise DeliveryError(f"the report could not be sent ({type(error).__name__})") from error
    if status.get("Status") != SUCCESS:
        answer = "no answer" if "Status" not in status else f"status 0x{status.Status:04X}"
        raise DeliveryError(f"{answer} to the report")
    detail = f"{len(told.get('FailedSOPSequence', ()))} of {len(commitment.requested)} not held"
    store.commitment_reported(commitment.id, detail, now)


def step(
    store: Store, settings: DeliverySettings, destinations: Sequence[Destination], data_dir: Path, now: datetime
) -> Commitment | None:
    """Report what is due on a new association; the request as it was, or None when none is due.

    A failure is written against the request and tried again as a delivery is; only StoreError is raised.
    """
    commitment = store.due_commitment(now)
    if commitment is None:
        return None
    destination = next((one for one in destinations if one.ae_title == commitment.calling_ae), None)
    if destination is None:
        reason = f"no [[destination]] has the AE title {commitment.calling_ae!r}; add one to report there"
        store.commitment_failed(commitment.id, reason, None, now)
        return commitment
    try:
        _on_new_association(store, settings, destination, data_dir, commitment, now)
    except DeliveryError as error:
        wait_s = settings.wait_s(commitment.attempt + 1)
        is_last = commitment.attempt + 1 >= settings.max_attempts
        due = None if is_last else now + timedelta(seconds=wait_s)
        store.commitment_failed(commitment.id, str(error), due, now)
    return commitment


def _on_new_association(
    store: Store,
    settings: DeliverySettings,
    destination: Destination,
    data_dir: Path,
    commitment: Commitment,
    now: datetime,
) -> None:
    provider = build_role(SOP_CLASS, scu_role=False, scp_role=True)  # though we ask for the association (PS3.7 D.3.3.4)
    contexts = [(SOP_CLASS, syntax) for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian)]
    with associated(destination, contexts, settings.timeout_s, roles=[provider]) as assoc:
        send(store, data_dir, commitment, assoc, now)
