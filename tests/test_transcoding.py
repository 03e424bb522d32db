"""The same instance in another encoding without loss is a duplicate; whatever else differs is a contradiction."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from test_listener import a_slice, associated, kept
from told import events

from salsa_node import transcoding
from salsa_node.instance_header import CONTENT_CONFLICT, SUCCESS
from salsa_node.listener import Listener
from salsa_node.settings import ListenerSettings
from salsa_node.store import Store
from salsa_node.transcoding import Comparison, is_same

T0 = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
PRIVATE = 0x00090010
Tool = Callable[[str], str]
#: how DCMTK is asked for each encoding, and whether it is the same image still
ENCODINGS = {
    ImplicitVRLittleEndian: (["dcmconv", "+ti"], True),
    ExplicitVRBigEndian: (["dcmconv", "+tb"], True),
    DeflatedExplicitVRLittleEndian: (["dcmconv", "+td"], True),
    RLELossless: (["dcmcrle"], True),
    JPEGLSLossless: (["dcmcjpls"], True),
    JPEGLosslessSV1: (["dcmcjpeg"], True),
    JPEGLSNearLossless: (["dcmcjpls", "+en", "+un"], False),
}


@pytest.fixture
def image(tmp_path: Path) -> Dataset:
    """A CT image with a sequence, a private block and words in Little Endian that are no pixels."""
    inner = Dataset()
    inner.ReferencedSOPClassUID, inner.ReferencedSOPInstanceUID = CTImageStorage, "1.2.3.9"
    ds = a_slice(PixelData=np.arange(1024, dtype="<i2").tobytes())
    ds.ReferencedImageSequence = Sequence([inner])
    ds.Rows = ds.Columns = 32
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0
    ds.ImagePositionPatient, ds.WindowCenter = [0.5, -3, 7], "40"
    block = ds.private_block(0x0009, "MADE UP", create=True)
    block.add_new(1, "LO", "odd")
    block.add_new(2, "US", [1, 2])
    ds.add_new(0x00281201, "OW", b"\1\2\3\4")
    return ds


def written(ds: Dataset, path: Path) -> Path:
    ds.save_as(path, enforce_file_format=True)
    return path


def in_encoding(tool: Tool, source: Path, syntax: str) -> Path:
    program, *how = ENCODINGS[syntax][0]
    path = source.with_name(f"{source.stem}-{syntax}.dcm")
    subprocess.run([tool(program), *how, source, path], check=True, capture_output=True)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    return path


@pytest.mark.parametrize("syntax", ENCODINGS)
def test_an_image_is_itself_in_every_encoding_without_loss(
    image: Dataset, tmp_path: Path, tool: Tool, syntax: str
) -> None:
    first = written(image, tmp_path / "first.dcm")
    again = in_encoding(tool, first, syntax)
    assert (is_same(first, again), is_same(again, first)) == (ENCODINGS[syntax][1],) * 2
    image.PixelData = image.PixelData[:-2] + b"\0\1"  # one pixel
    other = in_encoding(tool, written(image, tmp_path / "other.dcm"), syntax)
    assert not is_same(first, other)


@pytest.mark.parametrize(
    "change",
    [
        {"PatientID": "ANOTHER"},
        {"WindowCenter": "41"},
        {"ImagePositionPatient": [0.5, -3, 7.1]},
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"BitsStored": 13},
        {"ReferencedImageSequence": Sequence()},
        {"StudyTime": "101010"},
        {"PixelData": None},
        {PRIVATE + 0x0FF1: ("LO", "even")},
        {PRIVATE + 0x0FF2: ("US", [1, 3])},
        {0x00281201: ("OW", b"\1\2\4\3")},
    ],
    ids=str,
)
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_what_differs_in_anything_but_the_encoding_is_another(
    image: Dataset, tmp_path: Path, tool: Tool, syntax: str, change: dict[str | int, object]
) -> None:
    first = written(image, tmp_path / "first.dcm")
    for where, value in change.items():
        if isinstance(where, int):
            image.add_new(where, *value)  # type: ignore[misc]
        elif value is None:
            delattr(image, where)
        else:
            setattr(image, where, value)
    assert not is_same(first, in_encoding(tool, written(image, tmp_path / "other.dcm"), syntax))


def icon(content: bytes) -> Sequence:
    inner = Dataset()
    inner.Rows = inner.Columns = 2
    inner.add_new(0x7FE00010, "OW", content)
    return Sequence([inner])


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize(
    ("tag", "vr", "value", "other"),
    [
        (0x00280120, "US", 0, 0x2020),  # Pixel Padding Value: bytes with which a text is padded
        (0x60003000, "OW", b"\1\2\0\0", b"\1\2"),  # an overlay
        (PRIVATE + 0x0FF3, "OB", b"\1\2", b"\1\2  "),
        (0x00880200, "SQ", icon(b"\1" * 8), icon(b"\2" * 8)),
    ],
    ids=["number", "overlay", "private", "icon"],
)
def test_words_that_look_like_padding_and_the_pixels_of_an_icon_are_compared(
    image: Dataset, tmp_path: Path, syntax: UID, tag: int, vr: str, value: object, other: object
) -> None:
    files = []
    for n, each in enumerate((value, other)):
        image.add_new(tag, vr, each)
        image.file_meta.TransferSyntaxUID = syntax
        files.append(written(image, tmp_path / f"{n}.dcm"))
    assert is_same(files[0], files[0])
    assert not is_same(*files)


def test_what_lies_above_the_stored_bits_is_not_let_go(image: Dataset, tmp_path: Path, tool: Tool) -> None:
    plain = written(image, tmp_path / "plain.dcm")
    packed = in_encoding(tool, plain, JPEGLSLossless)
    image.PixelData = b"\0\xf0" + image.PixelData[2:]  # an overlay in the bits that no pixel needs (retired)
    above = written(image, tmp_path / "above.dcm")
    assert is_same(packed, plain)
    assert not is_same(above, plain)
    assert not is_same(above, packed)
    image.PixelRepresentation = 1
    image.PixelData = b"\xff\xff" + image.PixelData[2:]  # -1
    below = written(image, tmp_path / "below.dcm")
    assert is_same(below, in_encoding(tool, below, RLELossless))


def test_one_image_in_all_the_syntaxes_of_the_test_set(testdata: Path) -> None:
    files = sorted((testdata / "07_ct_one_image_all_syntaxes").glob("CTImage.dcm_*"))
    plain = next(file for file in files if pydicom.dcmread(file).file_meta.TransferSyntaxUID == ExplicitVRLittleEndian)
    same = {pydicom.dcmread(file).file_meta.TransferSyntaxUID.name for file in files if is_same(plain, file)}
    assert len(same) >= 5
    assert all("Lossy" not in name and "Near" not in name and "Baseline" not in name for name in same), same


def test_what_cannot_be_read_or_grows_beyond_measure_is_nobody_s_equal(
    image: Dataset, tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    image.PixelData = bytes(8192)
    image.Rows, image.Columns = 64, 64
    plain = written(image, tmp_path / "plain.dcm")
    deflated = in_encoding(tool, plain, DeflatedExplicitVRLittleEndian)
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(deflated.read_bytes()[:-40])
    noise = tmp_path / "noise.dcm"
    noise.write_bytes(b"no DICOM at all")
    assert [is_same(plain, path) for path in (deflated, cut, noise, tmp_path / "gone.dcm")] == [True] + [False] * 3
    image.Rows = image.Columns = 65535  # says more pixels than it has, or than may be decoded
    many = [written(image, tmp_path / f"many-{n}.dcm") for n in range(2)]
    assert not is_same(*many)
    monkeypatch.setattr(transcoding, "MOST_BYTES", 8192)  # the pixels alone, so that the data set is beyond it
    assert deflated.stat().st_size < 8192
    assert not is_same(deflated, deflated)


@pytest.fixture
def comparison() -> Iterator[Comparison]:
    comparison = Comparison()
    yield comparison
    comparison.close()


def test_a_process_that_dies_of_a_file_costs_an_answer_and_no_more(
    image: Dataset, tmp_path: Path, tool: Tool, comparison: Comparison
) -> None:
    first = written(image, tmp_path / "first.dcm")
    again = in_encoding(tool, first, RLELossless)
    assert comparison.is_same(first, again)
    assert comparison._process is not None
    comparison._process.kill()
    comparison._process.wait()
    assert comparison.is_same(first, again), "another one answers"
    assert not comparison.is_same(first, tmp_path / "gone.dcm")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that were started."""
    processes: list[subprocess.Popen[bytes]] = []
    start = transcoding._started

    def noted() -> subprocess.Popen[bytes]:
        processes.append(start())
        return processes[-1]

    monkeypatch.setattr(transcoding, "_started", noted)
    return processes


def without_end(path: Path) -> Path:
    """A file that nobody ever reads to its end."""
    os.mkfifo(path)
    return path


def test_files_that_hold_it_up_are_asked_about_once_and_hold_up_nobody_else(
    image: Dataset, tmp_path: Path, comparison: Comparison, started: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, endless = written(image, tmp_path / "first.dcm"), without_end(tmp_path / "endless.dcm")
    assert comparison.is_same(first, first)
    monkeypatch.setattr(transcoding, "_ANSWER_S", 0.2)
    assert not comparison.is_same(first, endless)
    assert len(started) == 1
    with comparison._turn:
        assert not comparison.is_same(first, first), "its turn does not come"


def test_closing_ends_a_question_that_is_held_up(
    tmp_path: Path, comparison: Comparison, started: list[subprocess.Popen[bytes]]
) -> None:
    endless = without_end(tmp_path / "endless.dcm")
    asking = threading.Thread(target=comparison.is_same, args=(endless, endless), daemon=True)
    asking.start()
    while not started:
        asking.join(0.01)
    comparison.close()
    asking.join(10)
    assert not asking.is_alive()
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_process_that_nobody_waits_for_ends_though_its_files_hold_it_up(tmp_path: Path) -> None:
    code = "from salsa_node import transcoding; transcoding._ANSWER_S = 0; transcoding._answer()"
    asked = [sys.executable, "-c", code]
    endless = str(without_end(tmp_path / "endless.dcm"))
    with subprocess.Popen(asked, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps([endless] * 2).encode() + b"\n")
        process.stdin.flush()
        try:
            assert process.wait(60) == -signal.SIGALRM
        finally:
            process.kill()


def test_where_no_process_can_be_started_nothing_is_the_same(
    image: Dataset, tmp_path: Path, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left() -> subprocess.Popen[bytes]:
        raise BlockingIOError

    monkeypatch.setattr(transcoding, "_started", none_left)
    first = written(image, tmp_path / "first.dcm")
    assert not comparison.is_same(first, first)


@pytest.mark.parametrize("fast", [True, False])
def test_the_door_takes_a_transcoded_copy_for_a_duplicate_and_keeps_the_first(
    image: Dataset, store: Store, data_dir: Path, tmp_path: Path, tool: Tool, fast: bool
) -> None:
    first = written(image, tmp_path / "first.dcm")
    settings = ListenerSettings(port=0, min_free_gib=0.0, fast=fast)
    with Listener(settings, store, data_dir, clock=lambda: T0) as door:

        def sent(path: Path) -> int:
            ds = pydicom.dcmread(path)
            with associated(door.port, (CTImageStorage, ds.file_meta.TransferSyntaxUID)) as assoc:
                return int(assoc.send_c_store(ds).Status)

        copies = [in_encoding(tool, first, syntax) for syntax in (RLELossless, ImplicitVRLittleEndian)]
        assert [sent(path) for path in (first, *copies)] == [SUCCESS] * 3
        assert sent(in_encoding(tool, first, JPEGLSNearLossless)) == CONTENT_CONFLICT
        image.PixelData = bytes(len(image.PixelData))
        other = written(image, tmp_path / "other.dcm")
        assert sent(in_encoding(tool, other, RLELossless)) == CONTENT_CONFLICT
    [row] = store.instances_of("1.2.3")
    assert row.transfer_syntax_uid == ExplicitVRLittleEndian
    assert [path for path in kept(data_dir) if path.startswith("studies/")] == [row.path]
    assert pydicom.dcmread(data_dir / row.path).PixelData == pydicom.dcmread(first).PixelData
    assert store.series_of("1.2.3")[0].duplicates == 2
    assert [event.name for event in events(store)].count("series.duplicate") == 1
    assert len(store.quarantined()) == 2
    assert not list((data_dir / "incoming").iterdir())
