"""Whether two files hold one and the same instance, each in an encoding of its own without loss.

Asked only where an instance comes again with other bytes: an archive that sends today in RLE or JPEG-LS what it sent
uncompressed before contradicts nothing. Data sets are compared element by element as Little Endian has them, pixels as
they decode; only how the pixels are encoded may differ. Decoders are others' code in C: they run in a process of their
own (this module, run), which may die of what it reads without taking the door with it.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import weakref
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Final

import pydicom
from pydicom.charset import default_encoding
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_file_meta_info, read_sequence
from pydicom.filewriter import write_data_element
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from salsa_node.damage import DAMAGED

MOST_BYTES: Final = 256 << 20  #: of a file, of what is inflated from it, and of its decoded pixels
_ANSWER_S: Final = 30.0  # for one comparison; what takes longer is not the same
_IDLE_S: Final = 60.0  # then the process ends; the next question starts another
_ADDRESS_BYTES: Final = 4 << 30  # that the process may ever have
_LOSSLESS: Final = frozenset(
    (
        *(ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian),
        *(RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless),
        *(JPEG2000Lossless, HTJ2KLossless, HTJ2KLosslessRPCL),
    )
)
_PIXELS: Final = 0x7FE00010
_PLANAR_CONFIGURATION: Final = 0x00280006
_PHOTOMETRIC_INTERPRETATION: Final = 0x00280004
_DERIVATION: Final = frozenset((0x00082111, 0x00089215))  # which DCMTK gives what it compresses without loss
#: what says only how the pixels are encoded, beside Photometric Interpretation, or only fills (PS3.5 8.2, PS3.10 7.2)
_ENCODING: Final = frozenset((_PIXELS, 0x7FE00001, 0x7FE00002, 0x7FE00003, _PLANAR_CONFIGURATION, 0xFFFCFFFC))
_WORD_BYTES: Final = (
    dict.fromkeys(("AT", "OW", "SS", "US"), 2)
    | dict.fromkeys(("FL", "OF", "OL", "SL", "UL"), 4)
    | dict.fromkeys(("FD", "OD", "OV", "SV", "UV"), 8)
)
_TEXTS: Final = frozenset(
    ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
)


class Comparison:
    """Asks a process of its own whether files hold the same instance; one question at a time, whoever asks."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: Callable[[], object] | None = None

    def is_same(self, one: Path, other: Path) -> bool:
        """As the function of that name; False too where its process dies of the files, or it or its turn takes long."""
        if not self._turn.acquire(timeout=_ANSWER_S):
            return False
        try:
            if self._process is not None and self._process.poll() is not None:
                self._end()  # of idleness, most likely
            answer = self._asked(one, other)
            if answer is None and self._end() == 0:  # of idleness, as it was asked; what files do to it is no zero
                answer = self._asked(one, other)
            if answer is None:
                self._end()
            return bool(answer)
        finally:
            self._turn.release()

    def close(self) -> None:
        """End the process, whatever it is asked now; harmless at any time."""
        while not self._turn.acquire(timeout=0.1):
            process = self._process
            if process is not None:
                process.kill()
        try:
            self._end()
        finally:
            self._turn.release()

    def _asked(self, one: Path, other: Path) -> bool | None:
        """The answer of the process, which is started where there is none; None where it gives none."""
        answer = b""
        with suppress(OSError):  # it cannot be started, or ended
            if self._process is None:
                self._process = _started()
                self._finalizer = weakref.finalize(self, _ended, self._process)  # where nobody closes it
            asks, answers = self._process.stdin, self._process.stdout
            assert asks is not None, "it was asked for"
            assert answers is not None, "it was asked for"
            asks.write(json.dumps([str(one.absolute()), str(other.absolute())]).encode() + b"\n")
            asks.flush()
            coming = select.poll()  # unlike select, of any file descriptor
            coming.register(answers, select.POLLIN)
            if coming.poll(1000 * _ANSWER_S):
                answer = answers.readline()
        return answer == b"true\n" if answer in (b"true\n", b"false\n") else None

    def _end(self) -> int | None:
        """What the process ended with, None where there was none."""
        process = self._process
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None
        return None if process is None else process.returncode


def is_same(one: Path, other: Path) -> bool:
    """Whether both files hold equal data sets and, decoded, equal pixels; False wherever that cannot be told.

    Never raises. Reads and decodes both wholly, up to MOST_BYTES of each; what was compressed with loss is nobody's
    equal.
    """
    try:
        if max(path.stat().st_size for path in (one, other)) > MOST_BYTES:
            return False
        first, again = _read(one), _read(other)
        if first is None or again is None or not _are_equal(first, again):
            return False
        has_pixels = [_PIXELS in ds for ds in (first, again)]
        return has_pixels == [False, False] or (has_pixels == [True, True] and _equal_pixels(first, again))
    except (*DAMAGED, BytesLengthException, InvalidDicomError, MemoryError, RuntimeError):
        return False


def _read(path: Path) -> FileDataset | None:
    """The data set of a file; None where its encoding loses something, or it grows too large."""
    meta = read_file_meta_info(path)
    syntax = meta.get("TransferSyntaxUID")
    if syntax not in _LOSSLESS or (syntax == DeflatedExplicitVRLittleEndian and not _inflates(path)):
        return None
    return pydicom.dcmread(path)


def _inflates(path: Path) -> bool:
    """Whether a deflated data set is no larger than MOST_BYTES."""
    content = path.read_bytes()
    meta_bytes = int.from_bytes(content[140:144], "little")  # File Meta Information Group Length (PS3.10 7.1)
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[144 + meta_bytes :], MOST_BYTES)
    return len(inflated) < MOST_BYTES


def _are_equal(one: Dataset, other: Dataset, passed_over: frozenset[int] = _ENCODING) -> bool:
    """Whether two data sets say the same, but for what is passed over: how pixels are encoded."""
    tags, others = _tags(one) - passed_over, _tags(other) - passed_over
    return tags ^ others <= _DERIVATION and all(_same_element(one, other, tag) for tag in tags & others)


def _tags(ds: Dataset) -> set[int]:
    tags = ds.keys()
    return {int(tag) for tag in tags if tag.element}  # a group length's element is 0


def _same_element(one: Dataset, other: Dataset, tag: int) -> bool:
    if tag == _PHOTOMETRIC_INTERPRETATION:
        return _colours(one) == _colours(other)
    mine, theirs = one.get_item(tag), other.get_item(tag)
    vrs = {_vr(mine), _vr(theirs)} - {"UN", None}  # Implicit VR names none, and others give what they do not know UN
    if "SQ" in vrs:
        items, others = _items(one, tag), _items(other, tag)
        return len(items) == len(others) and all(
            _are_equal(*pair, passed_over=frozenset())  # the pixels of an icon are compared as they are
            for pair in zip(items, others, strict=True)
        )
    if len(vrs) > 1:
        return False
    if not vrs and dictionary_has_tag(tag):
        vrs = {dictionary_VR(tag)}
    is_text = bool(vrs) and vrs <= _TEXTS  # only there is what is at the end no more than padding
    return _plain(mine, one, is_text) == _plain(theirs, other, is_text)


_Element = DataElement | RawDataElement | None


def _vr(element: _Element) -> str | None:
    if element is None or element.VR:
        return None if element is None else str(element.VR)
    return "SQ" if dictionary_has_tag(element.tag) and dictionary_VR(element.tag) == "SQ" else None


def _colours(ds: Dataset) -> str:
    """YBR_RCT is how JPEG 2000 Lossless keeps RGB, and decodes to it (PS3.5 8.2.4)."""
    named = str(ds.PhotometricInterpretation)
    return "RGB" if named == "YBR_RCT" else named


def _items(ds: Dataset, tag: int) -> list[Dataset]:
    """The items of a sequence; what came as UN is Implicit VR Little Endian (PS3.5 6.2.2). Raises one of DAMAGED."""
    element = ds[tag]
    if element.VR == "SQ":
        return list(element.value)
    content = bytes(element.value)
    return list(read_sequence(BytesIO(content), True, True, len(content), default_encoding))


def _plain(element: _Element, ds: Dataset, is_text: bool) -> bytes:
    """The value as Little Endian has it, without the padding of a text (PS3.5 6.2)."""
    assert element is not None, "only what is there is compared"
    if element.is_raw:
        content = bytes(element.value or b"")
        width = 1 if ds.original_encoding[1] is not False else _WORD_BYTES.get(str(element.VR), 1)
        words = [content[n : n + width][::-1] for n in range(0, len(content), width)] if width > 1 else [content]
        content = b"".join(words)
    else:
        stream = DicomBytesIO()
        stream.is_little_endian, stream.is_implicit_VR = True, True
        write_data_element(stream, element, default_encoding)  # of no text: what is read is raw but for sequences
        content = stream.getvalue()[8:]
    return content.rstrip(b"\0 ") if is_text else content


def _equal_pixels(one: FileDataset, other: FileDataset) -> bool:
    """Whether the pixels are equal, with what lies above Bits Stored in those that are not compressed."""
    for ds in (one, other):
        samples = int(ds.Rows) * int(ds.Columns) * int(ds.get("SamplesPerPixel") or 1)
        if samples * int(ds.get("NumberOfFrames") or 1) * int(ds.BitsAllocated) > 8 * MOST_BYTES:
            return False
        ds.pixel_array_options(raw=True)
    native = [ds for ds in (one, other) if not ds.file_meta.TransferSyntaxUID.is_encapsulated]
    if len(native) == 2:
        return _plain(one.get_item(_PIXELS), one, False) == _plain(other.get_item(_PIXELS), other, False)
    if any(_has_more_than_pixels(ds) for ds in native):
        return False
    import numpy as np  # late: the door imports this room, and asks it hardly ever

    return np.array_equal(one.pixel_array, other.pixel_array)


def _has_more_than_pixels(ds: Dataset) -> bool:
    """Whether something lies above Bits Stored, as overlays once did: decoding and compression let it go."""
    import numpy as np  # late, as above

    stored, allocated = int(ds.BitsStored), int(ds.BitsAllocated)
    if stored == allocated:
        return False
    words = np.frombuffer(_plain(ds.get_item(_PIXELS), ds, False), f"<u{allocated // 8}")
    above = words >> stored
    if not ds.PixelRepresentation:
        return bool(above.any())
    extended = np.where(words >> (stored - 1) & 1, (1 << allocated - stored) - 1, 0)
    return not np.array_equal(above, extended)


def _started() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "salsa_node.transcoding"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )


def _ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(OSError):  # what was written to it and not read
        process.communicate()


def _answer() -> None:
    """The process: a line with two paths comes, a line with the answer goes; it ends with who asks, or idle."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    while select.select([sys.stdin], [], [], _IDLE_S)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        signal.alarm(int(_ANSWER_S) + 1)  # where whoever asked is gone, and the files hold it up
        one, other = (Path(name) for name in json.loads(line))
        sys.stdout.write(f"{json.dumps(is_same(one, other))}\n")
        sys.stdout.flush()
        signal.alarm(0)


if __name__ == "__main__":
    _answer()
