"""How many images of each series an archive holds, asked by C-FIND (PS3.4 C.6.2, Study Root, series level)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.status import STATUS_PENDING, code_to_category

from salsa_node.association import without_delay
from salsa_node.settings import QuerySettings

_FIND = "1.2.840.10008.5.1.4.1.2.2.1"  # Study Root Query/Retrieve Information Model - FIND


@dataclass(frozen=True, slots=True)
class Answer:
    """What the archive says of one study.

    images: Series Instance UID -> Number of Series Related Instances, of those that it counts.
    silence: why there is no answer; "" where there is one, or nobody was asked.
    """

    images: Mapping[str, int] = field(default_factory=dict)
    silence: str = ""


def ask(settings: QuerySettings, study_uid: str) -> Answer:
    """The archive's counts for that study; empty where no archive is configured, or it does not answer."""
    if not settings.ae_title:
        return Answer()
    ae = AE(settings.calling_ae_title)
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = settings.timeout_s
    ae.add_requested_context(_FIND)
    try:
        assoc = ae.associate(
            settings.host,
            settings.port,
            ae_title=settings.ae_title,
            evt_handlers=[(evt.EVT_CONN_OPEN, without_delay)],
        )
    except (RuntimeError, ValueError, OSError) as error:
        return Answer(silence=f"cannot be reached ({type(error).__name__})")
    if not assoc.is_established:
        return Answer(silence="takes no association for C-FIND")
    try:
        return _counts(list(assoc.send_c_find(_question(study_uid), _FIND)))
    except (RuntimeError, ValueError) as error:
        return Answer(silence=f"takes no C-FIND ({type(error).__name__})")
    finally:
        if assoc.is_established:
            assoc.release()


def _question(study_uid: str) -> Dataset:
    ds = Dataset()
    ds.QueryRetrieveLevel = "SERIES"
    ds.StudyInstanceUID = study_uid
    ds.SeriesInstanceUID = ""
    ds.NumberOfSeriesRelatedInstances = None
    return ds


def _counts(answers: list[tuple[Dataset, Dataset | None]]) -> Answer:
    """The matches, once a final status says that there are no more of them."""
    images: dict[str, int] = {}
    status = None
    for told, match in answers:
        status = told.get("Status")
        if status is not None and code_to_category(status) == STATUS_PENDING and match is not None:
            number = match.get("NumberOfSeriesRelatedInstances")
            if isinstance(number, int) and match.get("SeriesInstanceUID"):
                images[str(match.SeriesInstanceUID)] = int(number)
    if status == 0:
        return Answer(images, "" if images else "counts no images of this study")
    return Answer(silence="did not answer in time" if status is None else f"answered status 0x{status:04X}")
