"""What every result object shares: whose it is, when and by what it was made, and the guards on all that.

A result carries the patient and the study of its source as they stand there, character set
included; our own words are ASCII, which every character set holds. Nothing is drawn at random:
UIDs derive from the run, dates from `produced_at`, so the same run gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt
from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from salsa_node import __version__, uids
from salsa_node.errors import EncodingError
from salsa_node.owners import differ, distinct, same_patient_and_study
from salsa_node.pipelines import Provenance
from salsa_node.series import WHOSE
from salsa_node.uids import digest
from salsa_node.volume import Grid

LO_CHARS: Final = 64  # longest Long String (PS3.5 6.2)
SH_CHARS: Final = 16  # longest Short String
CAVEAT: Final = "AI candidate findings. Not a diagnosis."
CAVEAT_BY_PERSON: Final = "Lesions marked by a person, measured by software. Not a diagnosis."
_SIMPLER: Final = dict(zip("·–—‘’“”×³", "---''\"\"x3", strict=True)) | {"≥": ">=", "≤": "<="}
SERIES_APART: Final = 100  # between the Series Numbers of one kind, where it fills several series
_FREE_NUMBERS: Final = 100_000  # above the first Series Number
LABEL_MAP_STORAGE: Final = UID("1.2.840.10008.5.1.4.1.1.66.7")  # Supplement 243; pydicom 3.0 has no name for it
GRID_TOLERANCE: Final = 0.5  # of the smallest voxel side: beyond it another voxel would be the nearest

_EARLIEST, _LATEST = timedelta(hours=-12), timedelta(hours=14)  # of Timezone Offset From UTC (PS3.3 Table C.12-1)

# Type 2 in every composite IOD: present, if need be without a value.
_REQUIRED = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyID",
)
# The rest of the Patient, General Study, Patient Study and Clinical Trial modules (PS3.3 C.7.1, C.7.2).
_OPTIONAL = (
    "IssuerOfPatientID",
    "IssuerOfPatientIDQualifiersSequence",
    "TypeOfPatientID",
    "PatientBirthTime",
    "OtherPatientIDs",
    "OtherPatientIDsSequence",
    "OtherPatientNames",
    "EthnicGroup",
    "PatientComments",
    "QualityControlSubject",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyDescription",
    "IssuerOfAccessionNumberSequence",
    "ReferringPhysicianIdentificationSequence",
    "PhysiciansOfRecord",
    "NameOfPhysiciansReadingStudy",
    "RequestingService",
    "ReferencedStudySequence",
    "ProcedureCodeSequence",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "AdmissionID",
    "IssuerOfAdmissionIDSequence",
    "AdditionalPatientHistory",
    "AdmittingDiagnosesDescription",
    "ClinicalTrialSponsorName",
    "ClinicalTrialProtocolID",
    "ClinicalTrialProtocolName",
    "ClinicalTrialSiteID",
    "ClinicalTrialSiteName",
    "ClinicalTrialSubjectID",
    "ClinicalTrialSubjectReadingID",
    "ClinicalTrialTimePointID",
    "ClinicalTrialTimePointDescription",
)
_DATED = ("Study", "Series", "Acquisition")  # a result is never older than these
_TEXT = ("AS", "CS", "DA", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UT")  # carried over byte by byte
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
# What the segmentation's own headers are made from.
_UIDS = {
    keyword: Tag(keyword) for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
}
_IMAGE = (
    "Modality",
    "Rows",
    "Columns",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    *_LOSSY,
)


#: `produced_at` of what no run stands behind: it is dated as its images, so that the same images give the same bytes
AS_ITS_IMAGES: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Kind(Enum):
    """What a result may consist of; each is a series of its own, or several where one would be too large."""

    SEG = "SEG"  #: the lesions by class
    SR = "SR"  #: the record
    LESION_SEG = "LESION_SEG"  #: one segment per lesion
    VIEWER_SR = "VIEWER_SR"  #: the diameters, as viewers draw them
    SC = "SC"  #: the summary page and the key images, as pictures
    PDF = "PDF"  #: the summary page
    KO = "KO"  #: a selection that points at the source slices
    LABELMAP = "LABELMAP"  #: the lesions by class in one label map, for destinations that ask for it instead of SEG


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """One object of a result.

    name: what its file is called, without suffix; unique within the result.
    """

    kind: Kind
    name: str
    ds: Dataset


@dataclass(frozen=True, slots=True)
class Identity:
    """The equipment that signs the results, and where their series stand in the study.

    All text is ASCII, at most 64 characters (station_name 16). institution_name may be empty.
    revision: 1 for the first result of its study, 2 for the one that takes its place, and so on.
    of_series: the number of the series that was read, where results of others stand beside; else "".
    """

    manufacturer: str = "salsa_node"
    model_name: str = "salsa_node"
    device_serial_number: str = "1"
    station_name: str = "SALSA_NODE"
    institution_name: str = ""
    first_series_number: int = 9001
    software_version: str = __version__
    revision: int = 1
    of_series: str = ""

    def __post_init__(self) -> None:
        for name, limit in (
            ("manufacturer", LO_CHARS),
            ("model_name", LO_CHARS),
            ("device_serial_number", LO_CHARS),
            ("institution_name", LO_CHARS),
            ("software_version", LO_CHARS),
            ("station_name", SH_CHARS),
        ):
            text = getattr(self, name)
            if len(text) > limit or plain(text) != text or "\\" in text:
                raise ValueError(f"{name} must be at most {limit} ASCII characters without a backslash, found {text!r}")
        if not 1 <= self.first_series_number < 2**31 - _FREE_NUMBERS:
            raise ValueError(
                f"first_series_number must be a positive 32-bit number with {_FREE_NUMBERS} free ones from it on, "
                f"found {self.first_series_number}"
            )

    def series_number(self, kind: Kind, part: int = 1) -> int:
        """The Series Number of the objects of this kind, in the order of `Kind`; another series of it lies 100 on."""
        return self.first_series_number + list(Kind).index(kind) + SERIES_APART * (part - 1)

    @property
    def device_uid(self) -> str:
        """The same for the same device, whatever it reports on."""
        return uids.derive("device", self.manufacturer, self.model_name, self.device_serial_number, self.station_name)


def plain(text: str) -> str:
    """`text` in printable ASCII and line breaks: dashes and quotes simplified, anything else as "?"."""
    simpler = "".join(_SIMPLER.get(c, c) for c in text)
    return "".join(c if c == "\n" or " " <= c <= "~" else "?" for c in simpler)


def line(*parts: str, chars: int = LO_CHARS) -> str:
    """The non-empty parts as one Long String, joined by " - "; what is too long ends in "..."."""
    text = " - ".join(plain(part).replace("\\", "/").replace("\n", " ") for part in parts if part)
    return text if len(text) <= chars else text[: chars - 3] + "..."


def caveat(provenance: Provenance | None) -> str:
    """The words of caution that every result of this provenance carries."""
    return CAVEAT_BY_PERSON if provenance is not None and provenance.by_person else CAVEAT


def titled(what: str, provenance: Provenance | None) -> str:
    """How a series of this provenance is called in a list: "AI liver lesions SEG", or whose they are instead."""
    by_person = provenance is not None and provenance.by_person
    return f"Liver lesions {what} by a person" if by_person else f"AI liver lesions {what}"


def described(what: str, provenance: Provenance | None, identity: Identity) -> str:
    """The Series Description: title, revision from the second on, notice; a list of series tells results apart."""
    notice = provenance.notice if provenance is not None else ""
    title = titled(what, provenance)
    series = f", s{identity.of_series}" if identity.of_series else ""
    revision = f", rev {identity.revision}" if identity.revision > 1 else ""
    if notice and (series or revision):  # the longest notice leaves no room for all words
        title = title.replace(" liver lesions" if series else " lesions", "", 1)
    return line(f"{title}{series}{revision}", notice)


def series_read(source: Sequence[Dataset]) -> str:
    """Which series the findings were made from, in words: its number and description, and how many images.

    source: the headers of its images.
    """
    number = source[0].get("SeriesNumber")
    called = plain(str(source[0].get("SeriesDescription") or "")).strip()
    name = " ".join(
        ["series", "without a number" if number is None else str(number)] + ([f'"{called}"'] if called else [])
    )
    return f"Images read: {name}, {len(source)} {'image' if len(source) == 1 else 'images'}."


def replaces(identity: Identity) -> str:
    """That this result takes the place of another one, in words; "" for the first of its study."""
    if identity.revision == 1:
        return ""
    return f"Result {identity.revision} of this study: it takes the place of result {identity.revision - 1}."


def weights(provenance: Provenance) -> tuple[str, ...]:
    """One line for each weight file: its name and the first 12 digits of its SHA-256."""
    return tuple(plain(f"{name} sha256:{digest[:12]}") for name, digest in sorted(provenance.weights_sha256.items()))


def check_source(source: Sequence[Dataset], grid: Grid) -> None:
    """Raises EncodingError unless `source[k]` is slice k of `grid`, all of one patient, study and series."""
    if len(source) != grid.shape[0]:
        raise EncodingError(f"{len(source)} source images for a grid of {grid.shape[0]} slices")
    first = source[0]
    named = first.get("FrameOfReferenceUID")
    if grid.frame_of_reference_uid and named and grid.frame_of_reference_uid != named:
        raise EncodingError(
            f"the findings lie in frame of reference {grid.frame_of_reference_uid}, the source in {named}"
        )
    rows, columns = grid.shape[1:]
    in_common = [(keyword, Tag(keyword)) for keyword in (*WHOSE, "SeriesInstanceUID", "FrameOfReferenceUID")]
    for k in distinct(source, [keyword for keyword, _ in in_common]):
        for keyword, tag in in_common:
            if differ(source[k], first, tag):
                raise EncodingError(f"source images 0 and {k} differ in {keyword}: they are not one series")
    for k, ds in enumerate(source):
        if (ds.get("Rows"), ds.get("Columns")) != (rows, columns):
            raise EncodingError(
                f"source image {k} has {ds.get('Rows')} x {ds.get('Columns')} pixels, not {rows} x {columns}"
            )
    allowed_mm = GRID_TOLERANCE * min(grid.spacing_mm)
    apart_mm = _corners_apart_mm(source, grid)
    for k in np.flatnonzero(apart_mm > allowed_mm)[:1]:
        raise EncodingError(
            f"source image {k} lies {apart_mm[k]:.3f} mm from slice {k} of the findings' grid, "
            f"allowed are {allowed_mm:.3f} mm"
        )


def _corners_apart_mm(source: Sequence[Dataset], grid: Grid) -> npt.NDArray[np.float64]:
    """How far each image lies from its slice, at the worst of its corners."""
    position, orientation, spacing = (
        np.array([_numbers(ds, Tag(keyword), k) for k, ds in enumerate(source)])
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    )
    between_rows, between_columns = spacing[:, :1], spacing[:, 1:]
    slices = grid.along
    worst = np.zeros(len(source))
    for row in (0, grid.shape[1] - 1):
        for column in (0, grid.shape[2] - 1):
            here = position + column * between_columns * orientation[:, :3] + row * between_rows * orientation[:, 3:]
            index = np.stack([slices, np.full_like(slices, row), np.full_like(slices, column), np.ones_like(slices)])
            apart = here - (grid.affine_lps_mm @ index)[:3].T
            worst = np.maximum(worst, np.linalg.norm(apart, axis=1))
    return worst


def _numbers(ds: Dataset, tag: BaseTag, k: int) -> list[float]:
    held = ds.get_item(tag)
    if isinstance(held, RawDataElement) and held.VR == "DS" and b"\\" in (held.value or b""):
        try:
            return [float(text) for text in held.value.split(b"\\")]  # fifty times faster than by way of `ds`
        except ValueError:  # not as the standard writes numbers: pydicom has the say
            pass
    values = ds[tag].value if tag in ds else None
    if values is None:
        raise EncodingError(f"source image {k} has no {keyword_for_tag(tag)}")
    return [float(value) for value in values]


def reference(ds: Dataset) -> Dataset:
    """What a result needs of an image's header, nameless: type 2 patient and study attributes are empty.

    Names and dates are put in afterwards by `sign`, so a value that breaks its own
    representation in the source cannot stop the result.
    """
    stand_in = named(ds)
    for keyword in _IMAGE:
        if keyword in ds:
            element = ds[keyword]
            stand_in.add(DataElement(element.tag, element.VR, element.value, already_converted=True))
    return stand_in


def named(ds: Dataset) -> Dataset:
    """What another object needs to name this instance as evidence, with type 2 attributes empty.

    Raises EncodingError where one of its UIDs is missing.
    """
    stand_in = _uids_of(ds)
    for keyword in _REQUIRED:
        setattr(stand_in, keyword, None)
    return stand_in


def evidence(source: Sequence[Dataset]) -> list[Dataset]:
    """These images as evidence for another object: the first as `named` gives it, the rest as bare UIDs.

    Raises EncodingError where one of the UIDs is missing.
    """
    return [*map(named, source[:1]), *map(_uids_of, source[1:])]


def _uids_of(ds: Dataset) -> Dataset:
    bare = Dataset()
    for keyword, tag in _UIDS.items():
        uid = ds[tag].value if tag in ds else None
        if not uid:
            raise EncodingError(f"the source header has no {keyword}")
        bare.add(DataElement(tag, "UI", uid, already_converted=True))
    return bare


def sign(obj: Dataset, source: Dataset, identity: Identity, produced_at: datetime) -> None:
    """Put the source's patient and study, the equipment and the time of production into `obj`.

    produced_at: aware. Written as the source's own Timezone Offset From UTC says, else in the time zone that it is
    given in, and never as before the study (`local`).
    Raises ValueError for a naive `produced_at`, EncodingError where `obj` ends up with another patient or study.
    """
    correct_ambiguous_vr(obj, True)  # else done in writing, where it would also decode what is carried over as bytes
    for keyword in ("SpecificCharacterSet", "TimezoneOffsetFromUTC", *_REQUIRED, *_OPTIONAL):
        obj.pop(keyword, None)
        element = _element(source, keyword)
        if element is not None and _fit(keyword, element.value):
            obj[Tag(keyword)] = deepcopy(element)
        elif keyword in _REQUIRED:
            setattr(obj, keyword, None)
    if not obj.get("DeidentificationMethod") and not obj.get("DeidentificationMethodCodeSequence"):
        obj.pop("PatientIdentityRemoved", None)  # PS3.3 C.7.1.1: not without the method, which the source keeps back
    when = local(produced_at, source)
    obj.InstanceCreationDate = obj.ContentDate = obj.SeriesDate = when.strftime("%Y%m%d")
    obj.InstanceCreationTime = obj.ContentTime = obj.SeriesTime = when.strftime("%H%M%S.%f")
    obj.pop("ContributingEquipmentSequence", None)  # highdicom's own note on the scanner, dated by the wall clock
    obj.Manufacturer = identity.manufacturer
    obj.ManufacturerModelName = identity.model_name
    obj.DeviceSerialNumber = identity.device_serial_number
    obj.SoftwareVersions = identity.software_version
    obj.StationName = identity.station_name
    if identity.institution_name:
        obj.InstitutionName = identity.institution_name
    # pydicom writes bytes as they are where it believes that they were read in this very encoding.
    named_set = "SpecificCharacterSet" in obj
    encodings = convert_encodings(obj.SpecificCharacterSet) if named_set else default_encoding
    obj.set_original_encoding(is_implicit_vr=False, is_little_endian=True, character_encoding=encodings)
    meta = obj.file_meta
    meta.ImplementationClassUID = UID(uids.IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = uids.IMPLEMENTATION_VERSION_NAME
    same_patient_and_study(obj, source)


def burned_in(image: Dataset) -> str:
    """Burned In Annotation of what is drawn from that image: identity that is burned in there is so here."""
    return "YES" if str(image.get("BurnedInAnnotation") or "").strip().upper() == "YES" else "NO"


def carry_loss(obj: Dataset, image: Dataset) -> None:
    """Say of `obj`, pixels drawn from that image, that they were compressed with loss where the image was.

    What was so once is so for ever (PS3.3 C.7.6.1.1.5).
    """
    if str(image.get("LossyImageCompression") or "").strip() == "01":
        for keyword in _LOSSY:
            if image.get(keyword):
                obj[keyword] = deepcopy(image[keyword])


def _fit(keyword: str, value: object) -> bool:
    """Whether a result may carry it: an optional attribute only with a value, an age only as the standard writes it."""
    text = value.decode("ascii", "replace").strip() if isinstance(value, bytes) else value
    if keyword == "PatientAge":
        return bool(re.fullmatch(r"\d{3}[DWMY]", str(text or "")))  # PS3.5 6.2, value representation AS
    return keyword in _REQUIRED or bool(text)


def _element(source: Dataset, keyword: str) -> DataElement | RawDataElement | None:
    """The source's attribute, text as the very bytes that stand in its file; None where it has none.

    None also for an optional one that cannot be read.
    """
    if keyword not in source:
        return None
    held = source.get_item(Tag(keyword))
    vr = dictionary_VR(keyword)
    if isinstance(held, RawDataElement) and vr in _TEXT and held.VR in (None, "UN", *_TEXT):
        # Only the padding is ours: decoded and encoded again, bytes that their character set lacks would be lost.
        value = (held.value or b"").rstrip(b"\0")
        value += b"" if len(value) % 2 == 0 else b"\0" if vr == "UI" else b" "
        return held._replace(VR=vr, length=len(value), value=value, is_implicit_VR=False, is_little_endian=True)
    try:
        return source[keyword]
    except (BytesLengthException, ValueError, TypeError, OverflowError, NotImplementedError) as exc:
        if keyword in _OPTIONAL:
            return None
        # Not `from exc`: its text would quote the value.
        raise EncodingError(f"the source's {keyword} cannot be read ({type(exc).__name__})") from None


def whose_digest(source: Dataset) -> str:
    """SHA-256 of the patient and study that `sign` carries over: other bytes get other UIDs."""
    carried = []
    for keyword in ("SpecificCharacterSet", "TimezoneOffsetFromUTC", *_REQUIRED, *_OPTIONAL):
        element = _element(source, keyword)
        carried.append("" if element is None else repr(element.value))
    return digest(*carried)


def local(produced_at: datetime, source: Dataset) -> datetime:
    """`produced_at` as the source's dates are: in their time zone, where the source names it, and not before them.

    A result that would be older than its image by the clocks is dated as the image.
    """
    if produced_at.tzinfo is None:
        raise ValueError("produced_at must be an aware datetime")
    when = produced_at
    offset = str(source.get("TimezoneOffsetFromUTC") or "")
    if re.fullmatch(r"[+-][0-9]{2}[0-5][0-9]", offset):
        away = timedelta(hours=int(offset[:3]), minutes=int(offset[0] + offset[3:]))
        if _EARLIEST <= away <= _LATEST:
            when = produced_at.astimezone(timezone(away))
    taken = [_read_date(source, of, when.tzinfo) for of in _DATED]
    return max([when, *(dated for dated in taken if dated is not None)])


def _read_date(source: Dataset, of: str, zone: tzinfo | None) -> datetime | None:
    """The source's date and time of its study, series and the like; None where there is none."""
    day, time = (str(source.get(f"{of}{part}") or "").strip() for part in ("Date", "Time"))
    if not re.fullmatch(r"\d{8}", day, re.ASCII):
        return None
    written = re.match(r"([01]\d|2[0-3])([0-5]\d)?([0-5]\d)?", time, re.ASCII)  # PS3.5 6.2, TM
    hour, minute, second = (int(part or 0) for part in written.groups()) if written else (0, 0, 0)
    try:
        return datetime(int(day[:4]), int(day[4:6]), int(day[6:]), hour, minute, second, tzinfo=zone)
    except ValueError:
        return None
