"""What both ends of a DICOM association share, as pynetdicom makes them."""

from __future__ import annotations

import logging
import socket
from typing import Final

from pynetdicom import evt

VERIFICATION: Final = "1.2.840.10008.1.1"  # the SOP class of C-ECHO (PS3.4 annex A)

# pynetdicom would log data sets, and with them the patient.
logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)


def without_delay(event: evt.Event) -> None:
    """For EVT_CONN_OPEN: a small message must not wait for the peer's delayed acknowledgement (40 ms each)."""
    connection = event.assoc.dul.socket
    if connection is not None and connection.socket is not None:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
