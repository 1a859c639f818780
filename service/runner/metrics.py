"""What a runner counts: read off what it writes to the job store, so that nothing else need know.

A job that several runners worked on is counted by the one that ended it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from prometheus_client import Counter, Histogram

from merging.plan.plan import Plan
from merging.rates import storage_kind
from service.jobs.records import Claim, JobRecord
from service.jobs.states import TERMINAL, JobState, ShardState
from service.jobs.store import JobStore
from service.metrics import Metrics
from service.runner.observed import ObservedStore

_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 48 * 3600)
_BYTES = tuple(1 << power for power in range(26, 41, 2))
_RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.5, 2.0)


class RunnerMetrics:
    """Counters and histograms of one runner. No ids, addresses or user text in labels.

    Args:
        metrics: Of the process; ``/metrics`` shows both.
    """

    def __init__(self, metrics: Metrics) -> None:
        registry = metrics.registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"mergeyard_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Any, *labels: str) -> Histogram:
            return Histogram(f"mergeyard_{name}", text, labels, registry=registry, buckets=buckets)

        outcome = ("merge_method", "outcome")
        self.jobs_finished = metrics.jobs_finished
        self.queue_wait = histogram(
            "job_queue_wait_seconds", "From being queued to being claimed.", _SECONDS
        )
        self.durations = histogram(
            "job_duration_seconds",
            "From the first claim of an attempt to its end.",
            _SECONDS,
            *outcome,
        )
        self.shards_finished = counter(
            "plan_shards_finished", "Shards that were published or failed for good.", "outcome"
        )
        self.shard_retries = counter(
            "shard_retries", "Shards that failed and were tried again, by error code.", "reason"
        )
        self.bytes_read = counter("storage_read_bytes", "Bytes that workers read.", "backend")
        self.bytes_written = counter("storage_written_bytes", "Likewise written.", "backend")
        self.peak_memory = histogram(
            "worker_peak_memory_bytes", "Most tensor buffers of a shard.", _BYTES, "merge_method"
        )
        self.memory_ratio = histogram(
            "plan_memory_estimate_ratio",
            "Those as a part of what was planned.",
            _RATIOS,
            "merge_method",
        )
        self.lease_expirations = counter(
            "lease_expirations", "Jobs taken over from a runner that fell silent."
        )
        self.stale_writes = counter(
            "stale_writes_refused", "Writes of a runner that no longer held the job."
        )


def metered(store: JobStore, metrics: RunnerMetrics) -> JobStore:
    """The same store, whose use by a runner is counted."""
    return cast(JobStore, _MeteredStore(store, metrics))


class _MeteredStore(ObservedStore):
    def __init__(self, store: JobStore, metrics: RunnerMetrics) -> None:
        super().__init__(store)
        self._metrics = metrics
        self._planned_bytes: dict[str, int] = {}

    def _note_stale(self, *_: Any) -> None:
        self._metrics.stale_writes.inc()

    def _note_claim(self, claim: Claim | None, *_: Any, **__: Any) -> None:
        if claim is None:
            return
        job = claim.job
        if job.takeovers:
            self._metrics.lease_expirations.inc()
        elif job.state == JobState.PLANNING and job.started_at is not None:
            self._metrics.queue_wait.observe((job.started_at - job.queued_at).total_seconds())

    def _note_save_plan(self, _job: JobRecord, claim: Claim, plan: Plan, **_: Any) -> None:
        self._planned_bytes[claim.job_id] = plan.totals.max_host_bytes

    def _note_transition(
        self, job: JobRecord, claim: Claim, state: JobState, **_facts: Any
    ) -> None:
        if state not in TERMINAL:
            return
        self._planned_bytes.pop(claim.job_id, None)
        labels = (job.method, state.value)
        self._metrics.jobs_finished.labels(*labels).inc()
        if job.started_at is not None and job.finished_at is not None:
            seconds = (job.finished_at - job.started_at).total_seconds()
            self._metrics.durations.labels(*labels).observe(seconds)

    def _note_record_shard(
        self, _: None, claim: Claim, _index: int, state: ShardState, **facts: Any
    ) -> None:
        if state in (ShardState.SUCCEEDED, ShardState.FAILED):
            self._metrics.shards_finished.labels(state.value).inc()
        if state == ShardState.PENDING:
            reason = (facts.get("error") or {}).get("code", "unknown")
            self._metrics.shard_retries.labels(reason).inc()
        if state == ShardState.SUCCEEDED:
            self._note_receipt(claim, facts["receipt"])

    def _note_receipt(self, claim: Claim, receipt: Mapping[str, Any]) -> None:
        job, metrics = claim.job, self._metrics
        kinds = {storage_kind(item["uri"]) for item in job.inputs}
        backend = kinds.pop() if len(kinds) == 1 else "mixed"
        metrics.bytes_read.labels(backend).inc(receipt["bytes_read"])
        metrics.bytes_written.labels(storage_kind(job.output_uri)).inc(
            0 if receipt["reused"] else receipt["size"]
        )
        peak = receipt["peak_buffer_bytes"]
        metrics.peak_memory.labels(job.method).observe(peak)
        planned = self._planned_bytes.get(claim.job_id)
        if planned:
            metrics.memory_ratio.labels(job.method).observe(peak / planned)
