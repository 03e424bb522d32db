"""Which SOP classes the door takes beyond those that pynetdicom names: private, retired and newer ones.

What an archive routes holds such instances now and then (a vendor's raw data, a retired overlay), and an association
that refuses one often costs the study. They are kept like all others, and analysed like no CT image. A class is taken
where nothing else can be meant: one of the standard's storage classes by its arc, or one that is not the standard's.
Queries, work lists and transfer syntaxes are neither.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Final

from pydicom.uid import UID
from pynetdicom import register_uid
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.service_class import ServiceClass, StorageServiceClass
from pynetdicom.sop_class import uid_to_service_class

from salsa_node.instance_header import uid_or_nothing

log = logging.getLogger(__name__)

MOST: Final = 256  #: classes that one process learns; a peer that names ever new ones is refused the rest
_STANDARD: Final = "1.2.840.10008."  # the root of DICOM's own UIDs (PS3.5 9.1)
_STORAGE: Final = f"{_STANDARD}5.1.4.1.1."  # below it lie the storage SOP classes (PS3.6 annex A)
_MIXED: Final = (f"{_STORAGE}200.", f"{_STORAGE}201.")  # of protocols and inventories: queries and an instance too
_ELSEWHERE: Final = frozenset((f"{_STANDARD}5.1.1.29", f"{_STANDARD}5.1.1.30"))  # of hardcopies, both retired


def is_unlisted_storage(sop_class_uid: str) -> bool:
    """Whether this can only be a storage SOP class, though pynetdicom has no service for it yet."""
    if not uid_or_nothing(sop_class_uid) or uid_to_service_class(sop_class_uid) is not ServiceClass:
        return False
    if not f"{sop_class_uid}.".startswith(_STANDARD) or sop_class_uid in _ELSEWHERE:
        return True
    return sop_class_uid.startswith(_STORAGE) and not sop_class_uid.startswith(_MIXED)


class Unlisted:
    """The classes that peers have proposed so far; one for a process, as pynetdicom's table of classes is."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._known: set[str] = set()

    def contexts(
        self, proposed: Iterable[PresentationContext], transfer_syntaxes: Sequence[str | UID]
    ) -> list[PresentationContext]:
        """A context for each class among those proposed that is to be taken; pynetdicom stores such from now on."""
        asked = {str(context.abstract_syntax) for context in proposed}
        with self._turn:
            new = [uid for uid in sorted(asked - self._known) if is_unlisted_storage(uid)]
            room = MOST - len(self._known)
            for uid in new[:room]:
                register_uid(uid, f"Unlisted_{uid.replace('.', '_')}", StorageServiceClass)
                self._known.add(uid)
                log.info("class learned", extra={"event": "node.sop_class", "sop_class_uid": uid})
            if refused := new[room:]:
                text = (
                    f"{MOST} SOP classes beyond the known ones were learned; {len(refused)} more are refused until the "
                )
                text += f"next start, among them {refused[0]}"
                log.warning(text, extra={"event": "node.sop_class_refused"})
            return [build_context(uid, list(transfer_syntaxes)) for uid in sorted(asked & self._known)]


UNLISTED: Final = Unlisted()
