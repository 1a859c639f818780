"""Spans of jobs and shards, read off what a runner writes to the job store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from merging.plan.plan import Plan
from service.jobs.records import Claim, JobRecord
from service.jobs.states import TERMINAL, JobState, ShardState
from service.jobs.store import JobStore
from service.runner.observed import ObservedStore
from service.tracing import Tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span


def traced(store: JobStore, tracing: Tracing) -> JobStore:
    """The same store, whose use by a runner makes spans."""
    return cast(JobStore, _TracedStore(store, tracing))


class _TracedStore(ObservedStore):
    """One span for each claim of a job, and below it one for each try at a shard."""

    def __init__(self, store: JobStore, tracing: Tracing) -> None:
        super().__init__(store)
        self._tracing = tracing
        self._jobs: dict[str, Span] = {}
        self._shards: dict[tuple[str, int], Span] = {}

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

    def _note_record_shard(
        self, _: None, claim: Claim, index: int, state: ShardState, **facts: Any
    ) -> None:
        key = (claim.job_id, index)
        if state == ShardState.RUNNING:
            self._shards[key] = self._tracing.begin(
                "shard",
                self._jobs.get(claim.job_id),
                {
                    "job_id": claim.job_id,
                    "shard_index": index,
                    "attempt": facts["attempt"],
                    "worker": facts.get("worker") or "",
                    "device": facts.get("device") or "",
                },
            )
            return
        span = self._shards.pop(key, None)
        if span is not None:
            receipt = facts.get("receipt") or {}
            for name in ("bytes_read", "size"):
                if name in receipt:
                    span.set_attribute(name, receipt[name])
            _end(span, (facts.get("error") or {}).get("code"))

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
            self._end_job(claim.job_id, (job.error or {}).get("code"))

    def _note_release(self, _: None, claim: Claim) -> None:
        self._end_job(claim.job_id, None)

    def _note_stale(self, *args: Any) -> None:
        if args and isinstance(args[0], Claim):
            self._end_job(args[0].job_id, "stale_lease")

    def _end_job(self, job_id: str, code: str | None) -> None:
        for key in [key for key in self._shards if key[0] == job_id]:
            _end(self._shards.pop(key), "cancelled")
        span = self._jobs.pop(job_id, None)
        if span is not None:
            _end(span, code)


def _end(span: Span, code: str | None) -> None:
    from opentelemetry.trace import StatusCode

    if code is not None:
        span.set_attribute("error.type", code)
        span.set_status(StatusCode.ERROR)
    span.end()
