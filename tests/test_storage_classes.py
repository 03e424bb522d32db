"""The door takes what a routed study holds beside images, whoever named its class; and nothing that is no object."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.sop_class import uid_to_service_class
from test_door_dcmtk import asked
from test_listener import a_slice, associated, sent

from salsa_node import storage_classes
from salsa_node.instance_header import SUCCESS
from salsa_node.listener import Listener
from salsa_node.settings import ListenerSettings
from salsa_node.store import Store

T0 = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
SIEMENS_NON_IMAGE = UID("1.3.12.2.1107.5.9.1")
GE_RAW = UID("1.2.840.113619.4.26")
RETIRED_OVERLAY = UID("1.2.840.10008.5.1.4.1.1.8")
YET_TO_COME = UID("1.2.840.10008.5.1.4.1.1.99999")
NONSENSE = {
    "Patient Root Query/Retrieve - FIND": "1.2.840.10008.5.1.4.1.2.1.1",
    "a retired query": "1.2.840.10008.5.1.4.1.2.3.1",
    "Modality Worklist": "1.2.840.10008.5.1.4.31",
    "a transfer syntax": "1.2.840.10008.1.2.1",
    "Basic Film Session": "1.2.840.10008.5.1.1.1",
    "a directory of media": "1.2.840.10008.1.3.10",
    "unknown, of the standard": "1.2.840.10008.99.1",
    "the standard itself": "1.2.840.10008",
    "an instance below the storage classes": "1.2.840.10008.5.1.4.1.1.201.1.1",
    "yet to come, among queries of inventories": "1.2.840.10008.5.1.4.1.1.201.99",
}


@pytest.fixture(params=[True, False], ids=["fast", "plain"])
def door(store: Store, data_dir: Path, request: pytest.FixtureRequest) -> Listener:
    settings = ListenerSettings(port=0, min_free_gib=0.0, fast=request.param)
    with Listener(settings, store, data_dir, clock=lambda: T0) as door:
        yield door


def test_private_retired_and_newer_classes_are_kept_beside_the_images(door, store, data_dir):
    others = [
        a_slice(number, SOPClassUID=sop_class, Modality="OT")
        for number, sop_class in enumerate([SIEMENS_NON_IMAGE, GE_RAW, RETIRED_OVERLAY, YET_TO_COME], start=2)
    ]
    assert sent(door.port, a_slice(1), *others) == [SUCCESS] * 5
    rows = {row.sop_class_uid: row for row in store.instances_of("1.2.3")}
    assert set(rows) == {CTImageStorage, SIEMENS_NON_IMAGE, GE_RAW, RETIRED_OVERLAY, YET_TO_COME}
    kept = pydicom.dcmread(data_dir / rows[SIEMENS_NON_IMAGE].path)
    assert (kept.SOPClassUID, kept.file_meta.MediaStorageSOPClassUID) == (SIEMENS_NON_IMAGE, SIEMENS_NON_IMAGE)


@pytest.mark.parametrize("what", NONSENSE)
def test_what_is_no_storage_class_is_refused_as_ever(door, what):
    contexts = [(UID(NONSENSE[what]), ExplicitVRLittleEndian), (CTImageStorage, ExplicitVRLittleEndian)]
    with associated(door.port, *contexts) as assoc:
        assert assoc.is_established
        assert [context.abstract_syntax for context in assoc.accepted_contexts] == [CTImageStorage]


def test_a_private_class_in_a_private_encoding_is_refused(door):
    contexts = [(GE_RAW, UID("1.2.840.113619.5.2")), (CTImageStorage, ImplicitVRLittleEndian)]
    with associated(door.port, *contexts) as assoc:
        assert [context.abstract_syntax for context in assoc.accepted_contexts] == [CTImageStorage]


def test_a_peer_that_names_ever_new_classes_is_refused_the_rest_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(storage_classes, "MOST", 3)
    learned = storage_classes.Unlisted()
    proposed = [storage_classes.build_context(f"2.25.777.{number}") for number in range(9)]
    first = [str(context.abstract_syntax) for context in learned.contexts(proposed, [ExplicitVRLittleEndian])]
    assert first == ["2.25.777.0", "2.25.777.1", "2.25.777.2"]
    assert "6 more are refused until the next start, among them 2.25.777.3" in caplog.text
    assert learned.contexts(proposed[5:], [ExplicitVRLittleEndian]) == []
    assert [str(one.abstract_syntax) for one in learned.contexts(proposed[1:2], [ImplicitVRLittleEndian])] == first[1:2]
    assert uid_to_service_class("2.25.777.5") is not uid_to_service_class(first[0])


def test_dcmtk_sends_a_private_class(door, store, tmp_path, tool: Callable[[str], str]):
    ds = a_slice(SOPClassUID=SIEMENS_NON_IMAGE, Modality="OT")
    ds.save_as(tmp_path / "private.dcm", enforce_file_format=True)
    code, told = asked([tool("dcmsend"), "-dn", str(tmp_path / "private.dcm")], door.port)
    assert code == 0, told
    assert [row.sop_class_uid for row in store.instances_of("1.2.3")] == [SIEMENS_NON_IMAGE]
