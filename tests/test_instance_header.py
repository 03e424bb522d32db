"""What is read of a data set without pydicom is what pydicom reads; whatever is odd is left to it."""

from __future__ import annotations

import struct
import warnings
from io import BytesIO
from pathlib import Path

import pytest
import raw_scu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)

from salsa_node import instance_header
from salsa_node.instance_header import Header, Refused, header_of_file, read_header

NOWHERE = Path("/nonexistent")
TAGS = (
    0x00080005, 0x00080008, 0x00080016, 0x00080018, 0x00080020, 0x00080050, 0x00080060, 0x00081140, 0x00090010,
    0x00100010, 0x00100020, 0x00180050, 0x0020000D, 0x0020000E, 0x00200011, 0x00200013, 0x7FE00010,
)  # fmt: skip


def element(tag: int, vr: bytes, value: bytes, *, implicit: bool = False) -> bytes:
    if implicit:
        return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value)) + value
    if vr in instance_header._LONG_VRS:
        return struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value


def whole(changed: dict[int, bytes], *, implicit: bool = False) -> bytes:
    """A data set with everything that is asked for, and those values."""
    values = dict.fromkeys(TAGS, b"1 ") | {0x00080005: b"ISO_IR 100"} | changed
    return b"".join(
        element(
            tag, b"OW" if tag == 0x7FE00010 else b"SQ" if tag == 0x00081140 else b"LO", values[tag], implicit=implicit
        )
        for tag in TAGS
    )


def outcome(content: bytes, syntax: UID, *, by_pydicom: bool) -> Header | str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if by_pydicom:
                return read_header(BytesIO(content), syntax, complete=False)
            return header_of_file(NOWHERE, 0, content, False, syntax)
        except Refused as refused:
            return f"0x{refused.status:04X} {refused.reason}"


pieces = st.tuples(
    st.sampled_from(TAGS),
    st.sampled_from([b"LO", b"UI", b"CS", b"OB", b"SQ", b"UN", b"UT", b"xx", b"ZZ", b"\0\0"]),
    st.one_of(
        st.sampled_from(
            [b"1.2.3", b"1.2\0", b"", b"ISO_IR 100", b"ISO 2022 IR 87", b"\\ISO 2022 IR 58", b"+12 ", b"x\xff"]
        ),
        st.binary(max_size=12),
    ),
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    made=st.lists(pieces, max_size=14),
    in_order=st.booleans(),
    is_implicit=st.booleans(),
    says_implicit=st.booleans(),
    flipped=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2),
)
def test_what_is_read_here_is_what_pydicom_reads(
    made: list[tuple[int, bytes, bytes]],
    in_order: bool,
    is_implicit: bool,
    says_implicit: bool,
    flipped: list[tuple[int, int]],
) -> None:
    elements = sorted({tag: (vr, value) for tag, vr, value in made}.items()) if in_order else [
        (tag, (vr, value)) for tag, vr, value in made
    ]  # fmt: skip
    content = bytearray(b"".join(element(tag, vr, value, implicit=is_implicit) for tag, (vr, value) in elements))
    for at, byte in flipped:
        if at < len(content):
            content[at] = byte
    syntax = ImplicitVRLittleEndian if says_implicit else ExplicitVRLittleEndian
    if instance_header._plain_elements(bytes(content), syntax) is not None:
        assert outcome(bytes(content), syntax, by_pydicom=False) == outcome(bytes(content), syntax, by_pydicom=True)


values = st.dictionaries(
    st.sampled_from([tag for tag in TAGS if tag != 0x00080005]),
    st.one_of(
        st.sampled_from([b"1.2.840.10008.5.1.4.1.1.2\0", b"", b" 7 ", b"M\xc3\xbcller", b"M\xfcller"]),
        st.binary(max_size=30),
    ),
)


@settings(max_examples=300, deadline=None)
@given(changed=values, implicit=st.booleans())
def test_plain_data_sets_are_read_here(changed: dict[int, bytes], implicit: bool) -> None:
    content = whole(changed, implicit=implicit)
    syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    assert instance_header._plain_elements(content, syntax) is not None
    assert outcome(content, syntax, by_pydicom=False) == outcome(content, syntax, by_pydicom=True)


def test_a_ct_image_is_read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_header, "read_dataset", lambda *_, **__: pytest.fail("pydicom was asked"))
    (image,) = raw_scu.images(7, 1, 16)
    for syntax in (ExplicitVRLittleEndian, JPEG2000Lossless):
        found = header_of_file(NOWHERE, 0, image.content, True, syntax)
        assert found == Header(
            study_uid="2.25.7", series_uid="2.25.7.1", sop_instance_uid=image.uid, sop_class_uid=raw_scu.CT,
            modality="CT", series_number=1, accession_number="", patient_id="MADE", study_date="20260101",
        )  # fmt: skip


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, UID("1.2.840.10008.1.1")])
def test_other_byte_orders_are_left_to_pydicom(syntax: UID) -> None:
    assert instance_header._plain_elements(whole({}), syntax) is None


@pytest.mark.parametrize(
    "content",
    [
        whole({0x00080005: rb"\ISO 2022 IR 87"}),
        whole({})[10:],
        whole({})[:150],
        element(0x00080016, b"UI", b"1.2 ") * 2 + whole({}),
        element(0x00020010, b"UI", b"1.2 ") + whole({}),
        struct.pack("<HH2sHL", 0x0008, 0x0001, b"SQ", 0, 0xFFFFFFFF) + whole({}),
    ],
    ids=["character set by extensions", "no beginning", "no end", "twice", "file meta", "undefined length"],
)  # fmt: skip
def test_what_is_odd_is_left_to_pydicom(content: bytes) -> None:
    assert instance_header._plain_elements(content, ExplicitVRLittleEndian) is None


def test_a_value_that_the_head_holds_in_part_is_read_from_the_file(tmp_path: Path) -> None:
    """Wherever the head ends; a UID cut short would be a UID too, of another series."""
    content = struct.pack("<HH2sHL", 0x0008, 0x0001, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    content += whole({0x0020000D: b"1.2.3.4.5.6.7.8.9.10", 0x0020000E: b"1.2.3.4.5.6.7.8.9.11"})
    (tmp_path / "file").write_bytes(content)
    expected = read_header(BytesIO(content), ExplicitVRLittleEndian)
    for end in range(content.index(b"ISO_IR 100") + 10, len(content)):
        found = header_of_file(tmp_path / "file", 0, content[:end], False, ExplicitVRLittleEndian)
        assert found == expected, f"the head ends after {end} bytes"
