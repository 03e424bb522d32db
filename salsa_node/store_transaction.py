"""One transaction on the store's database: rows read as frozen values, states changed only along the drawing."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from salsa_node.errors import IllegalTransition, LeaseLost, StoreError, UnknownStudy
from salsa_node.store_prepared import refusal
from salsa_node.store_rows import (
    DELIVERIES,
    EVENTS,
    RUNS,
    SERIES,
    STUDIES,
    TRANSITIONS,
    Delivery,
    DeliveryState,
    Event,
    Run,
    RunState,
    Series,
    SeriesState,
    State,
    Study,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Row = TypeVar("_Row")
_DISPLACED = "a newer result took its place"


@contextmanager
def transaction(engine: sa.Engine) -> Iterator[Transaction]:
    """One transaction: committed at the end, rolled back on any error. Raises StoreError for the database's own."""
    with _own_errors(), engine.begin() as connection:
        yield Transaction(connection)


class KeptConnection:
    """A connection that stays open between the transactions of a change that runs for every image.

    Transactions take turns; after one that failed the next has a new connection. That of a server, which may be
    started anew meanwhile, is not kept: the pool asks it each time whether it is still there.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._turn = threading.Lock()
        self._connection: sa.Connection | None = None

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """As the function of that name."""
        with self._turn, _own_errors():
            connection = self._connection or self._engine.connect()
            try:
                with connection.begin():
                    yield Transaction(connection)
            except BaseException:
                self._connection = None
                connection.close()
                raise
            if self._engine.dialect.name == "sqlite":
                self._connection = connection
            else:
                connection.close()

    def close(self) -> None:
        """Give it back; harmless at any time."""
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


@contextmanager
def _own_errors() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise refusal(cause) from error


def columns(row: DataclassInstance) -> dict[str, object]:
    """The fields of a row as column values."""
    return {name: getattr(row, name) for name in _names(type(row))}


@lru_cache(maxsize=64)
def _names(kind: type[DataclassInstance]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


class Transaction:
    """What can be done with rows between BEGIN and COMMIT."""

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection

    def execute(self, statement: sa.Executable) -> sa.CursorResult[tuple[object, ...]]:
        """Run a statement."""
        return self.connection.execute(statement)

    def insert(self, table: sa.Table, **values: object) -> int:
        """Add a row to a numbered table; returns its number."""
        made = self.connection.execute(sa.insert(table).values(**values)).inserted_primary_key
        if made is None:
            raise StoreError(f"a row of {table.name} was stored but got no number")
        return int(made[0])

    def one(self, kind: type[_Row], query: sa.Select[*tuple[object, ...]]) -> _Row | None:
        """The first row that the query finds."""
        found = self.connection.execute(query).mappings().first()
        return None if found is None else kind(**found)

    def all(self, kind: type[_Row], query: sa.Select[*tuple[object, ...]], **parameters: object) -> tuple[_Row, ...]:
        """Every row that the query finds; parameters: the values that it was built without."""
        return tuple(kind(**found) for found in self.connection.execute(query, parameters).mappings())

    def study(self, study_uid: str) -> Study:
        """Raises UnknownStudy."""
        return self._known(
            "study", study_uid, self.one(Study, sa.select(STUDIES).where(STUDIES.c.study_uid == study_uid))
        )

    def series(self, series_uid: str) -> Series:
        """Raises UnknownStudy."""
        found = self.one(Series, sa.select(SERIES).where(SERIES.c.series_uid == series_uid))
        return self._known("series", series_uid, found)

    def run(self, run_id: int) -> Run:
        """Raises UnknownStudy."""
        return self._known("run", run_id, self.one(Run, sa.select(RUNS).where(RUNS.c.id == run_id)))

    def delivery(self, delivery_id: int) -> Delivery:
        """Raises UnknownStudy."""
        found = self.one(Delivery, sa.select(DELIVERIES).where(DELIVERIES.c.id == delivery_id))
        return self._known("delivery", delivery_id, found)

    def leased_run(self, run_id: int, owner: str) -> Run:
        """The RUNNING run that `owner` holds. Raises LeaseLost, UnknownStudy."""
        run = self.run(run_id)
        if run.state is not RunState.RUNNING or run.lease_owner != owner:
            raise LeaseLost(
                f"run {run_id} is {run.state.value} and not leased to {owner} any more; its work is dropped"
            )
        return run

    def leased_delivery(self, delivery_id: int, owner: str) -> Delivery:
        """The PENDING delivery that `owner` holds. Raises LeaseLost, UnknownStudy."""
        delivery = self.delivery(delivery_id)
        if delivery.state is not DeliveryState.PENDING or delivery.lease_owner != owner:
            raise LeaseLost(f"delivery {delivery_id} is {delivery.state.value} and not leased to {owner} any more")
        return delivery

    def event(
        self, at: datetime, study_uid: str | None, subject: str, subject_id: str | int, name: str, detail: str
    ) -> Event:
        """Write down what happened."""
        values = {
            "at": at,
            "study_uid": study_uid,
            "subject": subject,
            "subject_id": str(subject_id),
            "name": name,
            "detail": detail,
        }
        number = self.insert(EVENTS, **values)
        return self._known("event", number, self.one(Event, sa.select(EVENTS).where(EVENTS.c.id == number)))

    def become_series(
        self, series: Series, state: SeriesState, now: datetime, detail: str, **changes: object
    ) -> Series:
        """Change the state, with an event. Raises IllegalTransition."""
        self._allowed(f"series {series.series_uid}", series.state, state)
        where = SERIES.c.series_uid == series.series_uid
        self.execute(sa.update(SERIES).where(where).values(state=state, **changes))
        name = f"series.{state.value.lower()}"
        self.event(now, series.study_uid, "series", series.series_uid, name, detail)
        return self.series(series.series_uid)

    def become_run(self, run: Run, state: RunState, now: datetime, detail: str, **changes: object) -> Run:
        """Change the state, with an event; only RUNNING keeps a lease. Raises IllegalTransition."""
        self._allowed(f"run {run.id}", run.state, state)
        lease = {} if state is RunState.RUNNING else {"lease_owner": None, "lease_until": None}
        self.execute(sa.update(RUNS).where(RUNS.c.id == run.id).values(state=state, **lease, **changes))
        self.event(now, run.study_uid, "run", run.id, f"run.{state.value.lower()}", detail)
        return self.run(run.id)

    def become_delivery(
        self, delivery: Delivery, state: DeliveryState, now: datetime, detail: str, **changes: object
    ) -> Delivery:
        """Change the state, with an event; the lease ends. Raises IllegalTransition.

        What would wait, of a result whose place a newer one took meanwhile, is WITHDRAWN.
        """
        self._allowed(f"delivery {delivery.id}", delivery.state, state)
        free = {"lease_owner": None, "lease_until": None}
        where = DELIVERIES.c.id == delivery.id
        self.execute(sa.update(DELIVERIES).where(where).values(state=state, **free, **changes))
        run = self.run(delivery.run_id)
        detail = f"{delivery.destination}: {detail}" if detail else delivery.destination
        self.event(now, run.study_uid, "delivery", delivery.id, f"delivery.{state.value.lower()}", detail)
        changed = self.delivery(delivery.id)
        if run.state is RunState.SUPERSEDED and state in (DeliveryState.PENDING, DeliveryState.HELD):
            return self.become_delivery(changed, DeliveryState.WITHDRAWN, now, _DISPLACED)
        return changed

    def new_deliveries(self, run: Run, object_id: int, destinations: Sequence[str], now: datetime) -> None:
        """One PENDING delivery of that object to each destination."""
        for destination in dict.fromkeys(destinations):
            number = self.insert(
                DELIVERIES,
                object_id=object_id,
                run_id=run.id,
                destination=destination,
                state=DeliveryState.PENDING,
                attempt=0,
            )
            self.event(now, run.study_uid, "delivery", number, "delivery.pending", destination)

    def withdraw_superseded(self, study_uid: str, now: datetime) -> None:
        """What of the study's superseded results has not gone out, and is not going out right now, is WITHDRAWN."""
        idle = sa.or_(DELIVERIES.c.lease_until.is_(None), DELIVERIES.c.lease_until <= now)
        stale = (
            sa.select(DELIVERIES)
            .join(RUNS, RUNS.c.id == DELIVERIES.c.run_id)
            .where(
                DELIVERIES.c.state.in_([DeliveryState.PENDING, DeliveryState.HELD]),
                RUNS.c.study_uid == study_uid,
                RUNS.c.state == RunState.SUPERSEDED,
                idle,
            )
        )
        for delivery in self.all(Delivery, stale):
            self.become_delivery(delivery, DeliveryState.WITHDRAWN, now, _DISPLACED)

    @staticmethod
    def _known(kind: str, name: str | int, found: _Row | None) -> _Row:
        if found is None:
            raise UnknownStudy(f"the store holds no {kind} {name}")
        return found

    @staticmethod
    def _allowed(what: str, found: State, wanted: State) -> None:
        if wanted not in TRANSITIONS[found]:
            allowed = ", ".join(sorted(state.value for state in TRANSITIONS[found])) or "nothing"
            raise IllegalTransition(f"{what} is {found.value}, which leads to {allowed}, not to {wanted.value}")
