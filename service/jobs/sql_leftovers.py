"""Statements of those who remove what attempts have left behind."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from merging.plan.plan import Plan
from service.jobs.overlap import overlap
from service.jobs.records import JobRecord, Leftover
from service.jobs.rows import unpack
from service.jobs.sql_base import SqlBase
from service.jobs.states import TERMINAL
from service.jobs.tables import documents, jobs, leftovers


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

    def end_collection(self, leftover: Leftover, *, is_gone: bool) -> None:
        """See :meth:`service.jobs.store.Leftovers.end_collection`."""
        place = _place(leftover.job_id, leftover.attempt)
        with self._write() as connection:
            if is_gone:
                connection.execute(sa.delete(leftovers).where(*place))
            else:
                change = sa.update(leftovers).where(*place)
                connection.execute(change.values(collecting_until=None))


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


def is_being_collected(now: datetime) -> sa.ColumnElement[bool]:
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


def _leftover(row: sa.Row[Any]) -> Leftover:
    plan = Plan.from_json(unpack(row.plan))
    return Leftover(row.job_id, row.attempt, plan, row.began_at, row.ended_at)


def _place(job_id: str, attempt: int) -> tuple[sa.ColumnElement[bool], ...]:
    return (leftovers.c.job_id == job_id, leftovers.c.attempt == attempt)


def _at(row: sa.Row[Any]) -> sa.Update:
    return sa.update(leftovers).where(*_place(row.job_id, row.attempt))
