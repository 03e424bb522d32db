"""CT series on disk for tests: small ones of known voxels, and copies of public ones that can be told apart."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import generate_uid

from salsa_node.dicom_ct import CtHeader, write
from salsa_node.volume import CtVolume, Grid

HEADER = CtHeader("2.25.1", "2.25.2", "Nobody^Known", "X-1", datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC))
AXIAL = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=float).T  # columns: slice, row, column direction
TURNED = np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))[0]

ORIENTATIONS = {
    "axial": AXIAL,
    "head to feet": AXIAL * (-1, 1, 1),
    "prone, feet first": np.array([[0, 0, 1], [0, -1, 0], [-1, 0, 0]], dtype=float).T,
    "coronal": np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0]], dtype=float).T,
    "sagittal": np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=float).T,
    "oblique": TURNED,
    "oblique, mirrored": TURNED * (-1, 1, 1),
}


def made(folder: Path, axes: np.ndarray = AXIAL, slices: int = 6, step_mm: float = 2.5) -> tuple[CtVolume, list[Path]]:
    affine = np.eye(4)
    affine[:3, :3] = axes * (step_mm, 0.7, 0.9)
    affine[:3, 3] = (-100.25, 20.125, 900.5)
    voxels = np.random.default_rng(1).integers(-1000, 1500, (slices, 12, 10)).astype(np.int16)
    ct = CtVolume(voxels, Grid(voxels.shape, affine, "2.25.3"))
    return ct, list(write(ct, folder, HEADER))


def edit(path: Path, change: Callable[[pydicom.Dataset], object]) -> None:
    ds = pydicom.dcmread(path)
    change(ds)
    ds.save_as(path)


def move(path: Path, *by_mm: float) -> None:
    edit(
        path,
        lambda ds: setattr(
            ds, "ImagePositionPatient", [float(x) + d for x, d in zip(ds.ImagePositionPatient, by_mm, strict=True)]
        ),
    )


def files(path: Path) -> list[Path]:
    beside = {"LICENSE", "DIRFILE", "info.txt"}
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name not in beside)


def given_uids(paths: list[Path], folder: Path, **also: object) -> list[Path]:
    """Copies with UIDs of their own, as an archive needs them; pixels untouched."""
    study, series = generate_uid(), generate_uid()
    copies = []
    for n, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = study, series, generate_uid()
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID
        for keyword, value in also.items():
            setattr(ds, keyword, value)
        copies.append(folder / f"{n}.dcm")
        ds.save_as(copies[-1])
    return copies
