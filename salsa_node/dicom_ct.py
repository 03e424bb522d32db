"""A CtVolume as a CT Image Storage series on disk (PS3.3 A.3), one file per slice.

Each slice keeps its place in the patient: the position and orientation come from the grid's affine, so a
reader that sorts by position finds the very same voxels at the very same points. Explicit VR little endian,
16 bit signed, rescale 1 and 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from salsa_node.errors import EncodingError
from salsa_node.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, derive
from salsa_node.volume import CtVolume, Grid

_ORTHOGONAL_TOLERANCE = 1e-3  # of a cosine; a DS of 16 characters carries far more


@dataclass(frozen=True, slots=True)
class CtHeader:
    """What a CT series says beside its voxels.

    patient_birth_date: YYYYMMDD, or empty.
    acquired: goes into study, series, acquisition and content date and time, as it stands.
    image_type: three or more values; the third is AXIAL or LOCALIZER (PS3.3 C.8.2.1.1.1).
    patient_position: how the patient lay in the scanner, "HFS" for most.
    """

    study_uid: str
    series_uid: str
    patient_name: str
    patient_id: str
    acquired: datetime
    patient_birth_date: str = ""
    patient_sex: str = ""
    accession_number: str = ""
    study_id: str = "1"
    study_description: str = ""
    series_description: str = ""
    series_number: int = 1
    image_type: tuple[str, ...] = ("ORIGINAL", "PRIMARY", "AXIAL")
    patient_position: str = "HFS"
    manufacturer: str = "salsa_node"
    body_part: str = "ABDOMEN"
    kvp: float = 120.0


def write(ct: CtVolume, folder: Path, header: CtHeader) -> tuple[Path, ...]:
    """Writes one file per slice into `folder` (made where absent) and returns them in slice order.

    SOP Instance UIDs are those of `ct`, or derive from the series UID and the slice number where `ct` has
    none; likewise the frame of reference. Raises EncodingError where the axes are not at right angles or a
    CT number does not fit 16 bits.
    """
    pixels = _as_int16(ct)
    rows_cosines, columns_cosines = _cosines(ct.grid)
    folder.mkdir(parents=True, exist_ok=True)
    uids = ct.slice_sop_uids or tuple(derive(header.series_uid, "slice", str(n)) for n in range(ct.grid.shape[0]))
    paths = []
    for index, sop_instance_uid in enumerate(uids):
        ds = _identity(header)
        ds.SOPClassUID = CTImageStorage
        ds.SOPInstanceUID = UID(sop_instance_uid)
        ds.InstanceNumber = index + 1
        _place(ds, ct.grid, index, header.series_uid, columns_cosines, rows_cosines)
        _put_pixels(ds, pixels[index])
        ds.RescaleType = "US" if "LOCALIZER" in header.image_type else "HU"
        path = folder / f"ct{index + 1:04d}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return tuple(paths)


def _as_int16(ct: CtVolume) -> npt.NDArray[np.int16]:
    voxels = ct.voxels_hu
    if voxels.dtype == np.int16:
        return voxels.astype(np.int16, copy=False)
    if not np.isfinite(voxels).all():
        raise EncodingError("the volume holds voxels that are not finite numbers; CT numbers were expected")
    low, high = float(voxels.min()), float(voxels.max())
    if low < -32768 or high > 32767:
        raise EncodingError(f"CT numbers from {low:g} to {high:g} HU do not fit 16 bits (-32768 to 32767)")
    return np.rint(voxels).astype(np.int16)


def _cosines(grid: Grid) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Unit vectors along increasing row and increasing column index."""
    axes = grid.affine_lps_mm[:3, :3] / np.array(grid.spacing_mm)
    across = np.abs(axes.T @ axes - np.eye(3)).max()
    if across > _ORTHOGONAL_TOLERANCE:
        raise EncodingError(
            f"the grid's axes are not at right angles (cosine {across:.4f} between two of them); "
            "a CT series needs a grid without shear: resample it first"
        )
    return axes[:, 1], axes[:, 2]


def _identity(header: CtHeader) -> Dataset:
    """Patient, study, series, equipment and acquisition, the same in every slice."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    ds.file_meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    ds.SpecificCharacterSet = "ISO_IR 192"
    date, time = header.acquired.strftime("%Y%m%d"), header.acquired.strftime("%H%M%S")
    for when in ("InstanceCreation", "Study", "Series", "Acquisition", "Content"):
        setattr(ds, f"{when}Date", date)
        setattr(ds, f"{when}Time", time)
    ds.Modality = "CT"
    ds.ImageType = list(header.image_type)
    ds.AccessionNumber = header.accession_number
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = header.study_description
    ds.SeriesDescription = header.series_description
    ds.Manufacturer = header.manufacturer
    ds.PatientName = header.patient_name
    ds.PatientID = header.patient_id
    ds.PatientBirthDate = header.patient_birth_date
    ds.PatientSex = header.patient_sex
    ds.StudyInstanceUID = header.study_uid
    ds.SeriesInstanceUID = header.series_uid
    ds.StudyID = header.study_id
    ds.SeriesNumber = header.series_number
    ds.AcquisitionNumber = 1
    ds.BodyPartExamined = header.body_part  # an unpaired part: without one Laterality would be due (PS3.3 C.7.3.1)
    ds.KVP = header.kvp
    ds.PatientPosition = header.patient_position
    return ds


def _place(
    ds: Dataset,
    grid: Grid,
    index: int,
    series_uid: str,
    columns_cosines: npt.NDArray[np.float64],
    rows_cosines: npt.NDArray[np.float64],
) -> None:
    """Image plane module (PS3.3 C.7.6.2): the first three cosines run along a row, that is, with the column index."""
    position = grid.to_lps_mm((index, 0, 0))
    slice_mm, row_mm, column_mm = grid.spacing_mm
    normal = np.cross(columns_cosines, rows_cosines)
    ds.ImagePositionPatient = [_decimal(value) for value in position]
    ds.ImageOrientationPatient = [_decimal(value) for value in (*columns_cosines, *rows_cosines)]
    ds.PixelSpacing = [_decimal(row_mm), _decimal(column_mm)]
    ds.SliceThickness = _decimal(slice_mm)
    ds.SliceLocation = _decimal(float(np.dot(normal, position)))
    ds.FrameOfReferenceUID = UID(grid.frame_of_reference_uid or derive(series_uid, "frame of reference"))
    ds.PositionReferenceIndicator = ""


def _decimal(value: float) -> str:
    """A DS of at most 16 characters; no minus sign on a zero."""
    return format_number_as_ds(round(float(value), 10) + 0.0)


def _put_pixels(ds: Dataset, pixels: npt.NDArray[np.int16]) -> None:
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleIntercept, ds.RescaleSlope = 0, 1
    ds.WindowCenter, ds.WindowWidth = 60, 400
    ds.set_pixel_data(np.ascontiguousarray(pixels), "MONOCHROME2", 16, generate_instance_uid=False)
