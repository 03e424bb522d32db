"""What the store remembers: the rows as frozen values, the tables behind them, and the states a row may take.

Rows hold UIDs, counts, times and reasons; of the patient only the identifiers that a person needs to
find the study again (`Study.patient_id`, `Study.accession_number`), and those never enter an event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from salsa_node.store_columns import METADATA as METADATA
from salsa_node.store_columns import UtcDateTime as UtcDateTime
from salsa_node.store_columns import state
from salsa_node.store_states import TRANSITIONS as TRANSITIONS  # a row is told by its state
from salsa_node.store_states import DeliveryState as DeliveryState
from salsa_node.store_states import RunState as RunState
from salsa_node.store_states import SeriesState as SeriesState
from salsa_node.store_states import State as State


@dataclass(frozen=True, slots=True)
class Study:
    """One study as it arrived.

    calling_ae: the AE title that sent the newest instance; "sender" destinations go back there.
    called_ae: the AE title of ours that its sender called, "" where that was not noted.
    study_date: as in the data set (YYYYMMDD), "" where absent.
    instances: how many instances are stored; assembled_instances: how many there were when the
        study was last looked at for something to analyse.
    """

    study_uid: str
    calling_ae: str
    accession_number: str
    patient_id: str
    study_date: str
    first_at: datetime
    last_at: datetime
    instances: int
    assembled_instances: int
    called_ae: str


@dataclass(frozen=True, slots=True)
class Series:
    """One series of a study; `reason` says why it is REJECTED, "" otherwise.

    duplicates: how often an instance came again with the same content.
    """

    series_uid: str
    study_uid: str
    modality: str
    series_number: int | None
    state: SeriesState
    reason: str
    instances: int
    duplicates: int
    last_instance_at: datetime


@dataclass(frozen=True, slots=True)
class Instance:
    """One stored file.

    path: relative to the data folder, with forward slashes.
    digest: XXH3 (128 bits) of the data set as received, without the file meta information; "" where it is not known.
    size_bytes: of the file.
    """

    sop_instance_uid: str
    series_uid: str
    study_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: str
    digest: str
    size_bytes: int
    received_at: datetime


@dataclass(frozen=True, slots=True)
class NewInstance:
    """An instance that lies on disk and asks for its row; fields as in `Instance`, `Series` and `Study`."""

    sop_instance_uid: str
    series_uid: str
    study_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: str
    digest: str
    size_bytes: int
    calling_ae: str
    modality: str = ""
    series_number: int | None = None
    accession_number: str = ""
    patient_id: str = ""
    study_date: str = ""
    called_ae: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What became of an instance: a new row, or (`is_new` false) the row of the same content that was there."""

    instance: Instance
    is_new: bool


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A file set aside because it contradicts what is stored; fields as in `NewInstance`.

    reason: what it contradicts; times: how often the same content came for the same reason.
    """

    id: int
    study_uid: str
    series_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: str
    digest: str
    size_bytes: int
    calling_ae: str
    reason: str
    times: int
    received_at: datetime


@dataclass(frozen=True, slots=True)
class Run:
    """One series through one pipeline once.

    refusal: why nothing can be analysed; the worker then only writes a "not analysed" report.
    source_digest: what decides the input; see `salsa_node.series.Series.source_digest`.
    forced: a person asked for it, so assembly must not take its own last run for outdated.
    attempt: how often it was claimed.
    failure: the class of its last failure, as `failures.Failure` names it; None where it came to a result.
    outcome: "lesions", "no_candidate" or "not_analysed" once PRODUCED or BLOCKED.
    findings: the numbers that `show` prints.
    digest: the findings' run digest, from which the UIDs of the objects derive; CANCELLED with one, it has yielded.
    overdue: its study was waited for long enough, so it does not wait for images that still come.
    part, images: which stack of a series that holds several ("1 of 2"), and its SOP Instance UIDs; "" and None else.
    beside: the `place` of each other result of the study that this one leaves in force.
    """

    id: int
    study_uid: str
    series_uid: str | None
    pipeline: str
    masks_path: str | None
    masks_sha256: str | None
    options: Mapping[str, object]
    refusal: str | None
    source_digest: str
    forced: bool
    state: RunState
    attempt: int
    lease_owner: str | None
    lease_until: datetime | None
    not_before: datetime | None
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None
    supersedes_id: int | None
    outcome: str | None
    findings: Mapping[str, object] | None
    digest: str | None
    failure: str | None = None
    overdue: bool = False
    part: str = ""
    images: Sequence[str] | None = None
    beside: Sequence[str] = ()

    @property
    def has_yielded(self) -> bool:
        """Whether it came to a result that was let go, because the one in force is of a better series."""
        return self.state is RunState.CANCELLED and self.digest is not None

    @property
    def place(self) -> str:
        """What of the study it is about: a run takes the place of an older one of the same."""
        return place(self.series_uid, self.part)

    def displaces(self, older: Run) -> bool:
        """Whether the older run's result may not stand beside this one's."""
        return older.place == self.place or older.place not in self.beside


def place(series_uid: str | None, part: str = "") -> str:
    """How `Run.beside` names a series, or one stack of it."""
    return " ".join(filter(None, (series_uid, part)))


@dataclass(frozen=True, slots=True)
class NewObject:
    """A result file that lies on disk; kind is "SEG", "SR" and the like, path is relative to the data folder."""

    kind: str
    sop_instance_uid: str
    sop_class_uid: str
    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class ResultObject:
    """A result file of a run; fields as in `NewObject`."""

    id: int
    run_id: int
    kind: str
    sop_instance_uid: str
    sop_class_uid: str
    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """One object on its way to one destination.

    attempt: how often it was claimed since it was last asked for.
    last_status: the DIMSE status of the last answer; last_error: the last failure or the peer's warning.
    check_at: when the destination is asked next whether it holds the object, None where that is over;
    checks: how often it was asked. proof: how it said so once VERIFIED; "unverified" where it never did,
        "disowned" where it said that it does not.
    transaction_uid: of the request for storage commitment that is out.
    """

    id: int
    object_id: int
    run_id: int
    destination: str
    state: DeliveryState
    attempt: int
    not_before: datetime | None
    last_status: int | None
    last_error: str | None
    sent_at: datetime | None
    lease_owner: str | None
    lease_until: datetime | None
    check_at: datetime | None
    checks: int
    proof: str
    transaction_uid: str | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; never holds patient identity.

    subject: "study", "series", "run", "delivery", "instance" or "node"; subject_id: its UID or number.
    name: subject and what happened, as in "series.complete".
    """

    id: int
    at: datetime
    study_uid: str | None
    subject: str
    subject_id: str
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a study that seemed whole.

    run_id: the run that it led to. scores: a line for each series, as `selection.Verdict.as_json` has it.
    evidence: a line for each thing that speaks for or against the study's being whole.
    """

    id: int
    study_uid: str
    run_id: int | None
    at: datetime
    scores: Sequence[Mapping[str, object]]
    evidence: Sequence[Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class SeenPhase:
    """What the pixels of a series, or of one stack of it, said of its contrast phase when they were analysed last.

    part, source_digest: as in `Run`, of the run that saw it.
    phase: in the words of `contrast_phase.Phase`; certainty: 0 to 1.
    considered: the study has been looked at again with this in mind.
    """

    series_uid: str
    part: str
    study_uid: str
    run_id: int
    source_digest: str
    phase: str
    certainty: float
    after_injection_s: float | None
    at: datetime
    considered: bool

    @property
    def place(self) -> str:
        """As `Run.place`."""
        return place(self.series_uid, self.part)

    def says_the_same(self, other: SeenPhase) -> bool:
        """Whether both name one phase of the same images, as certainly."""
        mine = (self.source_digest, self.phase, self.certainty)
        return mine == (other.source_digest, other.phase, other.certainty)


STUDIES = sa.Table(
    "studies",
    METADATA,
    sa.Column("study_uid", sa.String(64), primary_key=True),
    sa.Column("calling_ae", sa.String(16), nullable=False),
    sa.Column("accession_number", sa.String(64), nullable=False, index=True),
    sa.Column("patient_id", sa.String(64), nullable=False),
    sa.Column("study_date", sa.String(8), nullable=False),
    sa.Column("first_at", UtcDateTime, nullable=False),
    sa.Column("last_at", UtcDateTime, nullable=False, index=True),
    sa.Column("instances", sa.Integer, nullable=False),
    sa.Column("assembled_instances", sa.Integer, nullable=False),
    sa.Column("called_ae", sa.String(16), nullable=False, server_default=""),
)
_NEW = STUDIES.c.instances > STUDIES.c.assembled_instances
# In PostgreSQL too, as its migration says; said here it would load that dialect for every command, a tenth of its time.
sa.Index("ix_studies_work", STUDIES.c.last_at, STUDIES.c.study_uid, sqlite_where=_NEW)

SERIES = sa.Table(
    "series",
    METADATA,
    sa.Column("series_uid", sa.String(64), primary_key=True),
    sa.Column("study_uid", sa.ForeignKey("studies.study_uid"), nullable=False, index=True),
    sa.Column("modality", sa.String(16), nullable=False),
    sa.Column("series_number", sa.Integer),
    sa.Column("state", state(SeriesState), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("instances", sa.Integer, nullable=False),
    sa.Column("duplicates", sa.Integer, nullable=False),
    sa.Column("last_instance_at", UtcDateTime, nullable=False),
    sa.Index("ix_series_work", "state", "last_instance_at", "series_uid"),
)

INSTANCES = sa.Table(
    "instances",
    METADATA,
    sa.Column("sop_instance_uid", sa.String(64), primary_key=True),
    sa.Column("series_uid", sa.ForeignKey("series.series_uid"), nullable=False, index=True),
    sa.Column("study_uid", sa.ForeignKey("studies.study_uid"), nullable=False, index=True),
    sa.Column("sop_class_uid", sa.String(64), nullable=False),
    sa.Column("transfer_syntax_uid", sa.String(64), nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("received_at", UtcDateTime, nullable=False),
)

QUARANTINE = sa.Table(
    "quarantine",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uid", sa.String(64), nullable=False, index=True),
    sa.Column("series_uid", sa.String(64), nullable=False),
    sa.Column("sop_instance_uid", sa.String(64), nullable=False, index=True),
    sa.Column("sop_class_uid", sa.String(64), nullable=False),
    sa.Column("transfer_syntax_uid", sa.String(64), nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("calling_ae", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("times", sa.Integer, nullable=False),
    sa.Column("received_at", UtcDateTime, nullable=False),
)

RUNS = sa.Table(
    "runs",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uid", sa.ForeignKey("studies.study_uid"), nullable=False, index=True),
    sa.Column("series_uid", sa.ForeignKey("series.series_uid")),
    sa.Column("pipeline", sa.String(64), nullable=False),
    sa.Column("masks_path", sa.Text),
    sa.Column("masks_sha256", sa.String(64)),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("refusal", sa.Text),
    sa.Column("source_digest", sa.String(64), nullable=False),
    sa.Column("forced", sa.Boolean, nullable=False),
    sa.Column("state", state(RunState), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("lease_owner", sa.String(128)),
    sa.Column("lease_until", UtcDateTime),
    sa.Column("not_before", UtcDateTime),
    sa.Column("queued_at", UtcDateTime, nullable=False),
    sa.Column("started_at", UtcDateTime),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("error", sa.Text),
    sa.Column("supersedes_id", sa.ForeignKey("runs.id")),
    sa.Column("outcome", sa.String(32)),
    sa.Column("findings", sa.JSON(none_as_null=True)),
    sa.Column("digest", sa.String(64)),
    sa.Column("failure", sa.String(32)),
    sa.Column("overdue", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("part", sa.String(64), nullable=False, server_default=""),
    sa.Column("images", sa.JSON(none_as_null=True)),
    sa.Column("beside", sa.JSON, nullable=False, server_default="[]"),
    sa.Index("ix_runs_work", "state", "queued_at", "id"),
)

OBJECTS = sa.Table(
    "objects",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("sop_instance_uid", sa.String(64), nullable=False, index=True),
    sa.Column("sop_class_uid", sa.String(64), nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
)

DELIVERIES = sa.Table(
    "deliveries",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("object_id", sa.ForeignKey("objects.id"), nullable=False),
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("destination", sa.String(64), nullable=False),
    sa.Column("state", state(DeliveryState), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("not_before", UtcDateTime),
    sa.Column("last_status", sa.Integer),
    sa.Column("last_error", sa.Text),
    sa.Column("sent_at", UtcDateTime),
    sa.Column("lease_owner", sa.String(128)),
    sa.Column("lease_until", UtcDateTime),
    sa.Column("check_at", UtcDateTime),
    sa.Column("checks", sa.Integer, nullable=False, server_default="0"),
    sa.Column("proof", sa.String(32), nullable=False, server_default=""),
    sa.Column("transaction_uid", sa.String(64), index=True),
    sa.UniqueConstraint("object_id", "destination"),
    sa.Index("ix_deliveries_work", "state", "not_before", "id"),
    sa.Index("ix_deliveries_checks", "state", "check_at", "id"),
    sa.Index("ix_deliveries_sent", "destination", "sent_at"),
)

EVENTS = sa.Table(
    "events",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("study_uid", sa.String(64), index=True),
    sa.Column("subject", sa.String(16), nullable=False),
    sa.Column("subject_id", sa.String(128), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
)

LOOKS = sa.Table(
    "looks",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uid", sa.ForeignKey("studies.study_uid"), nullable=False, index=True),
    sa.Column("run_id", sa.ForeignKey("runs.id"), index=True),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("scores", sa.JSON, nullable=False),
    sa.Column("evidence", sa.JSON, nullable=False),
)

PIXEL_PHASES = sa.Table(
    "pixel_phases",
    METADATA,
    sa.Column("series_uid", sa.ForeignKey("series.series_uid"), primary_key=True),
    sa.Column("part", sa.String(64), primary_key=True),
    sa.Column("study_uid", sa.ForeignKey("studies.study_uid"), nullable=False, index=True),
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("source_digest", sa.String(64), nullable=False),
    sa.Column("phase", sa.String(32), nullable=False),
    sa.Column("certainty", sa.Float, nullable=False),
    sa.Column("after_injection_s", sa.Float),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("considered", sa.Boolean, nullable=False),
)
