"""Indexes in the order in which work is picked, so that what waits, and what is over, costs the next one nothing."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision: str | None = "0012"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Make them; those that they begin with are gone."""
    op.create_index("ix_series_work", "series", ["state", "last_instance_at", "series_uid"])
    op.create_index("ix_runs_work", "runs", ["state", "queued_at", "id"])
    op.create_index("ix_deliveries_work", "deliveries", ["state", "not_before", "id"])
    op.create_index("ix_deliveries_checks", "deliveries", ["state", "check_at", "id"])
    op.create_index("ix_deliveries_sent", "deliveries", ["destination", "sent_at"])
    new = sa.text("instances > assembled_instances")
    op.create_index(
        "ix_studies_work", "studies", ["last_at", "study_uid"], sqlite_where=new, postgresql_where=new
    )  # fmt: skip
    op.drop_index("ix_series_state", "series")
    op.drop_index("ix_runs_state", "runs")
    op.drop_index("ix_deliveries_state", "deliveries")
    op.drop_index("ix_deliveries_check_at", "deliveries")
