"""What each look at a study found: the scores of its series and the evidence that it is whole."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "looks",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("study_uid", sa.String(64), nullable=False),
        sa.Column("run_id", sa.Integer),
        sa.Column("at", sa.DateTime, nullable=False),
        sa.Column("scores", sa.JSON, nullable=False),
        sa.Column("evidence", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_looks"),
        sa.ForeignKeyConstraint(["study_uid"], ["studies.study_uid"], name="fk_looks_study_uid"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_looks_run_id"),
    )
    op.create_index("ix_looks_study_uid", "looks", ["study_uid"])
    op.create_index("ix_looks_run_id", "looks", ["run_id"])
