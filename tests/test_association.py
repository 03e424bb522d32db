"""Two threads of one association: the answer goes to whoever asked."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest
from pynetdicom import AE, evt

from salsa_node import association, requestor
from salsa_node.errors import DeliveryError
from salsa_node.settings import Destination


@pytest.fixture
def peer():
    ae = AE("PEER")
    ae.add_supported_context(association.VERIFICATION)
    server = ae.start_server(("127.0.0.1", 0), block=False)
    yield server.server_address[1]
    server.shutdown()


def later(call: Callable[..., object], seconds: float) -> Callable[..., object]:
    """The same, by a thread that the machine then leaves waiting."""

    def called(*args: object) -> object:
        done = call(*args)
        time.sleep(seconds)
        return done

    return called


def test_an_answer_goes_to_whoever_asked_however_slowly_the_other_thread_stands_still(peer):
    ae = AE()
    ae.add_requested_context(association.VERIFICATION)
    ae.dimse_timeout = 2
    assoc = ae.associate("127.0.0.1", peer, evt_handlers=[(evt.EVT_CONN_OPEN, association.taking_turns)])
    assoc._reactor_checkpoint.wait = later(assoc._reactor_checkpoint.wait, 0.1)
    assoc.dimse.send_msg = later(assoc.dimse.send_msg, 0.3)
    try:
        assert [assoc.send_c_echo().get("Status") for _ in range(4)] == [0, 0, 0, 0]
    finally:
        assoc.release()
    assert assoc.is_released
    assert not assoc.is_aborted


def test_where_the_other_thread_has_ended_nobody_waits_for_it(peer):
    ae = AE()
    ae.add_requested_context(association.VERIFICATION)
    assoc = ae.associate("127.0.0.1", peer, evt_handlers=[(evt.EVT_CONN_OPEN, association.taking_turns)])
    assoc.abort()
    assoc.join(10)
    assoc._reactor_checkpoint.clear()
    assert not assoc._reactor_checkpoint.is_set()


def test_a_peer_that_leaves_first_leaves_no_connection_open(monkeypatch):
    asked = []
    associate = AE.associate

    def noted(*arguments: object, **settings: object) -> object:
        asked.append(associate(*arguments, **settings))
        return asked[-1]

    monkeypatch.setattr(AE, "associate", noted)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        pacs = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=server.getsockname()[1])
        plain = [(association.VERIFICATION, "1.2.840.10008.1.2")]
        with pytest.raises(DeliveryError, match="no association"), requestor.associated(pacs, plain, 5):
            pass
        thread.join(20)
    [refused] = asked
    connection = refused.dul.socket.socket
    assert connection is None or connection.fileno() == -1
