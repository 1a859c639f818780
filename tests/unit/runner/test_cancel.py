"""Cancelling, in every state that a job can be in."""

from __future__ import annotations

import pytest

from merging.errors import WorkerError
from merging.publish import INDEX_NAME
from service.jobs.states import JobState
from tests.support.runner_bench import NUM_SHARDS, Bench


def test_a_queued_job_is_never_touched(bench: Bench) -> None:
    job = bench.submit()
    bench.store.request_cancel(job.id)
    runner = bench.runner()
    runner.turn(3)
    bench.assert_ended_once(job)
    assert bench.store.get(job.id).state == JobState.CANCELLED
    assert runner.pool.submitted == []


def test_planning_is_let_finish_and_nothing_is_run(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner()
    runner.threads.holding = True
    runner.turn(2)
    bench.store.request_cancel(job.id)
    runner.turn(2)
    assert bench.store.get(job.id).state == JobState.CANCELLING
    runner.threads.run_kept()
    (done,) = runner.finish(job)
    assert done.state == JobState.CANCELLED
    assert runner.pool.submitted == []


@pytest.mark.parametrize("mode", ["orderly", "now"])
def test_shards_in_flight_are_stopped_as_asked(bench: Bench, mode: str) -> None:
    job = bench.submit()
    runner = bench.runner()
    runner.pool.holding = True
    runner.turn_until(lambda: len(runner.pool.in_flight) == NUM_SHARDS)
    bench.store.request_cancel(job.id, mode)
    (done,) = runner.finish(job)
    assert done.state == JobState.CANCELLED
    assert runner.pool.cancels == [(job.id, mode == "now")]
    assert INDEX_NAME not in bench.output(job)
    assert not any(e.type == "shard.retried" for e in bench.store.events(job.id))


def test_workers_that_do_not_heed_an_orderly_stop_are_ended(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner(grace_seconds=10)
    runner.pool.holding = runner.pool.stubborn = True
    runner.turn_until(lambda: runner.pool.in_flight)
    bench.store.request_cancel(job.id)
    runner.turn(18)
    assert runner.pool.cancels == [(job.id, False)]
    assert bench.store.get(job.id).state == JobState.CANCELLING
    runner.finish(job)
    assert runner.pool.cancels == [(job.id, False), (job.id, True)]


def test_an_orderly_stop_can_be_made_an_immediate_one(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner()
    runner.pool.holding = runner.pool.stubborn = True
    runner.turn_until(lambda: runner.pool.in_flight)
    bench.store.request_cancel(job.id)
    runner.turn(4)
    bench.store.request_cancel(job.id, "now")
    runner.turn(2)
    assert runner.pool.cancels == [(job.id, False), (job.id, True)]
    assert runner.finish(job)[0].state == JobState.CANCELLED


def test_a_cancel_that_comes_after_the_output_is_complete_is_too_late(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner()
    runner.turn_until(lambda: runner.pool.submitted)
    runner.threads.holding = True
    runner.turn_until(lambda: bench.store.get(job.id).state == JobState.PUBLISHING)
    runner.turn(2)
    bench.store.request_cancel(job.id)
    runner.turn(2)
    assert bench.store.get(job.id).state == JobState.CANCELLING
    runner.threads.run_kept()
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED
    assert INDEX_NAME in bench.output(job)


def test_a_cancelled_job_whose_publishing_fails_is_cancelled(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner()
    runner.turn_until(lambda: runner.pool.submitted)
    runner.threads.holding = True
    runner.turn_until(lambda: bench.store.get(job.id).state == JobState.PUBLISHING)
    runner.turn(2)
    bench.store.request_cancel(job.id)
    bench.storage.delete(f"{job.output_uri}/model-00001-of-00003.safetensors")
    runner.threads.run_kept()
    (done,) = runner.finish(job)
    assert done.state == JobState.CANCELLED
    assert INDEX_NAME not in bench.output(job)


def test_a_cancel_between_two_looks_at_the_job_is_seen(bench: Bench) -> None:
    """The runner learns of it when its own transition is refused."""
    job = bench.submit()
    runner = bench.runner()
    runner.turn()
    assert bench.store.get(job.id).state == JobState.PLANNING
    bench.store.request_cancel(job.id)
    for _ in range(20):
        runner.turn(beat=False)
    bench.assert_ended_once(job)
    assert bench.store.get(job.id).state == JobState.CANCELLED


def test_a_cancel_wins_over_a_failure_that_is_not_recorded_yet(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner(max_tries=1)
    runner.pool.holding = True
    runner.turn_until(lambda: runner.pool.in_flight)
    bench.store.request_cancel(job.id)
    runner.pool.fail_all(WorkerError("Lost.", retryable=True))
    (done,) = runner.finish(job)
    assert (done.state, done.error) == (JobState.CANCELLED, None)


def test_a_job_cancelled_while_its_runner_is_dead_is_cancelled_by_the_next(bench: Bench) -> None:
    job = bench.submit()
    dead = bench.runner()
    dead.pool.holding = True
    dead.turn_until(lambda: dead.pool.in_flight)
    bench.store.request_cancel(job.id)
    bench.clock.advance(31)
    runner = bench.runner()
    (done,) = runner.finish(job)
    assert done.state == JobState.CANCELLED
    assert runner.pool.submitted == []


def test_a_deadline_ends_a_job_like_a_failure(bench: Bench) -> None:
    job = bench.submit(deadline_seconds=60)
    runner = bench.runner()
    runner.pool.holding = True
    runner.turn(110)
    assert bench.store.get(job.id).state == JobState.RUNNING
    (done,) = runner.finish(job)
    assert done.state == JobState.FAILED
    assert done.error
    assert done.error["code"] == "deadline_exceeded"
    assert "60 seconds" in done.error["detail"]
    assert runner.pool.cancels == [(job.id, False)]
