"""A CT image as it lies in its file: the header values that a volume needs, and uncompressed pixels in one read.

Only what is plainly in order is read here, some forty times faster than a general reader does it. For
whatever is odd or damaged, `read_header` returns None, and `series` asks pydicom, whose word is final.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from math import isfinite
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

PADDING_HU: Final = -1024  #: what Pixel Padding Value becomes: air, as scanners write outside the circle they image

_FIRST_BYTES, _MOST_BYTES = 16 * 1024, 1024 * 1024  # of a file, searched for the beginning of Pixel Data
_UNDEFINED: Final = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE | element << 16 for element in (0xE000, 0xE00D, 0xE0DD))
_EXPLICIT = struct.Struct("<I2sH")
_IMPLICIT = struct.Struct("<II")
_LONG = struct.Struct("<I")
_SHORT_VRS: Final = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG_VRS: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())

_COMPRESSED: Final = frozenset(
    (JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless, JPEG2000Lossless, JPEG2000, RLELossless)
)

# The first four bytes of an element read as one little-endian number: the group below, the element above.
_WANTED: Final[Mapping[int, tuple[str, bytes]]] = {
    group | element << 16: (keyword, vr)
    for group, element, keyword, vr in (
        (0x0008, 0x0005, "SpecificCharacterSet", b"CS"),
        (0x0008, 0x0008, "ImageType", b"CS"),
        (0x0008, 0x0016, "SOPClassUID", b"UI"),
        (0x0008, 0x0018, "SOPInstanceUID", b"UI"),
        (0x0008, 0x0050, "AccessionNumber", b"SH"),
        (0x0008, 0x0060, "Modality", b"CS"),
        (0x0010, 0x0010, "PatientName", b"PN"),
        (0x0010, 0x0020, "PatientID", b"LO"),
        (0x0010, 0x0030, "PatientBirthDate", b"DA"),
        (0x0020, 0x000D, "StudyInstanceUID", b"UI"),
        (0x0020, 0x000E, "SeriesInstanceUID", b"UI"),
        (0x0020, 0x0013, "InstanceNumber", b"IS"),
        (0x0020, 0x0032, "ImagePositionPatient", b"DS"),
        (0x0020, 0x0037, "ImageOrientationPatient", b"DS"),
        (0x0020, 0x0052, "FrameOfReferenceUID", b"UI"),
        (0x0028, 0x0002, "SamplesPerPixel", b"US"),
        (0x0028, 0x0004, "PhotometricInterpretation", b"CS"),
        (0x0028, 0x0008, "NumberOfFrames", b"IS"),
        (0x0028, 0x0010, "Rows", b"US"),
        (0x0028, 0x0011, "Columns", b"US"),
        (0x0028, 0x0030, "PixelSpacing", b"DS"),
        (0x0028, 0x0100, "BitsAllocated", b"US"),
        (0x0028, 0x0101, "BitsStored", b"US"),
        (0x0028, 0x0103, "PixelRepresentation", b"US"),
        (0x0028, 0x0120, "PixelPaddingValue", b"US SS"),
        (0x0028, 0x0121, "PixelPaddingRangeLimit", b"US SS"),
        (0x0028, 0x1052, "RescaleIntercept", b"DS"),
        (0x0028, 0x1053, "RescaleSlope", b"DS"),
        (0x0028, 0x1054, "RescaleType", b"LO"),
    )
}
_PIXELS: Final = 0x7FE0 | 0x0010 << 16
_META_LENGTH: Final = 0x0002
_TRANSFER_SYNTAX: Final = 0x0002 | 0x0010 << 16
_TRAILING_PADDING: Final = b"\xfc\xff\xfc\xff"
_BLANK: Final = b" \0"
_CT_IMAGE: Final = str(CTImageStorage).encode()
_HU: Final = (b"", b"HU", b"US")
_ALIKE: Final = (
    "SpecificCharacterSet",
    "AccessionNumber",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
)


class _NotPlain(Exception):
    """This file is for the general reader."""


class _TooShort(Exception):
    """The header goes on behind the bytes held."""


@dataclass(frozen=True, slots=True)
class NativePixels:
    """Where the pixels of an image lie in its file, and how they become Hounsfield units.

    offset: of the first pixel, in bytes; 16 bit little endian each. intercept: what is added to each.
    padding: the lowest and the highest stored value that are no image; None where the header declares none.
    """

    offset: int
    signed: bool
    bits_stored: int
    intercept: int
    padding: tuple[int, int] | None

    def read_into(self, path: Path, plane_hu: npt.NDArray[np.int16]) -> bool:
        """Fill a contiguous (rows, columns) plane; False where a value does not fit it, or the file ends too early."""
        with path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            if file.readinto(plane_hu.data.cast("B")) != plane_hu.nbytes:
                return False
        stored = plane_hu if self.signed else plane_hu.view(np.uint16)
        if self.bits_stored < 16:
            lowest = -1 << (self.bits_stored - 1) if self.signed else 0
            if int(stored.max()) - lowest >> self.bits_stored or (self.signed and int(stored.min()) < lowest):
                np.left_shift(stored, 16 - self.bits_stored, out=stored)  # the other bits are none of the value
                np.right_shift(stored, 16 - self.bits_stored, out=stored)
        if not self.signed and self.intercept >= 0 and int(stored.max()) >> (self.bits_stored - 1):
            return False  # perhaps signed after all
        no_image = None
        if self.padding is not None:
            no_image = (stored >= self.padding[0]) & (stored <= self.padding[1])
        if not self._fits(stored) and (no_image is None or not self._fits(stored[~no_image])):
            return False
        if self.intercept:
            np.add(plane_hu, np.int16(self.intercept), out=plane_hu)  # beyond 16 bits only where there is no image
        if no_image is not None:
            plane_hu[no_image] = PADDING_HU
        return True

    def _fits(self, stored: npt.NDArray[np.int16] | npt.NDArray[np.uint16]) -> bool:
        """Whether all of them are in 16 signed bits after rescale."""
        if not stored.size:
            return True
        low = self.intercept >= 0 or not self.signed or _in_16_bits(int(stored.min()) + self.intercept)
        return low and ((self.signed and self.intercept <= 0) or _in_16_bits(int(stored.max()) + self.intercept))


@dataclass(frozen=True, slots=True)
class NativeImage:
    """What one image says about itself.

    alike: raw values that are the same in every image of one series. shape: (rows, columns).
    number: Instance Number; None where it has none.
    position_lps_mm, cosines, spacing_mm: Image Position and Image Orientation (Patient), Pixel Spacing.
    pixels: None where they are compressed.
    """

    sop_instance_uid: str
    alike: tuple[bytes, ...]
    shape: tuple[int, int]
    number: int | None
    position_lps_mm: tuple[float, ...]
    cosines: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    pixels: NativePixels | None


def read_header(path: Path) -> NativeImage | None:
    """What the header of that file says; None where it is not a plain CT slice of 16 bits, whole or compressed."""
    try:
        with path.open("rb", buffering=0) as file:
            try:
                return _image(*_header(file.read(_FIRST_BYTES)), file)
            except _TooShort:
                file.seek(0)
                return _image(*_header(file.read(_MOST_BYTES)), file)
    except (_NotPlain, _TooShort, OSError, ValueError):  # ValueError: a number that is none
        return None


def _in_16_bits(value: int) -> bool:
    return -32768 <= value <= 32767


def _header(held: bytes) -> tuple[dict[str, bytes], int, int]:
    """The wanted values as they stand in the file, the offset of the pixels and their number of bytes."""
    if held[128:132] != b"DICM":
        raise _NotPlain
    values: dict[str, bytes] = {}
    try:
        at, syntax = _meta(held)
        if syntax == ExplicitVRLittleEndian or syntax in _COMPRESSED:
            at, length = _explicit(held, at, values)
            if (length == _UNDEFINED) != (syntax in _COMPRESSED):  # PS3.5 A.4
                raise _NotPlain
        elif syntax == ImplicitVRLittleEndian and not held[at + 4 : at + 6].isupper():  # else its VRs are explicit
            at, length = _implicit(held, at, values)
        else:
            raise _NotPlain
    except (IndexError, struct.error) as exc:
        raise _TooShort from exc
    return values, at, length


def _meta(held: bytes) -> tuple[int, str]:
    """Where the data set begins, and the Transfer Syntax UID (PS3.10 7.1)."""
    tag, vr, length = _EXPLICIT.unpack_from(held, 132)
    if tag != _META_LENGTH or vr != b"UL" or length != 4:
        raise _NotPlain
    at = 144
    end = at + _LONG.unpack_from(held, 140)[0]
    syntax = ""
    while at < end:
        tag, vr, length = _EXPLICIT.unpack_from(held, at)
        if vr in _SHORT_VRS:
            at += 8
        elif vr in _LONG_VRS:
            length = _LONG.unpack_from(held, at + 8)[0]
            at += 12
        else:
            raise _NotPlain
        if tag & 0xFFFF != 0x0002:
            raise _NotPlain
        if tag == _TRANSFER_SYNTAX:
            syntax = held[at : at + length].rstrip(b" \0").decode("ascii")
        at += length
    if at != end:
        raise _NotPlain
    return at, syntax


def _explicit(held: bytes, at: int, values: dict[str, bytes]) -> tuple[int, int]:
    """Walks the elements up to Pixel Data: the offset and length of its value."""
    element, long = _EXPLICIT.unpack_from, _LONG.unpack_from
    while True:
        tag, vr, length = element(held, at)
        if vr in _SHORT_VRS:
            at += 8
        elif vr in _LONG_VRS:
            length = long(held, at + 8)[0]
            at += 12
            if tag == _PIXELS:
                return at, length
            if length == _UNDEFINED:
                if vr != b"SQ":
                    raise _NotPlain
                at = _end_of_sequence(held, at, explicit=True)
                continue
        else:
            raise _NotPlain
        if tag in _WANTED:
            keyword, vrs = _WANTED[tag]
            if vr not in vrs:
                raise _NotPlain
            values[keyword] = held[at : at + length]
            if vr == b"SS":
                values["signed " + keyword] = b""
        at += length


def _implicit(held: bytes, at: int, values: dict[str, bytes]) -> tuple[int, int]:
    """Walks the elements up to Pixel Data: the offset and length of its value."""
    element = _IMPLICIT.unpack_from
    while True:
        tag, length = element(held, at)
        at += 8
        if tag == _PIXELS:
            return at, length
        if length == _UNDEFINED:
            at = _end_of_sequence(held, at, explicit=False)
            continue
        if tag in _WANTED:
            values[_WANTED[tag][0]] = held[at : at + length]
        elif tag & 0xFFFF == 0xFFFE:
            raise _NotPlain
        at += length


def _end_of_sequence(held: bytes, at: int, *, explicit: bool) -> int:
    """Where a sequence of undefined length ends whose first item begins at `at` (PS3.5 7.5)."""
    while True:
        tag, length = _IMPLICIT.unpack_from(held, at)
        at += 8
        if tag == _SEQUENCE_END:
            return at
        if tag != _ITEM:
            raise _NotPlain
        at = _end_of_item(held, at, None if length == _UNDEFINED else at + length, explicit=explicit)


def _end_of_item(held: bytes, at: int, end: int | None, *, explicit: bool) -> int:
    """Where an item ends whose elements begin at `at`: at `end`, or, where that is None, behind its delimiter."""
    while end is None or at < end:
        tag, length = _IMPLICIT.unpack_from(held, at)
        at += 8
        if tag == _ITEM_END and end is None:
            return at
        if explicit:
            _, vr, length = _EXPLICIT.unpack_from(held, at - 8)
            if vr in _LONG_VRS:
                length = _LONG.unpack_from(held, at)[0]
                at += 4
            elif vr not in _SHORT_VRS:
                raise _NotPlain
            if length == _UNDEFINED and vr != b"SQ":
                raise _NotPlain
        at = _end_of_sequence(held, at, explicit=explicit) if length == _UNDEFINED else at + length
    if at != end:
        raise _NotPlain
    return at


def _image(values: Mapping[str, bytes], offset: int, length: int, file: FileIO) -> NativeImage:
    """Raises _NotPlain unless everything that `series` asks of a single image is in order."""
    get = values.get
    whole = (
        get("Modality", b"").strip(_BLANK) == b"CT"
        and get("SOPClassUID", b"").rstrip(_BLANK) == _CT_IMAGE
        and get("NumberOfFrames", b"1").strip(_BLANK) == b"1"
        and get("SamplesPerPixel") == b"\1\0"
        and get("PhotometricInterpretation", b"").strip(_BLANK) in (b"MONOCHROME1", b"MONOCHROME2")
        and get("BitsAllocated") == b"\x10\0"
        and get("RescaleType", b"").strip(_BLANK).upper() in _HU
        and b"LOCALIZER" not in get("ImageType", b"").upper()
    )
    sop_instance_uid = get("SOPInstanceUID", b"").rstrip(_BLANK).decode("ascii")
    if not (whole and sop_instance_uid and get("SeriesInstanceUID") and get("StudyInstanceUID")):
        raise _NotPlain
    rows, columns, bits_stored = (_unsigned(get(k, b"")) for k in ("Rows", "Columns", "BitsStored"))
    representation = _unsigned(get("PixelRepresentation", b""))
    [slope], [intercept] = _decimals(values, "RescaleSlope", 1), _decimals(values, "RescaleIntercept", 1)
    if not (rows and columns and 1 <= bits_stored <= 16 and representation in (0, 1)):
        raise _NotPlain
    if slope != 1 or intercept != int(intercept) or not _in_16_bits(int(intercept)):
        raise _NotPlain
    padding = _padding(values, representation == 1)
    pixels = None
    if length != _UNDEFINED:
        _check_whole(file, offset, length, 2 * rows * columns)
        pixels = NativePixels(offset, representation == 1, bits_stored, int(intercept), padding)
    return NativeImage(
        sop_instance_uid,
        tuple(get(keyword, b"").rstrip(_BLANK) for keyword in _ALIKE),
        (rows, columns),
        _number(get("InstanceNumber", b"").strip(_BLANK)),
        _decimals(values, "ImagePositionPatient", 3),
        _decimals(values, "ImageOrientationPatient", 6),
        _decimals(values, "PixelSpacing", 2),
        pixels,
    )


def _check_whole(file: FileIO, offset: int, length: int, expected: int) -> None:
    """Raises _NotPlain unless so many bytes of pixels lie there, and behind them nothing but padding."""
    behind = os.fstat(file.fileno()).st_size - offset - length
    if behind:
        file.seek(offset + length)
    if length != expected or behind < 0 or (behind and file.read(4) != _TRAILING_PADDING):
        raise _NotPlain


def _unsigned(value: bytes) -> int:
    if len(value) != 2:
        raise _NotPlain
    return value[0] | value[1] << 8


def _number(text: bytes) -> int | None:
    if text and not text.lstrip(b"+-").isdigit():
        raise _NotPlain
    return int(text) if text else None


def _decimals(values: Mapping[str, bytes], keyword: str, count: int) -> tuple[float, ...]:
    numbers = tuple(map(float, values.get(keyword, b"").rstrip(b"\0").split(b"\\")))
    if len(numbers) != count or not all(map(isfinite, numbers)):
        raise _NotPlain
    return numbers


def _padding(values: Mapping[str, bytes], signed: bool) -> tuple[int, int] | None:
    """Pixel Padding Value and, where there is one, Pixel Padding Range Limit (PS3.3 C.7.5.1.1.2), in order."""
    limits = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        if keyword in values:
            value = _unsigned(values[keyword])
            negative = (signed or "signed " + keyword in values) and value >= 1 << 15
            limits.append(value - (1 << 16) if negative else value)
    return (min(limits), max(limits)) if limits else None
