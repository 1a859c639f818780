"""Spans of jobs and shards, read off what a runner tells its job store and its pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec

from merging.plan.plan import Plan
from service.jobs.records import Claim, JobRecord
from service.jobs.states import TERMINAL, JobState
from service.jobs.store import JobStore
from service.runner.observed import ObservedStore
from workers.in_flight import Key, cancelled_error
from workers.messages import PoolEvent, ShardDone, ShardFailed, ShardStarted, ShardTask
from workers.pool import ShardPool
from workers.tracing import Tracing, end_span

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_STALE = {"code": "stale_lease", "detail": "Another runner has taken the job over."}


def traced(
    store: JobStore, pool: ShardPool, tracing: Tracing, endpoint: str
) -> tuple[JobStore, ShardPool]:
    """The same store and pool, whose use by a runner makes spans.

    Args:
        store: Tells of jobs.
        pool: Tells of shards.
        tracing: Makes spans.
        endpoint: Where workers send theirs, which go below a shard's.
    """
    jobs: dict[str, Span] = {}
    return cast(JobStore, _TracedStore(store, tracing, jobs)), _TracedPool(
        pool, tracing, endpoint, jobs
    )


class _TracedStore(ObservedStore):
    """One span for each claim of a job."""

    def __init__(self, store: JobStore, tracing: Tracing, jobs: dict[str, Span]) -> None:
        super().__init__(store)
        self._tracing = tracing
        self._jobs = jobs

    def _note_claim(self, claim: Claim | None, *_: Any, **__: Any) -> None:
        if claim is not None:
            job = claim.job
            self._jobs[job.id] = self._tracing.begin(
                f"merge {job.method}",
                job.traceparent,
                {"job_id": job.id, "attempt": job.attempt, "merge_method": job.method},
            )

    def _note_set_phase(self, _: JobRecord, claim: Claim, name: str, *__: Any) -> None:
        self._note_phase(claim, name)

    def _note_save_plan(
        self, _: JobRecord, claim: Claim, __: Plan, *, phase: str | None = None
    ) -> None:
        self._note_phase(claim, phase)

    def _note_phase(self, claim: Claim, name: str | None) -> None:
        span = self._jobs.get(claim.job_id)
        if span is not None and name is not None:
            span.add_event(name)

    def _note_transition(
        self,
        job: JobRecord,
        claim: Claim,
        state: JobState,
        *,
        phase: str | None = None,
        **_: Any,
    ) -> None:
        self._note_phase(claim, phase)
        if state in TERMINAL:
            self._end_job(claim.job_id, job.error)

    def _note_release(self, _: None, claim: Claim) -> None:
        self._end_job(claim.job_id, None)

    def _note_stale(self, *args: Any) -> None:
        if args and isinstance(args[0], Claim):
            self._end_job(args[0].job_id, _STALE)

    def _end_job(self, job_id: str, error: dict[str, Any] | None) -> None:
        span = self._jobs.pop(job_id, None)
        if span is not None:
            end_span(span, error)


class _TracedPool:
    """One span for each try at a shard, from when it is handed out until its end is known."""

    def __init__(
        self, pool: ShardPool, tracing: Tracing, endpoint: str, jobs: dict[str, Span]
    ) -> None:
        self._pool = pool
        self._tracing = tracing
        self._endpoint = endpoint
        self._jobs = jobs
        self._shards: dict[Key, Span] = {}

    def slots(self) -> int:
        """See :meth:`workers.pool.ShardPool.slots`."""
        return self._pool.slots()

    def submit(self, task: ShardTask) -> None:
        """See :meth:`workers.pool.ShardPool.submit`; a task that is not taken leaves no span."""
        from opentelemetry.trace import SpanKind

        span = self._tracing.begin(
            "shard",
            self._jobs.get(task.job_id, task.traceparent),
            {
                "job_id": task.job_id,
                "shard_index": task.work.shard.index,
                "attempt": task.attempt,
            },
            kind=SpanKind.CLIENT,
        )
        self._pool.submit(
            msgspec.structs.replace(
                task, traceparent=self._tracing.traceparent(span), otlp_endpoint=self._endpoint
            )
        )
        self._shards[task.key] = span

    def poll(self, timeout: float) -> list[PoolEvent]:
        """See :meth:`workers.pool.ShardPool.poll`."""
        events = self._pool.poll(timeout)
        for event in events:
            self._note(event)
        return events

    def cancel(self, job_id: str, *, now: bool = False) -> None:
        """See :meth:`workers.pool.ShardPool.cancel`."""
        self._pool.cancel(job_id, now=now)

    def close(self) -> None:
        """See :meth:`workers.pool.ShardPool.close`."""
        self._pool.close()
        for key in list(self._shards):
            end_span(self._shards.pop(key), cancelled_error().to_dict())

    def _note(self, event: PoolEvent) -> None:
        key = (event.job_id, event.shard_index)
        span = self._shards.get(key)
        if span is None:  # told after closing
            return
        if isinstance(event, ShardStarted):
            span.set_attributes({"worker": event.worker, "device": event.device})
            span.add_event("started")
        elif isinstance(event, (ShardDone, ShardFailed)):
            del self._shards[key]
            if isinstance(event, ShardDone):
                receipt = event.receipt
                span.set_attributes({"bytes_read": receipt.bytes_read, "size": receipt.size})
            end_span(span, event.error if isinstance(event, ShardFailed) else None)
