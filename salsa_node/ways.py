"""Which way leads to a destination: DICOM, DICOMweb or a folder; to send by, and to ask by afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from salsa_node import way_dicom, way_folder, way_web
from salsa_node.errors import DestinationRefused
from salsa_node.outgoing import Outgoing, Reference, Way
from salsa_node.settings import Destination


@contextmanager
def opened(destination: Destination, objects: Sequence[Outgoing], timeout_s: float) -> Iterator[Way]:
    """A way for those objects. Raises DeliveryError."""
    if destination.folder:
        yield way_folder.FolderWay(destination)
    elif destination.url:
        with way_web.opened(destination, timeout_s) as web:
            yield web
    else:
        with way_dicom.opened(destination, objects, timeout_s) as dicom:
            yield dicom


def held(destination: Destination, references: Sequence[Reference], timeout_s: float) -> frozenset[str] | None:
    """The SOP Instance UIDs among those that the destination holds; None where it cannot be asked.

    Raises DeliveryError where it does not answer.
    """
    if destination.folder:
        folder = way_folder.FolderWay(destination)
        return frozenset(one.sop_instance_uid for one in references if folder.holds(one))
    if not destination.url:
        return way_dicom.held(destination, references, timeout_s)
    with way_web.opened(destination, timeout_s) as web:
        try:
            return frozenset(one.sop_instance_uid for one in references if web.holds(one))
        except DestinationRefused:
            return None


def proof(destination: Destination) -> str:
    """What it is called when such a destination says that it holds an object."""
    return "file" if destination.folder else "QIDO-RS" if destination.url else "C-FIND"


def echo(destination: Destination, timeout_s: float) -> str:
    """Knock, and send nothing; what answered. Raises DeliveryError that says how far it came."""
    if destination.folder:
        way_folder.FolderWay(destination)
        return "folder"
    if destination.url:
        with way_web.opened(destination, timeout_s) as web:
            web.knock()
        return "DICOMweb"
    way_dicom.echo(destination, timeout_s)
    return "0x0000"
