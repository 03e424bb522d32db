"""The neighbours on the loopback say so when something is wrong."""

from __future__ import annotations

import pytest
from pynetdicom import AE, evt

from salsa_node import loopback, phantom
from salsa_node.errors import DeliveryError, PipelineError


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pynetdicom drops a refused connection's socket
def test_sending_to_nobody_and_to_a_node_that_refuses(tmp_path, free_port):
    recipe = phantom.Recipe(11, shape=(3, 16, 16), spacing_mm=(8.0, 18.0, 18.0))
    study = phantom.write_study(phantom.make(recipe), tmp_path)
    assert not loopback.echoes(free_port)
    with pytest.raises(DeliveryError, match="took no association"):
        loopback.send(study.axial, free_port)
    ae = AE("SALSA_NODE")
    ae.add_supported_context("1.2.840.10008.5.1.4.1.1.2")
    server = ae.start_server(("127.0.0.1", free_port), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda _: 0xA700)])
    try:
        with pytest.raises(DeliveryError, match="0xA700"):
            loopback.send(study.axial, free_port)
    finally:
        server.shutdown()


def test_a_node_that_cannot_start_is_told_with_its_log(tmp_path, free_port):
    config = tmp_path / "wrong.toml"
    config.write_text("[listner]\n")
    with (
        pytest.raises(PipelineError, match=r"did not start; its log is .*node\.log"),
        loopback.node(config, tmp_path / "node.log", free_port),
    ):
        pass
    assert "did you mean 'listener'" in (tmp_path / "node.log").read_text()
