"""Statements of those who remove what attempts have left behind."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from merging.plan.plan import Plan
from service.jobs.errors import IllegalTransitionError, OutputInUseError
from service.jobs.overlap import overlap
from service.jobs.records import JobRecord, KeptInUse, Leftover
from service.jobs.rows import unpack
from service.jobs.sql_base import SqlBase
from service.jobs.states import TERMINAL, JobState
from service.jobs.tables import documents, jobs, leftovers, shards


class LeftoverStatements(SqlBase):
    """See :class:`service.jobs.store.Leftovers`."""

    def take_leftover(
        self, kept_seconds: float, lease_seconds: float, *, after: Leftover | None = None
    ) -> Leftover | None:
        """See :meth:`service.jobs.store.Leftovers.take_leftover`."""
        while True:
            with self._write() as connection:
                now = self._now(connection)
                query = _due(now, now - timedelta(seconds=kept_seconds), after)
                row = connection.execute(query).one_or_none()
                if row is None:
                    return None
                until = now + timedelta(seconds=lease_seconds)
                connection.execute(_at(row).values(collecting_until=until))
            after = _leftover(row)
            # From here on no job with this output is claimed. One that was claimed while the mark
            # was being set was queued before, so that it is seen now.
            with self._write() as connection:
                if not connection.execute(sa.select(_is_wanted(row.output_uri))).scalar_one():
                    return after
                connection.execute(_at(row).values(collecting_until=None))

    def hold_output(self, job_id: str, lease_seconds: float) -> Leftover:
        """See :meth:`service.jobs.store.Leftovers.hold_output`."""
        with self._write() as connection:
            job = self._lock(connection, job_id)
            if job.state != JobState.SUCCEEDED or job.finished_at is None:
                raise IllegalTransitionError(
                    f"Job {job_id} is {job.state}; only one that succeeded has an output.",
                    context={"job_id": job_id, "state": str(job.state)},
                )
            mine = sa.select(leftovers).where(*_place(job_id, job.attempt)).with_for_update()
            if connection.execute(mine).one_or_none() is None:  # collected before
                keep_leftover(connection, job, job.finished_at)
            row, now = connection.execute(mine).one(), self._now(connection)
            if row.collecting_until is not None and row.collecting_until > now:
                raise _in_use(job, "somebody removes what is there already")
            until = now + timedelta(seconds=lease_seconds)
            connection.execute(_at(row).values(collecting_until=until))
        leftover = _leftover(row)
        # As above: whoever was claimed while the mark was being set is seen now.
        with self._write() as connection:
            user = _user_of_output(connection, job)
            if user is None:
                return leftover
            connection.execute(_at(row).values(collecting_until=None))
        raise _in_use(job, user)

    def end_collection(self, leftover: Leftover, *, is_gone: bool) -> None:
        """See :meth:`service.jobs.store.Leftovers.end_collection`."""
        place = _place(leftover.job_id, leftover.attempt)
        with self._write() as connection:
            if is_gone:
                connection.execute(sa.delete(leftovers).where(*place))
            else:
                change = sa.update(leftovers).where(*place)
                connection.execute(change.values(collecting_until=None))

    def kept_in_use(self, kept_seconds: float) -> KeptInUse:
        """See :meth:`service.jobs.store.Leftovers.kept_in_use`."""
        with self._read() as connection:
            before = self._now(connection) - timedelta(seconds=kept_seconds)
            query = (
                sa.select(shards.c.file_name)
                .distinct()
                .join(jobs, jobs.c.id == shards.c.job_id)
                .where(
                    shards.c.kind == "intermediate",
                    shards.c.file_name.startswith("statistics-"),
                    sa.or_(
                        jobs.c.state.not_in([str(state) for state in TERMINAL]),
                        jobs.c.finished_at > before,
                    ),
                )
            )
            return KeptInUse(frozenset(connection.scalars(query)), before)


def keep_leftover(connection: sa.Connection, job: JobRecord, ended_at: datetime) -> None:
    """Note that an attempt ended: if it had a plan, it may have left something."""
    plan = sa.select(
        sa.literal(job.id),
        sa.literal(job.attempt),
        sa.literal(job.output_uri),
        documents.c.data,
        sa.literal(job.queued_at, leftovers.c.began_at.type),
        sa.literal(ended_at, leftovers.c.ended_at.type),
    ).where(documents.c.job_id == job.id, documents.c.kind == "plan")
    columns = ["job_id", "attempt", "output_uri", "plan", "began_at", "ended_at"]
    connection.execute(sa.insert(leftovers).from_select(columns, plan))


def is_being_collected(now: datetime | sa.BindParameter[datetime]) -> sa.ColumnElement[bool]:
    """Whether somebody removes what is at the output of the job that a query selects."""
    return (
        sa.select(sa.literal(1))
        .where(
            overlap(leftovers.c.output_uri, jobs.c.output_uri), leftovers.c.collecting_until > now
        )
        .exists()
    )


def _due(now: datetime, ended_before: datetime, after: Leftover | None) -> sa.Select[Any]:
    """The next leftover that nobody wants or collects, locked.

    A younger one of the same output keeps it: their files may be the same.
    """
    younger = leftovers.alias("younger")
    kept = sa.select(younger.c.job_id).where(
        overlap(younger.c.output_uri, leftovers.c.output_uri), younger.c.ended_at > ended_before
    )
    query = (
        sa.select(leftovers)
        .where(
            leftovers.c.ended_at <= ended_before,
            sa.func.coalesce(leftovers.c.collecting_until, leftovers.c.ended_at) <= now,
            ~kept.exists(),
            ~_is_wanted(leftovers.c.output_uri),
        )
        .order_by(leftovers.c.job_id, leftovers.c.attempt)
        .limit(1)
        .with_for_update(skip_locked=True, of=leftovers)
    )
    if after is not None:
        place = sa.tuple_(leftovers.c.job_id, leftovers.c.attempt)
        query = query.where(place > sa.tuple_(sa.literal(after.job_id), sa.literal(after.attempt)))
    return query


def _is_wanted(output_uri: Any) -> sa.ColumnElement[bool]:
    """Whether a job that has not ended writes to an output, or is going to."""
    return (
        sa.select(sa.literal(1))
        .where(
            overlap(jobs.c.output_uri, output_uri),
            jobs.c.state.not_in([str(state) for state in TERMINAL]),
        )
        .exists()
    )


def _user_of_output(connection: sa.Connection, job: JobRecord) -> str | None:
    """Who else needs what a job published, in words."""
    others = sa.select(jobs.c.id, jobs.c.inputs, overlap(jobs.c.output_uri, job.output_uri)).where(
        jobs.c.id != job.id, jobs.c.state.not_in([str(state) for state in TERMINAL])
    )
    for other_id, inputs, is_written in connection.execute(others):
        if is_written:
            return f"job {other_id} is going to write there"
        if any(f"{item['uri']}/".startswith(f"{job.output_uri}/") for item in inputs):
            return f"job {other_id} reads from there"
    later = sa.select(jobs.c.id).where(
        jobs.c.output_uri == job.output_uri,
        jobs.c.state == str(JobState.SUCCEEDED),
        jobs.c.finished_at > job.finished_at,
    )
    newest = connection.execute(later.order_by(jobs.c.finished_at.desc()).limit(1))
    other_id = newest.scalar_one_or_none()
    return None if other_id is None else f"job {other_id} published there later"


def _in_use(job: JobRecord, reason: str) -> OutputInUseError:
    return OutputInUseError(
        f"The output of job {job.id} is needed: {reason}.",
        context={"job_id": job.id, "uri": job.output_uri},
    )


def _leftover(row: sa.Row[Any]) -> Leftover:
    plan = Plan.from_json(unpack(row.plan))
    return Leftover(row.job_id, row.attempt, plan, row.began_at, row.ended_at)


def _place(job_id: str, attempt: int) -> tuple[sa.ColumnElement[bool], ...]:
    return (leftovers.c.job_id == job_id, leftovers.c.attempt == attempt)


def _at(row: sa.Row[Any]) -> sa.Update:
    return sa.update(leftovers).where(*_place(row.job_id, row.attempt))
