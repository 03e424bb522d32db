"""What the pixels of each analysed series said of its contrast phase."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision: str | None = "0011"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the table; of the series that were analysed before, nothing is known."""
    op.create_table(
        "pixel_phases",
        sa.Column("series_uid", sa.String(64), sa.ForeignKey("series.series_uid"), nullable=False),
        sa.Column("part", sa.String(64), nullable=False),
        sa.Column("study_uid", sa.String(64), sa.ForeignKey("studies.study_uid"), nullable=False),
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("source_digest", sa.String(64), nullable=False),
        sa.Column("phase", sa.String(32), nullable=False),
        sa.Column("certainty", sa.Float, nullable=False),
        sa.Column("after_injection_s", sa.Float),
        sa.Column("at", sa.DateTime, nullable=False),
        sa.Column("considered", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("series_uid", "part", name="pk_pixel_phases"),
    )
    op.create_index("ix_pixel_phases_study_uid", "pixel_phases", ["study_uid"])
