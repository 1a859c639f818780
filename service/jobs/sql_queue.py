"""Statements of those who submit jobs: queue, cancel, retry, relabel, forget."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.jobs.changes import end_phase, state_changed
from service.jobs.errors import (
    AlreadyTerminalError,
    IdempotencyReusedError,
    IllegalTransitionError,
    RevisionMismatchError,
)
from service.jobs.ids import new_id
from service.jobs.records import (
    CancelMode,
    EventType,
    IdempotencyRequest,
    JobIntegration,
    JobRecord,
    NewJob,
    Progress,
)
from service.jobs.rows import to_json, to_record
from service.jobs.sql_base import SqlBase
from service.jobs.states import JobState
from service.jobs.tables import documents, idempotency_keys, jobs, shards

IDEMPOTENCY_HOURS = 24
"""How long a key is remembered; published in the API's documentation."""

_KEY_COLUMNS = ("owner", "method", "path", "key")


class QueueStatements(SqlBase):
    """What anybody may change."""

    def submit(
        self, job: NewJob, *, idempotency: IdempotencyRequest | None = None
    ) -> tuple[JobRecord, bool]:
        """See :meth:`service.jobs.store.JobQueue.submit`."""
        with self._write() as connection:
            job_id = new_id("job", self._now(connection))
            if idempotency is not None:
                first = self._claim_key(connection, idempotency, job_id)
                if first is not None:
                    return self._lock(connection, first), False
            return self._insert_job(connection, job_id, job), True

    def find_submitted(self, idempotency: IdempotencyRequest) -> JobRecord | None:
        """See :meth:`service.jobs.store.JobQueue.find_submitted`."""
        with self._read() as connection:
            job_id = self._find_key(connection, idempotency)
            if job_id is None:
                return None
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one_or_none()
        return None if row is None else to_record(row, JobRecord)

    def _claim_key(
        self, connection: sa.Connection, request: IdempotencyRequest, job_id: str
    ) -> str | None:
        """Take a key for this job, or give the job that has it already.

        The insert waits for another transaction that is just taking the same key, and then finds
        it taken: equal requests, however many at once, make one job.
        """
        now = self._now(connection)
        keys = idempotency_keys
        expired = keys.c.created_at < now - timedelta(hours=IDEMPOTENCY_HOURS)
        connection.execute(sa.delete(keys).where(expired))
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        row = {**to_json(request), "job_id": job_id, "created_at": now}
        taken = insert(keys).values(row).on_conflict_do_nothing().returning(keys.c.job_id)
        if connection.execute(taken).one_or_none() is not None:
            return None
        return self._find_key(connection, request)

    def _find_key(self, connection: sa.Connection, request: IdempotencyRequest) -> str | None:
        keys = idempotency_keys
        same = (keys.c[name] == getattr(request, name) for name in _KEY_COLUMNS)
        fresh = keys.c.created_at >= self._now(connection) - timedelta(hours=IDEMPOTENCY_HOURS)
        query = sa.select(keys.c.job_id, keys.c.fingerprint).where(*same, fresh)
        found = connection.execute(query).one_or_none()
        if found is None:
            return None
        if found.fingerprint != request.fingerprint:
            raise IdempotencyReusedError(
                "This Idempotency-Key was used for another request. Use a new key, or send the"
                " first request again unchanged.",
                context={"job_id": found.job_id},
            )
        return str(found.job_id)

    def _insert_job(self, connection: sa.Connection, job_id: str, job: NewJob) -> JobRecord:
        now = self._now(connection)
        values = {
            **to_json(job),
            "id": job_id,
            "state": str(JobState.QUEUED),
            "attempt": 1,
            "revision": 1,
            "event_seq": 1,
            "created_at": now,
            "queued_at": now,
            "progress": to_json(Progress()),
            "phases": [],
            "fencing_token": 0,
            "takeovers": 0,
        }
        row = connection.execute(sa.insert(jobs).values(values).returning(jobs)).one()
        record = to_record(row, JobRecord)
        data = {"state": str(record.state), "method": job.method, "output_uri": job.output_uri}
        self._append(connection, record, [(EventType.JOB_CREATED, data)])
        return record

    def request_cancel(self, job_id: str, mode: CancelMode = "orderly") -> JobRecord:
        """See :meth:`service.jobs.store.JobQueue.request_cancel`."""
        with self._write() as connection:
            job = self._lock(connection, job_id)
            if job.state in (JobState.SUCCEEDED, JobState.FAILED):
                raise AlreadyTerminalError(
                    f"Job {job_id} has {job.state} already; there is nothing to cancel.",
                    context={"job_id": job_id, "state": str(job.state)},
                )
            asked = job.cancel_requested
            if job.state == JobState.CANCELLED or asked == "now" or asked == mode:
                return job
            values: dict[str, Any] = {"cancel_requested": mode}
            if job.state == JobState.CANCELLING:
                return self._change(connection, job_id, values, [])
            at_once = job.state == JobState.QUEUED
            state = JobState.CANCELLED if at_once else JobState.CANCELLING
            values |= {"state": str(state), "previous_state": jobs.c.state}
            changes = [state_changed(job, state, cancel_requested=mode)]
            if at_once:
                now = self._now(connection)
                values |= {"finished_at": now, "phases": to_json(end_phase(job.phases, now))}
                changes.append((EventType.JOB_FINISHED, {"state": str(state)}))
            return self._change(connection, job_id, values, changes)

    def retry(self, job_id: str) -> JobRecord:
        """See :meth:`service.jobs.store.JobQueue.retry`."""
        with self._write() as connection:
            job = self._lock(connection, job_id)
            if job.state != JobState.FAILED:
                raise IllegalTransitionError(
                    f"Job {job_id} is {job.state}; only a failed job can be retried. Submit it"
                    " again as a new job instead.",
                    context={"job_id": job_id, "state": str(job.state)},
                )
            for table in (shards, documents):
                connection.execute(sa.delete(table).where(table.c.job_id == job_id))
            values = {
                "state": str(JobState.QUEUED),
                "previous_state": jobs.c.state,
                "integrations": to_json([_afresh(entry) for entry in job.integrations]),
                "attempt": job.attempt + 1,
                "queued_at": self._now(connection),
                "started_at": None,
                "finished_at": None,
                "error": None,
                "plan_digest": None,
                "progress": to_json(Progress()),
                "phases": [],
                "takeovers": 0,
            }
            return self._change(connection, job_id, values, [state_changed(job, JobState.QUEUED)])

    def patch(
        self,
        job_id: str,
        *,
        labels: Mapping[str, str] | None = None,
        priority: int | None = None,
        if_revision: int | None = None,
    ) -> JobRecord:
        """See :meth:`service.jobs.store.JobQueue.patch`."""
        with self._write() as connection:
            job = self._lock(connection, job_id)
            if if_revision is not None and if_revision != job.revision:
                raise RevisionMismatchError(
                    f"Job {job_id} was changed since it was read; read it again.",
                    context={"job_id": job_id},
                )
            if priority is not None and job.state != JobState.QUEUED:
                raise IllegalTransitionError(
                    f"Job {job_id} is {job.state}; the priority matters only while it is queued.",
                    context={"job_id": job_id, "state": str(job.state)},
                )
            values: dict[str, Any] = {} if labels is None else {"labels": dict(labels)}
            if priority is not None:
                values["priority"] = priority
            return self._change(connection, job_id, values, [])

    def delete(self, job_id: str) -> None:
        """See :meth:`service.jobs.store.JobQueue.delete`."""
        with self._write() as connection:
            job = self._lock(connection, job_id)
            if not job.is_terminal:
                raise IllegalTransitionError(
                    f"Job {job_id} is {job.state}; cancel it before it can be forgotten.",
                    context={"job_id": job_id, "state": str(job.state)},
                )
            connection.execute(sa.delete(jobs).where(jobs.c.id == job_id))


def _afresh(entry: JobIntegration) -> JobIntegration:
    return JobIntegration(entry.name, entry.options)
