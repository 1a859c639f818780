"""Connections to SQLite and PostgreSQL, set up so that the store's promises hold on both."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from service.jobs.errors import StoreUnavailableError

_BUSY_SECONDS = 30
"""How long a writer of SQLite waits for the others; writes take milliseconds."""

_MOST_THREADS = 50
"""Connections to SQLite that are kept: one for each thread that serves requests, and some more."""

_CACHE_KIB = 256
"""Of pages, kept by each connection to SQLite; the system keeps the file, once for all of them."""

_IDLE_SECONDS = 15
"""How long a transaction may do nothing; ours never wait for anything but the database."""

# A server that vanished without a word is noticed before a lease (30 s) lapses.
_POSTGRES = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}


def open_engine(url: str) -> sa.Engine:
    """An engine for ``sqlite:///path`` or ``postgresql://…``.

    Raises:
        ValueError: Another database, or SQLite in memory, which threads cannot share.
    """
    parsed = sa.make_url(url)
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "postgresql":
        engine = sa.create_engine(
            parsed,
            pool_pre_ping=True,
            pool_size=10,
            max_overflow=20,
            connect_args=_POSTGRES,
            json_deserializer=_from_json,
        )
        sa.event.listen(engine, "connect", _prepare_postgres)
        return engine
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise ValueError(
            f"{parsed.render_as_string()} cannot hold jobs; use sqlite:///path or postgresql://…"
        )
    engine = sa.create_engine(
        parsed,
        pool_size=_MOST_THREADS,
        connect_args={"timeout": _BUSY_SECONDS},
        json_deserializer=_from_json,
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def for_writing(engine: sa.Engine) -> sa.Engine:
    """The same engine, whose transactions take SQLite's write lock at their beginning.

    A transaction that began by reading and then writes fails at once when another one wrote in
    between; one that waits for the lock first does not.
    """
    return engine.execution_options(takes_write_lock=True)


def _from_json(text: str | bytes) -> Any:
    """A job has ten columns of JSON: reading them is much of what reading it takes."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:  # what only the standard library reads: halves of surrogate pairs
        return json.loads(text)


def _prepare_postgres(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    """A process that is stopped in mid-transaction must not keep its locks for ever."""
    with contextlib.closing(connection.cursor()) as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_SECONDS}s'")
    connection.commit()


def _prepare_sqlite(connection: sqlite3.Connection, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver begins no transactions of its own
    _use_write_ahead_log(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON", f"cache_size=-{_CACHE_KIB}"):
        connection.execute(f"PRAGMA {pragma}")


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """A file is changed to it once; SQLite does not wait for others who are just doing so."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("takes_write_lock")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def outages_as_unavailable() -> Iterator[None]:
    """Turn what the driver raises when the database is away or busy into our own error.

    SQLite's driver raises the same class for a wrong statement; that is a fault of ours and passes.
    """
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
        original = getattr(error, "orig", None)
        if getattr(original, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
            raise
        # The driver's text names host and user at most; SQLAlchemy hides the password.
        reason = str(original or error).strip().splitlines()
        raise StoreUnavailableError(
            f"The job database does not answer: {reason[0] if reason else 'no reason given'}."
        ) from error
