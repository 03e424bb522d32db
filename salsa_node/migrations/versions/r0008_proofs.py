"""When a sent object is looked for at its destination, how often it was, and what proves that it is there."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision: str | None = "0007"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the columns; what was sent before is not checked."""
    op.add_column("deliveries", sa.Column("check_at", sa.DateTime))
    op.add_column("deliveries", sa.Column("checks", sa.Integer, nullable=False, server_default="0"))
    op.add_column("deliveries", sa.Column("proof", sa.String(32), nullable=False, server_default=""))
    op.add_column("deliveries", sa.Column("transaction_uid", sa.String(64)))
    op.create_index("ix_deliveries_check_at", "deliveries", ["check_at"])
    op.create_index("ix_deliveries_transaction_uid", "deliveries", ["transaction_uid"])
