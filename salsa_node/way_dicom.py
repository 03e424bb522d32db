"""The way to a destination by DICOM: one association for all that goes, one C-STORE and one status for each object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import _config
from pynetdicom.association import Association
from pynetdicom.status import STATUS_PENDING, STATUS_SUCCESS, STATUS_WARNING, code_to_category

from salsa_node.association import VERIFICATION
from salsa_node.errors import DeliveryError, DestinationRefused, FormRefused
from salsa_node.outgoing import PLAIN, Outgoing, Reference, in_syntax
from salsa_node.requestor import accepts, associated
from salsa_node.settings import Destination

_LABEL_MAP: Final = "1.2.840.10008.5.1.4.1.1.66.7"  # Label Map Segmentation Storage (Supplement 243)
FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"  # Study Root Query/Retrieve Information Model - FIND
_SOP_CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 C.5.6: the same answer tomorrow
_ALREADY_THERE = 0x0111  # PS3.7 C.5.8, duplicate SOP instance: what an interrupted delivery meets the second time

# A file is sent as it lies there, part by part, neither decoded nor encoded; this is the library's switch for it.
_config.STORE_SEND_CHUNKED_DATASET = True


class DicomWay:
    """An open association to a destination; an `outgoing.Way`."""

    def __init__(self, destination: Destination, assoc: Association) -> None:
        self._destination = destination
        self._assoc = assoc

    @property
    def is_open(self) -> bool:
        """Whether more can be sent."""
        return bool(self._assoc.is_established)

    def send(self, outgoing: Outgoing) -> tuple[int, str | None]:
        """The status of one C-STORE, and what to note where it was no plain success.

        Raises FormRefused where the destination does not take objects of this SOP class, DeliveryError.
        """
        name, sop_class = self._destination.name, outgoing.sop_class_uid
        syntax = next((one for one in _syntaxes(outgoing) if accepts(self._assoc, sop_class, one)), None)
        if syntax is None:
            tried = ", ".join(one.name for one in _syntaxes(outgoing))
            raise FormRefused(f"{name}: does not accept {_named(sop_class)} as {tried}; allow this SOP class there")
        what = outgoing.path if syntax == outgoing.syntax else in_syntax(outgoing, syntax)
        if not self._assoc.is_established:
            raise DeliveryError(f"{name}: the association ended before the object was sent")
        try:
            answer = self._assoc.send_c_store(what)
        except (RuntimeError, ValueError, OSError) as error:
            raise DeliveryError(f"{name}: sending failed ({type(error).__name__}: {error})") from error
        status = answer.get("Status")
        if status is None:
            raise DeliveryError(f"{name}: the association ended without an answer to C-STORE")
        changed = f"sent as {syntax.name}" if syntax != outgoing.syntax else None
        return status, _note(name, status) or changed


def _named(sop_class: UID) -> str:
    """Its name; the library's dictionary has none for the youngest."""
    return f"Label Map Segmentation Storage ({sop_class})" if sop_class == _LABEL_MAP else str(sop_class.name)


def _note(name: str, status: int) -> str | None:
    """What an answer says beside success. Raises FormRefused, DeliveryError."""
    told = f"{name}: status 0x{status:04X}"  # the peer's comment may quote the patient
    category = code_to_category(status)
    if category == STATUS_SUCCESS:
        return None
    if category == STATUS_WARNING:
        return f"taken with a warning: {told}"
    if status == _ALREADY_THERE:
        return f"it was there already: {told}"
    raise (FormRefused if status == _SOP_CLASS_NOT_SUPPORTED else DeliveryError)(told, status)


def _syntaxes(outgoing: Outgoing) -> tuple[UID, ...]:
    """The transfer syntaxes in which it may go, its own first."""
    return (outgoing.syntax, *(syntax for syntax in PLAIN if syntax != outgoing.syntax))


@contextmanager
def opened(destination: Destination, objects: Iterable[Outgoing], timeout_s: float) -> Iterator[DicomWay]:
    """An association for those objects, in every transfer syntax that they may have. Raises DeliveryError."""
    contexts: set[tuple[str, UID | str]] = set()
    for outgoing in objects:
        contexts |= {(str(outgoing.sop_class_uid), syntax) for syntax in _syntaxes(outgoing)}
    with associated(destination, contexts, timeout_s) as assoc:
        yield DicomWay(destination, assoc)


def echo(destination: Destination, timeout_s: float) -> None:
    """C-ECHO. Raises DeliveryError that says how far it came."""
    with associated(destination, {(VERIFICATION, PLAIN[1])}, timeout_s) as assoc:
        if not assoc.accepted_contexts:
            raise DestinationRefused(f"{destination.name}: accepts the association but not C-ECHO")
        status = assoc.send_c_echo().get("Status")
    if status != 0:
        answer = "no answer" if status is None else f"status 0x{status:04X}"
        raise DeliveryError(f"{destination.name}: {answer} to C-ECHO", status)


def held(destination: Destination, references: Sequence[Reference], timeout_s: float) -> frozenset[str] | None:
    """The SOP Instance UIDs among those that the destination holds, by C-FIND; None where it offers none.

    Raises DeliveryError where it does not answer.
    """
    with associated(destination, [(FIND, syntax) for syntax in PLAIN], timeout_s) as assoc:
        if not accepts(assoc, FIND):
            return None
        return frozenset(one.sop_instance_uid for one in references if _is_held(assoc, destination, one))


def _is_held(assoc: Association, destination: Destination, wanted: Reference) -> bool:
    """One question for one instance: lists of UIDs are not understood everywhere."""
    asked = Dataset()
    asked.QueryRetrieveLevel = "IMAGE"
    asked.StudyInstanceUID, asked.SeriesInstanceUID = wanted.study_uid, wanted.series_uid
    asked.SOPInstanceUID = wanted.sop_instance_uid
    found, last = False, None
    try:
        for told, match in assoc.send_c_find(asked, FIND):
            last = told.get("Status")
            if last is not None and code_to_category(last) == STATUS_PENDING and match is not None:
                found = found or str(match.get("SOPInstanceUID", "")) == wanted.sop_instance_uid
    except (RuntimeError, ValueError, OSError) as error:
        raise DeliveryError(f"{destination.name}: no answer to C-FIND ({type(error).__name__})") from error
    if last != 0:
        answer = "no answer" if last is None else f"status 0x{last:04X}"
        raise DeliveryError(f"{destination.name}: {answer} to C-FIND", last)
    return found
