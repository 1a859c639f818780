"""What a runner writes of a job that it holds; all of it carries the claim's fencing token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from merging.plan.plan import Plan, Shard
from service.jobs.changes import Change, begin_phase, end_phase, furthest, state_changed
from service.jobs.errors import IllegalTransitionError
from service.jobs.records import (
    Claim,
    EventRecord,
    EventType,
    JobRecord,
    Progress,
    ShardCounts,
)
from service.jobs.rows import pack, pack_json, to_json
from service.jobs.sql_base import SqlBase
from service.jobs.sql_leftovers import keep_leftover
from service.jobs.states import TERMINAL, JobState, ShardState, is_allowed
from service.jobs.tables import documents, shards

_SHARD_EVENTS = {
    ShardState.PENDING: EventType.SHARD_RETRIED,
    ShardState.RUNNING: EventType.SHARD_STARTED,
    ShardState.SUCCEEDED: EventType.SHARD_FINISHED,
    ShardState.FAILED: EventType.SHARD_FINISHED,
}


class ClaimedStatements(SqlBase):
    """What comes of a job: states, phases, plan, shards, progress."""

    def transition(
        self,
        claim: Claim,
        state: JobState,
        *,
        error: Mapping[str, Any] | None = None,
        output: Mapping[str, Any] | None = None,
        report: Mapping[str, Any] | None = None,
        phase: str | None = None,
    ) -> JobRecord:
        """See :meth:`service.jobs.store.ClaimedJobs.transition`."""
        with self._write() as connection:
            job = self._lock(connection, claim.job_id, claim)
            if not is_allowed(job.state, state):
                raise IllegalTransitionError(
                    f"Job {job.id} is {job.state} and cannot become {state}.",
                    context={"job_id": job.id, "state": str(job.state)},
                )
            values: dict[str, Any] = {
                "state": str(state),
                "takeovers": 0,
            }
            changes = [state_changed(job, state)]
            now = self._now(connection)
            if phase is not None:
                _begin(job, phase, now, values, changes)
            if state in TERMINAL:
                values |= {
                    "finished_at": now,
                    "estimated_finish_at": None,
                    "lease_owner": None,
                    "lease_expires_at": None,
                    "phases": to_json(end_phase(job.phases, now)),
                    "error": error,
                    "output": output,
                }
                if output is not None:
                    changes.insert(0, (EventType.JOB_OUTPUT_COMMITTED, {"output": output}))
                changes.append((EventType.JOB_FINISHED, {"state": str(state), "error": error}))
            job = self._change(connection, job.id, values, changes, claim=claim)
            if job.is_terminal:
                _stop_shards(connection, job.id)
                keep_leftover(connection, job, now)
            if report is not None:
                _keep_document(connection, job.id, "report", pack_json(report))
            return job

    def set_phase(self, claim: Claim, name: str, message: str = "") -> JobRecord:
        """See :meth:`service.jobs.store.ClaimedJobs.set_phase`."""
        with self._write() as connection:
            job = self._lock(connection, claim.job_id, claim)
            if job.phase == name:
                return job
            values: dict[str, Any] = {}
            changes: list[Change] = []
            _begin(job, name, self._now(connection), values, changes, message)
            return self._change(connection, job.id, values, changes, claim=claim)

    def save_plan(self, claim: Claim, plan: Plan, *, phase: str | None = None) -> JobRecord:
        """See :meth:`service.jobs.store.ClaimedJobs.save_plan`."""
        values = {
            "plan_digest": plan.digest,
            "inputs": to_json(plan.inputs),
            "warnings": to_json(plan.warnings),
            "progress": to_json(
                Progress(
                    shards_total=len(plan.shards),
                    bytes_total=plan.totals.bytes_read + plan.totals.bytes_written,
                    tensors_total=plan.totals.tensors,
                )
            ),
        }
        changes: list[Change] = [
            (EventType.JOB_WARNING, {"code": "plan", "detail": text}) for text in plan.warnings
        ]
        with self._write() as connection:
            job = self._lock(connection, claim.job_id, claim)
            if job.plan_digest == values["plan_digest"]:
                return job
            if phase is not None:
                _begin(job, phase, self._now(connection), values, changes)
            job = self._change(connection, job.id, values, changes, claim=claim)
            connection.execute(sa.delete(shards).where(shards.c.job_id == job.id))
            rows = [_shard_row(job.id, shard) for shard in plan.shards]
            if rows:
                connection.execute(sa.insert(shards), rows)
            _keep_document(connection, job.id, "plan", pack(plan.to_json()))
            return job

    def record_shard(
        self,
        claim: Claim,
        index: int,
        state: ShardState,
        *,
        attempt: int,
        worker: str | None = None,
        device: str | None = None,
        receipt: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        """See :meth:`service.jobs.store.ClaimedJobs.record_shard`."""
        place = (shards.c.job_id == claim.job_id, shards.c.index == index)
        facts = {"worker": worker, "device": device, "receipt": receipt, "error": error}
        facts = {name: value for name, value in facts.items() if value is not None}
        with self._write() as connection:
            job = self._lock(connection, claim.job_id, claim)
            row = connection.execute(sa.select(shards).where(*place)).one()
            if row.state == state and row.attempt == attempt:
                return
            now = self._now(connection)
            values: dict[str, Any] = {"state": str(state), "attempt": attempt, **facts}
            if state == ShardState.RUNNING:
                values |= {"started_at": now, "finished_at": None, "error": None, "receipt": None}
                values |= dict.fromkeys(_COUNTS, 0)
            if state == ShardState.SUCCEEDED:
                values |= {"finished_at": now, "error": None}
                values |= dict.fromkeys(_COUNTS, row.tensors_total)
            if state == ShardState.PENDING:
                values |= {"receipt": None}
            if state == ShardState.FAILED:
                values |= {"finished_at": now}
            data = {"shard_index": index, "state": str(state), "attempt": attempt, **facts}
            progressed = {"takeovers": 0} if state == ShardState.SUCCEEDED else {}
            self._change(
                connection, job.id, progressed, [(_SHARD_EVENTS[state], data)], claim=claim
            )
            connection.execute(sa.update(shards).where(*place).values(**values))

    def update_progress(
        self,
        claim: Claim,
        progress: Progress,
        *,
        shards: Sequence[ShardCounts] = (),
        estimated_finish_at: datetime | None = None,
        with_event: bool = True,
    ) -> JobRecord:
        """See :meth:`service.jobs.store.ClaimedJobs.update_progress`."""
        with self._write() as connection:
            job = self._lock(connection, claim.job_id, claim)
            reached = furthest(job.progress, progress)
            data = {
                "progress": reached,
                "shards": shards,
                "estimated_finish_at": estimated_finish_at,
            }
            values = {"progress": to_json(reached), "estimated_finish_at": estimated_finish_at}
            changes: list[Change] = [(EventType.JOB_PROGRESS, data)] if with_event else []
            job = self._change(connection, job.id, values, changes, claim=claim)
            if shards:
                connection.execute(_COUNT_UPDATE, [_count_row(job.id, counts) for counts in shards])
            return job

    def append_event(self, claim: Claim, event: EventType, data: Mapping[str, Any]) -> EventRecord:
        """See :meth:`service.jobs.store.ClaimedJobs.append_event`."""
        with self._write() as connection:
            job = self._change(connection, claim.job_id, {}, [(event, data)], claim=claim)
            now = self._now(connection)
            return EventRecord(job.event_seq, event, now, job.id, job.attempt, dict(data))


def _begin(
    job: JobRecord,
    phase: str,
    now: datetime,
    values: dict[str, Any],
    changes: list[Change],
    message: str = "",
) -> None:
    """Add a phase that begins to what is about to be changed of a job, and to the events of it."""
    values["phases"] = to_json(begin_phase(job.phases, phase, message, now))
    changes.append((EventType.JOB_PHASE_CHANGED, {"name": phase, "message": message}))


_COUNTS = ("tensors_fetched", "tensors_solved", "tensors_written")

_COUNT_UPDATE = (
    sa.update(shards)
    .where(shards.c.job_id == sa.bindparam("of_job"), shards.c.index == sa.bindparam("of_index"))
    .values({name: sa.bindparam(f"new_{name}") for name in _COUNTS})
)


def _count_row(job_id: str, counts: ShardCounts) -> dict[str, Any]:
    new = {f"new_{name}": getattr(counts, name) for name in _COUNTS}
    return {"of_job": job_id, "of_index": counts.shard_index, **new}


def _shard_row(job_id: str, shard: Shard) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "index": shard.index,
        "file_name": shard.file_name,
        "kind": shard.kind,
        "state": str(ShardState.PENDING),
        "attempt": 0,
        "tensors_total": len(shard.problems),
        **dict.fromkeys(_COUNTS, 0),
        "bytes_read_total": shard.bytes_read,
        "bytes_total": shard.bytes_written,
    }


def _stop_shards(connection: sa.Connection, job_id: str) -> None:
    """Nothing of a job that has ended is running."""
    running = (shards.c.job_id == job_id, shards.c.state == str(ShardState.RUNNING))
    connection.execute(sa.update(shards).where(*running).values(state=str(ShardState.PENDING)))


def _keep_document(connection: sa.Connection, job_id: str, kind: str, data: bytes) -> None:
    place = (documents.c.job_id == job_id, documents.c.kind == kind)
    connection.execute(sa.delete(documents).where(*place))
    connection.execute(sa.insert(documents).values(job_id=job_id, kind=kind, data=data))
