"""The first tables: studies, series, instances, runs, objects, deliveries, events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "studies",
        sa.Column("study_uid", sa.String(64), nullable=False),
        sa.Column("calling_ae", sa.String(16), nullable=False),
        sa.Column("accession_number", sa.String(64), nullable=False),
        sa.Column("patient_id", sa.String(64), nullable=False),
        sa.Column("study_date", sa.String(8), nullable=False),
        sa.Column("first_at", sa.DateTime, nullable=False),
        sa.Column("last_at", sa.DateTime, nullable=False),
        sa.Column("instances", sa.Integer, nullable=False),
        sa.Column("assembled_instances", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("study_uid", name="pk_studies"),
    )
    op.create_index("ix_studies_accession_number", "studies", ["accession_number"])
    op.create_index("ix_studies_last_at", "studies", ["last_at"])
    op.create_table(
        "series",
        sa.Column("series_uid", sa.String(64), nullable=False),
        sa.Column("study_uid", sa.String(64), nullable=False),
        sa.Column("modality", sa.String(16), nullable=False),
        sa.Column("series_number", sa.Integer),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("instances", sa.Integer, nullable=False),
        sa.Column("duplicates", sa.Integer, nullable=False),
        sa.Column("last_instance_at", sa.DateTime, nullable=False),
        sa.PrimaryKeyConstraint("series_uid", name="pk_series"),
        sa.ForeignKeyConstraint(["study_uid"], ["studies.study_uid"], name="fk_series_study_uid"),
    )
    op.create_index("ix_series_study_uid", "series", ["study_uid"])
    op.create_index("ix_series_state", "series", ["state"])
    op.create_table(
        "instances",
        sa.Column("sop_instance_uid", sa.String(64), nullable=False),
        sa.Column("series_uid", sa.String(64), nullable=False),
        sa.Column("study_uid", sa.String(64), nullable=False),
        sa.Column("sop_class_uid", sa.String(64), nullable=False),
        sa.Column("transfer_syntax_uid", sa.String(64), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("received_at", sa.DateTime, nullable=False),
        sa.PrimaryKeyConstraint("sop_instance_uid", name="pk_instances"),
        sa.ForeignKeyConstraint(["series_uid"], ["series.series_uid"], name="fk_instances_series_uid"),
        sa.ForeignKeyConstraint(["study_uid"], ["studies.study_uid"], name="fk_instances_study_uid"),
    )
    op.create_index("ix_instances_series_uid", "instances", ["series_uid"])
    op.create_index("ix_instances_study_uid", "instances", ["study_uid"])
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("study_uid", sa.String(64), nullable=False),
        sa.Column("series_uid", sa.String(64)),
        sa.Column("pipeline", sa.String(64), nullable=False),
        sa.Column("masks_path", sa.Text),
        sa.Column("masks_sha256", sa.String(64)),
        sa.Column("options", sa.JSON, nullable=False),
        sa.Column("refusal", sa.Text),
        sa.Column("source_digest", sa.String(64), nullable=False),
        sa.Column("forced", sa.Boolean, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("lease_owner", sa.String(128)),
        sa.Column("lease_until", sa.DateTime),
        sa.Column("not_before", sa.DateTime),
        sa.Column("queued_at", sa.DateTime, nullable=False),
        sa.Column("started_at", sa.DateTime),
        sa.Column("finished_at", sa.DateTime),
        sa.Column("error", sa.Text),
        sa.Column("supersedes_id", sa.Integer),
        sa.Column("outcome", sa.String(32)),
        sa.Column("findings", sa.JSON),
        sa.Column("digest", sa.String(64)),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sa.ForeignKeyConstraint(["study_uid"], ["studies.study_uid"], name="fk_runs_study_uid"),
        sa.ForeignKeyConstraint(["series_uid"], ["series.series_uid"], name="fk_runs_series_uid"),
        sa.ForeignKeyConstraint(["supersedes_id"], ["runs.id"], name="fk_runs_supersedes_id"),
    )
    op.create_index("ix_runs_study_uid", "runs", ["study_uid"])
    op.create_index("ix_runs_state", "runs", ["state"])
    op.create_table(
        "objects",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("run_id", sa.Integer, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("sop_instance_uid", sa.String(64), nullable=False),
        sa.Column("sop_class_uid", sa.String(64), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_objects"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_objects_run_id"),
    )
    op.create_index("ix_objects_run_id", "objects", ["run_id"])
    op.create_index("ix_objects_sop_instance_uid", "objects", ["sop_instance_uid"])
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("object_id", sa.Integer, nullable=False),
        sa.Column("run_id", sa.Integer, nullable=False),
        sa.Column("destination", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("not_before", sa.DateTime),
        sa.Column("last_status", sa.Integer),
        sa.Column("last_error", sa.Text),
        sa.Column("sent_at", sa.DateTime),
        sa.Column("lease_owner", sa.String(128)),
        sa.Column("lease_until", sa.DateTime),
        sa.PrimaryKeyConstraint("id", name="pk_deliveries"),
        sa.ForeignKeyConstraint(["object_id"], ["objects.id"], name="fk_deliveries_object_id"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_deliveries_run_id"),
        sa.UniqueConstraint("object_id", "destination", name="uq_deliveries_object_id_destination"),
    )
    op.create_index("ix_deliveries_run_id", "deliveries", ["run_id"])
    op.create_index("ix_deliveries_state", "deliveries", ["state"])
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("at", sa.DateTime, nullable=False),
        sa.Column("study_uid", sa.String(64)),
        sa.Column("subject", sa.String(16), nullable=False),
        sa.Column("subject_id", sa.String(128), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_study_uid", "events", ["study_uid"])
