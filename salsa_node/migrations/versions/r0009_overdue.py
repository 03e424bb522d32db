"""Runs that wait no longer for images that still come."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision: str | None = "0008"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the column; what came before waits."""
    op.add_column("runs", sa.Column("overdue", sa.Boolean, nullable=False, server_default=sa.false()))
