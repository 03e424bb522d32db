"""What the door reads of an encoded data set, and the status by which it refuses one."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final

from pydicom.filereader import read_dataset
from pydicom.uid import UID
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32
from pynetdicom.dsutils import create_file_meta, encode_file_meta

from salsa_node.damage import DAMAGED

SUCCESS: Final = 0x0000
SOP_CLASS_NOT_SUPPORTED: Final = 0x0122  # PS3.7 C.5
OUT_OF_RESOURCES: Final = 0xA700  # PS3.4 table B.2-1; the sender may try again
DOES_NOT_MATCH: Final = 0xA900  # the data set is not the instance that the request named
CANNOT_UNDERSTAND: Final = 0xC000
CONTENT_CONFLICT: Final = 0xC001  # in the "cannot understand" range, which is the node's to use (PS3.4 B.2.3)
PATIENT_CONFLICT: Final = 0xC002
NODE_FAILED: Final = 0xC0FF

HEAD_BYTES: Final = 1 << 16  #: of a data set, in which the identifiers nearly always lie
_LAST_TAG = 0x00200011  # Series Number: nothing behind it is read
_INFLATED_BYTES = 1 << 20
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_WANTED = frozenset(
    (0x00080016, 0x00080018, 0x00080020, 0x00080050, 0x00080060, 0x00100020, 0x0020000D, 0x0020000E, 0x00200011)
)
_CHARACTER_SET = 0x00080005
_PLAIN_CHARACTER_SET = re.compile(rb" *|ISO_IR (6|13|100|101|109|110|144|127|126|138|148|166|192) *")
_FIRST_GROUP, _ITEM_GROUP = 0x0008, 0xFFFE  # of a data set; of what delimits its sequences
_SHORT_VRS = frozenset(str(vr).encode("ascii") for vr in EXPLICIT_VR_LENGTH_16)
_LONG_VRS = frozenset(str(vr).encode("ascii") for vr in EXPLICIT_VR_LENGTH_32)
_EXPLICIT, _IMPLICIT, _LENGTH = struct.Struct("<HH2sH"), struct.Struct("<HHL"), struct.Struct("<L")


class Refused(Exception):
    """An instance is not taken.

    status: the DIMSE status that says so; reason: at most 64 characters, without identity (PS3.7 C.4.2).
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Header:
    """What the door reads of a data set."""

    study_uid: str
    series_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    modality: str
    series_number: int | None
    accession_number: str
    patient_id: str
    study_date: str


def file_head(sop_class_uid: str, sop_instance_uid: str, transfer_syntax: UID) -> bytes:
    """Preamble, prefix and File Meta Information of a file that holds such an instance (PS3.10 7.1)."""
    of_all, of_class = _meta(sop_class_uid, transfer_syntax)
    uid = sop_instance_uid.encode("ascii", "replace")
    uid += b"\0" * (len(uid) % 2)
    elements = of_all + struct.pack("<HH2sH", 0x0002, 0x0003, b"UI", len(uid)) + uid + of_class
    return b"\0" * 128 + b"DICM" + struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(elements)) + elements


@lru_cache(maxsize=256)
def _meta(sop_class_uid: str, transfer_syntax: UID) -> tuple[bytes, bytes]:
    """The elements before and after Media Storage SOP Instance UID, as pynetdicom encodes them."""
    whole = encode_file_meta(create_file_meta(sop_class_uid=UID(sop_class_uid), sop_instance_uid=UID("1.2"),
                                              transfer_syntax=transfer_syntax))  # fmt: skip
    placeholder = struct.pack("<HH2sH", 0x0002, 0x0003, b"UI", 4) + b"1.2\0"
    before, found, after = whole[12:].partition(placeholder)
    assert found, "pynetdicom writes the SOP Instance UID that it is given"
    return before, after


def header_of_file(path: Path, offset: int, head: bytes, whole: bool, transfer_syntax: UID) -> Header:
    """The identifiers of the data set that begins at `offset` of a file. Raises Refused.

    head: its first bytes, at hand; whole: whether there are no more.
    """
    if (found := _plain_elements(head, transfer_syntax)) is not None:
        return _header(found.get)
    try:
        return read_header(BytesIO(head), transfer_syntax, complete=whole)
    except Refused:
        if whole:
            raise
    with path.open("rb") as file:
        file.seek(offset)
        return read_header(file, transfer_syntax)


def read_header(stream: BinaryIO, transfer_syntax: UID, *, complete: bool = True) -> Header:
    """The identifiers of an encoded data set, read up to Series Number. Raises Refused.

    complete: False where the stream may end before the data set does; its end is then a reason to refuse.
    """
    reached = False

    def beyond(tag: int, _vr: str | None, _length: int) -> bool:
        nonlocal reached
        reached = tag > _LAST_TAG
        return reached

    try:
        if transfer_syntax.is_deflated:
            stream = BytesIO(
                zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream.read(_INFLATED_BYTES), _INFLATED_BYTES)
            )
        ds = read_dataset(stream, transfer_syntax.is_implicit_VR, transfer_syntax.is_little_endian, stop_when=beyond)
        if not (reached or complete):
            raise Refused(CANNOT_UNDERSTAND, "the data set has more to it than was read")
        return _header(lambda tag: ds.get_item(tag).value if tag in ds else None)
    except DAMAGED as error:
        raise Refused(CANNOT_UNDERSTAND, f"the data set cannot be read ({type(error).__name__})") from error


def _plain_elements(head: bytes, transfer_syntax: UID) -> dict[int, bytes] | None:
    """The wanted elements of a data set that begins with `head`, as pydicom would read them; None where it has to.

    That is wherever something is not plainly so: another byte order, elements out of order, of unknown VR or of
    undefined length, a character set by extensions, an end before Series Number is passed.
    """
    is_implicit = _is_implicit(transfer_syntax)
    if is_implicit is None or (is_implicit and head[4:6].isalpha()):  # the latter may be explicit all the same
        return None
    found: dict[int, bytes] = {}
    at, last, size = 0, 0, len(head) - 12
    while at <= size:
        if is_implicit:
            group, element, length = _IMPLICIT.unpack_from(head, at)
            at += 8
        else:
            group, element, vr, length = _EXPLICIT.unpack_from(head, at)
            at += 8
            if vr in _LONG_VRS:
                length = _LENGTH.unpack_from(head, at)[0]
                at += 4
            elif vr not in _SHORT_VRS:
                return None
        tag = group << 16 | element
        if tag <= last or not _FIRST_GROUP <= group < _ITEM_GROUP:
            return None
        if tag > _LAST_TAG:
            return found
        if tag in _WANTED or tag == _CHARACTER_SET:
            found[tag] = head[at : at + length]
            if tag == _CHARACTER_SET and not _PLAIN_CHARACTER_SET.fullmatch(found[tag]):
                return None
        at, last = at + length, tag
    return None


@lru_cache(maxsize=256)
def _is_implicit(transfer_syntax: UID) -> bool | None:
    """Whether VRs are left out of a data set in little endian; None for any other, and for no transfer syntax."""
    if not transfer_syntax.is_transfer_syntax or transfer_syntax.is_deflated or not transfer_syntax.is_little_endian:
        return None
    return transfer_syntax.is_implicit_VR


def _header(value: Callable[[int], object]) -> Header:
    """The header whose elements have those values, undecoded. Raises Refused."""
    number = _text(value(0x00200011))
    return Header(
        study_uid=_uid(value(0x0020000D), "Study Instance UID"),
        series_uid=_uid(value(0x0020000E), "Series Instance UID"),
        sop_instance_uid=_uid(value(0x00080018), "SOP Instance UID"),
        sop_class_uid=_uid(value(0x00080016), "SOP Class UID"),
        modality=_text(value(0x00080060))[:16],
        series_number=int(number) if re.fullmatch(r"[+-]?[0-9]{1,9}", number) else None,
        accession_number=_text(value(0x00080050))[:64],
        patient_id=_text(value(0x00100020))[:64],
        study_date=_text(value(0x00080020))[:8],
    )


def _text(value: object) -> str:
    """A value's text without padding, "" where absent; read raw, so that odd values neither warn nor fail."""
    if not isinstance(value, bytes):
        text = "" if value is None else str(value)
    else:
        try:
            text = value.decode()
        except UnicodeDecodeError:
            text = value.decode("latin-1")
    return text.replace("\0", " ").strip(" ")  # PostgreSQL keeps no NUL


def _uid(value: object, name: str) -> str:
    """A UID that may name a file. Raises Refused; the text of a bad one is not repeated."""
    text = _text(value)
    if not text:
        raise Refused(CANNOT_UNDERSTAND, f"{name} is missing")
    if not uid_or_nothing(text):
        raise Refused(CANNOT_UNDERSTAND, f"{name} is not digits and dots, at most 64")
    return text


def uid_or_nothing(text: str | None) -> str:
    """`text` where it may name a file, else ""."""
    return text if text and len(text) <= 64 and _UID.fullmatch(text) else ""
