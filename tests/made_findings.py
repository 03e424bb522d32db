"""A small CT series with drawn lesions, as headers and as findings: what the result tests start from."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from salsa_node import series, uids
from salsa_node.criteria import Criteria
from salsa_node.findings import Findings, measure
from salsa_node.pipelines import DEMO_NOTICE, Masks, Provenance
from salsa_node.volume import CtVolume, Grid, LabelVolume

assert series  # imported because reading a series sets how pydicom treats odd values

PRODUCED_AT = datetime(2026, 11, 20, 22, 30, 15, 250000, tzinfo=UTC)
PROVENANCE = Provenance(
    pipeline="demo",
    version="0.1.0",
    weights_sha256={"liver/checkpoint_final.pth": "a" * 64, "lesions/checkpoint_final.pth": "0123456789ab" + "c" * 52},
    notice=DEMO_NOTICE,
)
SHAPE = (20, 48, 40)
MEASURABLE_BOX = (slice(5, 10), slice(10, 24), slice(8, 20))
SMALL_BOX = (slice(14, 16), slice(30, 33), slice(25, 28))

#: name -> rows of (slice, row, column) directions in LPS; "cosines" of an oblique one are made below.
ORIENTATIONS = {
    "axial": ((0, 0, 1), (0, 1, 0), (1, 0, 0)),
    "axial from head to feet": ((0, 0, -1), (0, 1, 0), (1, 0, 0)),
    "feet first, turned over": ((0, 0, 1), (0, -1, 0), (-1, 0, 0)),
    "negated column cosines": ((0, 0, 1), (0, -1, 0), (1, 0, 0)),
    "coronal": ((0, 1, 0), (0, 0, -1), (1, 0, 0)),
    "sagittal": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "oblique": None,
}


def grid(orientation: str = "axial", spacing_mm: tuple[float, float, float] = (2.5, 0.9, 1.1)) -> Grid:
    directions = ORIENTATIONS[orientation]
    if directions is None:
        a, b = np.deg2rad(20), np.deg2rad(-11)
        about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
        about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
        axes = about_x @ about_z @ np.array(ORIENTATIONS["axial"]).T
    else:
        axes = np.array(directions, dtype=float).T
    affine = np.eye(4)
    affine[:3, :3] = axes * np.array(spacing_mm)
    affine[:3, 3] = (-31.5, 12.25, -400.75)
    return Grid(SHAPE, affine, uids.derive("made", "frame"))


def headers(where: Grid, *, instance_numbers: str = "rising") -> list[Dataset]:
    """CT headers without pixels, in slice order of `where`."""
    directions = where.affine_lps_mm[:3, :3] / np.array(where.spacing_mm)
    made = []
    for k in range(where.shape[0]):
        ds = Dataset()
        ds.SpecificCharacterSet = "ISO_IR 100"
        ds.SOPClassUID = CTImageStorage
        ds.SOPInstanceUID = uids.derive("made", str(k), repr(where.affine_lps_mm.tolist()))
        ds.StudyInstanceUID = uids.derive("made", "study")
        ds.SeriesInstanceUID = uids.derive("made", "series")
        ds.FrameOfReferenceUID = where.frame_of_reference_uid
        ds.PositionReferenceIndicator = ""
        ds.Modality = "CT"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.PatientName = "Müller^Grün"
        ds.PatientID = "P-1"
        ds.PatientBirthDate = "19600102"
        ds.PatientSex = "F"
        ds.StudyDate, ds.StudyTime = "20261119", "101112"
        ds.AccessionNumber = "A-17"
        ds.StudyID = "4"
        ds.StudyDescription = "CT Oberbauch für Leber"
        ds.ReferringPhysicianName = "Arzt^Jürg"
        ds.SeriesNumber = 3
        ds.InstanceNumber = k + 1 if instance_numbers == "rising" else where.shape[0] - k
        ds.Rows, ds.Columns = where.shape[1:]
        ds.PixelSpacing = [where.spacing_mm[1], where.spacing_mm[2]]
        ds.SliceThickness = 5.0  # unlike the spacing, on purpose
        ds.ImageOrientationPatient = [f"{x:.10f}"[:16] for x in (*directions[:, 2], *directions[:, 1])]
        ds.ImagePositionPatient = [f"{x:.8f}"[:16] for x in where.to_lps_mm((k, 0, 0))]
        made.append(ds)
    return made


def boxes(where: Grid, *drawn: tuple[slice, slice, slice]) -> LabelVolume:
    labels = np.zeros(where.shape, dtype=np.uint16)
    for number, box in enumerate(drawn, start=1):
        labels[box] = number
    return LabelVolume(labels, where)


def findings(
    where: Grid,
    source: list[Dataset],
    *drawn: tuple[slice, slice, slice],
    criteria: Criteria | None = None,
    provenance: Provenance = PROVENANCE,
    with_organ: bool = True,
) -> Findings:
    rng = np.random.default_rng(7)
    voxels = rng.normal(100, 10, where.shape).astype(np.int16)
    ct = CtVolume(voxels, where, tuple(ds.SOPInstanceUID for ds in source))
    organ = boxes(where, (slice(2, 17), slice(5, 44), slice(4, 33))) if with_organ else None
    return measure(ct, Masks(organ, boxes(where, *drawn), provenance), criteria or Criteria())


def case(orientation: str = "axial", **kwargs) -> tuple[Findings, list[Dataset]]:
    """One measurable and one non-measurable lesion, and the headers they were found in."""
    where = grid(orientation)
    source = headers(where)
    return findings(where, source, MEASURABLE_BOX, SMALL_BOX, **kwargs), source


def with_meta(ds: Dataset) -> Dataset:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds
