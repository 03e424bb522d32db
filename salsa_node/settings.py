"""Every setting of the node as frozen values: data only, filled by `config`, handed down by argument."""

from __future__ import annotations

import ipaddress
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

#: what `Destination.seg` may be -> the kind of the object that such a destination gets of the lesions by class
SEG_KINDS: Final[Mapping[str, str]] = {"binary": "SEG", "labelmap": "LABELMAP"}
SENDER = "sender"  #: in `DeliverySettings.to`: the destination whose AE title sent the study

_TIME = r"([01]\d|2[0-3]):[0-5]\d"
FIELDS: Final = ("at", "event", "study", "subject", "number", "detail", "node")  #: what a notification's template names
DEVICE = r"auto|cpu|cuda(:\d+)?"
AUTO = "auto"  #: `PipelineChoice.name`: the best pipeline whose models are installed


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """The node itself.

    data_dir: everything the node keeps lies below it; made when absent.
    store_url: SQLAlchemy URL of the record, SQLite or PostgreSQL; "" for an SQLite file in data_dir.
    """

    data_dir: Path = field(default=Path("salsa-data"), metadata={"pattern": r"[^?]+"})
    store_url: str = ""
    log_level: str = field(default="info", metadata={"choices": ("debug", "info", "warning", "error")})
    log_format: str = field(default="text", metadata={"choices": ("text", "json")})


@dataclass(frozen=True, slots=True)
class Peer:
    """Who may open an association: a calling AE title ("*" for any) from an address ("*" for any)."""

    ae_title: str = "*"
    address: str = "127.0.0.1"


def invalid_peer(peers: Iterable[Peer]) -> str | None:
    """What is wrong with the first peer whose address is none; None where every one can be used."""
    for peer in peers:
        if peer.address == "*":
            continue
        try:
            ipaddress.ip_network(peer.address, strict=False)
        except ValueError:
            return (
                "listener.allowed: expected an IP address, a network such as 192.0.2.0/24, or '*', "
                f"found {peer.address!r}"
            )
    return None


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """The door behind TLS, beside the plain one: both sides show a certificate.

    port: 0 for no such door.
    certificate, key: our own, as PEM files; authorities: who may have signed a peer's certificate.
    """

    host: str = field(default="127.0.0.1", metadata={"pattern": r"\S+"})
    port: int = field(default=0, metadata={"max": 65535})
    certificate: str = ""
    key: str = ""
    authorities: str = ""


@dataclass(frozen=True, slots=True)
class ListenerSettings:
    """The door.

    any_called_ae_title: accept associations that call us by another AE title.
    allowed: an association from anybody else is rejected.
    fast: take C-STORE past pynetdicom's own reading, which costs twice the processor time; what is kept is the same.
    min_free_gib: with less left on the disk of node.data_dir new associations are rejected until there is more.
    quarantine_files, quarantine_gib: as much of what contradicts what is stored is kept; what came first goes first.
    """

    ae_title: str = "SALSA_NODE"
    host: str = field(default="127.0.0.1", metadata={"pattern": r"\S+"})
    port: int = field(default=11112, metadata={"min": 1, "max": 65535})
    any_called_ae_title: bool = False
    allowed: tuple[Peer, ...] = (Peer(),)
    max_associations: int = field(default=10, metadata={"min": 1})
    max_pdu_bytes: int = field(default=131072, metadata={"min": 4096})
    idle_timeout_s: float = field(default=60.0, metadata={"above": 0})
    fast: bool = True
    min_free_gib: float = 1.0
    quarantine_files: int = field(default=10_000, metadata={"min": 0})
    quarantine_gib: float = 10.0
    tls: TlsSettings = field(default_factory=TlsSettings)


@dataclass(frozen=True, slots=True)
class AssemblySettings:
    """When a series is whole: no new instance for quiet_s.

    max_wait_s: so long after its first new image a study is looked at, whatever is still arriving or missing.
    """

    quiet_s: float = field(default=30.0, metadata={"max": 86400})
    max_wait_s: float = field(default=3600.0, metadata={"above": 0, "max": 604800})
    poll_s: float = field(default=1.0, metadata={"above": 0})


@dataclass(frozen=True, slots=True)
class QuerySettings:
    """The archive that is asked by C-FIND how many images of a series it holds; nobody where ae_title is empty.

    calling_ae_title: what we call ourselves there.
    """

    ae_title: str = ""
    host: str = field(default="127.0.0.1", metadata={"pattern": r"\S+"})
    port: int = field(default=104, metadata={"min": 1, "max": 65535})
    calling_ae_title: str = "SALSA_NODE"
    timeout_s: float = field(default=10.0, metadata={"above": 0, "max": 60})


@dataclass(frozen=True, slots=True)
class Destination:
    """Where results may go: by DICOM to an AE title at host and port, by DICOMweb to a url, or into a folder.

    calling_ae_title: what we call ourselves there.
    url: of its DICOMweb service, as "https://192.0.2.10/dicom-web". folder: that exists.
    tls: DICOM behind TLS. authorities: who may have signed its certificate, a PEM file; "" for those of the system.
    certificate, key: our own, as PEM files, where it asks for one.
    user, secret: HTTP credentials, basic with a user and else bearer; secret says where: "env:NAME" or "file:PATH".
    per_minute: so many objects at most; 0 for any number.
    seg: the form in which it gets the lesions by class; "labelmap" (DICOM Supplement 243) is smaller, and few read it.
    verify: how it is asked afterwards whether it holds what it took; "auto" is storage commitment where it has that,
        else a query.
    """

    name: str = field(metadata={"pattern": r"\S+"})
    ae_title: str = ""
    host: str = field(default="", metadata={"pattern": r"\S+"})
    port: int = field(default=0, metadata={"min": 1, "max": 65535})
    calling_ae_title: str = "SALSA_NODE"
    seg: str = field(default="binary", metadata={"choices": tuple(SEG_KINDS)})
    verify: str = field(default="auto", metadata={"choices": ("auto", "commitment", "query", "off")})
    url: str = field(default="", metadata={"pattern": r"https?://[^\s@]+"})
    folder: str = ""
    tls: bool = False
    authorities: str = ""
    certificate: str = ""
    key: str = ""
    user: str = field(default="", metadata={"pattern": r"[^\s:]+"})
    secret: str = field(default="", metadata={"pattern": r"(env|file):\S+"})
    per_minute: int = 0

    @property
    def where(self) -> str:
        """In words."""
        return self.folder or self.url or f"{self.ae_title} at {self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class DeliverySettings:
    """How results leave.

    to: names of destinations; "sender" is the destination whose AE title sent the study.
    first_retry_s, max_retry_s: the wait after a failure doubles from the first to the second.
    max_attempts: after so many a delivery is given up and waits for `salsa-node resend`.
    verify_after_s: how long after an object was taken its destination is asked for it; doubled with each question.
    max_checks: after so many questions without an answer it stays sent, unverified.
    hold: every result waits for a person: `salsa-node release STUDY`.
    shadow: everything is done and nothing is sent, except to the destinations of `research`, which then get everything.
    commitment_s: how long the answer to a request for storage commitment may take before a query is asked instead.
    """

    to: tuple[str, ...] = ("sender",)
    first_retry_s: float = 30.0
    max_retry_s: float = 3600.0
    max_attempts: int = field(default=20, metadata={"min": 1})
    timeout_s: float = field(default=30.0, metadata={"above": 0})
    lease_s: float = field(default=300.0, metadata={"above": 0})
    poll_s: float = field(default=1.0, metadata={"above": 0})
    verify_after_s: float = 10.0
    max_checks: int = field(default=8, metadata={"min": 1})
    commitment_s: float = 120.0
    hold: bool = False
    shadow: bool = False
    research: tuple[str, ...] = ()

    def wait_s(self, attempt: int, first_s: float | None = None) -> float:
        """How long after the attempt of that number (1, 2, ...) the next one follows; first_s: not `first_retry_s`."""
        first = self.first_retry_s if first_s is None else first_s
        return float(min(first * 2 ** min(attempt - 1, 60), self.max_retry_s))


@dataclass(frozen=True, slots=True)
class PipelineChoice:
    """Which pipeline looks at the images.

    name: "auto" is SALSA where its models are installed, else TotalSegmentator where those are, else the demo.
    device: "auto", "cpu", "cuda" or "cuda:N".
    models_dir: where installed models lie; "" for `models` in node.data_dir.
    may_download: a start fetches what the pipeline lacks of TotalSegmentator's open models; "auto" then never comes
        down to the demo.
    """

    name: str = AUTO
    device: str = field(default="auto", metadata={"pattern": DEVICE})
    models_dir: str = ""
    may_download: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Profile:
    """What is done with the studies that come to another AE title of ours.

    ae_title: by which a sender calls the node, beside listener.ae_title.
    pipeline: "" for pipeline.name and its options, else that one with these options.
    to: as delivery.to, which an empty list leaves in force.
    """

    ae_title: str
    pipeline: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    to: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How runs are carried.

    lease_s: how long a silent worker keeps a run; heartbeat_s: how often a living one renews it.
    max_attempts: after so many the run fails and waits for a person.
    retry_s: the wait before a retryable failure is tried again, doubled each time; `failures.POLICIES` refine it.
    run_limit_s: a run that takes longer is ended, and so is a worker that looked for no work so long.
    memory_limit_gib: so is a run whose process holds more; 0 for no limit.
    stop_grace_s: how long a stopping node waits for its worker before it kills it.
    devices: one worker process for each of these; none for a single one on pipeline.device.
    stat_ae_titles: calling AE titles, such as those of an emergency room's scanners, whose studies go first.
    off_peak_ae_titles: calling AE titles whose studies wait for the hours off_peak, by the machine's own clock.
    """

    lease_s: float = field(default=60.0, metadata={"above": 0})
    heartbeat_s: float = field(default=10.0, metadata={"above": 0})
    max_attempts: int = field(default=3, metadata={"min": 1})
    retry_s: float = 30.0
    run_limit_s: float = field(default=3600.0, metadata={"above": 0})
    memory_limit_gib: float = 0.0
    stop_grace_s: float = 15.0
    poll_s: float = field(default=0.5, metadata={"above": 0})
    devices: tuple[str, ...] = field(default=(), metadata={"pattern": DEVICE})
    stat_ae_titles: tuple[str, ...] = ()
    off_peak_ae_titles: tuple[str, ...] = ()
    off_peak: str = field(
        default="20:00-06:00", metadata={"pattern": r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d"}
    )


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """How long files are kept after a study's last image, in days; 0: for ever.

    Never removed is what has not reached its destination or is held.
    done_days, failed_days, blocked_days, nothing_days, cancelled_days: the images of studies that stand so.
    results_days: the result files of studies that are done.
    record_days: what the record tells of studies none of whose files are kept any more; the audit trail stays.
    min_free_gib: with less left on the disk the images of the oldest studies that are done go first.
    verify_hours: how often every stored file is read and compared with its digest; 0: only by `salsa-node verify`.
    """

    done_days: float = field(default=0.0, metadata={"max": 36500})
    failed_days: float = field(default=0.0, metadata={"max": 36500})
    blocked_days: float = field(default=0.0, metadata={"max": 36500})
    nothing_days: float = field(default=0.0, metadata={"max": 36500})
    cancelled_days: float = field(default=0.0, metadata={"max": 36500})
    results_days: float = field(default=0.0, metadata={"max": 36500})
    record_days: float = field(default=0.0, metadata={"max": 36500})
    min_free_gib: float = 0.0
    verify_hours: float = field(default=0.0, metadata={"max": 8760})
    poll_s: float = field(default=300.0, metadata={"above": 0})


@dataclass(frozen=True, slots=True)
class WebSettings:
    """Where monitoring asks for /metrics and /health; port 0: nowhere."""

    host: str = field(default="127.0.0.1", metadata={"pattern": r"\S+"})
    port: int = field(default=0, metadata={"max": 65535})


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """Where the lines of the audit trail go besides the data folder.

    syslog: "udp://HOST:PORT", "tcp://…" or "tls://…" of a collector of DICOM audit messages; "": nowhere.
    source: our name among the sources of audit messages.
    authorities: who may have signed the certificate of a collector behind TLS, a PEM file; "" for those of the system.
    certificate, key: our own, as PEM files, where it asks for one.
    """

    syslog: str = field(default="", metadata={"pattern": r"((udp|tcp|tls)://[^/\s]+:\d+)?"})
    source: str = field(default="SALSA_NODE", metadata={"pattern": r"\S+"})
    authorities: str = ""
    certificate: str = ""
    key: str = ""
    poll_s: float = field(default=2.0, metadata={"above": 0})


@dataclass(frozen=True, slots=True)
class NotifySettings:
    """Who is told when something needs a person, and in which words.

    events: beginnings of the names of events. webhook: takes a POST of {"text": ...}. subject, text: templates with
    $at, $event, $study, $subject, $number, $detail and $node, none of which holds patient identity.
    """

    events: tuple[str, ...] = ("run.failed", "run.blocked", "delivery.gave_up", "instance.quarantined", "file.fault")
    webhook: str = field(default="", metadata={"pattern": r"(https?://\S+)?"})
    email_to: tuple[str, ...] = ()
    email_from: str = "salsa-node@localhost"
    smtp_host: str = field(default="127.0.0.1", metadata={"pattern": r"\S+"})
    smtp_port: int = field(default=25, metadata={"min": 1, "max": 65535})
    smtp_tls: bool = False
    subject: str = "salsa-node: $event"
    text: str = "$at  $event  $detail  study $study"
    timeout_s: float = field(default=10.0, metadata={"above": 0})
    poll_s: float = field(default=5.0, metadata={"above": 0})


def invalid_template(settings: NotifySettings) -> str | None:
    """What is wrong with the first template that cannot be filled in; None where all can."""
    fields = dict.fromkeys(FIELDS, "")
    for key in ("subject", "text"):
        try:
            string.Template(getattr(settings, key)).substitute(fields)
        except (KeyError, ValueError) as error:
            there = ", ".join(f"${name}" for name in fields)
            return f"notify.{key}: {error} is no field of a template; there are {there} ($$ for a dollar)"
    return None
