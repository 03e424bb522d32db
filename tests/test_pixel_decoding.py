"""The quick decoders give what pydicom gives, pixel by pixel, or leave the word to it."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_series import edit, files, made
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from salsa_node import pixel_decoding, series
from salsa_node.errors import SeriesRejected
from salsa_node.pixel_decoding import quickly, stored_values
from salsa_node.series import inspect, read_volume

Tool = Callable[[str], str]
LOSSLESS = {
    "JPEG Lossless": ["dcmcjpeg"],
    "JPEG Lossless, process 14": ["dcmcjpeg", "+el", "+sv", "1"],
    "JPEG-LS": ["dcmcjpls"],
    "JPEG-LS, without JFIF": ["dcmcjpls", "+il", "+pr"],
    "JPEG-LS near lossless": ["dcmcjpls", "+en", "+un"],
    "RLE": ["dcmcrle"],
}


def image(values: np.ndarray, bits_stored: int = 16) -> Dataset:
    """An image of these 16 bit values, uncompressed."""
    ds = Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    ds.Rows, ds.Columns = values.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits_stored, bits_stored - 1
    ds.PixelRepresentation = int(values.dtype == np.int16)
    ds.PixelData = values.tobytes()
    return ds


def holding(ds: Dataset, syntax: UID, frame: bytes, fragments: int = 1) -> Dataset:
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([frame + b"\0" * (len(frame) % 2)], fragments_per_frame=fragments)
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return ds


def a_scan(dtype: type, bits_stored: int, shape: tuple[int, int] = (37, 51)) -> np.ndarray:
    """Smooth, with noise, from the lowest value of so many bits to the highest."""
    low = -(1 << bits_stored - 1) if dtype == np.int16 else 0
    ramp = np.linspace(0, 1, shape[0] * shape[1]).reshape(shape) ** 2
    values = low + ramp * ((1 << bits_stored) - 1) + np.random.default_rng(5).normal(0, 20, shape)
    return np.clip(np.rint(values), low, low + (1 << bits_stored) - 1).astype(dtype)


def is_same(ds: Dataset) -> bool:
    ours = quickly(ds)
    return ours is not None and ours.dtype == ds.pixel_array.dtype and np.array_equal(ours, ds.pixel_array)


@pytest.mark.parametrize("bits_stored", [12, 16])
@pytest.mark.parametrize(
    ("way", "dtype"),
    [(way, dtype) for way in LOSSLESS for dtype in (np.int16, np.uint16) if dtype == np.uint16 or "near" not in way],
)  # DCMTK makes no signed ones near lossless
def test_what_dcmtk_compresses_is_decoded_as_by_pydicom(
    tool: Tool, tmp_path: Path, way: str, dtype: type, bits_stored: int
) -> None:
    program, *how = LOSSLESS[way]
    plain, packed = tmp_path / "plain.dcm", tmp_path / "packed.dcm"
    values = a_scan(dtype, bits_stored)
    image(values, bits_stored).save_as(plain, enforce_file_format=True)
    subprocess.run([tool(program), *how, plain, packed], check=True, capture_output=True)
    ds = pydicom.dcmread(packed)
    assert ds.file_meta.TransferSyntaxUID.is_compressed
    assert is_same(ds)
    if "near" not in way:
        assert np.array_equal(quickly(ds), values)


@pytest.mark.parametrize("how", [["+eb"], ["+ee"], ["+el", "+sv", "6"]])
def test_jpeg_with_loss_or_another_predictor_is_left_to_pydicom(tool: Tool, tmp_path: Path, how: list[str]) -> None:
    plain, packed = tmp_path / "plain.dcm", tmp_path / "packed.dcm"
    image(a_scan(np.uint16, 12), 12).save_as(plain, enforce_file_format=True)
    subprocess.run([tool("dcmcjpeg"), *how, plain, packed], check=True, capture_output=True)
    assert quickly(pydicom.dcmread(packed)) is None


def test_the_public_images_are_decoded_as_by_pydicom(testdata: Path) -> None:
    """One image in nine encodings without loss and two with; others of several makers."""
    taken: dict[str, int] = {}
    for folder in ("01_abdomen_ct_siemens_j2k", "07_ct_one_image_all_syntaxes", "08_odd_ct_and_seg_encodings",
                   "09_charsets_and_odd_ct"):  # fmt: skip
        paths = files(testdata / folder)
        for path in paths[:3] if folder.startswith("01") else paths:
            try:
                ds = pydicom.dcmread(path)
            except series.UNREADABLE:
                continue
            if "PixelData" in ds and quickly(ds) is not None:
                assert is_same(ds), path.name
                syntax = str(ds.file_meta.TransferSyntaxUID).removeprefix("1.2.840.10008.1.2.")
                taken[syntax] = taken.get(syntax, 0) + 1
    assert set(taken) == {"5", "4.70", "4.80", "4.81", "4.90", "4.91"}
    assert taken["4.90"] >= 5
    assert taken["4.70"] >= 3
    assert taken["5"] >= 2


def jpeg_2000(values: np.ndarray, precision: int) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(values, level=0, codecformat="J2K", bitspersample=precision))


def jpeg_lossless(values: np.ndarray, precision: int) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(values, lossless=True, bitspersample=precision, predictor=1))


def rle(values: np.ndarray, _precision: int) -> bytes:
    ds = image(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.compress(RLELossless, generate_instance_uid=False)
    return next(generate_frames(ds.PixelData, number_of_frames=1))


def jpeg_ls(values: np.ndarray, _precision: int) -> bytes:
    return bytes(imagecodecs.jpegls_encode(values))


ENCODERS: dict[UID, Callable[[np.ndarray, int], bytes]] = {
    JPEG2000Lossless: jpeg_2000,
    JPEGLosslessSV1: jpeg_lossless,
    JPEGLSLossless: jpeg_ls,
    RLELossless: rle,
}


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    syntax=st.sampled_from(sorted(ENCODERS)),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bits=st.integers(9, 16),
    spare=st.integers(0, 7),
    signed=st.booleans(),
    declared_signed=st.booleans(),
    fragments=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_image_is_decoded_as_by_pydicom_or_not_at_all(
    syntax: UID, shape: tuple[int, int], bits: int, spare: int, signed: bool, declared_signed: bool,
    fragments: int, seed: int,
) -> None:  # fmt: skip
    """Also where the header tells of other bits or another sign than the code stream."""
    low = -(1 << bits - 1) if signed and syntax == JPEG2000Lossless else 0
    values = np.random.default_rng(seed).integers(low, low + (1 << bits), shape)
    values = values.astype(np.int16 if low else np.uint16)
    ds = image(values.view(np.int16 if declared_signed else np.uint16), max(9, bits - spare))
    frame = ENCODERS[syntax](values, bits)
    ds = holding(ds, syntax, frame, min(fragments, len(frame) // 4))
    ours = quickly(ds)
    expected = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = ds.pixel_array
        except (ValueError, RuntimeError):
            assert ours is None, "pydicom refuses it"
    if expected is not None and ours is not None:
        assert ours.dtype == expected.dtype
        assert np.array_equal(ours, expected)
    if expected is not None and not spare and signed == declared_signed:
        assert ours is not None, "nothing is odd about it"


@pytest.mark.parametrize(
    "change",
    [
        lambda ds: setattr(ds, "Rows", ds.Rows + 1),
        lambda ds: setattr(ds, "Columns", ds.Columns - 1),
        lambda ds: setattr(ds, "SamplesPerPixel", 3),
        lambda ds: setattr(ds, "BitsAllocated", 32),
        lambda ds: setattr(ds, "NumberOfFrames", 2),
        lambda ds: setattr(ds, "PhotometricInterpretation", "RGB"),
        lambda ds: ds.pop("PixelRepresentation"),
        lambda ds: holding(ds, JPEG2000Lossless, next(generate_frames(ds.PixelData, number_of_frames=1))),
    ],
)
def test_what_is_not_as_declared_is_left_to_pydicom(change: Callable[[Dataset], object]) -> None:
    values = a_scan(np.int16, 16)
    ds = holding(image(values), JPEGLosslessSV1, jpeg_lossless(values.view(np.uint16), 16))
    assert np.array_equal(quickly(ds), values)
    change(ds)
    assert quickly(ds) is None


@pytest.mark.parametrize("syntax", ENCODERS)
def test_a_code_stream_that_was_cut_is_left_to_pydicom(syntax: UID) -> None:
    values = a_scan(np.uint16, 16, (60, 60))
    frame = ENCODERS[syntax](values, 16)
    ds = holding(image(values), syntax, frame)
    assert np.array_equal(quickly(ds), values)
    for length in (*range(2, 120, 3), len(frame) // 2, len(frame) - 40):
        assert quickly(holding(ds, syntax, frame[:length])) is None, length


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize("lost", [1, 2, 60])
def test_a_code_stream_that_lost_bytes_within_is_left_to_pydicom(syntax: UID, lost: int) -> None:
    """Its header and its end are whole, and a decoder that makes what it can of the rest would make other voxels."""
    values = a_scan(np.uint16, 12, (96, 80))
    frame = ENCODERS[syntax](values, 12)
    for at in (len(frame) // 3, len(frame) // 2, len(frame) - 100):
        found = quickly(holding(image(values, 12), syntax, frame[:at] + frame[at + lost :]))
        assert found is None or np.array_equal(found, values), at


def test_jpeg_2000_in_several_tiles_is_decoded_quickly() -> None:
    values = a_scan(np.uint16, 16, (96, 80))
    content = io.BytesIO()
    Image.fromarray(values).save(content, "JPEG2000", tile_size=(32, 32), irreversible=False, no_jp2=True)
    frame = content.getvalue()
    assert frame.count(b"\xff\x90\0\x0a") == 9
    assert is_same(holding(image(values), JPEG2000Lossless, frame))


DAMAGE = """
import random, sys, warnings, logging
import numpy as np
import test_pixel_decoding as t
from salsa_node.pixel_decoding import quickly
warnings.simplefilter("ignore")
logging.disable()
syntax = t.UID(sys.argv[1])
values = t.a_scan(np.uint16, 12, (64, 64))
frame = t.ENCODERS[syntax](values, 12)
chance = random.Random(7)
same = 0
for _ in range(200):
    broken = bytearray(frame)
    at = chance.randrange(60, len(broken))
    kind = chance.choice(["flip", "zero", "insert", "delete"])
    if kind == "flip":
        broken[at] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        broken[at : at + 9] = bytes(len(broken[at : at + 9]))
    elif kind == "insert":
        broken[at:at] = chance.randbytes(5)
    else:
        del broken[at : at + 7]
    ds = t.holding(t.image(values, 12), syntax, bytes(broken))
    ours = quickly(ds)
    if ours is None:
        continue
    assert np.array_equal(ours, ds.pixel_array), (kind, at)
    same += 1
print(same)
"""


@pytest.mark.parametrize("syntax", ENCODERS)
def test_damage_gives_nothing_that_pydicom_would_not_give(syntax: UID) -> None:
    """In a process of its own: a decoder that breaks on damage would end it."""
    done = subprocess.run(
        [sys.executable, "-c", DAMAGE, str(syntax)], capture_output=True, text=True, check=False, timeout=300,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert syntax == JPEGLSLossless or int(done.stdout) > 20, "JPEG-LS alone notices all of it"


def test_a_cut_jpeg_ls_image_is_refused_by_name(tmp_path: Path) -> None:
    """The second decoder that pydicom knows for it never returns, and lets no other thread go on."""
    _, paths = made(tmp_path)
    edit(paths[2], lambda ds: compress(ds, JPEGLSLossless, cut=60))
    told = f"""
from pathlib import Path
from salsa_node.series import inspect, read_volume
read_volume(inspect(sorted(Path({str(tmp_path)!r}).iterdir())))
"""
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=False, timeout=120)
    assert "SeriesRejected: the image with Instance Number 3 (slice 3 of 6) cannot be decoded" in done.stderr


def compress(ds: Dataset, syntax: UID, cut: int = 0) -> Dataset:
    values = np.frombuffer(ds.PixelData, np.uint16).reshape(ds.Rows, ds.Columns)
    frame = ENCODERS[syntax](values, 16)
    return holding(ds, syntax, frame[: len(frame) - cut])


@pytest.mark.parametrize("syntax", ENCODERS)
def test_a_compressed_series_is_the_volume_of_the_plain_one(tmp_path: Path, syntax: UID) -> None:
    ct, paths = made(tmp_path, slices=13)
    for path in paths:
        edit(path, lambda ds: compress(ds, syntax))
    read = read_volume(inspect(paths))
    assert np.array_equal(read.voxels_hu, ct.voxels_hu)
    assert read.voxels_hu.dtype == np.int16


@pytest.mark.parametrize("cores", [1, 2, 40])
def test_the_first_bad_slice_is_the_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(series, "cores", lambda: cores)
    _, paths = made(tmp_path, slices=13)
    for path in paths:
        edit(path, lambda ds: compress(ds, JPEGLosslessSV1))
    for bad in (11, 4, 7):
        edit(paths[bad], lambda ds: holding(ds, JPEGLosslessSV1, b"\0\1" * 40))
    with pytest.raises(SeriesRejected, match=r"Instance Number 5 \(slice 5 of 13\) cannot be decoded"):
        read_volume(inspect(paths))


def test_fractions_in_one_slice_make_all_of_them_float(tmp_path: Path) -> None:
    ct, paths = made(tmp_path, slices=9)
    for path in paths:
        edit(path, lambda ds: compress(ds, RLELossless))
    edit(paths[4], lambda ds: setattr(ds, "RescaleIntercept", ds.RescaleIntercept + 0.5))
    read = read_volume(inspect(paths)).voxels_hu
    assert read.dtype == np.float32
    expected = ct.voxels_hu.astype(np.float32)
    expected[4] += 0.5
    assert np.array_equal(read, expected)


def test_few_slices_are_decoded_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs memory beside the volume."""
    monkeypatch.setattr(series, "cores", lambda: 3)
    _, paths = made(tmp_path, slices=30)
    begun: list[str] = []
    threads: set[str] = set()

    def noted(ds: Dataset) -> np.ndarray:
        begun.append(ds.SOPInstanceUID)
        threads.add(threading.current_thread().name)
        return stored_values(ds)

    monkeypatch.setattr(series, "stored_values", noted)
    slices = series._decoded(inspect(paths), range(30))
    for taken in range(1, 31):
        n, _ = next(slices)
        assert n == taken - 1
        assert taken <= len(begun) <= taken + 4
    assert next(slices, None) is None
    assert len(threads) <= 3


def test_only_gdcm_is_asked_about_jpeg_ls(monkeypatch: pytest.MonkeyPatch) -> None:
    values = a_scan(np.uint16, 16)
    ds = holding(image(values), JPEGLSLossless, jpeg_ls(values, 16))
    monkeypatch.setattr(pixel_decoding, "quickly", lambda _: None)
    assert np.array_equal(stored_values(ds), values)
    assert ds._pixel_array_opts["decoding_plugin"] == "gdcm"
