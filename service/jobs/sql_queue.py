"""Statements of those who submit jobs: queue, cancel, retry, relabel, forget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from service.jobs.changes import end_phase, state_changed
from service.jobs.errors import (
    AlreadyTerminalError,
    IllegalTransitionError,
    RepeatedRequestError,
    RevisionMismatchError,
)
from service.jobs.ids import new_id
from service.jobs.news import NewsType
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
from service.jobs.search import keep_text
from service.jobs.sql_keys import KeyStatements, forget_keys
from service.jobs.states import JobState
from service.jobs.tables import documents, jobs, shards


class QueueStatements(KeyStatements):
    """What anybody may change."""

    def submit(
        self, job: NewJob, *, idempotency: IdempotencyRequest | None = None
    ) -> tuple[JobRecord, bool]:
        """See :meth:`service.jobs.store.JobQueue.submit`."""
        try:
            with self._write() as connection:
                job_id = new_id("job", self._now(connection))
                self._claim_key(connection, idempotency, job_id)
                return self._insert_job(connection, job_id, job), True
        except RepeatedRequestError as repeated:
            with self._write() as connection:
                return self._lock(connection, repeated.object_id), False

    def find_submitted(self, idempotency: IdempotencyRequest) -> JobRecord | None:
        """See :meth:`service.jobs.store.JobQueue.find_submitted`."""
        job_id = self.find_created(idempotency)
        if job_id is None:
            return None
        with self._read() as connection:
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one_or_none()
        return None if row is None else to_record(row, JobRecord)

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
        row = connection.execute(sa.insert(jobs).returning(jobs), values).one()
        record = to_record(row, JobRecord)
        keep_text(connection, record)
        data = {
            "state": str(record.state),
            "method": job.method,
            "methods": list(job.methods),
            "output_uri": job.output_uri,
        }
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
            values |= {"state": str(state)}
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
            job = self._change(connection, job_id, values, [])
            self._tell(connection, NewsType.JOB_UPDATED, job_id)
            return job

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
            self._tell(connection, NewsType.JOB_FORGOTTEN, job_id)
            forget_keys(connection, job_id)


def _afresh(entry: JobIntegration) -> JobIntegration:
    return JobIntegration(entry.name, entry.options)
