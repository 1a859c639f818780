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
from service.tracing import Tracing
from tests.support.fake_pool import FakePool
from tests.support.runner_bench import NUM_SHARDS, Bench


def watch(bench: Bench) -> tuple[Tracing, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter, "0")
    bench.store = traced(bench.store, tracing)  # type: ignore[assignment]
    return tracing, exporter


def outcomes(exporter: InMemorySpanExporter, name: str) -> list[Any]:
    spans = [span for span in exporter.get_finished_spans() if span.name == name]
    return [(span.attributes or {}).get("error.type") for span in spans]


def test_tries_at_a_shard_are_spans_of_their_own_with_what_went_wrong(bench: Bench) -> None:
    tracing, exporter = watch(bench)
    slow = StorageError("Slow down.", code="throttled", retryable=True)
    fails = {(0, 1): slow, (1, 1): CheckpointError("Broken.", code="header_invalid")}
    pool = FakePool(
        bench.storage, script=lambda task: fails.get((task.work.shard.index, task.attempt))
    )
    bench.runner(pool).finish(bench.submit())
    tracing.close()
    assert "throttled" in outcomes(exporter, "shard")
    assert "header_invalid" in outcomes(exporter, "shard")
    assert outcomes(exporter, "merge linear") == ["header_invalid"]
    (merge,) = [span for span in exporter.get_finished_spans() if span.name == "merge linear"]
    assert merge.status.status_code == StatusCode.ERROR


def test_a_job_that_succeeds_without_a_trace_has_one_of_its_own(bench: Bench) -> None:
    tracing, exporter = watch(bench)
    bench.runner().finish(bench.submit())
    tracing.close()
    assert outcomes(exporter, "shard") == [None] * NUM_SHARDS
    assert len({span.context.trace_id for span in exporter.get_finished_spans()}) == 1


def test_a_lost_lease_ends_the_span(bench: Bench) -> None:
    tracing, exporter = watch(bench)
    bench.submit()
    claim = bench.store.claim("silent", 30)
    assert claim is not None
    bench.clock.advance(31)
    assert bench.store.claim("other", 30)
    with pytest.raises(StaleLeaseError):
        bench.store.transition(claim, JobState.RUNNING)
    tracing.close()
    assert "stale_lease" in outcomes(exporter, "merge linear")
