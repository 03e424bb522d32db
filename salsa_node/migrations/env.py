"""What Alembic runs to migrate: on the connection it was given, in the transaction that is open on it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from salsa_node.store_rows import RUNS

connection = context.config.attributes["connection"]
if not isinstance(connection, sa.Connection):
    raise TypeError(f"expected a connection in config.attributes, found {type(connection).__name__}")
context.configure(connection=connection, target_metadata=RUNS.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
