"""How many images of each series an archive holds, asked by C-FIND (PS3.4 C.6.2, Study Root, series level)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.status import STATUS_PENDING, code_to_category

from salsa_node.association import taking_turns, without_delay
from salsa_node.settings import QuerySettings

log = logging.getLogger(__name__)

DOWN_S = 60.0  # an archive that does not answer is not asked again for so long
AT_ONCE_S = 0.2  # as long as anybody waits for an archive that answers at once
_REMEMBERED = 1000  # studies
_NEVER = datetime.min.replace(tzinfo=UTC)
_FIND = "1.2.840.10008.5.1.4.1.2.2.1"  # Study Root Query/Retrieve Information Model - FIND


@dataclass(frozen=True, slots=True)
class Answer:
    """What the archive says of one study.

    images: Series Instance UID -> Number of Series Related Instances, of those that it counts.
    silence: why there is no answer; "" where there is one, or nobody was asked.
    is_down: nobody answers there, whatever is asked.
    """

    images: Mapping[str, int] = field(default_factory=dict)
    silence: str = ""
    is_down: bool = False


def ask(settings: QuerySettings, study_uid: str) -> Answer:
    """The archive's counts for that study; empty where no archive is configured, or it does not answer.

    Takes up to four times `timeout_s`: to connect, to associate, for the first match and for all of them.
    """
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
            evt_handlers=[(evt.EVT_CONN_OPEN, without_delay), (evt.EVT_CONN_OPEN, taking_turns)],
        )
    except (RuntimeError, ValueError, OSError) as error:
        return Answer(silence=f"cannot be reached ({type(error).__name__})", is_down=True)
    if not assoc.is_established:
        return Answer(silence="takes no association for C-FIND", is_down=True)
    try:
        until = time.monotonic() + settings.timeout_s
        answers = []
        for answer in assoc.send_c_find(_question(study_uid), _FIND):
            answers.append(answer)
            if time.monotonic() > until:
                assoc.abort()
                break
        return _counts(answers)
    except (RuntimeError, ValueError) as error:
        return Answer(silence=f"takes no C-FIND ({type(error).__name__})", is_down=True)
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
    if status is None or code_to_category(status) == STATUS_PENDING:
        return Answer(silence="did not answer in time", is_down=True)
    return Answer(silence=f"answered status 0x{status:04X}")


class Archive:
    """The archive, asked beside whoever wants to know, so that nothing waits for one that hangs.

    One question at a time, each in a thread of its own; after one without an answer none is asked for DOWN_S.
    """

    def __init__(self, settings: QuerySettings, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._asking_since: datetime | None = None
        self._answers: dict[str, tuple[datetime, Answer]] = {}
        self._down = Answer(silence="did not answer in time", is_down=True)
        self._down_until = _NEVER

    def counts(self, study_uid: str, since: datetime) -> Answer | None:
        """What it says of a study when asked at `since` or later; None while that is being asked."""
        if not self._settings.ae_title:
            return Answer()
        with self._lock:
            now = self._clock()
            asked_at, answer = self._answers.get(study_uid, (_NEVER, self._down))
            if asked_at >= since:
                return answer
            if now < self._down_until or self._hangs(now):
                self._remember(study_uid, now, self._down)
                return self._down
            if self._asking_since is not None:
                return None
            self._asking_since = now
        asking = threading.Thread(target=self._ask, args=(study_uid, now), name="archive", daemon=True)
        asking.start()
        asking.join(AT_ONCE_S)
        with self._lock:
            asked_at, answer = self._answers.get(study_uid, (_NEVER, self._down))
            return answer if asked_at >= since else None

    def latest(self, study_uid: str) -> Answer:
        """What it said of a study when it was last asked; nothing is asked."""
        with self._lock:
            return self._answers.get(study_uid, (_NEVER, Answer()))[1]

    def _hangs(self, now: datetime) -> bool:
        """Whether the question under way takes longer than any of the network's time limits allows."""
        since, limit = self._asking_since, timedelta(seconds=5 * self._settings.timeout_s)
        return since is not None and now - since > limit

    def _ask(self, study_uid: str, now: datetime) -> None:
        answer = self._down
        try:
            answer = ask(self._settings, study_uid)
        finally:
            with self._lock:
                self._asking_since = None
                self._remember(study_uid, now, answer)
                if answer.is_down:
                    self._down, self._down_until = answer, self._clock() + timedelta(seconds=DOWN_S)
        if answer.is_down:
            extra = {"event": "query.down", "ae_title": self._settings.ae_title, "again_in_s": DOWN_S}
            log.warning("the archive %s", answer.silence, extra=extra)

    def _remember(self, study_uid: str, asked_at: datetime, answer: Answer) -> None:
        self._answers.pop(study_uid, None)
        self._answers[study_uid] = (asked_at, answer)
        if len(self._answers) > _REMEMBERED:
            del self._answers[next(iter(self._answers))]
