"""What all statements of the SQL store share: transactions, and the one way to change a job."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.dml import ReturningUpdate

from service.jobs.announce import announce
from service.jobs.changes import Change
from service.jobs.database import for_writing, outages_as_unavailable
from service.jobs.errors import NotFoundError, StaleLeaseError
from service.jobs.news import NewsType
from service.jobs.records import Claim, JobRecord
from service.jobs.rows import to_json, to_record
from service.jobs.search import SEARCHED, keep_text
from service.jobs.tables import events, jobs
from service.jobs.tell import news_row, tell

Clock = Callable[[], datetime]
"""The time now, aware."""


class SqlBase:
    """Engine, clock, and the primitives that keep the store's rules.

    Args:
        engine: See :func:`service.jobs.database.open_engine`.
        clock: The time now; by default PostgreSQL's own, or this machine's for a file on it.
    """

    def __init__(self, engine: sa.Engine, clock: Clock | None = None) -> None:
        self._engine = engine
        self._writer = for_writing(engine)
        self._clock = clock or _machine_time
        is_file = engine.dialect.name == "sqlite"
        self._writing = threading.Lock() if is_file else contextlib.nullcontext()
        self._asks_database = clock is None and engine.dialect.name == "postgresql"

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with outages_as_unavailable(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """A transaction: committed at the end, rolled back by any error.

        SQLite has one writer at a time and lets others ask again after ever longer sleeps; the
        threads of this process wait for each other without.
        """
        with self._writing, outages_as_unavailable(), self._writer.begin() as connection:
            yield connection

    def _now(self, connection: sa.Connection) -> datetime:
        """The time by which leases run and history is written.

        Replicas on many machines share one database: its clock is the one that they agree on, so
        that a machine whose clock is wrong or is set neither takes leases over nor keeps them.
        """
        if not self._asks_database:
            return self._clock()
        now: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        return now.astimezone(UTC)

    def _lock(
        self, connection: sa.Connection, job_id: str, claim: Claim | None = None
    ) -> JobRecord:
        """The job, locked until the transaction ends; with a claim, only if that still holds."""
        row = connection.execute(_LOCKED_JOB, {"of_job": job_id}).one_or_none()
        if row is None and claim is None:
            raise NotFoundError(f"There is no job {job_id}.", context={"job_id": job_id})
        if row is None or (claim and not _holds(claim, row)):
            raise _stale(job_id)
        return to_record(row, JobRecord)

    def _change(
        self,
        connection: sa.Connection,
        job_id: str,
        values: Mapping[str, Any],
        changes: Sequence[Change],
        *,
        claim: Claim | None = None,
        visible: bool = True,
    ) -> JobRecord:
        """Change a job and append the events of it; only visible changes make a new revision.

        The event numbers come from the job's own row, which this update locks: hence no gaps and
        no repeats, however many write. With a claim the update only finds a job that the claim
        still holds.
        """
        parameters: dict[str, Any] = {
            "of_job": job_id,
            "events": len(changes),
            "seen": int(visible),
            **{f"new_{name}": value for name, value in values.items()},
        }
        if claim is not None:
            parameters |= {"held_as": claim.fencing_token, "held_by": claim.owner}
        update = _job_update(frozenset(values), is_claimed=claim is not None)
        row = connection.execute(update, parameters).one_or_none()
        if row is None:
            raise _stale(job_id)
        job = to_record(row, JobRecord)
        if not SEARCHED.isdisjoint(values):
            keep_text(connection, job)
        self._append(connection, job, changes)
        return job

    def _append(self, connection: sa.Connection, job: JobRecord, changes: Sequence[Change]) -> None:
        if not changes:
            return
        first, now = job.event_seq - len(changes) + 1, self._now(connection)
        rows = [
            {
                "job_id": job.id,
                "seq": seq,
                "type": str(event),
                "time": now,
                "attempt": job.attempt,
                "data": to_json(data),
            }
            for seq, (event, data) in enumerate(changes, first)
        ]
        connection.execute(sa.insert(events), rows)
        state = str(job.state)
        told = [news_row(row["type"], now, job.id, seq=row["seq"], state=state) for row in rows]
        tell(connection, [*told, *announce(connection, job, changes, now)])

    def _tell(self, connection: sa.Connection, what: NewsType, subject: str) -> None:
        """Tell that something changed that is no event of a job."""
        tell(connection, [news_row(what, self._now(connection), subject)])


_LOCKED_JOB = sa.select(jobs).where(jobs.c.id == sa.bindparam("of_job")).with_for_update()


@functools.cache
def _job_update(names: frozenset[str], *, is_claimed: bool) -> ReturningUpdate[Any]:
    """The statement that changes these columns of a job; made once, of the few that there are.

    A change of state notes the one before in the same statement, which the database checks.
    """
    values: dict[str, Any] = {
        name: sa.bindparam(f"new_{name}", type_=jobs.c[name].type) for name in names
    }
    if "state" in names:
        values["previous_state"] = jobs.c.state
    update = (
        sa.update(jobs)
        .where(jobs.c.id == sa.bindparam("of_job"))
        .values(
            **values,
            event_seq=jobs.c.event_seq + sa.bindparam("events"),
            revision=jobs.c.revision + sa.bindparam("seen"),
        )
        .returning(jobs)
    )
    if is_claimed:
        update = update.where(
            jobs.c.fencing_token == sa.bindparam("held_as"),
            jobs.c.lease_owner == sa.bindparam("held_by"),
        )
    return update


def _machine_time() -> datetime:
    return datetime.now(UTC)


def _holds(claim: Claim, row: sa.Row[Any]) -> bool:
    return bool(row.fencing_token == claim.fencing_token and row.lease_owner == claim.owner)


def _stale(job_id: str) -> StaleLeaseError:
    return StaleLeaseError(
        f"The lease of job {job_id} has ended or passed to another runner; this write is refused.",
        context={"job_id": job_id},
    )
