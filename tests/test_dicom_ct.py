"""A volume written as a CT series lies where it lay."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest

from salsa_node import uids
from salsa_node.dicom_ct import CtHeader, write
from salsa_node.errors import EncodingError
from salsa_node.volume import CtVolume, Grid

HEADER = CtHeader("2.25.1", "2.25.2", "Nobody^Known", "X-1", datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC))


def volume(voxels: np.ndarray, axes: np.ndarray | None = None) -> CtVolume:
    affine = np.eye(4)
    affine[:3, :3] = np.diag([1.0, 1.0, 1.0])[:, [2, 1, 0]] * (3.0, 0.7, 0.8) if axes is None else axes
    affine[:3, 3] = (-100.25, 20.125, 900.5)
    return CtVolume(voxels, Grid(voxels.shape, affine))  # type: ignore[arg-type]


def test_each_voxel_is_found_at_its_position_by_the_standards_formula(tmp_path: Path) -> None:
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    ct = volume(np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6), turn * (2.5, 0.7, 0.9))
    for index, path in enumerate(write(ct, tmp_path, HEADER)):
        ds = pydicom.dcmread(path)
        along_row, along_column = np.array(ds.ImageOrientationPatient, float).reshape(2, 3)
        row_mm, column_mm = map(float, ds.PixelSpacing)
        row, column = 3, 4
        # PS3.3 C.7.6.2.1.1
        point = np.array(ds.ImagePositionPatient, float) + along_row * column_mm * column + along_column * row_mm * row
        assert np.allclose(point, ct.grid.to_lps_mm((index, row, column)), atol=1e-4)
        assert ds.pixel_array[row, column] * ds.RescaleSlope + ds.RescaleIntercept == ct.voxels_hu[index, row, column]
        assert float(ds.SliceThickness) == pytest.approx(2.5)


def test_uids_derive_from_the_series_where_the_volume_has_none(tmp_path: Path) -> None:
    ct = volume(np.zeros((2, 4, 4), np.int16))
    first = [pydicom.dcmread(path).SOPInstanceUID for path in write(ct, tmp_path / "a", HEADER)]
    again = [pydicom.dcmread(path).SOPInstanceUID for path in write(ct, tmp_path / "b", HEADER)]
    assert first == again
    assert len(set(first)) == 2


def test_no_decimal_string_says_minus_zero(tmp_path: Path) -> None:
    affine = np.eye(4)[:, [2, 1, 0, 3]] * (-1.0, 1.0, 1.0, 1.0)  # head to feet: the products hold -0.0
    affine[:3, 3] = (-0.0, -1e-13, 0.0)
    (path, *_) = write(CtVolume(np.zeros((2, 4, 4), np.int16), Grid((2, 4, 4), affine)), tmp_path, HEADER)
    ds = pydicom.dcmread(path)
    texts = [
        str(x) for k in ("ImagePositionPatient", "ImageOrientationPatient", "SliceLocation") for x in _values(ds[k])
    ]
    assert all(float(text) != 0 or not text.startswith("-") for text in texts), texts
    assert [float(x) for x in ds.ImagePositionPatient] == [0, 0, 0]


def _values(element: pydicom.DataElement) -> list[object]:
    return list(element.value) if element.VM > 1 else [element.value]


def test_the_file_says_who_wrote_it(tmp_path: Path) -> None:
    (path, *_) = write(volume(np.zeros((1, 2, 2), np.int16)), tmp_path, HEADER)
    meta = pydicom.dcmread(path).file_meta
    assert meta.ImplementationClassUID == uids.IMPLEMENTATION_CLASS_UID
    assert meta.ImplementationVersionName == uids.IMPLEMENTATION_VERSION_NAME


def test_fractions_are_rounded_to_whole_hounsfield_units(tmp_path: Path) -> None:
    ct = volume(np.array([[[-1024.4, 0.6], [99.5, 3000.0]]], np.float32))
    (path,) = write(ct, tmp_path, HEADER)
    assert pydicom.dcmread(path).pixel_array.tolist() == [[-1024, 1], [100, 3000]]


@pytest.mark.parametrize(("voxel", "words"), [(40000.0, "do not fit 16 bits"), (np.nan, "not finite")])
def test_numbers_that_fit_no_ct_are_refused(tmp_path: Path, voxel: float, words: str) -> None:
    with pytest.raises(EncodingError, match=words):
        write(volume(np.full((1, 2, 2), voxel, np.float32)), tmp_path, HEADER)
    assert not list(tmp_path.iterdir())


def test_a_sheared_grid_is_refused(tmp_path: Path) -> None:
    axes = np.array([[0, 0, 1.0], [0, 1.0, 0.2], [1.0, 0, 0]])
    with pytest.raises(EncodingError, match="not at right angles"):
        write(volume(np.zeros((1, 2, 2), np.int16), axes), tmp_path, HEADER)
