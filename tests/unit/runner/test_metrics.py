"""What a runner counts while it works."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from merging.errors import CheckpointError, StorageError
from service.jobs.errors import StaleLeaseError
from service.jobs.states import JobState
from service.metrics import Metrics
from service.runner.metrics import RunnerMetrics, metered
from service.storage_metrics import StorageMetrics
from tests.support.fake_pool import FakePool
from tests.support.memory_storage import MemoryStorage
from tests.support.runner_bench import NUM_SHARDS, Bench
from workers.messages import StorageTimes


class Counted:
    def __init__(self, bench: Bench) -> None:
        metrics = Metrics("0")
        self.registry = metrics.registry
        self.bench = bench
        bench.store = metered(bench.store, RunnerMetrics(metrics))  # type: ignore[assignment]

    def __call__(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"mergeyard_{name}", labels) or 0.0


@pytest.fixture
def counted(bench: Bench) -> Counted:
    return Counted(bench)


def test_a_job_that_succeeds(bench: Bench, counted: Counted) -> None:
    job = bench.submit(inputs=({"uri": "mem://models/a"}, {"uri": "mem://models/b"}))
    bench.runner().finish(job)
    assert counted("jobs_finished_total", merge_method="linear", outcome="succeeded") == 1
    assert counted("job_duration_seconds_count", merge_method="linear", outcome="succeeded") == 1
    assert counted("job_queue_wait_seconds_count") == 1
    assert counted("plan_shards_finished_total", outcome="succeeded") == NUM_SHARDS
    done = bench.store.get(job.id)
    moved = counted("storage_read_bytes_total", backend="mem") + counted(
        "storage_written_bytes_total", backend="mem"
    )
    assert moved == done.progress.bytes_total
    assert counted("worker_peak_memory_bytes_count", merge_method="linear") == NUM_SHARDS
    assert counted("plan_memory_estimate_ratio_count", merge_method="linear") == NUM_SHARDS


def test_a_job_whose_shard_is_retried_and_one_that_fails(bench: Bench, counted: Counted) -> None:
    slow = StorageError("Slow down.", code="throttled", retryable=True)
    bad = CheckpointError("Broken.", code="header_invalid")
    fails = {(0, 1): slow, (1, 1): bad}
    pool = FakePool(
        bench.storage, script=lambda task: fails.get((task.work.shard.index, task.attempt))
    )
    bench.runner(pool).finish(bench.submit())
    assert counted("shard_retries_total", reason="throttled") == 1
    assert counted("plan_shards_finished_total", outcome="failed") == 1
    assert counted("jobs_finished_total", merge_method="linear", outcome="failed") == 1


def test_a_runner_that_fell_silent(bench: Bench, counted: Counted) -> None:
    bench.submit()
    claim = bench.store.claim("silent", 30)
    assert claim is not None
    bench.clock.advance(31)
    assert bench.store.claim("other", 30)
    assert counted("lease_expirations_total") == 1
    with pytest.raises(StaleLeaseError):
        bench.store.transition(claim, JobState.RUNNING)
    assert counted("stale_writes_refused_total") == 1


def test_requests_to_storage_are_timed_by_what_became_of_them() -> None:
    registry = CollectorRegistry()
    storage = StorageMetrics(registry).timed(MemoryStorage())
    storage.write_bytes("mem://a/b", b"x")
    assert storage.read_bytes("mem://a/b", limit=10) == b"x"
    with pytest.raises(StorageError):
        storage.stat("mem://a/c")
    name = "mergeyard_storage_request_duration_seconds_count"
    for operation, outcome in (("write_bytes", "ok"), ("read_bytes", "ok"), ("stat", "not_found")):
        labels = {"backend": "mem", "operation": operation, "outcome": outcome}
        assert registry.get_sample_value(name, labels) == 1


def test_requests_of_workers_are_counted_with_those_of_the_service() -> None:
    registry = CollectorRegistry()
    metrics = StorageMetrics(registry)
    metrics.timed(MemoryStorage()).write_bytes("mem://a/b", b"x")
    metrics.note_worker([StorageTimes("mem", "write_bytes", "ok", (0.25, 0.5))])
    name = "mergeyard_storage_request_duration_seconds"
    labels = {"backend": "mem", "operation": "write_bytes", "outcome": "ok"}
    assert registry.get_sample_value(f"{name}_count", labels) == 3
    total = registry.get_sample_value(f"{name}_sum", labels)
    assert total is not None
    assert 0.75 < total < 1
