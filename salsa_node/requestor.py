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
from salsa_node.tls import client_context

_MAX_PDU_BYTES = 131072


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
    try:
        assoc = ae.associate(
            destination.host,
            destination.port,
            ae_title=destination.ae_title,
            max_pdu=_MAX_PDU_BYTES,
            ext_neg=list(roles) or None,
            tls_args=(secure, destination.host) if secure else None,
            evt_handlers=[
                (evt.EVT_CONN_OPEN, without_delay),
                (evt.EVT_CONN_OPEN, taking_turns),
                (evt.EVT_DATA_SENT, acknowledging_at_once),
                *handlers,
            ],
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise DeliveryError(f"{where}: cannot be reached ({type(error).__name__}: {error})") from error
    if not assoc.is_established and not assoc.rejected_contexts:
        let_go(assoc)
        fault = f"no TLS with it: {secure.fault}" if secure is not None and secure.fault else _why_not(assoc)
        raise DeliveryError(f"{where}: {fault}")
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


def _why_not(assoc: Association) -> str:
    answer = assoc.acceptor.primitive
    if assoc.is_rejected and isinstance(answer, A_ASSOCIATE):
        return f"rejected the association: {answer.result_str}, {answer.source_str}, {answer.reason_str}"
    return "no association: nobody listens there, or the peer aborted or did not answer in time"
