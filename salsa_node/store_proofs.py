"""What the record says of proof: which objects a destination took, whether it still holds them, and who said so."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa

from salsa_node.errors import LeaseLost
from salsa_node.store_connection import writer
from salsa_node.store_queries import Queries
from salsa_node.store_rows import DELIVERIES, OBJECTS, Delivery, DeliveryState
from salsa_node.store_transaction import Transaction, transaction


class Proofs(Queries):
    """The changes of deliveries that were SENT and are checked; each method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._writer = writer(engine)

    def claim_checks(self, owner: str, lease_s: float, now: datetime) -> tuple[Delivery, ...]:
        """The SENT deliveries of one run to one destination whose check is due, leased to `owner`; () when none is."""
        due = sa.and_(
            DELIVERIES.c.state == DeliveryState.SENT,
            DELIVERIES.c.check_at <= now,
            sa.or_(DELIVERIES.c.lease_until.is_(None), DELIVERIES.c.lease_until <= now),
        )
        oldest = sa.select(DELIVERIES).where(due).order_by(DELIVERIES.c.check_at, DELIVERIES.c.id).limit(1)
        with transaction(self._engine) as t:
            if t.one(Delivery, oldest) is None:
                return ()
        with transaction(self._writer) as t:
            first = t.one(Delivery, oldest)
            if first is None:
                return ()
            together = sa.and_(due, DELIVERIES.c.run_id == first.run_id, DELIVERIES.c.destination == first.destination)
            ids = t.execute(sa.select(DELIVERIES.c.id).where(together)).scalars().all()
            mine = DELIVERIES.c.id.in_(ids)
            lease = {"lease_owner": owner, "lease_until": now + timedelta(seconds=lease_s)}
            t.execute(sa.update(DELIVERIES).where(mine).values(**lease))
            return t.all(Delivery, sa.select(DELIVERIES).where(mine).order_by(DELIVERIES.c.id))

    def commitment_asked(self, delivery_ids: Sequence[int], owner: str, transaction_uid: str) -> None:
        """Note under which Transaction UID a destination is about to be asked to commit to those. Raises LeaseLost."""
        with transaction(self._writer) as t:
            for delivery_id in delivery_ids:
                _leased(t, delivery_id, owner)
            mine = DELIVERIES.c.id.in_(delivery_ids)
            t.execute(sa.update(DELIVERIES).where(mine).values(transaction_uid=transaction_uid))

    def commitment_answered(
        self, transaction_uid: str, held: Collection[str], failed: Collection[str], now: datetime
    ) -> tuple[Delivery, ...]:
        """A destination reported on a request of ours: what it holds is VERIFIED, what it does not is checked at once.

        held, failed: SOP Instance UIDs. Returns the deliveries that the request was about; () where there is none.
        """
        with transaction(self._writer) as t:
            asked = sa.and_(DELIVERIES.c.transaction_uid == transaction_uid, DELIVERIES.c.state == DeliveryState.SENT)
            of_request = (
                sa.select(DELIVERIES.c.id, OBJECTS.c.sop_instance_uid)
                .join(OBJECTS, OBJECTS.c.id == DELIVERIES.c.object_id)
                .where(asked)
                .order_by(DELIVERIES.c.id)
            )
            told = []
            for delivery_id, uid in t.connection.execute(of_request).all():
                delivery = t.delivery(delivery_id)
                if uid in held and uid not in failed:
                    told.append(_verified(t, delivery, "storage commitment", now))
                elif uid in failed:
                    changes = {"transaction_uid": None, "check_at": now, "proof": "disowned"}
                    free = {"lease_owner": None, "lease_until": None, "checks": delivery.checks + 1}
                    t.execute(sa.update(DELIVERIES).where(DELIVERIES.c.id == delivery_id).values(**changes, **free))
                    text = f"{delivery.destination}: does not commit to it"
                    t.event(now, t.run(delivery.run_id).study_uid, "delivery", delivery_id, "delivery.disowned", text)
                    told.append(t.delivery(delivery_id))
            return tuple(told)

    def verified(self, delivery_id: int, owner: str, proof: str, now: datetime) -> Delivery:
        """The destination holds the object; proof: how it said so. Raises LeaseLost."""
        with transaction(self._writer) as t:
            return _verified(t, _leased(t, delivery_id, owner), proof, now)

    def check_later(self, delivery_id: int, owner: str, why: str, check_at: datetime | None, now: datetime) -> Delivery:
        """Nothing is certain yet: check again at that time, or never (None): it stays SENT, unverified. Counts a check.

        Raises LeaseLost.
        """
        with transaction(self._writer) as t:
            delivery = _leased(t, delivery_id, owner)
            changes = {"checks": delivery.checks + 1, "check_at": check_at, "proof": "" if check_at else "unverified"}
            free = {"lease_owner": None, "lease_until": None}
            t.execute(sa.update(DELIVERIES).where(DELIVERIES.c.id == delivery_id).values(**changes, **free))
            if check_at is None:
                study_uid = t.run(delivery.run_id).study_uid
                detail = f"{delivery.destination}: sent, unverified: {why}"
                t.event(now, study_uid, "delivery", delivery_id, "delivery.unverified", detail)
            return t.delivery(delivery_id)

    def lost(self, delivery_id: int, owner: str, why: str, not_before: datetime, now: datetime) -> Delivery:
        """The destination took the object and does not hold it: it is due again at `not_before`. Raises LeaseLost."""
        with transaction(self._writer) as t:
            delivery = _leased(t, delivery_id, owner)
            changes = {"last_error": why, "not_before": not_before, "check_at": None}
            return t.become_delivery(delivery, DeliveryState.PENDING, now, why, **changes)


def _leased(t: Transaction, delivery_id: int, owner: str) -> Delivery:
    delivery = t.delivery(delivery_id)
    if delivery.state is not DeliveryState.SENT or delivery.lease_owner != owner:
        raise LeaseLost(f"the check of delivery {delivery_id} is not leased to {owner} any more")
    return delivery


def _verified(t: Transaction, delivery: Delivery, proof: str, now: datetime) -> Delivery:
    return t.become_delivery(
        delivery, DeliveryState.VERIFIED, now, f"it is there: {proof}", proof=proof, check_at=None, transaction_uid=None
    )
