"""Statements that only read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from merging.plan.plan import Plan
from service.jobs.errors import NotFoundError
from service.jobs.records import (
    Backlog,
    EventRecord,
    JobCursor,
    JobFilter,
    JobHead,
    JobRecord,
    ShardRecord,
    WorkerRecord,
)
from service.jobs.rows import to_record, unpack
from service.jobs.search import has_words
from service.jobs.sql_base import SqlBase
from service.jobs.states import TERMINAL, JobState, ShardState
from service.jobs.tables import ACTIVE, UtcDateTime, documents, events, jobs, shards

_TASK = ("worker", "job_id", "file_name", "started_at")
"""What is told of a shard that a worker has."""


_THIS_JOB = sa.bindparam("of_job", type_=sa.String)

# Made once: building a statement takes as long as carrying it out.
_JOB = sa.select(jobs).where(jobs.c.id == _THIS_JOB)
_JOBS = sa.select(jobs).where(jobs.c.id.in_(sa.bindparam("of_jobs", expanding=True)))
_HEADS = (
    sa.select(jobs.c.id, jobs.c.revision, jobs.c.created_at)
    .order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
_LAST_EVENT = sa.select(jobs.c.event_seq, jobs.c.state).where(jobs.c.id == _THIS_JOB)
_SHARDS = sa.select(shards).where(shards.c.job_id == _THIS_JOB).order_by(shards.c.index)
_EVENTS = (
    sa.select(events)
    .where(events.c.job_id == _THIS_JOB, events.c.seq > sa.bindparam("after"))
    .order_by(events.c.seq)
    .limit(sa.bindparam("limit", type_=sa.Integer))
)


class ReadStatements(SqlBase):
    """What anybody may read."""

    def get(self, job_id: str) -> JobRecord:
        """See :meth:`service.jobs.store.JobQueue.get`."""
        with self._read() as connection:
            row = connection.execute(_JOB, {"of_job": job_id}).one_or_none()
        if row is None:
            raise _not_found(job_id)
        return to_record(row, JobRecord)

    @property
    def is_at_hand(self) -> bool:
        """See :attr:`service.jobs.store.JobQueue.is_at_hand`."""
        return self._engine.dialect.name == "sqlite"

    def list_heads(
        self,
        job_filter: JobFilter | None = None,
        *,
        cursor: JobCursor | None = None,
        limit: int = 20,
    ) -> list[JobHead]:
        """See :meth:`service.jobs.store.JobQueue.list_heads`."""
        query, conditions = _HEADS, _conditions(job_filter or JobFilter())
        if cursor is not None:
            seen = sa.tuple_(sa.literal(cursor.created_at, UtcDateTime), sa.literal(cursor.id))
            conditions.append(sa.tuple_(jobs.c.created_at, jobs.c.id) < seen)
        if conditions:
            query = query.where(*conditions)
        with self._read() as connection:
            return [JobHead(*row) for row in connection.execute(query, {"limit": limit})]

    def get_many(self, job_ids: Collection[str]) -> dict[str, JobRecord]:
        """See :meth:`service.jobs.store.JobQueue.get_many`."""
        with self._read() as connection:
            rows = connection.execute(_JOBS, {"of_jobs": list(job_ids)})
            return {row.id: to_record(row, JobRecord) for row in rows}

    def counts(self) -> dict[JobState, int]:
        """See :meth:`service.jobs.store.JobQueue.counts`."""
        query = sa.select(jobs.c.state, sa.func.count().label("number")).group_by(jobs.c.state)
        with self._read() as connection:
            found = {row.state: row.number for row in connection.execute(query)}
        return {state: found.get(str(state), 0) for state in JobState}

    def backlog(self, initiator: str) -> Backlog:
        """See :meth:`service.jobs.store.JobQueue.backlog`."""
        number = sa.func.count()
        query = sa.select(
            number.filter(jobs.c.state == str(JobState.QUEUED)),
            number.filter(jobs.c.initiator == initiator),
        ).where(jobs.c.state.in_([str(state) for state in JobState if state not in TERMINAL]))
        with self._read() as connection:
            queued, unfinished = connection.execute(query).one()
        return Backlog(queued, unfinished)

    def shards(self, job_id: str) -> list[ShardRecord]:
        """See :meth:`service.jobs.store.JobQueue.shards`."""
        with self._read() as connection:
            rows = connection.execute(_SHARDS, {"of_job": job_id})
            return [to_record(row, ShardRecord) for row in rows]

    def workers(self, since: datetime) -> list[WorkerRecord]:
        """See :meth:`service.jobs.store.JobQueue.workers`."""
        is_busy = (shards.c.state == str(ShardState.RUNNING)) & jobs.c.state.in_(
            [str(state) for state in ACTIVE]
        )
        is_done = shards.c.state == str(ShardState.SUCCEEDED)
        moved = shards.c.bytes_read_total + shards.c.bytes_total
        seen = sa.func.max(sa.func.coalesce(shards.c.finished_at, shards.c.started_at))
        grouped = (
            sa.select(
                shards.c.worker,
                sa.func.max(shards.c.device).label("device"),
                sa.func.count().filter(is_done).label("shards_done"),
                sa.func.coalesce(sa.func.sum(moved).filter(is_done), 0).label("bytes_done"),
                sa.type_coerce(seen, UtcDateTime).label("last_seen_at"),
            )
            .join(jobs, jobs.c.id == shards.c.job_id)
            .where(shards.c.worker.is_not(None), shards.c.device.is_not(None))
            .where(is_busy | (shards.c.finished_at >= since))
            .group_by(shards.c.worker)
            .order_by(shards.c.worker)
        )
        busy = (
            sa.select(*(shards.c[name] for name in _TASK), shards.c.index.label("shard_index"))
            .join(jobs, jobs.c.id == shards.c.job_id)
            .where(is_busy)
            .order_by(shards.c.started_at)
        )
        with self._read() as connection:
            tasks = {row.worker: row._asdict() for row in connection.execute(busy)}
            return [
                WorkerRecord(**{**tasks.get(row.worker, {}), **row._asdict()})
                for row in connection.execute(grouped)
            ]

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[EventRecord]:
        """See :meth:`service.jobs.store.JobQueue.events`."""
        with self._read() as connection:
            return _events(connection, job_id, after, limit)

    def last_event(self, job_id: str) -> tuple[int, bool]:
        """See :meth:`service.jobs.store.JobQueue.last_event`."""
        with self._read() as connection:
            row = connection.execute(_LAST_EVENT, {"of_job": job_id}).one_or_none()
        if row is None:
            raise _not_found(job_id)
        return row.event_seq, row.state in TERMINAL

    def new_events(
        self, positions: Mapping[str, int], *, limit: int = 1000
    ) -> dict[str, list[EventRecord]]:
        """See :meth:`service.jobs.store.JobQueue.new_events`."""
        query = sa.select(jobs.c.id, jobs.c.event_seq).where(jobs.c.id.in_(positions))
        with self._read() as connection:
            found: dict[str, list[EventRecord]] = {}
            for job_id, last in connection.execute(query):
                after = positions[job_id]
                found[job_id] = _events(connection, job_id, after, limit) if last > after else []
            return found

    def load_plan(self, job_id: str) -> Plan | None:
        """See :meth:`service.jobs.store.JobQueue.load_plan`."""
        data = self._document(job_id, "plan")
        return None if data is None else Plan.from_json(data)

    def load_report(self, job_id: str) -> dict[str, Any] | None:
        """See :meth:`service.jobs.store.JobQueue.load_report`."""
        data = self._document(job_id, "report")
        return None if data is None else msgspec.json.decode(data, type=dict[str, Any])

    def _document(self, job_id: str, kind: str) -> bytes | None:
        query = sa.select(documents.c.data).where(
            documents.c.job_id == job_id, documents.c.kind == kind
        )
        with self._read() as connection:
            data: bytes | None = connection.execute(query).scalar_one_or_none()
        return None if data is None else unpack(data)


def _not_found(job_id: str) -> NotFoundError:
    return NotFoundError(f"There is no job {job_id}.", context={"job_id": job_id})


def _events(connection: sa.Connection, job_id: str, after: int, limit: int) -> list[EventRecord]:
    rows = connection.execute(_EVENTS, {"of_job": job_id, "after": after, "limit": limit})
    return [to_record(row, EventRecord) for row in rows]


def _conditions(job_filter: JobFilter) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if job_filter.states:
        found.append(jobs.c.state.in_([str(state) for state in job_filter.states]))
    if job_filter.method is not None:
        # A list of plain words as JSON: each stands in it between quotes.
        methods = sa.cast(jobs.c.methods, sa.Text)
        found.append(methods.contains(f'"{job_filter.method}"', autoescape=True))
    if job_filter.initiator is not None:
        found.append(jobs.c.initiator == job_filter.initiator)
    if job_filter.created_after is not None:
        found.append(jobs.c.created_at > job_filter.created_after)
    if job_filter.text is not None:
        found.append(has_words(job_filter.text))
    found.extend(_has_label(key, value) for key, value in job_filter.labels.items())
    return found


def _has_label(key: str, value: str) -> sa.ColumnElement[bool]:
    if '"' in key or "\\" in key:
        return sa.false()  # a path of SQLite's JSON functions cannot name such a key
    matches: sa.ColumnElement[bool] = jobs.c.labels[key].as_string() == value
    return matches
