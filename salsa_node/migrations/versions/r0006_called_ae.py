"""Which AE title of ours a study came to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision: str | None = "0005"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the column, empty for what came before."""
    op.add_column("studies", sa.Column("called_ae", sa.String(16), nullable=False, server_default=""))
