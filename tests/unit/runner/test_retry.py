"""What is tried again, how often, and after how long."""

from __future__ import annotations

import pytest

from merging.errors import (
    Cancelled,
    CheckpointError,
    MergeError,
    NumericalError,
    StorageError,
    WorkerError,
)
from service.jobs.states import JobState
from service.runner.retry import RULES, is_worth_retrying, wait_before_retry
from tests.support.fake_pool import FakePool
from tests.support.runner_bench import NUM_SHARDS, Bench

TABLE = [
    (WorkerError("", retryable=True), [1, 2, 4]),
    (Cancelled(""), [1, 2, 4]),
    (WorkerError("", code="out_of_memory", retryable=True), [4]),
    (StorageError("", code="throttled", retryable=True), [4, 8, 16, 32, 60, 60, 60]),
    (StorageError("", retryable=True), [2, 4, 8, 16, 32, 60, 60]),
    (MergeError("", code="another", retryable=True), [1, 2, 4]),
    (WorkerError("", code="out_of_memory"), []),
    (WorkerError("", code="wrong_version"), []),
    (StorageError("", code="source_changed"), []),
    (StorageError("", code="no_space"), []),
    (StorageError("", code="denied"), []),
    (CheckpointError(""), []),
    (NumericalError(""), []),
    (MergeError(""), []),
]


@pytest.mark.parametrize(("error", "waits"), TABLE, ids=lambda value: getattr(value, "code", ""))
def test_each_kind_of_failure_has_its_rule(error: MergeError, waits: list[float]) -> None:
    assert is_worth_retrying(error) == bool(waits)
    found = [
        wait_before_retry(error.code, failures, max_tries=4, retry_seconds=1.0)
        for failures in range(1, len(waits) + 2)
    ]
    if waits:
        assert found == [*waits, None]


def test_every_rule_is_tested() -> None:
    assert RULES.keys() <= {error.code for error, _ in TABLE}


@pytest.mark.parametrize(("code", "tries"), [("throttled", 8), ("out_of_memory", 2)])
def test_a_shard_is_tried_as_its_failure_says(bench: Bench, code: str, tries: int) -> None:
    job = bench.submit()
    error = StorageError("No.", code=code, retryable=True)
    pool = FakePool(bench.storage, script=lambda task: None if task.work.shard.index else error)
    (done,) = bench.runner(pool, retry_seconds=0.1).finish(job)
    assert done.state == JobState.FAILED
    assert done.error is not None
    assert done.error["code"] == code
    assert pool.indexes(job.id).count(0) == tries
    assert len(pool.submitted) == tries + NUM_SHARDS - 1


def test_failures_of_different_kinds_do_not_add_up(bench: Bench) -> None:
    """A shard that lost three workers still has patience for a busy server."""
    job = bench.submit()
    failures = [WorkerError("", retryable=True)] * 3 + [StorageError("", retryable=True)] * 7

    def script(task: object) -> MergeError | None:
        return failures.pop() if failures else None

    pool = FakePool(bench.storage, slots=1, script=script)
    (done,) = bench.runner(pool, max_in_flight_shards=1).finish(job)
    assert done.state == JobState.SUCCEEDED
