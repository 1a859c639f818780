"""Statements of the runner that holds a job; each carries the claim's fencing token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from merging.plan.plan import Plan, Shard
from service.jobs.changes import Change, begin_phase, end_phase, furthest, state_changed
from service.jobs.errors import IllegalTransitionError
from service.jobs.overlap import overlap
from service.jobs.records import (
    Claim,
    EventRecord,
    EventType,
    JobRecord,
    Progress,
    ShardCounts,
)
from service.jobs.rows import pack, pack_json, to_json, to_record
from service.jobs.sql_base import SqlBase
from service.jobs.sql_leftovers import is_being_collected, keep_leftover
from service.jobs.states import TERMINAL, JobState, ShardState, is_allowed
from service.jobs.tables import ACTIVE, UtcDateTime, documents, jobs, shards

_SHARD_EVENTS = {
    ShardState.PENDING: EventType.SHARD_RETRIED,
    ShardState.RUNNING: EventType.SHARD_STARTED,
    ShardState.SUCCEEDED: EventType.SHARD_FINISHED,
    ShardState.FAILED: EventType.SHARD_FINISHED,
}


_CLAIMING = 7_247_001
_NOW = sa.bindparam("now", type_=UtcDateTime)


class ClaimedStatements(SqlBase):
    """The runner's side of the store."""

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
