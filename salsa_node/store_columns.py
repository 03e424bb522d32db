"""What the store's tables are made of: how they are named, moments in UTC, and states by name."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import Enum

import sqlalchemy as sa

METADATA = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An aware datetime, kept as UTC; a naive one is refused."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002
        """To the database: UTC without its zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("expected an aware datetime, found a naive one")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002
        """From the database: aware UTC."""
        return None if value is None else value.replace(tzinfo=UTC)


def state(kind: type[Enum]) -> sa.Enum:
    """One of those states, by its name."""
    return sa.Enum(kind, native_enum=False, length=16, create_constraint=False)
