"""The bench of the readers runs; it fails by itself where two readers come to different voxels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench_volume"


def test_every_reader_is_measured_beside_dicom2nifti():
    command = [sys.executable, str(BENCH), "--small", "--rounds", "1", "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert told.returncode == 0, told.stderr
    rows = {row["way"]: row for row in json.loads(told.stdout)["rows"]}
    peers = ["SimpleITK", *(["dcm2niix"] if shutil.which("dcm2niix") else []), "dicom2nifti", "dicom2nifti .gz"]
    assert list(rows) == ["ours", "ours, general", *peers]
    assert {row["voxels"] for row in rows.values()} == {20 * 128 * 128}
    assert rows["dicom2nifti"]["times_faster"] == 1.0
    assert rows["ours"]["times_faster"] == round(rows["dicom2nifti"]["seconds"] / rows["ours"]["seconds"], 1)


@pytest.mark.parametrize("way", ["jpeg-lossless", "jpeg-ls", "jpeg-2000", "rle"])
def test_compressed_series_are_measured_beside_pydicom(way: str):
    command = [sys.executable, str(BENCH), "--small", "--rounds", "1", "--json", "--compressed", way]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert told.returncode == 0, told.stderr
    told_rows = json.loads(told.stdout)
    assert told_rows["compressed"] == way
    rows = {row["way"]: row for row in told_rows["rows"]}
    assert list(rows) == ["ours", "pydicom"]
    assert {row["voxels"] for row in rows.values()} == {20 * 128 * 128}
    assert rows["pydicom"]["times_faster"] == 1.0
