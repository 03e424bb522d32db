"""Studies back from an archive: found by C-FIND or QIDO-RS, brought by C-GET, C-MOVE to our door, or WADO-RS.

Of a study its CT series are asked for, one by one: an archive also holds our results, dose reports and screenshots, and
one that may not go by C-GET ends the whole request there. What comes by C-GET or WADO-RS is kept as the door keeps it:
file and row on disk before the archive hears Success.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from pynetdicom import build_role, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.status import STATUS_PENDING, STATUS_SUCCESS, STATUS_WARNING, code_to_category

from salsa_node import way_web
from salsa_node.errors import DeliveryError, DestinationRefused
from salsa_node.instance_header import SUCCESS
from salsa_node.intake import Intake, Request
from salsa_node.outgoing import PLAIN
from salsa_node.requestor import accepts, associated
from salsa_node.settings import Destination
from salsa_node.way_dicom import FIND

GET: Final = "1.2.840.10008.5.1.4.1.2.2.3"  # Study Root Query/Retrieve Information Model - GET
MOVE: Final = "1.2.840.10008.5.1.4.1.2.2.2"  # Study Root Query/Retrieve Information Model - MOVE
_UNKNOWN_DESTINATION = 0xA801  # PS3.4 table C.4-2
_Ask = Callable[[Dataset], Iterator[tuple[Dataset, Dataset | None]]]
#: what is brought by C-GET, with the transfer syntaxes of each; an archive converts what it has in another
BROUGHT: Final = {
    CTImageStorage: (
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        JPEGLosslessSV1,
        JPEGLSLossless,
        JPEG2000Lossless,
        RLELossless,
        DeflatedExplicitVRLittleEndian,
    ),
    EnhancedCTImageStorage: (ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless),
    SecondaryCaptureImageStorage: (
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
    ),  # screenshots that call themselves CT
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which studies; an empty field is no condition. study_date: YYYYMMDD, or a range YYYYMMDD-YYYYMMDD."""

    study_uid: str = ""
    accession_number: str = ""
    patient_id: str = field(default="", repr=False)
    study_date: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A study that the archive holds; images: how many instances it counts, None where it does not count."""

    study_uid: str
    accession_number: str
    study_date: str
    images: int | None


@dataclass(frozen=True, slots=True)
class _CtSeries:
    """A series to bring; images: how many instances the archive counts, 1 where it does not count."""

    series_uid: str
    images: int


@dataclass(frozen=True, slots=True)
class Brought:
    """What came of the CT of one study: by which way, how many instances were taken, how many were not."""

    by: str
    taken: int
    failed: int


def find(source: Destination, wanted: Wanted, timeout_s: float) -> tuple[Found, ...]:
    """The studies there, oldest first. Raises DeliveryError where there is no answer, DestinationRefused for no way.

    Each condition is held against each answer: a service may pass over a key that it does not know (PS3.18 8.3.4), and
    would name every study that it holds. Raises DestinationRefused where it has named others alone.
    """
    if source.url:
        with way_web.opened(source, timeout_s) as web:
            named = [_plain(item) for item in web.studies(_web_query(wanted))]
    else:
        named = list(_matches(source, _identifier(wanted), timeout_s))
    found = [_found(match) for match in named if _is_wanted(match, wanted)]
    if named and not found:
        raise DestinationRefused(
            f"{source.name}: named {len(named)} studies and none that was asked for; it may not match by these keys: "
            "name the study by its UID"
        )
    return tuple(sorted(found, key=lambda one: (one.study_date, one.study_uid)))


def bring(
    source: Destination, study_uid: str, intake: Intake, our_title: str, timeout_s: float, by: str = "auto"
) -> Brought:
    """The CT of a study: by "get" or "move", "auto" for the first that is offered; a url has one way of its own.

    our_title: the AE title of our door, to which C-MOVE sends; a node must listen there.
    Raises DeliveryError where nothing came, DestinationRefused where there is no such way or no CT.
    """
    if source.url:
        return _by_web(source, study_uid, intake, our_title, timeout_s)
    if source.folder:
        raise DestinationRefused(f"{source.name}: nothing can be fetched from a folder")
    series = _ct_series(source, study_uid, _series_by_find(source, study_uid, timeout_s))
    if by in ("auto", "get"):
        brought = _by_get(source, study_uid, series, intake, our_title, timeout_s)
        if brought is not None:
            return brought
        if by == "get":
            raise DestinationRefused(f"{source.name}: offers no C-GET; try --by move")
    return _by_move(source, study_uid, series, our_title, timeout_s)


def _identifier(wanted: Wanted) -> Dataset:
    ds = Dataset()
    ds.QueryRetrieveLevel = "STUDY"
    ds.StudyInstanceUID, ds.AccessionNumber = wanted.study_uid, wanted.accession_number
    ds.PatientID, ds.StudyDate = wanted.patient_id, wanted.study_date
    ds.NumberOfStudyRelatedInstances = None
    return ds


def _is_wanted(match: Dataset, wanted: Wanted) -> bool:
    """Whether a study that an archive names meets the conditions (PS3.4 C.2.2.2: values, wild cards, date ranges)."""
    study_uid, study_date = (str(match.get(key) or "").strip() for key in ("StudyInstanceUID", "StudyDate"))
    if not study_uid or wanted.study_uid not in ("", study_uid):
        return False
    for key, asked in (("AccessionNumber", wanted.accession_number), ("PatientID", wanted.patient_id)):
        pattern = re.escape(asked).replace(r"\*", ".*").replace(r"\?", ".")
        if asked and not re.fullmatch(pattern, str(match.get(key) or "").strip()):
            return False
    first, is_range, last = wanted.study_date.partition("-")
    last = (last or "99991231") if is_range else first
    return not wanted.study_date or (bool(study_date) and first <= study_date <= last)


def _matches(source: Destination, identifier: Dataset, timeout_s: float) -> Iterator[Dataset]:
    with associated(source, [(FIND, syntax) for syntax in PLAIN], timeout_s) as assoc:
        if not accepts(assoc, FIND):
            raise DestinationRefused(f"{source.name}: offers no C-FIND; allow our AE title to query there")
        last = None
        for told, match in assoc.send_c_find(identifier, FIND):
            last = told.get("Status")
            if match is not None and last is not None and code_to_category(last) == STATUS_PENDING:
                yield match
        _require_end(source, "C-FIND", last)


def _series_by_find(source: Destination, study_uid: str, timeout_s: float) -> Iterator[Dataset]:
    ds = Dataset()
    ds.QueryRetrieveLevel = "SERIES"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study_uid, None
    ds.Modality, ds.NumberOfSeriesRelatedInstances = None, None
    return _matches(source, ds, timeout_s)


def _ct_series(source: Destination, study_uid: str, matches: Iterable[Dataset]) -> tuple[_CtSeries, ...]:
    """Those that are CT, or of which the archive does not say. Raises DestinationRefused for none."""
    series, others = [], set()
    for match in matches:
        if match.get("StudyInstanceUID") not in (None, "", study_uid):
            continue  # not what was asked for
        modality, number = str(match.get("Modality") or ""), match.get("NumberOfSeriesRelatedInstances")
        if modality not in ("CT", ""):
            others.add(modality)
        elif match.get("SeriesInstanceUID"):
            series.append(_CtSeries(str(match.SeriesInstanceUID), 1 if number in (None, "") else int(number)))
    if not series:
        held = f"{', '.join(sorted(others))} of it, and no CT" if others else "no series of it"
        raise DestinationRefused(f"{source.name}: holds {held}; nothing to fetch of study {study_uid}")
    return tuple(series)


def _found(match: Dataset) -> Found:
    number = match.get("NumberOfStudyRelatedInstances")
    return Found(
        str(match.get("StudyInstanceUID") or ""),
        str(match.get("AccessionNumber") or ""),
        str(match.get("StudyDate") or ""),
        None if number in (None, "") else int(number),
    )


def _by_get(
    source: Destination,
    study_uid: str,
    series: Iterable[_CtSeries],
    intake: Intake,
    our_title: str,
    timeout_s: float,
) -> Brought | None:
    """None where the archive offers no C-GET."""
    contexts: list[tuple[str, UID | str]] = [(GET, syntax) for syntax in PLAIN]
    contexts += [(str(sop_class), syntax) for sop_class, syntaxes in BROUGHT.items() for syntax in syntaxes]
    roles = [build_role(sop_class, scu_role=False, scp_role=True) for sop_class in BROUGHT]
    statuses: list[int] = []

    def keep(event: evt.Event) -> int:
        request = event.request
        assert isinstance(request, C_STORE), "pynetdicom triggers EVT_C_STORE for C-STORE requests alone"
        incoming = intake.begin(
            Request(
                sop_class_uid=str(request.AffectedSOPClassUID or ""),
                sop_instance_uid=str(request.AffectedSOPInstanceUID or ""),
                context_sop_class_uid=str(event.context.abstract_syntax),
                transfer_syntax=event.context.transfer_syntax,
                sender=source.ae_title,
                called=our_title,
            )
        )
        incoming.write([request.DataSet.getbuffer()] if request.DataSet else [])
        statuses.append(intake.take(incoming)[0])
        return statuses[-1]

    with associated(source, contexts, timeout_s, roles=roles, handlers=[(evt.EVT_C_STORE, keep)]) as assoc:
        if not accepts(assoc, GET):
            return None
        _, failed = _retrieved(source, "C-GET", study_uid, series, lambda ds: assoc.send_c_get(ds, GET))
    refused = len([status for status in statuses if status != SUCCESS])
    return Brought("C-GET", len(statuses) - refused, max(failed, refused))


def _by_move(
    source: Destination, study_uid: str, series: Iterable[_CtSeries], our_title: str, timeout_s: float
) -> Brought:
    with associated(source, [(MOVE, syntax) for syntax in PLAIN], timeout_s) as assoc:
        if not accepts(assoc, MOVE):
            raise DestinationRefused(f"{source.name}: offers neither C-GET nor C-MOVE to us; allow one there")
        what = f"C-MOVE to {our_title}"
        ask: _Ask = lambda ds: assoc.send_c_move(ds, our_title, MOVE)  # noqa: E731
        return Brought("C-MOVE", *_retrieved(source, what, study_uid, series, ask))


def _retrieved(
    source: Destination, what: str, study_uid: str, series: Iterable[_CtSeries], ask: _Ask
) -> tuple[int, int]:
    """How many instances went and how many did not, of all those series. Raises DeliveryError where each failed."""
    taken, failed = 0, 0
    fault, is_any_done = None, False
    for one in series:
        ds = Dataset()
        ds.QueryRetrieveLevel, ds.StudyInstanceUID, ds.SeriesInstanceUID = "SERIES", study_uid, one.series_uid
        last, went, missed = None, 0, 0
        try:
            for told, _ in ask(ds):
                last = told.get("Status")
                went = int(told.get("NumberOfCompletedSuboperations") or went)
                missed = int(told.get("NumberOfFailedSuboperations") or missed)
            _require_end(source, what, last)
            is_any_done = True
        except (DeliveryError, RuntimeError) as error:  # pynetdicom's RuntimeError: the association has ended
            fault, missed = fault or error, max(missed, one.images - went)
        taken, failed = taken + went, failed + missed
    if fault is not None and not is_any_done:
        raise fault if isinstance(fault, DeliveryError) else DeliveryError(f"{source.name}: {what}: {fault}")
    return taken, failed


def _require_end(source: Destination, what: str, status: int | None) -> None:
    """Raises DeliveryError unless that was the last word on a request, and not a refusal."""
    if status is None:
        raise DeliveryError(f"{source.name}: the association ended without an answer to {what}")
    if status == _UNKNOWN_DESTINATION:
        raise DeliveryError(f"{source.name}: {what}: does not know where that is; tell it our host and port", status)
    if code_to_category(status) not in (STATUS_SUCCESS, STATUS_WARNING):
        raise DeliveryError(f"{source.name}: status 0x{status:04X} to {what}", status)


def _web_query(wanted: Wanted) -> dict[str, str]:
    conditions = {
        "StudyInstanceUID": wanted.study_uid,
        "AccessionNumber": wanted.accession_number,
        "PatientID": wanted.patient_id,
        "StudyDate": wanted.study_date,
    }
    return {name: value for name, value in conditions.items() if value}


def _plain(item: dict[str, object]) -> Dataset:
    return Dataset.from_json(item, lambda *_: None)


def _by_web(source: Destination, study_uid: str, intake: Intake, our_title: str, timeout_s: float) -> Brought:
    taken = failed = 0
    with way_web.opened(source, timeout_s) as web:
        matches = (_plain(item) for item in web.series(study_uid))
        for content in chain.from_iterable(
            web.instances(study_uid, one.series_uid) for one in _ct_series(source, study_uid, matches)
        ):
            is_kept = _keep_file(content, intake, source, our_title)
            taken, failed = taken + is_kept, failed + (not is_kept)
    return Brought("WADO-RS", taken, failed)


def _keep_file(content: bytes, intake: Intake, source: Destination, our_title: str) -> bool:
    """Whether a DICOM file (PS3.10) was taken, as if it had come through the door."""
    meta, offset = way_web.meta_of(content)
    sop_class = str(meta.get("MediaStorageSOPClassUID", ""))
    request = Request(
        sop_class_uid=sop_class,
        sop_instance_uid=str(meta.get("MediaStorageSOPInstanceUID", "")),
        context_sop_class_uid=sop_class,
        transfer_syntax=UID(str(meta.get("TransferSyntaxUID", ""))),
        sender=source.ae_title,
        called=our_title,
    )
    incoming = intake.begin(request)
    incoming.write([memoryview(content)[offset:]])
    return intake.take(incoming)[0] == SUCCESS
