"""The quick reader of uncompressed images gives what pydicom gives, voxel by voxel, or leaves the word to it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from made_series import edit, files, made
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from salsa_node import native_image
from salsa_node.candidate import read_candidate
from salsa_node.errors import SeriesRejected
from salsa_node.series import Series, inspect, read_volume
from salsa_node.volume import CtVolume

Change = Callable[[Dataset], object]


def by_pydicom(paths: list[Path]) -> tuple[Series, CtVolume]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_image, "read_header", lambda _path: None)
        series = inspect(paths)
        assert not any(instance.native for instance in series.instances)
        return series, read_volume(series)


def same(paths: list[Path]) -> tuple[Series, CtVolume]:
    """What both readers make of these files; fails where they differ."""
    series, ct = inspect(paths), None
    ct = read_volume(series)
    expected_series, expected = by_pydicom(paths)
    assert [(i.sop_instance_uid, i.path) for i in series.instances] == [
        (i.sop_instance_uid, i.path) for i in expected_series.instances
    ]
    assert (series.study_uid, series.series_uid) == (expected_series.study_uid, expected_series.series_uid)
    assert np.array_equal(series.grid.affine_lps_mm, expected_series.grid.affine_lps_mm)
    assert series.grid.frame_of_reference_uid == expected_series.grid.frame_of_reference_uid
    assert ct.voxels_hu.dtype == expected.voxels_hu.dtype
    assert np.array_equal(ct.voxels_hu, expected.voxels_hu)
    return series, ct


def stored(change: Callable[[np.ndarray], np.ndarray], **also: object) -> Change:
    """Puts other stored values into an image, and other words about them into its header."""

    def put(ds: Dataset) -> None:
        values = change(np.frombuffer(ds.PixelData, np.int16).reshape(ds.Rows, ds.Columns))
        ds.PixelData = values.tobytes()
        for keyword, value in also.items():
            if keyword.startswith("PixelPadding"):
                ds.add_new(keyword, *value)
            else:
                setattr(ds, keyword, value)

    return put


def unsigned(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.int32) + 1024).clip(0).astype(np.uint16)


def circle(values: np.ndarray) -> np.ndarray:
    out = values.copy()
    out[:3, :4] = -2000
    return out


def nested(ds: Dataset) -> None:
    """Sequences of defined and undefined length in each other, and a private one, before the pixels."""
    inner = Dataset()
    inner.CodeValue, inner.CodingSchemeDesignator, inner.CodeMeaning = "1", "99X", "a\0b"
    outer = Dataset()
    outer.PurposeOfReferenceCodeSequence = Sequence([inner, inner])
    outer.PurposeOfReferenceCodeSequence.is_undefined_length = True
    outer.is_undefined_length_sequence_item = True
    outer.ReferencedSOPInstanceUID = "2.25.7"
    ds.SourceImageSequence = Sequence([outer, inner])
    ds["SourceImageSequence"].is_undefined_length = True
    ds.ReferencedImageSequence = Sequence([])
    ds["ReferencedImageSequence"].is_undefined_length = True
    ds.ProcedureCodeSequence = Sequence([inner])
    block = ds.private_block(0x0009, "SALSA TEST", create=True)
    block.add_new(0x01, "SQ", Sequence([outer]))
    block.add_new(0x02, "OB", b"\xfe\xff\xdd\xe0\0\0\0\0")


def long_header(ds: Dataset) -> None:
    ds.private_block(0x0009, "SALSA TEST", create=True).add_new(0x10, "OB", bytes(40_000))


def trailing(ds: Dataset) -> None:
    ds.add_new(0xFFFCFFFC, "OB", bytes(64))


def nothing(_ds: Dataset) -> None: ...


PLAIN = {
    "signed": nothing,
    "unsigned with an intercept": stored(unsigned, PixelRepresentation=0, RescaleIntercept=-1024, BitsStored=12),
    "an intercept with a fraction of nothing": stored(unsigned, PixelRepresentation=0, RescaleIntercept="-1024.00"),
    "padding": stored(circle, PixelPaddingValue=("SS", -2000)),
    "padding in the wrong VR": stored(circle, PixelPaddingValue=("US", 63536), PixelPaddingRangeLimit=("SS", -1990)),
    "padding that cannot be": stored(unsigned, PixelRepresentation=0, PixelPaddingValue=("SS", -2000)),
    "padding beyond 16 bits after rescale": stored(
        lambda v: np.where(v > 1000, -32768, v).astype(np.int16), PixelPaddingValue=("SS", -32768), RescaleIntercept=-10
    ),
    "bits of something else": stored(lambda v: v & 0x0FFF | 0x5000, BitsStored=12, HighBit=11),
    "bits of something else, unsigned": stored(
        lambda v: unsigned(v) & 0x0FFF | 0x3000, BitsStored=12, HighBit=11, PixelRepresentation=0, RescaleIntercept=-9
    ),
    "sequences": nested,
    "a long header": long_header,
    "something behind the pixels": trailing,
    "no frame of reference": lambda ds: delattr(ds, "FrameOfReferenceUID"),
    "one frame, said so": lambda ds: setattr(ds, "NumberOfFrames", 1),
    "a contrast agent in Latin 1": lambda ds: setattr(ds, "ContrastBolusAgent", "Jod-Lösung"),
}
FOR_PYDICOM = {
    "slope 2": lambda ds: setattr(ds, "RescaleSlope", 2),
    "slope with a fraction": lambda ds: setattr(ds, "RescaleSlope", "0.5"),
    "intercept with a fraction": lambda ds: setattr(ds, "RescaleIntercept", "-0.5"),
    "8 bits": stored(lambda v: (v & 0x7F).astype(np.uint8), BitsAllocated=8, BitsStored=8, PixelRepresentation=0),
}


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["explicit", "implicit"])
@pytest.mark.parametrize("change", PLAIN.values(), ids=PLAIN)
def test_plain_images_are_read_quickly_and_alike(change, syntax, tmp_path):
    _, paths = made(tmp_path)
    for path in paths:
        rewritten(path, change, syntax)
    series, _ = same(paths)
    assert all(instance.native for instance in series.instances)


@pytest.mark.parametrize("change", FOR_PYDICOM.values(), ids=FOR_PYDICOM)
def test_what_is_not_plain_is_left_to_pydicom(change, tmp_path):
    _, paths = made(tmp_path)
    edit(paths[2], change)
    series, _ = same(paths)
    assert not any(instance.native for instance in series.instances)


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_other_transfer_syntaxes_are_left_to_pydicom(syntax, tmp_path):
    ct, paths = made(tmp_path)
    for path in paths:
        rewritten(path, nothing, syntax)
    series, read = same(paths)
    assert not any(instance.native for instance in series.instances)
    assert np.array_equal(read.voxels_hu, ct.voxels_hu)


@pytest.mark.parametrize("change", PLAIN.values(), ids=PLAIN)
def test_headers_of_compressed_images_are_read_quickly_and_alike(change, tmp_path):
    ct, paths = made(tmp_path)
    for path in paths:
        rewritten(path, change, RLELossless)
    assert all(native_image.read_header(path) for path in paths)
    series, read = same(paths)
    assert not any(instance.native for instance in series.instances)
    assert read.voxels_hu.shape == ct.voxels_hu.shape


def test_some_slices_may_be_compressed(tmp_path):
    ct, paths = made(tmp_path)
    for path in paths[1:4]:
        rewritten(path, nothing, RLELossless)
    series, read = same(paths)
    assert [instance.native is None for instance in series.instances] == [False, True, True, True, False, False]
    assert np.array_equal(read.voxels_hu, ct.voxels_hu)


def test_pixels_that_are_not_as_the_transfer_syntax_has_them_are_left_to_pydicom(tmp_path):
    _, paths = made(tmp_path)
    data = paths[0].read_bytes()
    assert native_image.read_header(paths[0])
    syntax = b"1.2.840.10008.1.2.1\0"
    assert len(syntax) == len(b"1.2.840.10008.1.2.5\0")
    paths[0].write_bytes(data.replace(syntax, b"1.2.840.10008.1.2.5\0", 1))
    assert native_image.read_header(paths[0]) is None


def test_a_value_beyond_16_bits_is_a_verdict_from_both(tmp_path):
    _, paths = made(tmp_path)
    wrong = stored(lambda v: np.where(v < 0, v, v + 30000).astype(np.int16), PixelRepresentation=0)
    edit(paths[4], wrong)  # negative values, declared unsigned
    words = r"\(slice 5 of 6\) holds \d+ pixels beyond 16 bits, from 30\d+ to 65\d+ HU, which is no CT; .* unsigned"
    for read in (lambda: read_volume(inspect(paths)), lambda: by_pydicom(paths)):
        with pytest.raises(SeriesRejected, match=words):
            read()


@pytest.mark.parametrize("number", ["7", " +7 ", "-3", "", "seven", "1.5"])
def test_what_a_series_says_of_itself_is_the_same_by_both(number, tmp_path):
    _, paths = made(tmp_path)
    edit(paths[1], lambda ds: ds.add_new("InstanceNumber", "SH", number))
    data = paths[1].read_bytes()
    at = data.index(b"\x20\0\x13\0SH")
    paths[1].write_bytes(data[: at + 4] + b"IS" + data[at + 6 :])
    quick = read_candidate(paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_image, "read_header", lambda _path: None)
        assert read_candidate(paths) == quick
    assert len(quick.image_numbers) in (5, 6)


@pytest.mark.parametrize("bits", [12, 16])
def test_signed_pixels_declared_unsigned_are_a_verdict_from_both(bits, tmp_path):
    _, paths = made(tmp_path)
    for path in paths:
        edit(
            path,
            stored(
                lambda v: v.view(np.uint16) & ((1 << bits) - 1),
                PixelRepresentation=0,
                BitsStored=bits,
                HighBit=bits - 1,
            ),
        )
    words = (
        r"\(slice 1 of 6\) has 3\d% of its pixels in the upper half .* can have none below 0 HU: .* unsigned"
        if bits == 12
        else r"^the image with Instance Number 1 \(slice 1 of 6\) holds \d+ pixels beyond 16 bits, from \d+ to 65\d+ HU"
    )
    for read in (lambda: read_volume(inspect(paths)), lambda: by_pydicom(paths)):
        with pytest.raises(SeriesRejected, match=words):
            read()


def test_metal_in_unsigned_pixels_is_no_verdict(tmp_path):
    _, paths = made(tmp_path)

    def metal(values: np.ndarray) -> np.ndarray:
        out = np.abs(values)
        out[3, 2:9] = 3000
        return out

    edit(paths[2], stored(metal, PixelRepresentation=0, BitsStored=12, HighBit=11))
    assert same(paths)[1].voxels_hu[2].max() == 3000


def test_a_file_cut_after_inspection_is_a_verdict(tmp_path):
    _, paths = made(tmp_path)
    series = inspect(paths)
    assert series.instances[3].native
    paths[3].write_bytes(paths[3].read_bytes()[:-20])
    with pytest.raises(SeriesRejected, match=r"Instance Number 4 \(slice 4 of 6\) cannot be decoded"):
        read_volume(series)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # its remarks on the damage
@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless],
    ids=["explicit", "implicit", "compressed"],
)
def test_damaged_files_get_the_same_from_both(syntax, tmp_path):
    _, paths = made(tmp_path, slices=4)
    for path in paths:
        rewritten(path, nested, syntax)
    whole, chance, quick = paths[1].read_bytes(), random.Random(7), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 8])):
            damaged[chance.randrange(128, len(whole) - 200)] = chance.randrange(256)
        paths[1].write_bytes(damaged)
        outcomes = []
        for read in (lambda: read_volume(inspect(paths)), lambda: by_pydicom(paths)[1]):
            try:
                ct = read()
                outcomes.append((ct.voxels_hu.tobytes(), ct.grid.affine_lps_mm.tobytes(), ct.slice_sop_uids))
            except SeriesRejected as verdict:
                outcomes.append(verdict.reason)
        assert outcomes[0] == outcomes[1]
        quick += native_image.read_header(paths[1]) is not None
    assert 30 < quick < 140


@pytest.mark.parametrize(
    "folder",
    [
        "02_liver_ct_seg_dcmqi/segmentations/ct-3slice",
        "02_liver_ct_seg_dcmqi/segmentations/23x38x3/image",
        "05_philips_head_study_localizer_dose/S21570/S2010",
    ],
)
def test_public_series_are_read_quickly_and_alike(folder, testdata):
    series, _ = same(files(testdata / folder))
    assert all(instance.native for instance in series.instances)


def rewritten(path: Path, change: Change, syntax: pydicom.uid.UID) -> None:
    """The image in another transfer syntax, with the change made."""
    ds = pydicom.dcmread(path)
    change(ds)
    if syntax.is_compressed and syntax != DeflatedExplicitVRLittleEndian:
        ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(path)
        return
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<i2").astype(">i2").tobytes()
    ds.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(path, ds, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
