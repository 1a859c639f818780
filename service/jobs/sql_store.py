"""The job store on SQLite or PostgreSQL.

The statements lie in files by who uses them: ``sql_read``, ``sql_queue`` and ``sql_plans`` for
the API, ``sql_leases`` and ``sql_claimed`` for the runner, ``sql_tokens`` and ``sql_sessions`` for
authentication; ``sql_endpoints`` and ``sql_outbox`` are about webhooks, ``sql_news`` about
everything that happens; ``sql_base`` holds what keeps the store's rules.
"""

from __future__ import annotations

from service.jobs.database import open_engine
from service.jobs.errors import StoreUnavailableError
from service.jobs.migrate import is_current, upgrade
from service.jobs.sql_base import Clock
from service.jobs.sql_claimed import ClaimedStatements
from service.jobs.sql_endpoints import EndpointStatements
from service.jobs.sql_leases import LeaseStatements
from service.jobs.sql_leftovers import LeftoverStatements
from service.jobs.sql_news import NewsStatements
from service.jobs.sql_outbox import OutboxStatements
from service.jobs.sql_plans import PlanStatements
from service.jobs.sql_queue import QueueStatements
from service.jobs.sql_read import ReadStatements
from service.jobs.sql_sessions import SessionStatements
from service.jobs.sql_tokens import TokenStatements


class SqlJobStore(
    ReadStatements,
    QueueStatements,
    PlanStatements,
    LeaseStatements,
    ClaimedStatements,
    LeftoverStatements,
    TokenStatements,
    SessionStatements,
    EndpointStatements,
    OutboxStatements,
    NewsStatements,
):
    """See :class:`service.jobs.store.JobStore`."""

    def ping(self) -> None:
        """See :meth:`service.jobs.store.JobStore.ping`."""
        with self._read() as connection:
            if not is_current(connection):
                raise StoreUnavailableError(
                    "The job database's schema is not that of this version; run the migration."
                )

    def close(self) -> None:
        """See :meth:`service.jobs.store.JobStore.close`."""
        self._engine.dispose()


def open_store(url: str, *, clock: Clock | None = None, migrate: bool = True) -> SqlJobStore:
    """The job store at a database address.

    Args:
        url: ``sqlite:///path`` or ``postgresql://…``.
        clock: The time now; by default PostgreSQL's own, or this machine's for SQLite.
        migrate: Bring the schema up to date first; several processes may do so at once.

    Raises:
        ValueError: The address is of another kind of database.
        StoreUnavailableError: The database does not answer.
    """
    engine = open_engine(url)
    if migrate:
        upgrade(engine)
    return SqlJobStore(engine, clock)
