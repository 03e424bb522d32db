"""The steps that bring an older store's tables to today's shape (Alembic)."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from salsa_node.errors import StoreError

HEAD = "0013"  #: the revision that the tables of `salsa_node.store_rows` are of; revisions count upwards


def revision(connection: sa.Connection) -> str | None:
    """The revision of the tables behind `connection`; None where there are none yet."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def require(connection: sa.Connection, *, upgrade_older: bool) -> None:
    """Leave the tables behind `connection` at `HEAD`, or raise StoreError that says what was found."""
    found = revision(connection)
    if found == HEAD:
        return
    if found is None and sa.inspect(connection).get_table_names():
        raise StoreError("the file holds tables of another program; name a file of its own for the store")
    if found is not None and found > HEAD:
        raise StoreError(
            f"the store has version {found}, this program knows up to {HEAD}; use the newer program, or another store"
        )
    if not upgrade_older:
        raise StoreError(
            f"the store has version {found or 'none'}, expected {HEAD}; start the node once to upgrade it, or stop it "
            "and say salsa-node db upgrade"
        )
    upgrade(connection)


def upgrade(connection: sa.Connection, target: str = HEAD) -> None:
    """Bring the tables behind `connection` to `target`, inside the caller's transaction."""
    from alembic import command  # 0.2 s of import that only the node's start needs
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, target)
