"""The stored values of one image, compressed ones by decoders that let other threads work meanwhile.

They are exactly what pydicom's `pixel_array` gives. It is asked itself where an image is not plainly in order: another
size or sample width than its header declares, several frames, a code stream without its end, one that the decoder
refuses; its word is then final. (GDCM, which decodes for pydicom, keeps all other threads waiting meanwhile.)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.encaps import generate_frames
from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from salsa_node.damage import DAMAGED

Stored = npt.NDArray[np.int16] | npt.NDArray[np.uint16]

_SOI: Final = b"\xff\xd8"  # ITU-T T.81 table B.1, and T.87 for JPEG-LS
_SOF_LOSSLESS, _SOF_JPEG_LS, _DHT, _SOS, _EOI = 0xC3, 0xF7, 0xC4, 0xDA, b"\xff\xd9"
_MARKER_IN_JPEG: Final = re.compile(rb"\xff[^\x00\xff]")  # T.81 F.1.2.3: a zero follows an FF that is none
_MARKER_IN_JPEG_LS: Final = re.compile(rb"\xff[\x80-\xfe]")  # T.87 A.1: a zero bit does
_TAIL: Final = 16  # bytes in which the last marker must lie: some writers pad by more than one
_SOC_SIZ: Final = b"\xff\x4f\xff\x51"  # ITU-T T.800 A.4.1 and A.5.1
_SOT: Final = b"\xff\x90"  # and A.4.2
_JPEG: Final = (JPEGLossless, JPEGLosslessSV1)
_JPEG_LS: Final = (JPEGLSLossless, JPEGLSNearLossless)
_JPEG_2000: Final = (JPEG2000Lossless, JPEG2000)


@dataclass(frozen=True, slots=True)
class _CodeStream:
    """What a code stream says about itself. shape: (rows, columns). precision: bits of a sample."""

    shape: tuple[int, int]
    precision: int
    signed: bool = False


@dataclass(frozen=True, slots=True)
class _Jpeg:
    """The parts of a code stream of JPEG or JPEG-LS; bits: of its only scan, without the zeros stuffed in."""

    stream: _CodeStream
    tables: Sequence[bytes]
    scan_header: bytes
    bits: int


def stored_values(ds: pydicom.Dataset) -> npt.NDArray[Any]:
    """What `ds.pixel_array` gives; raises what that raises.

    In JPEG-LS only GDCM is asked after us: the other decoder that pydicom knows never comes back from a code stream
    that was cut off.
    """
    values = quickly(ds)
    if values is not None:
        return values
    if ds.file_meta.get("TransferSyntaxUID") in _JPEG_LS:
        ds.pixel_array_options(decoding_plugin="gdcm")
    return ds.pixel_array


def quickly(ds: pydicom.Dataset) -> Stored | None:
    """(rows, columns) before rescale; None where pydicom has to look."""
    try:
        syntax = ds.file_meta.TransferSyntaxUID
        shape = (int(ds.Rows), int(ds.Columns))
        plain = (
            syntax in _DECODERS
            and int(ds.get("NumberOfFrames") or 1) == 1
            and ds.SamplesPerPixel == 1
            and ds.PhotometricInterpretation in ("MONOCHROME1", "MONOCHROME2")
            and ds.BitsAllocated == 16
            and 8 < ds.BitsStored <= 16
            and ds.PixelRepresentation in (0, 1)
            and "ExtendedOffsetTable" not in ds
        )
        if not plain:
            return None
        [frame] = islice(generate_frames(ds.PixelData, number_of_frames=1), 2)
        stream, decoded = _DECODERS[syntax](frame, shape)
    except (*DAMAGED, RuntimeError):  # imagecodecs' errors are RuntimeErrors
        return None
    if decoded.shape != shape or decoded.dtype.itemsize != 2:
        return None
    values: Stored = decoded.view(np.int16) if ds.PixelRepresentation else decoded.view(np.uint16)
    unused = 16 - _bits_of_a_value(ds, stream)
    if unused:
        values = np.left_shift(values, unused, dtype=values.dtype)
        np.right_shift(values, unused, out=values)
    return values


def _bits_of_a_value(ds: pydicom.Dataset, stream: _CodeStream) -> int:
    """Those above are none of it, where pydicom says so: where a sign may be lost, else as the header tells."""
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax in _JPEG_2000:
        return stream.precision if stream.signed != bool(ds.PixelRepresentation) else 16
    if syntax in _JPEG_LS:
        return stream.precision if ds.PixelRepresentation else 16
    return int(ds.BitsStored)


def _jpeg_lossless(frame: bytes, shape: tuple[int, int]) -> tuple[_CodeStream, npt.NDArray[Any]]:
    """Left to pydicom too: other predictors than the sample before, and code that is not as long as its values need.

    Of damaged code both decoders make an image as a rule, but GDCM refuses some of it; the length tells nearly all.
    """
    from imagecodecs import jpeg8_decode

    jpeg = _jpeg(frame, _SOF_LOSSLESS)
    _check(jpeg.stream, shape)
    components, _, tables, predictor, _, transform = jpeg.scan_header  # T.81 B.2.3
    if (components, predictor, transform) != (1, 1, 0):
        raise ValueError("another predictor, or shifted values")
    decoded = jpeg8_decode(frame)
    needed = int(_differences(decoded, jpeg.stream.precision) @ _bits_of_a_difference(jpeg.tables, tables >> 4))
    if not needed <= jpeg.bits < needed + 8:
        raise ValueError("a code of another length")
    return jpeg.stream, decoded


def _differences(values: npt.NDArray[Any], precision: int) -> npt.NDArray[np.int64]:
    """How many differences from the sample before have 0, 1, ... 16 bits (ITU-T T.81 H.1.2.1 and table H.2)."""
    values = values.view(np.uint16)
    difference = np.empty_like(values)  # modulo 65536
    np.subtract(values[:, 1:], values[:, :-1], out=difference[:, 1:])
    np.subtract(values[1:, 0], values[:-1, 0], out=difference[1:, 0])
    difference[0, 0] = (int(values[0, 0]) - (1 << precision - 1)) % (1 << 16)
    size = np.abs(difference.view(np.int16)).view(np.uint16)
    with_more = [np.count_nonzero(size >= 1 << bits) for bits in range(16)]
    return -np.diff([values.size, *with_more, 0])


def _bits_of_a_difference(tables: Sequence[bytes], which: int) -> npt.NDArray[np.int64]:
    """What one difference of 0, 1, ... 16 bits takes, with its Huffman code (ITU-T T.81 B.2.4.2, H.1.2.2)."""
    bits = np.full(17, 1 << 32)  # of those that have no code
    for table in tables:
        counts, symbols = table[1:17], table[17:]
        if table[0] == which and sum(counts) == len(symbols):
            lengths = np.repeat(np.arange(1, 17), list(counts))
            for symbol, length in zip(symbols, lengths, strict=True):
                bits[symbol] = length + (symbol if symbol < 16 else 0)
    return bits


def _jpeg_ls(frame: bytes, shape: tuple[int, int]) -> tuple[_CodeStream, npt.NDArray[Any]]:
    from imagecodecs import jpegls_decode

    jpeg = _jpeg(frame, _SOF_JPEG_LS)
    _check(jpeg.stream, shape)
    components, _, mapping, _, interleave, transform = jpeg.scan_header  # T.87 C.2.3
    if (components, mapping, interleave, transform) != (1, 0, 0, 0):
        raise ValueError("mapped or shifted values")
    return jpeg.stream, jpegls_decode(frame)


def _jpeg_2000(frame: bytes, shape: tuple[int, int]) -> tuple[_CodeStream, npt.NDArray[Any]]:
    from imagecodecs import jpeg2k_decode

    stream = _jpeg_2000_header(frame)
    _check(stream, shape)
    return stream, jpeg2k_decode(frame, numthreads=1)


def _rle(frame: bytes, shape: tuple[int, int]) -> tuple[_CodeStream, npt.NDArray[Any]]:
    from imagecodecs import dicomrle_decode

    offsets = [int(n) for n in np.frombuffer(frame[:64], "<u4")]  # PS3.5 G.5
    [segments, high, low], rest = offsets[:3], offsets[3:]
    if segments != 2 or any(rest) or not all(a < b for a, b in pairwise((63, high, low, len(frame)))):
        raise ValueError("not the two segments of 16 bits")
    decoded = np.frombuffer(dicomrle_decode(frame, "<u2"), np.dtype("<u2"))
    return _CodeStream(shape, 16), decoded.reshape(shape)


_DECODERS: Final[
    Mapping[str, Callable[[bytes, tuple[int, int]], tuple[_CodeStream, npt.NDArray[Any]]]]
] = {
    **dict.fromkeys(_JPEG, _jpeg_lossless),
    **dict.fromkeys(_JPEG_LS, _jpeg_ls),
    **dict.fromkeys(_JPEG_2000, _jpeg_2000),
    RLELossless: _rle,
}  # fmt: skip


def _check(stream: _CodeStream, shape: tuple[int, int]) -> None:
    """Before anything is decoded: a damaged size would have the decoder ask for any amount of memory."""
    if stream.shape != shape or not 8 < stream.precision <= 16:
        raise ValueError("another image than declared")


def _jpeg(frame: bytes, start_of_frame: int) -> _Jpeg:
    """Of JPEG and JPEG-LS: one frame header, of that kind, with one component, and one scan that goes on to the end."""
    if frame[:2] != _SOI:
        raise ValueError("no code stream")
    segments: list[tuple[int, bytes]] = []
    marker, at = 0, 2
    while marker != _SOS:
        lead, marker = frame[at : at + 2]
        length = int.from_bytes(frame[at + 2 : at + 4])
        if lead != 0xFF or length < 2:
            raise ValueError("no marker segment where one is due")
        segments.append((marker, frame[at + 4 : at + 2 + length]))
        at += 2 + length
    end = (_MARKER_IN_JPEG if start_of_frame == _SOF_LOSSLESS else _MARKER_IN_JPEG_LS).search(frame, at)
    if end is None or end.group() != _EOI or len(frame) - end.start() > _TAIL:
        raise ValueError("no single scan that ends")
    [header] = [content for marker, content in segments if marker == start_of_frame]
    precision, rows, columns, components = struct.unpack_from(">BHHB", header)
    if components != 1:
        raise ValueError("several components")
    bits = 8 * (end.start() - at - frame.count(b"\xff\0", at, end.start()))
    tables = [content for marker, content in segments if marker == _DHT]
    return _Jpeg(_CodeStream((rows, columns), precision), tables, segments[-1][1], bits)


def _jpeg_2000_header(frame: bytes) -> _CodeStream:
    """From the SIZ marker segment of a bare code stream, one component, one sample a pixel (ITU-T T.800 A.5.1)."""
    if frame[:4] != _SOC_SIZ:
        raise ValueError("no code stream")
    _check_tile_parts(frame)
    right, bottom, left, top = (int.from_bytes(frame[at : at + 4]) for at in (8, 12, 16, 20))
    components, depth, step = int.from_bytes(frame[40:42]), frame[42], frame[43:45]
    if (components, step, left, top) != (1, b"\1\1", 0, 0):
        raise ValueError("not one component from the origin on")
    return _CodeStream((bottom, right), (depth & 0x7F) + 1, bool(depth & 0x80))


def _check_tile_parts(frame: bytes) -> None:
    """Left to pydicom: a code stream whose tile-parts are not as long as they say (ITU-T T.800 A.4.2, A.4.4).

    GDCM refuses what lost or gained a byte; our decoder makes an image of it. A last tile-part may also say nothing.
    """
    at = 2
    while frame[at : at + 2] != _SOT:
        length = int.from_bytes(frame[at + 2 : at + 4])
        if frame[at : at + 1] != b"\xff" or length < 2:
            raise ValueError("no marker segment where one is due")
        at += 2 + length
    while frame[at : at + 2] == _SOT:
        length = int.from_bytes(frame[at + 6 : at + 10])
        if length < 14:
            raise ValueError("a tile-part of no known length")
        at += length
    if frame[at : at + 2] != _EOI or len(frame) - at > _TAIL:
        raise ValueError("tile-parts that do not end where the code stream does")
