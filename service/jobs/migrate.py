"""Bringing a database to the schema of this version; the steps are in ``service/migrations``."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from service.jobs.database import for_writing, outages_as_unavailable

_SCRIPTS = Path(__file__).parent.parent / "migrations"
_LOCK_KEY = 0x6D657267  # any fixed number: who holds it in PostgreSQL may migrate


def upgrade(engine: sa.Engine) -> None:
    """Apply what is missing, in one transaction; replicas that start together take turns."""
    with outages_as_unavailable(), for_writing(engine).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def is_current(connection: sa.Connection) -> bool:
    """Whether the database has exactly the schema of this version."""
    heads = ScriptDirectory.from_config(_config()).get_heads()
    return set(MigrationContext.configure(connection).get_current_heads()) == set(heads)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config
