"""Clocks of machines are set, jump and disagree; jobs do not notice."""

from __future__ import annotations

from datetime import timedelta

import pytest

from service.jobs.states import JobState
from tests.support.runner_bench import NUM_SHARDS, Bench

STEPS = [timedelta(hours=3), timedelta(hours=-3), timedelta(days=4000)]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_runner_whose_clock_is_set_keeps_its_jobs_and_their_deadlines(
    bench: Bench, step: timedelta
) -> None:
    job = bench.submit(deadline_seconds=600)
    offset = timedelta()
    runner = bench.runner(clock=lambda: bench.clock() + offset)
    runner.pool.holding = True
    runner.turn_until(lambda: len(runner.pool.in_flight) == NUM_SHARDS)
    offset = step
    runner.turn(20)
    assert bench.store.get(job.id).state == JobState.RUNNING
    runner.pool.holding = False
    (done,) = runner.finish(job)
    assert (done.state, done.fencing_token) == (JobState.SUCCEEDED, 1)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_deadline_is_kept_by_a_runner_whose_clock_is_wrong(bench: Bench, step: timedelta) -> None:
    job = bench.submit(deadline_seconds=60)
    bench.clock.advance(40)
    runner = bench.runner(clock=lambda: bench.clock() + step)
    runner.pool.holding = True
    runner.turn(38)
    assert bench.store.get(job.id).state == JobState.RUNNING
    runner.turn(6)
    (done,) = runner.finish(job)
    assert done.error is not None
    assert done.error["code"] == "deadline_exceeded"
