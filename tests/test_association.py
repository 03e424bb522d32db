"""Two threads of one association: the answer goes to whoever asked."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from pynetdicom import AE, evt

from salsa_node import association


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


def test_an_answer_goes_to_whoever_asked_however_slowly_the_other_thread_stands_still(peer, monkeypatch):
    monkeypatch.setattr(association._Turns, "wait", later(association._Turns.wait, 0.1))
    ae = AE()
    ae.add_requested_context(association.VERIFICATION)
    ae.dimse_timeout = 2
    assoc = ae.associate("127.0.0.1", peer, evt_handlers=[(evt.EVT_CONN_OPEN, association.taking_turns)])
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
