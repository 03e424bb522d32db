"""The summary page and the key images -> Secondary Captures, for viewers that show neither SEG nor SR.

All of a result form one series: the pages first, then one picture per slice. No identity is burned in but what the
images themselves have.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
import numpy.typing as npt
from highdicom.sc import SCImage
from pydicom.dataset import Dataset

from salsa_node import uids
from salsa_node.dicom_result import Identity, Kind, burned_in, carry_loss, described, line, named, sign
from salsa_node.errors import EncodingError
from salsa_node.pipelines import Provenance

Pixels = npt.NDArray[np.uint8]


def build(
    pictures: Sequence[tuple[Pixels, Dataset | None]],
    source: Dataset,
    identity: Identity,
    produced_at: datetime,
    run_digest: str,
    provenance: Provenance | None,
) -> tuple[Dataset, ...]:
    """One valid Secondary Capture for each picture, in order.

    pictures: (rows, columns, 3) of 8-bit RGB, each with the header of the image it shows, or None for a page.
    source: the header of any image of the series. produced_at: aware; becomes the objects' dates.
    run_digest: the UIDs derive from it.
    Raises EncodingError where an object cannot be put together.
    """
    return tuple(
        _capture(number, pixels, shown, source, identity, produced_at, run_digest, provenance)
        for number, (pixels, shown) in enumerate(pictures, start=1)
    )


def _capture(
    number: int,
    pixels: Pixels,
    shown: Dataset | None,
    source: Dataset,
    identity: Identity,
    produced_at: datetime,
    run_digest: str,
    provenance: Provenance | None,
) -> Dataset:
    try:
        capture: Dataset = SCImage(
            pixel_array=pixels,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            study_instance_uid=source.StudyInstanceUID,
            series_instance_uid=uids.derive(run_digest, "SC", "series"),
            series_number=identity.series_number(Kind.SC),
            sop_instance_uid=uids.derive(run_digest, "SC", str(number)),
            instance_number=number,
            manufacturer=identity.manufacturer,
            patient_orientation=("L", "F"),
        )
    except (ValueError, TypeError, AttributeError) as exc:
        raise EncodingError(f"a summary picture could not be put together ({type(exc).__name__})") from exc
    capture.PatientOrientation = None  # a page of words; tiles of a key image carry their own letters
    capture.Modality = "OT"
    capture.ConversionType = "WSD"
    capture.ImageType = ["DERIVED", "SECONDARY"]
    drawn_from = source if shown is None else shown  # a page may hold pictures of any slice
    capture.BurnedInAnnotation = burned_in(drawn_from)
    carry_loss(capture, drawn_from)
    capture.BodyPartExamined = "ABDOMEN"  # the source's word may be one of a paired part, which asks for a side
    capture.SeriesDescription = described("summary", provenance, identity)
    capture.DerivationDescription = line(
        "summary page" if shown is None else "slice with lesion outlines and diameters"
    )
    if shown is not None:
        reference = Dataset()
        reference.ReferencedSOPClassUID = named(shown).SOPClassUID
        reference.ReferencedSOPInstanceUID = shown.SOPInstanceUID
        capture.SourceImageSequence = [reference]
    sign(capture, source, identity, produced_at)
    capture.DateOfSecondaryCapture, capture.TimeOfSecondaryCapture = capture.ContentDate, capture.ContentTime
    return capture
