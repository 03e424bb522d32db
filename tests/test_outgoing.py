"""What a destination refuses goes in another form, visibly, and the same content arrives."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import made_findings
import numpy as np
import pydicom
import pytest
from made_delivery import SEG, SR, STUDY, T0, an_archive, an_object, produce
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    SegmentationStorage,
)
from test_result_cases import objects

from salsa_node import delivery, outgoing
from salsa_node.dicom_result import LABEL_MAP_STORAGE, Kind
from salsa_node.settings import DeliverySettings, Destination
from salsa_node.store import DeliveryState, Store

LABELMAP = "2.25.3"
LEFT_OUT, SENT, GAVE_UP = DeliveryState.LEFT_OUT, DeliveryState.SENT, DeliveryState.GAVE_UP


@pytest.fixture
def send(store: Store, tmp_path: Path) -> Callable[[Destination], list[tuple[str, DeliveryState]]]:
    """Steps until nothing is due; kind and state of every delivery."""

    def turns(destination: Destination) -> list[tuple[str, DeliveryState]]:
        while delivery.step(store, DeliverySettings(timeout_s=10), [destination], tmp_path, "x", T0, clock=lambda: T0):
            pass
        kinds = {item.id: item.kind for item in store.objects_of(1)}
        return [(kinds[row.object_id], row.state) for row in store.deliveries_of(1)]

    return turns


Send = Callable[[Destination], list[tuple[str, DeliveryState]]]


@pytest.fixture(scope="module")
def record() -> Dataset:
    """The record of a made-up result."""
    return next(item.ds for item in objects(made_findings.case()) if item.kind is Kind.SR)


def label_map(syntax: UID = ExplicitVRLittleEndian) -> Dataset:
    """As many elements as decoding needs."""
    ds = an_object(LABEL_MAP_STORAGE, LABELMAP)
    ds.Rows = ds.Columns = 8
    ds.NumberOfFrames, ds.SamplesPerPixel = 2, 1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.PixelData = np.arange(128, dtype=np.uint8).tobytes()
    ds["PixelData"].VR = "OB"
    if syntax == RLELossless:
        ds.compress(RLELossless, generate_instance_uid=False)
    return ds


@pytest.mark.parametrize(
    ("taken", "arrives_as"), [(ComprehensiveSRStorage, "SR_COMPREHENSIVE"), (EnhancedSRStorage, "SR_ENHANCED")]
)
def test_a_report_goes_in_the_class_that_is_taken(
    store: Store, tmp_path: Path, send: Send, record: Dataset, taken: UID, arrives_as: str, tool: Callable[..., str]
) -> None:
    produce(store, tmp_path, ["pacs"], [("SR", record)])
    with an_archive([taken]) as pacs:
        told = dict(send(pacs.destination()))
    assert told.pop(arrives_as) is SENT
    assert set(told.values()) == {LEFT_OUT}
    (arrived,) = pacs.taken
    assert (arrived.SOPClassUID, arrived.StudyInstanceUID) == (taken, record.StudyInstanceUID)
    assert arrived.ContentSequence == record.ContentSequence
    assert arrived.SOPInstanceUID != record.SOPInstanceUID
    assert store.is_result(arrived.SOPInstanceUID), "the door knows it when it comes back"
    row = store.deliveries_of(1)[0]
    assert row.last_error == (
        "pacs: does not accept Comprehensive 3D SR Storage as Explicit VR Little Endian, "
        "Implicit VR Little Endian; allow this SOP class there; "
        "SR_COMPREHENSIVE goes in its place"
    )
    path = tmp_path / f"{arrives_as.lower()}.dcm"
    judged = subprocess.run([tool("dciodvfy", "dicom3tools"), path], capture_output=True, check=False)
    assert b"Error" not in judged.stderr, judged.stderr.decode()


def test_a_resend_asks_for_the_first_form_again(store: Store, tmp_path: Path, send: Send, record: Dataset) -> None:
    produce(store, tmp_path, ["pacs"], [("SR", record)])
    with an_archive([ComprehensiveSRStorage]) as pacs:
        send(pacs.destination())
        store.resend(STUDY, None, T0)
        assert send(pacs.destination()) == [("SR", LEFT_OUT), ("SR_COMPREHENSIVE", SENT)]
        assert len(set(pacs.uids)) == 1, "the very same object"
        assert len(pacs.uids) == 2
    store.resend(STUDY, None, T0)
    with an_archive([Comprehensive3DSRStorage, ComprehensiveSRStorage]) as pacs:
        assert send(pacs.destination()) == [("SR", SENT), ("SR_COMPREHENSIVE", LEFT_OUT)]
        assert pacs.uids == [record.SOPInstanceUID]


def test_a_report_with_3d_coordinates_is_not_bent(store: Store, tmp_path: Path, send: Send) -> None:
    report = an_object(Comprehensive3DSRStorage, SR)
    item = Dataset()
    item.ValueType = "SCOORD3D"
    report.ContentSequence = [item]
    produce(store, tmp_path, ["pacs"], [("SR", report)])
    with an_archive([ComprehensiveSRStorage]) as pacs:
        assert send(pacs.destination()) == [("SR", GAVE_UP)]
        assert pacs.taken == []
    assert str(store.deliveries_of(1)[0].last_error).endswith(
        "in no other form: it has content that only a Comprehensive 3D SR can have"
    )


def test_where_no_label_map_is_taken_the_binary_segmentation_goes(store: Store, tmp_path: Path, send: Send) -> None:
    both = [("SEG", an_object(SegmentationStorage, SEG)), ("LABELMAP", label_map(RLELossless))]
    produce(store, tmp_path, ["pacs"], both)
    with an_archive([SegmentationStorage]) as pacs:
        for _ in range(2):
            assert send(pacs.destination(seg="labelmap")) == [("SEG", SENT), ("LABELMAP", LEFT_OUT)]
            assert set(pacs.uids) == {SEG}
            store.resend(STUDY, None, T0)
    told = "does not accept Label Map Segmentation Storage (1.2.840.10008.5.1.4.1.1.66.7) as RLE Lossless, Explicit VR"
    assert told in str([event.detail for event in store.events_of(STUDY)])


def test_a_status_that_says_the_same_as_a_refused_context_counts_as_one(
    store: Store, tmp_path: Path, send: Send, record: Dataset
) -> None:
    produce(store, tmp_path, ["pacs"], [("SR", record)])
    with an_archive([Comprehensive3DSRStorage, ComprehensiveSRStorage]) as pacs:
        pacs.statuses = {record.SOPInstanceUID: 0x0122}
        assert send(pacs.destination()) == [("SR", LEFT_OUT), ("SR_COMPREHENSIVE", SENT)]


def test_what_is_compressed_goes_uncompressed_where_only_that_is_taken(
    store: Store, tmp_path: Path, send: Send
) -> None:
    produce(store, tmp_path, ["pacs"], [("LABELMAP", label_map(RLELossless))])
    with an_archive([LABEL_MAP_STORAGE]) as pacs:
        assert send(pacs.destination(seg="labelmap")) == [("LABELMAP", SENT)]
    (arrived,) = pacs.taken
    assert arrived.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert arrived.SOPInstanceUID == LABELMAP
    assert arrived.PixelData == label_map().PixelData
    assert store.deliveries_of(1)[0].last_error == "sent as Explicit VR Little Endian"


def test_what_is_taken_compressed_goes_as_it_is(store: Store, tmp_path: Path, send: Send) -> None:
    produce(store, tmp_path, ["pacs"], [("LABELMAP", label_map(RLELossless))])
    with an_archive([LABEL_MAP_STORAGE], syntaxes=[RLELossless]) as pacs:
        assert send(pacs.destination(seg="labelmap")) == [("LABELMAP", SENT)]
    (arrived,) = pacs.taken
    assert arrived == pydicom.dcmread(tmp_path / "LABELMAP.dcm")


def test_the_forms_are_kinds_that_are_made_and_fit_their_column() -> None:
    made = {kind.value for kind in Kind}
    assert set(outgoing.NEXT_FORM) | set(outgoing.NEXT_FORM.values()) <= made | set(outgoing.REPORT_FORMS)
    assert max(map(len, outgoing.REPORT_FORMS)) <= 16
