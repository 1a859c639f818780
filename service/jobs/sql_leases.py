"""How runners come to hold jobs: claims, their leases, and giving jobs back."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from service.jobs.changes import Change, state_changed
from service.jobs.overlap import overlap
from service.jobs.records import Claim, EventType, JobRecord
from service.jobs.rows import to_record
from service.jobs.sql_base import SqlBase
from service.jobs.sql_leftovers import is_being_collected
from service.jobs.states import JobState
from service.jobs.tables import ACTIVE, UtcDateTime, jobs

_CLAIMING = 7_247_001
_NOW = sa.bindparam("now", type_=UtcDateTime)


class LeaseStatements(SqlBase):
    """Jobs that are held, by whom, and until when."""

    def claim(self, owner: str, lease_seconds: float, *, overdue: bool = False) -> Claim | None:
        """See :meth:`service.jobs.store.ClaimedJobs.claim`."""
        try:
            with self._write() as connection:
                _one_at_a_time(connection)
                now = self._now(connection)
                row = None
                for query in (_WITHOUT_RUNNER, _NEXT_QUEUED):
                    wanted = _overdue(connection, query, now) if overdue else query
                    row = row or connection.execute(wanted, {"now": now}).one_or_none()
                if row is None:
                    return None
                job = self._take(connection, to_record(row, JobRecord), owner, lease_seconds, now)
        except sa.exc.IntegrityError:
            # The last guard of an output: the index that allows one job to write to it.
            return None
        return Claim(job, owner, job.fencing_token, now)

    def _take(
        self,
        connection: sa.Connection,
        job: JobRecord,
        owner: str,
        lease_seconds: float,
        now: datetime,
    ) -> JobRecord:
        lapsed = job.lease_owner is not None
        values: dict[str, Any] = {
            "lease_owner": owner,
            "lease_expires_at": now + timedelta(seconds=lease_seconds),
            "fencing_token": job.fencing_token + 1,
            "takeovers": job.takeovers + 1 if lapsed else job.takeovers,
        }
        changes: list[Change] = []
        if job.state == JobState.QUEUED:
            values |= {
                "state": str(JobState.PLANNING),
                "started_at": now,
            }
            changes.append(state_changed(job, JobState.PLANNING))
        if lapsed:
            detail = "The runner of this job stopped answering; another one continues it."
            changes.append((EventType.JOB_WARNING, {"code": "runner_lost", "detail": detail}))
        return self._change(connection, job.id, values, changes)

    def renew(self, claim: Claim, lease_seconds: float) -> JobRecord:
        """See :meth:`service.jobs.store.ClaimedJobs.renew`."""
        with self._write() as connection:
            expires_at = self._now(connection) + timedelta(seconds=lease_seconds)
            values = {"lease_expires_at": expires_at}
            return self._change(connection, claim.job_id, values, [], claim=claim, visible=False)

    def release(self, claim: Claim) -> None:
        """See :meth:`service.jobs.store.ClaimedJobs.release`."""
        values = {"lease_owner": None, "lease_expires_at": None}
        with self._write() as connection:
            self._change(connection, claim.job_id, values, [], claim=claim, visible=False)


def _one_at_a_time(connection: sa.Connection) -> None:
    """Let runners claim one after the other, so that each sees the outputs in use.

    SQLite does so by itself. The number only has to differ from those of other uses.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CLAIMING)))


def _claimable(*of_which: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """The job that a runner should take next ``:now``, locked; others skip it meanwhile."""
    other = jobs.alias("other")
    output_in_use = (
        sa.select(sa.literal(1))
        .where(
            overlap(other.c.output_uri, jobs.c.output_uri),
            other.c.id != jobs.c.id,
            other.c.state.in_([str(state) for state in ACTIVE]),
        )
        .exists()
    )
    return (
        sa.select(jobs)
        .where(
            *of_which,
            ~output_in_use,
            ~is_being_collected(_NOW),
        )
        # As in the index of the queue: the first that is free ends the search.
        .order_by(jobs.c.priority.desc(), jobs.c.queued_at, jobs.c.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=jobs)
    )


_WITHOUT_RUNNER = _claimable(
    jobs.c.state.in_([str(state) for state in ACTIVE]),
    sa.or_(jobs.c.lease_expires_at.is_(None), jobs.c.lease_expires_at <= _NOW),
)
_NEXT_QUEUED = _claimable(jobs.c.state == str(JobState.QUEUED))


def _overdue(connection: sa.Connection, query: sa.Select[Any], now: datetime) -> sa.Select[Any]:
    due = _seconds(connection, jobs.c.queued_at) + jobs.c.deadline_seconds
    return query.where(due <= _seconds(connection, now))


def _seconds(connection: sa.Connection, time: Any) -> sa.ColumnElement[float]:
    """A time as seconds since some day, which databases can add to."""
    time = sa.type_coerce(time, UtcDateTime)
    if connection.dialect.name == "postgresql":
        return sa.cast(sa.extract("epoch", time), sa.Float)
    return sa.func.julianday(time, type_=sa.Float) * 86_400.0
