"""Spans of jobs that do not go well."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from merging.errors import CheckpointError, StorageError
from service.jobs.errors import StaleLeaseError
from service.jobs.states import JobState
from service.runner.traces import traced
from tests.support.fake_pool import FakePool
from tests.support.runner_bench import NUM_SHARDS, Bench
from workers.tracing import Tracing

ENDPOINT = "http://collector:4318"


def watch(bench: Bench, pool: FakePool) -> tuple[Any, Tracing, InMemorySpanExporter]:
    """The pool to run on, and where spans come out once the tracing is closed."""
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter, "0")
    bench.store, seen = traced(bench.store, pool, tracing, ENDPOINT)  # type: ignore[assignment]
    return seen, tracing, exporter


def outcomes(exporter: InMemorySpanExporter, name: str) -> list[Any]:
    spans = [span for span in exporter.get_finished_spans() if span.name == name]
    return [(span.attributes or {}).get("error.type") for span in spans]


def test_tries_at_a_shard_are_spans_of_their_own_with_what_went_wrong(bench: Bench) -> None:
    slow = StorageError("Slow down.", code="throttled", retryable=True)
    fails = {(0, 1): slow, (1, 1): CheckpointError("Broken.", code="header_invalid")}
    pool = FakePool(
        bench.storage, script=lambda task: fails.get((task.work.shard.index, task.attempt))
    )
    seen, tracing, exporter = watch(bench, pool)
    bench.runner(seen).finish(bench.submit())
    tracing.close()
    assert "throttled" in outcomes(exporter, "shard")
    assert "header_invalid" in outcomes(exporter, "shard")
    assert outcomes(exporter, "merge linear") == ["header_invalid"]
    (merge,) = [span for span in exporter.get_finished_spans() if span.name == "merge linear"]
    assert merge.status.status_code == StatusCode.ERROR


def test_a_job_that_succeeds_without_a_trace_has_one_of_its_own(bench: Bench) -> None:
    seen, tracing, exporter = watch(bench, FakePool(bench.storage))
    bench.runner(seen).finish(bench.submit())
    tracing.close()
    assert outcomes(exporter, "shard") == [None] * NUM_SHARDS
    assert len({span.context.trace_id for span in exporter.get_finished_spans()}) == 1


def test_a_lost_lease_ends_the_span(bench: Bench) -> None:
    _, tracing, exporter = watch(bench, FakePool(bench.storage))
    bench.submit()
    claim = bench.store.claim("silent", 30)
    assert claim is not None
    bench.clock.advance(31)
    assert bench.store.claim("other", 30)
    with pytest.raises(StaleLeaseError):
        bench.store.transition(claim, JobState.RUNNING)
    tracing.close()
    assert "stale_lease" in outcomes(exporter, "merge linear")


def test_a_task_carries_its_own_span_and_where_workers_send_theirs(bench: Bench) -> None:
    pool = FakePool(bench.storage)
    seen, tracing, exporter = watch(bench, pool)
    bench.runner(seen).finish(bench.submit())
    tracing.close()
    spans = {
        span.attributes["shard_index"]: span.context
        for span in exporter.get_finished_spans()
        if span.name == "shard" and span.attributes
    }
    for task in pool.submitted:
        context = spans[task.work.shard.index]
        assert task.traceparent is not None
        assert task.traceparent.startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")
        assert task.otlp_endpoint == ENDPOINT


def test_a_pool_that_takes_no_task_leaves_no_span_of_a_shard(bench: Bench) -> None:
    pool = FakePool(bench.storage)
    pool.refusing = True
    seen, tracing, exporter = watch(bench, pool)
    runner = bench.runner(seen)
    job = bench.submit()
    runner.turn_until(lambda: bench.store.get(job.id).phase == "waiting_for_workers")
    runner.turn(3)
    pool.refusing = False
    runner.finish(job)
    tracing.close()
    assert outcomes(exporter, "shard") == [None] * NUM_SHARDS


def test_closing_a_pool_ends_the_spans_of_what_it_had(bench: Bench) -> None:
    pool = FakePool(bench.storage)
    pool.holding = True
    seen, tracing, exporter = watch(bench, pool)
    runner = bench.runner(seen)
    bench.submit()
    runner.turn_until(lambda: pool.in_flight)
    count = len(pool.in_flight)
    seen.close()
    seen.poll(0)
    tracing.close()
    assert outcomes(exporter, "shard") == ["cancelled"] * count
