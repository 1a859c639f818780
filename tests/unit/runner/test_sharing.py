"""Many jobs, many runners, and orderly ends."""

from __future__ import annotations

from collections import Counter

from merging.publish import INDEX_NAME
from service.jobs.states import JobState
from tests.support.fake_pool import FakePool
from tests.support.runner_bench import NUM_SHARDS, Bench


def test_jobs_share_the_pool_evenly(bench: Bench) -> None:
    jobs = [bench.submit() for _ in range(2)]
    pool = FakePool(bench.storage, slots=4)
    pool.holding = True
    runner = bench.runner(pool, max_in_flight_shards=4)
    runner.turn(6)
    shares = [sum(task.job_id == job.id for task in pool.in_flight) for job in jobs]
    assert shares == [2, 2]
    pool.holding = False
    runner.finish(*jobs)


def test_jobs_of_higher_priority_are_served_first_and_share_among_themselves(bench: Bench) -> None:
    low = bench.submit()
    runner = bench.runner(FakePool(bench.storage, slots=4), max_in_flight_shards=4)
    runner.pool.refusing = True
    runner.turn(6)
    high = [bench.submit(priority=5) for _ in range(2)]
    runner.turn(6)
    runner.pool.refusing, runner.pool.holding = False, True
    runner.turn(6)
    shares = Counter(task.job_id for task in runner.pool.in_flight)
    assert shares == {high[0].id: 2, high[1].id: 2}
    runner.pool.holding = False
    ends = [done.finished_at for done in runner.finish(low, *high)]
    assert ends[0] == max(ends)


def test_a_long_job_does_not_keep_a_short_one_waiting(bench: Bench) -> None:
    long = bench.submit()
    pool = FakePool(bench.storage, slots=1)
    pool.holding = True
    runner = bench.runner(pool, max_in_flight_shards=2)
    runner.turn_until(lambda: len(pool.in_flight) == 2)
    short = bench.submit(options={"max_shard_size": 9000})  # one shard
    runner.turn(4)
    pool.holding = False
    runner.finish(long, short)
    order = [task.job_id for task in pool.submitted]
    assert order == [long.id, long.id, short.id, long.id]


def test_a_job_past_its_deadline_fails_though_no_runner_has_room_for_it(bench: Bench) -> None:
    running = bench.submit()
    bench.clock.advance(1)
    late = bench.submit(deadline_seconds=60)
    patient = bench.submit(deadline_seconds=6000)
    runner = bench.runner(max_concurrent_jobs=1)
    runner.pool.holding = True
    runner.turn(110)
    assert bench.store.get(late.id).state == JobState.QUEUED
    (done,) = runner.finish(late)
    assert done.error is not None
    assert done.error["code"] == "deadline_exceeded"
    assert bench.store.get(patient.id).state == JobState.QUEUED
    assert {task.job_id for task in runner.pool.submitted} == {running.id}
    runner.pool.holding = False
    runner.finish(running, patient)


def test_no_more_jobs_are_driven_than_allowed(bench: Bench) -> None:
    jobs = [bench.submit() for _ in range(3)]
    runner = bench.runner(max_concurrent_jobs=2)
    runner.pool.holding = True
    runner.turn(10)
    states = sorted(str(bench.store.get(job.id).state) for job in jobs)
    assert states == ["queued", "running", "running"]
    runner.pool.holding = False
    runner.finish(*jobs)


def test_the_pool_is_given_a_few_more_shards_than_it_has_slots(bench: Bench) -> None:
    jobs = [bench.submit() for _ in range(2)]
    pool = FakePool(bench.storage, slots=1)
    pool.holding = True
    runner = bench.runner(pool)
    runner.turn(6)
    assert len(pool.in_flight) == 3
    pool.holding = False
    runner.finish(*jobs)


def test_a_pool_without_slots_is_still_asked_so_that_it_can_grow(bench: Bench) -> None:
    bench.submit()
    pool = FakePool(bench.storage, slots=0)
    runner = bench.runner(pool)
    runner.turn(6)
    assert len(pool.in_flight) == NUM_SHARDS


def test_many_runners_share_the_jobs(bench: Bench) -> None:
    jobs = [bench.submit() for _ in range(6)]
    runners = [bench.runner(max_concurrent_jobs=1) for _ in range(3)]
    for _ in range(100):
        for runner in runners:
            runner.turn()
        if all(bench.store.get(job.id).is_terminal for job in jobs):
            break
    for job in jobs:
        bench.assert_ended_once(job)
        assert bench.store.get(job.id).state == JobState.SUCCEEDED
        assert bench.store.get(job.id).fencing_token == 1
    assert all(runner.pool.submitted for runner in runners)


def test_a_draining_runner_finishes_what_is_in_flight_and_gives_the_job_back(bench: Bench) -> None:
    job = bench.submit()
    pool = FakePool(bench.storage, slots=1)
    pool.holding = True
    first = bench.runner(pool, max_in_flight_shards=1)
    first.turn_until(lambda: pool.in_flight)
    first.runner.stop(drain=True)
    first.turn(3)
    assert bench.store.get(job.id).lease_owner is not None
    pool.holding = False
    first.turn(3)
    given_back = bench.store.get(job.id)
    assert (given_back.lease_owner, given_back.state) == (None, JobState.RUNNING)
    assert len(pool.submitted) == 1
    second = bench.runner()
    (done,) = second.finish(job)
    assert done.state == JobState.SUCCEEDED
    assert len(second.pool.submitted) == NUM_SHARDS - 1
    assert done.takeovers == 0


def test_a_runner_that_is_stopped_at_once_drops_what_is_in_flight(bench: Bench) -> None:
    job = bench.submit()
    first = bench.runner()
    first.pool.holding = True
    first.turn_until(lambda: len(first.pool.in_flight) == NUM_SHARDS)
    first.runner.stop(drain=False)
    first.turn(3)
    assert first.pool.cancels == [(job.id, False)]
    assert bench.store.get(job.id).lease_owner is None
    assert INDEX_NAME not in bench.output(job)
    (done,) = bench.runner().finish(job)
    assert done.state == JobState.SUCCEEDED


def test_a_stopping_runner_claims_nothing(bench: Bench) -> None:
    runner = bench.runner()
    runner.runner.stop()
    job = bench.submit()
    runner.turn(5)
    assert bench.store.get(job.id).state == JobState.QUEUED
