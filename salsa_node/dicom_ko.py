"""Findings -> a Key Object Selection that points at the slices where the lesions' diameters lie, and at their SEG."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from pydicom.dataset import Dataset

from salsa_node import codes, uids
from salsa_node.dicom_result import Identity, Kind, caveat, described, plain, reference, replaces, sign
from salsa_node.errors import EncodingError
from salsa_node.findings import Findings


def build(
    findings: Findings, segs: Sequence[Dataset], source: Sequence[Dataset], identity: Identity, produced_at: datetime
) -> Dataset | None:
    """A valid selection "Of Interest", or None where there is no lesion.

    segs: the segmentations of the same findings.
    source: the headers of the images the findings were made from, in slice order along the grid.
    produced_at: aware; becomes the object's dates.
    Raises EncodingError where it cannot be put together.
    """
    if not findings.lesions:
        return None
    # With their sizes, by which highdicom tells images from other objects.
    slices = [reference(source[k]) for k in sorted({lesion.slice_index for lesion in findings.lesions})]
    evidence = [*slices, *segs]
    provenance = findings.provenance
    words = " ".join(part for part in (caveat(provenance), provenance.notice, replaces(identity)) if part)
    try:
        selection: Dataset = KeyObjectSelectionDocument(
            evidence=evidence,
            content=KeyObjectSelection(codes.OF_INTEREST, evidence, description=plain(words)),
            series_instance_uid=uids.derive(findings.run_digest, "KO", "series"),
            series_number=identity.series_number(Kind.KO),
            sop_instance_uid=uids.derive(findings.run_digest, "KO"),
            instance_number=1,
            manufacturer=identity.manufacturer,
        )
    except (ValueError, TypeError, AttributeError) as exc:
        raise EncodingError(f"the key object selection could not be put together ({type(exc).__name__})") from exc
    for item in selection.ContentSequence:
        if item.ValueType == "IMAGE":
            del item.ConceptNameCodeSequence  # highdicom names it "Source"; TID 2010 leaves it without a name
    selection.SeriesDescription = described("key objects", provenance, identity)
    sign(selection, source[0], identity, produced_at)
    return selection
