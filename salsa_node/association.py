"""What both ends of a DICOM association share, as pynetdicom makes them."""

from __future__ import annotations

import logging
import socket
import threading
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


def let_go(assoc: Association) -> None:
    """Close the connection of an association that came to nothing: pynetdicom does not where the peer went first."""
    connection = assoc.dul.socket
    if connection is not None and connection.socket is not None:
        connection.socket.close()


def taking_turns(event: evt.Event) -> None:
    """For EVT_CONN_OPEN of an association that we ask for: the answer goes to whoever asked."""
    event.assoc._reactor_checkpoint = _Turns(event.assoc)


class _Turns(threading.Event):
    """pynetdicom's checkpoint, at which the thread of an association stops while another waits for an answer.

    pynetdicom takes a thread that was let go, but has not yet gone on, for one that stands still. On a busy machine it
    then takes the answer off the queue, and the one who asked waits until its time is over. Here `clear` returns when
    the thread stands still in deed, or is no more.
    """

    def __init__(self, assoc: Association) -> None:
        super().__init__()
        self._assoc = assoc
        self._moved = threading.Condition()
        self._is_open, self._is_standing = True, False

    def wait(self, timeout: float | None = None) -> bool:
        """Stand still until `set`, or for `timeout` seconds; whether it was set."""
        with self._moved:
            self._is_standing = True
            self._moved.notify_all()
            self._moved.wait_for(lambda: self._is_open, timeout)
            self._is_standing = False
            return self._is_open

    def set(self) -> None:
        """Let the thread go on."""
        with self._moved:
            self._is_open = True
            self._moved.notify_all()

    def clear(self) -> None:
        """Have the thread stand still, which it does within a millisecond unless it ends."""
        with self._moved:
            self._is_open = False
            while not (self._is_standing or threading.current_thread() is self._assoc):
                if not self._assoc.is_alive() or self._assoc._kill:
                    return
                self._moved.wait(0.01)

    def is_set(self) -> bool:
        """Whether the thread may go on."""
        return self._is_open


def called_by(assoc: Association) -> str:
    """The AE title by which the requestor of an association calls its acceptor."""
    request = assoc.requestor.primitive
    return request.called_ae_title.strip() if isinstance(request, A_ASSOCIATE) else ""
