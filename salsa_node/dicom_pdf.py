"""The summary page -> Encapsulated PDF (PS3.3 A.45.1)."""

from __future__ import annotations

from datetime import datetime

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.uid import EncapsulatedPDFStorage, ExplicitVRLittleEndian

from salsa_node import codes, uids
from salsa_node.dicom_result import Identity, Kind, burned_in, described, named, sign
from salsa_node.pipelines import Provenance


def build(
    pdf: bytes,
    source: Dataset,
    identity: Identity,
    produced_at: datetime,
    run_digest: str,
    provenance: Provenance | None,
) -> Dataset:
    """A valid Encapsulated PDF that holds `pdf`.

    source: the header of any image of the series. produced_at: aware; becomes the object's dates.
    run_digest: the UIDs derive from it.
    """
    title = described("summary", provenance, identity)
    ds = Dataset()
    ds.SOPClassUID = EncapsulatedPDFStorage
    ds.SOPInstanceUID = uids.derive(run_digest, "PDF")
    ds.StudyInstanceUID = source.StudyInstanceUID
    ds.SeriesInstanceUID = uids.derive(run_digest, "PDF", "series")
    ds.SeriesNumber = identity.series_number(Kind.PDF)
    ds.InstanceNumber = 1
    ds.Modality = "DOC"
    ds.ConversionType = "WSD"
    ds.SeriesDescription = ds.DocumentTitle = title
    ds.BurnedInAnnotation = burned_in(source)  # its pictures are drawn from images of that series
    ds.AcquisitionDateTime = None
    ds.ConceptNameCodeSequence = [_item(codes.REPORT_TITLE)]
    reference = Dataset()
    reference.ReferencedSOPClassUID = named(source).SOPClassUID
    reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
    ds.SourceInstanceSequence = [reference]
    ds.MIMETypeOfEncapsulatedDocument = "application/pdf"
    ds.EncapsulatedDocumentLength = len(pdf)
    ds.EncapsulatedDocument = pdf + b"\x00" * (len(pdf) % 2)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    sign(ds, source, identity, produced_at)
    return ds


def _item(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item
