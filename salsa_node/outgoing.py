"""A result object on its way out, as it was produced, and the same content in a form that more destinations take.

A LABELMAP may go as the BINARY segmentation of the same result, Comprehensive 3D SR as Comprehensive or Enhanced SR
(the record has no 3D coordinates, so nothing is lost), compressed pixels uncompressed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final, Protocol

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from salsa_node import durable
from salsa_node.errors import DestinationRefused
from salsa_node.store import NewObject, ResultObject
from salsa_node.uids import derive

#: kind -> the kind that has the same content and goes where the first is refused
NEXT_FORM: Final[Mapping[str, str]] = {
    "LABELMAP": "SEG",
    "SR": "SR_COMPREHENSIVE",
    "SR_COMPREHENSIVE": "SR_ENHANCED",
}
#: of these, the reports, which are made when they are needed, and their SOP classes
REPORT_FORMS: Final[Mapping[str, UID]] = {"SR_COMPREHENSIVE": ComprehensiveSRStorage, "SR_ENHANCED": EnhancedSRStorage}
PLAIN: Final = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)  #: what every archive reads


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """An object that lies on disk, unchanged since it was made.

    content: the file's bytes, with preamble and file meta information.
    """

    kind: str
    path: Path
    content: bytes
    sop_class_uid: UID
    sop_instance_uid: str
    syntax: UID

    def dataset(self) -> Dataset:
        """The object, decoded."""
        return pydicom.dcmread(BytesIO(self.content))


@dataclass(frozen=True, slots=True)
class Reference:
    """An object as an archive names it."""

    sop_class_uid: str
    sop_instance_uid: str
    series_uid: str
    study_uid: str


class Way(Protocol):
    """A way to one destination that is open."""

    @property
    def is_open(self) -> bool:
        """Whether more can be sent."""

    def send(self, outgoing: Outgoing) -> tuple[int, str | None]:
        """The DIMSE status of one object that was taken, and what to note where it was no plain success.

        Raises FormRefused where the destination takes no objects of this SOP class, DeliveryError.
        """


def read(data_dir: Path, item: ResultObject) -> Outgoing:
    """The object as it was produced. Raises DestinationRefused where the file is gone or not that any more."""
    path = data_dir / item.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DestinationRefused(f"the {item.kind} of run {item.run_id} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != item.sha256:
        raise DestinationRefused(
            f"the {item.kind} of run {item.run_id} has changed on disk since it was made; not sent"
        )
    meta = pydicom.dcmread(BytesIO(content), specific_tags=["SOPInstanceUID"], stop_before_pixels=True).file_meta
    syntax = UID(meta.TransferSyntaxUID)
    return Outgoing(item.kind, path, content, UID(item.sop_class_uid), item.sop_instance_uid, syntax)


def in_syntax(outgoing: Outgoing, syntax: UID) -> Dataset:
    """The same instance in another of the `PLAIN` transfer syntaxes, pixels decoded. Raises DestinationRefused."""
    ds = outgoing.dataset()
    try:
        if outgoing.syntax.is_encapsulated:
            ds.decompress(generate_instance_uid=False)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        raise DestinationRefused(f"{outgoing.syntax.name} cannot be decoded here ({type(error).__name__})") from error
    ds.file_meta.TransferSyntaxUID = syntax
    buffer = BytesIO()
    ds.save_as(buffer, implicit_vr=syntax.is_implicit_VR, little_endian=True, enforce_file_format=True)
    buffer.seek(0)
    return pydicom.dcmread(buffer)


def next_report(outgoing: Outgoing, data_dir: Path) -> NewObject:
    """The same report as the next of `REPORT_FORMS`, a file beside it: another instance, with a UID that derives.

    Raises DestinationRefused where it says something that the other class cannot (PS3.3 A.35.2, A.35.3), OSError.
    """
    kind, ds = NEXT_FORM[outgoing.kind], outgoing.dataset()
    for element in ds.iterall():
        if element.keyword == "ValueType" and element.value in ("SCOORD3D", "TABLE"):
            raise DestinationRefused("it has content that only a Comprehensive 3D SR can have")
        if element.keyword == "ReferencedContentItemIdentifier" and kind == "SR_ENHANCED":
            raise DestinationRefused("it refers to its own content, which an Enhanced SR cannot")
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = REPORT_FORMS[kind]
    uid = UID(derive("form", outgoing.sop_instance_uid, kind))
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    content = buffer.getvalue()
    path = outgoing.path.with_name(f"{kind.lower()}.dcm")
    durable.write(path, [content])
    relative = path.relative_to(data_dir).as_posix()
    return NewObject(kind, uid, ds.SOPClassUID, relative, hashlib.sha256(content).hexdigest())
