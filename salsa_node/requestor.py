"""An association that we ask for: opened with the contexts it needs, released at the end, or an error that says why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from pydicom.uid import UID
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import A_ASSOCIATE, SCP_SCU_RoleSelectionNegotiation

from salsa_node.association import acknowledging_at_once, let_go, taking_turns, without_delay
from salsa_node.errors import ConfigError, DeliveryError, DestinationRefused
from salsa_node.settings import Destination
from salsa_node.tls import client_context, remedy

_MAX_PDU_BYTES = 131072
_SERVICE_USER = 1  # the source of a rejection (PS3.8 9.3.4), whose reasons 3 and 7 name an AE title


@contextmanager
def associated(
    destination: Destination,
    contexts: Iterable[tuple[str, UID | str]],
    timeout_s: float,
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
    handlers: Sequence[evt.EventHandlerType] = (),
) -> Iterator[Association]:
    """An association with one presentation context for each pair of SOP class and transfer syntax.

    Those that the peer refuses are missing from its `accepted_contexts`; that may be all of them.
    Raises DeliveryError where there is no association.
    """
    ae = AE(destination.calling_ae_title)
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = timeout_s
    for sop_class, syntax in sorted(set(contexts)):
        ae.add_requested_context(sop_class, syntax)
    where = f"{destination.name} ({destination.where})"
    try:
        secure = client_context(destination) if destination.tls else None
    except ConfigError as error:
        raise DestinationRefused(str(error)) from error
    connected: list[evt.Event] = []
    try:
        assoc = ae.associate(
            destination.host,
            destination.port,
            ae_title=destination.ae_title,
            max_pdu=_MAX_PDU_BYTES,
            ext_neg=list(roles) or None,
            tls_args=(secure, destination.host) if secure else None,
            evt_handlers=[
                (evt.EVT_CONN_OPEN, connected.append),
                (evt.EVT_CONN_OPEN, without_delay),
                (evt.EVT_CONN_OPEN, taking_turns),
                (evt.EVT_DATA_SENT, acknowledging_at_once),
                *handlers,
            ],
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise DeliveryError(
            f"{where}: cannot be reached ({type(error).__name__}: {error}); is its host right, and known to the name "
            "server?"
        ) from error
    if not assoc.is_established and not assoc.rejected_contexts:
        let_go(assoc)
        if secure is not None and secure.fault:
            raise DeliveryError(f"{where}: no TLS with it: {secure.fault}; {remedy(secure.fault)}")
        raise DeliveryError(f"{where}: {_why_not(assoc, destination, bool(connected))}")
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()


def accepts(assoc: Association, sop_class: str, syntax: UID | str | None = None) -> bool:
    """Whether the peer agreed to that SOP class, in that transfer syntax where one is named."""
    return any(
        context.abstract_syntax == sop_class and (syntax is None or syntax in context.transfer_syntax)
        for context in assoc.accepted_contexts
    )


def _why_not(assoc: Association, destination: Destination, connected: bool) -> str:
    """How far it came, and what to do. connected: whether the peer took the connection."""
    answer = assoc.acceptor.primitive
    if assoc.is_rejected and isinstance(answer, A_ASSOCIATE):
        told = f"rejected the association: {answer.result_str}, {answer.source_str}, {answer.reason_str}"
        then = {
            3: f"; make {destination.calling_ae_title} known there, or set calling_ae_title",
            7: "; correct its ae_title",
        }
        return told + then.get(answer.diagnostic or 0, "") if answer.result_source == _SERVICE_USER else told
    if not connected:
        return "no association: nobody listens there; is it up, and the port open from here?"
    wants = "does it ask for a certificate of ours (certificate, key)" if destination.tls else "does it want TLS (tls)"
    return (
        "no association: it took the connection and then ended it, or did not answer in time; "
        f"{wants}, and does it know our AE title {destination.calling_ae_title}?"
    )
