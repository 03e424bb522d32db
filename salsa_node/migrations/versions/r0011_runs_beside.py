"""Which images of its series a run is about, and beside which other results of its study its own stands."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision: str | None = "0010"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the columns: the runs that came before were about whole series, and each stood alone."""
    op.add_column("runs", sa.Column("part", sa.String(64), nullable=False, server_default=""))
    op.add_column("runs", sa.Column("images", sa.JSON(none_as_null=True)))
    op.add_column("runs", sa.Column("beside", sa.JSON, nullable=False, server_default="[]"))
