"""What both ends of a DICOM association share, as pynetdicom makes them."""

from __future__ import annotations

import logging
import socket
from typing import Final

from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import A_ASSOCIATE

VERIFICATION: Final = "1.2.840.10008.1.1"  # the SOP class of C-ECHO (PS3.4 annex A)

# pynetdicom would log data sets, and with them the patient.
logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)


def without_delay(event: evt.Event) -> None:
    """For EVT_CONN_OPEN: a small message must not wait for the peer's delayed acknowledgement (40 ms each)."""
    connection = event.assoc.dul.socket
    if connection is not None and connection.socket is not None:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def acknowledging_at_once(event: evt.Event) -> None:
    """For EVT_DATA_SENT: a peer that sends its answer in two parts, as DCMTK does, must not wait for our 40 ms either.

    Linux takes the wish for a while only, so it is uttered after each PDU.
    """
    connection = event.assoc.dul.socket
    if connection is not None and connection.socket is not None and hasattr(socket, "TCP_QUICKACK"):
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def called_by(assoc: Association) -> str:
    """The AE title by which the requestor of an association calls its acceptor."""
    request = assoc.requestor.primitive
    return request.called_ae_title.strip() if isinstance(request, A_ASSOCIATE) else ""
