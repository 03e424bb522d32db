"""What identifies the content of an image is no longer a SHA-256, which cost more than all else at the door."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Rename the column; what is not known any more is empty, and then the size alone is compared."""
    op.execute("ALTER TABLE instances RENAME COLUMN sha256 TO digest")
    op.execute("UPDATE instances SET digest = ''")
    op.execute("ALTER TABLE quarantine RENAME COLUMN sha256 TO digest")
    op.execute("UPDATE quarantine SET digest = ''")
