"""Everything in flight is disposable: runners that die, stall, or lose the store or the pool."""

from __future__ import annotations

import pytest

from merging.publish import INDEX_NAME
from service.jobs.states import JobState
from tests.support.fake_pool import FakePool
from tests.support.runner_bench import (
    LEASE_SECONDS,
    NUM_SHARDS,
    Bench,
    BenchRunner,
    write_checkpoint,
)


def run_until_published(bench: Bench, count: int) -> tuple[str, BenchRunner]:
    """A job of which that many shards are published while the others are in flight."""
    job = bench.submit()
    runner = bench.runner(FakePool(bench.storage, slots=count), max_in_flight_shards=count)
    runner.turn_until(lambda: len(runner.pool.submitted) == count)
    runner.pool.holding = False
    runner.turn(1)
    runner.pool.holding = True
    runner.turn(2)
    assert bench.store.get(job.id).progress.shards_done == count
    return job.id, runner


def test_a_new_runner_skips_what_is_published(bench: Bench) -> None:
    job_id, dead = run_until_published(bench, 2)
    published = dead.pool.indexes(job_id)[:2]
    bench.clock.advance(LEASE_SECONDS)
    runner = bench.runner()
    (done,) = runner.finish(bench.store.get(job_id))
    assert done.state == JobState.SUCCEEDED
    assert sorted(runner.pool.indexes(job_id) + published) == list(range(NUM_SHARDS))
    assert (done.attempt, done.fencing_token) == (1, 2)


def test_shards_whose_receipt_the_dead_runner_did_not_record_are_found(bench: Bench) -> None:
    job = bench.submit()
    dead = bench.runner()
    dead.turn_until(lambda: len(dead.pool.in_flight) == NUM_SHARDS)
    dead.pool.poll(0)  # two workers publish, and nobody listens
    assert bench.store.get(job.id).progress.shards_done == 0
    bench.clock.advance(LEASE_SECONDS)
    runner = bench.runner()
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED
    assert runner.pool.indexes(job.id) == [2]
    assert [shard.state for shard in bench.store.shards(job.id)] == ["succeeded"] * NUM_SHARDS


def test_the_stored_plan_is_kept_so_that_versions_never_mix(bench: Bench) -> None:
    job_id, _ = run_until_published(bench, 1)
    digest = bench.store.get(job_id).plan_digest
    write_checkpoint(bench.storage, "mem://models/b", fill=b"\1")
    bench.clock.advance(LEASE_SECONDS)
    (done,) = bench.runner().finish(bench.store.get(job_id))
    assert done.plan_digest == digest
    assert done.error
    assert done.error["code"] == "source_changed"


def test_a_published_shard_that_somebody_changed_is_made_again(bench: Bench) -> None:
    job_id, dead = run_until_published(bench, 1)
    job = bench.store.get(job_id)
    file_name = dead.pool.submitted[0].work.shard.file_name
    bench.storage.write_bytes(f"{job.output_uri}/{file_name}", b"something else")
    bench.clock.advance(LEASE_SECONDS)
    runner = bench.runner()
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED
    assert sorted(runner.pool.indexes(job_id)) == list(range(NUM_SHARDS))


def publish_without_telling(bench: Bench) -> str:
    """A job whose output a runner completed before it died, without the store knowing."""
    job = bench.submit()
    dead = bench.runner()
    dead.turn_until(lambda: dead.pool.submitted)
    dead.threads.holding = True
    dead.turn_until(lambda: bench.store.get(job.id).state == JobState.PUBLISHING)
    dead.turn()
    dead.threads.run_kept()
    assert INDEX_NAME in bench.output(job)
    return job.id


def test_an_output_completed_by_a_runner_that_died_is_recognised(bench: Bench) -> None:
    job_id = publish_without_telling(bench)
    bench.clock.advance(LEASE_SECONDS)
    runner = bench.runner()
    (done,) = runner.finish(bench.store.get(job_id))
    assert done.state == JobState.SUCCEEDED
    assert done.output
    assert bench.store.load_report(job_id)
    assert runner.pool.submitted == []


def test_a_completed_output_is_a_success_even_if_it_was_cancelled_meanwhile(bench: Bench) -> None:
    job_id = publish_without_telling(bench)
    bench.store.request_cancel(job_id)
    bench.clock.advance(LEASE_SECONDS)
    (done,) = bench.runner().finish(bench.store.get(job_id))
    assert done.state == JobState.SUCCEEDED


@pytest.mark.parametrize("turns", range(1, 12))
def test_a_runner_may_die_at_any_moment(bench: Bench, turns: int) -> None:
    job = bench.submit()
    dead = bench.runner(FakePool(bench.storage, slots=1), max_in_flight_shards=1)
    dead.turn(turns)
    bench.clock.advance(LEASE_SECONDS)
    (done,) = bench.runner().finish(job)
    assert done.state == JobState.SUCCEEDED


def test_a_runner_that_wakes_up_after_a_takeover_writes_nothing(bench: Bench) -> None:
    job = bench.submit()
    stalled = bench.runner()
    stalled.pool.holding = True
    stalled.turn_until(lambda: stalled.pool.in_flight)
    bench.clock.advance(LEASE_SECONDS)
    other = bench.runner()
    other.pool.holding = True
    other.turn_until(lambda: other.pool.in_flight)
    before = bench.store.get(job.id).event_seq
    stalled.pool.holding = False
    for _ in range(5):
        stalled.runner.tick(0)
        stalled.runner.heartbeat.beat()
    assert bench.store.get(job.id).event_seq == before
    assert stalled.pool.in_flight == []
    other.pool.holding = False
    other.finish(job)


def test_a_lease_that_another_runner_took_is_noticed_by_the_heartbeat(bench: Bench) -> None:
    job = bench.submit()
    first = bench.runner(lease_seconds=1000.0)
    first.pool.holding = True
    first.turn_until(lambda: first.pool.in_flight)
    bench.clock.advance(1000)
    second = bench.store.claim("somebody else", 60)
    assert second
    first.runner._drivers[job.id].lease.extend(float("inf"))  # its clock says that all is well
    first.turn(2)
    assert first.pool.cancels == [(job.id, False)]
    assert bench.store.renew(second, 60).state == JobState.RUNNING


def test_a_runner_can_take_over_from_itself(bench: Bench) -> None:
    """Its heartbeat stalled; shards of the lost claim may still be in its pool."""
    job = bench.submit()
    runner = bench.runner()
    runner.pool.holding = runner.pool.stubborn = True
    runner.turn_until(lambda: len(runner.pool.in_flight) == NUM_SHARDS)
    bench.clock.advance(LEASE_SECONDS)
    runner.turn(beat=False)
    runner.turn(10)
    assert bench.store.get(job.id).fencing_token == 2
    assert len(runner.pool.submitted) == NUM_SHARDS  # none twice at once
    runner.pool.holding = False
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED


def test_the_store_may_be_away_for_a_while(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner(retry_seconds=0.5)
    runner.pool.holding = True
    runner.turn_until(lambda: len(runner.pool.in_flight) == NUM_SHARDS)
    runner.store.is_away = True
    runner.turn(4)
    runner.pool.holding = False
    runner.turn(20)
    runner.store.is_away = False
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED
    assert done.fencing_token == 1
    assert len(runner.pool.submitted) == NUM_SHARDS
    kinds = [str(event.type) for event in bench.store.events(job.id)]
    assert kinds.count("shard.started") == kinds.count("shard.finished") == NUM_SHARDS


def test_a_store_away_for_longer_than_the_lease_costs_only_what_was_in_flight(bench: Bench) -> None:
    job_id, runner = run_until_published(bench, 2)
    runner.store.is_away = True
    runner.turn(2 * int(LEASE_SECONDS) + 2)
    runner.store.is_away = False
    runner.pool.holding = False
    (done,) = runner.finish(bench.store.get(job_id))
    assert done.state == JobState.SUCCEEDED
    assert done.fencing_token == 2


@pytest.mark.parametrize(
    "call",
    ["claim", "set_phase", "save_plan", "transition", "record_shard", "update_progress", "shards"],
)
def test_an_answer_of_the_store_may_be_lost(bench: Bench, call: str) -> None:
    """The write was carried out, and is sent again."""
    job = bench.submit()
    runner = bench.runner()
    runner.store.fail_next = call
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED
    assert runner.store.fail_next is None
    kinds = [str(event.type) for event in bench.store.events(job.id)]
    assert kinds.count("shard.finished") == NUM_SHARDS


def test_the_answer_to_the_last_write_may_be_lost(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner()
    runner.turn_until(lambda: bench.store.get(job.id).state == JobState.PUBLISHING)
    runner.store.fail_next = "transition"
    (done,) = runner.finish(job)
    runner.turn(10)
    assert done.state == JobState.SUCCEEDED
    assert runner.runner._drivers == {}


def test_a_pool_that_takes_nothing_for_a_while_is_no_failure(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner(max_tries=1)
    runner.pool.refusing = True
    runner.turn(30)
    assert bench.store.get(job.id).state == JobState.RUNNING
    runner.pool.refusing = False
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED
    assert not any(e.type == "shard.retried" for e in bench.store.events(job.id))


def test_a_job_that_kills_its_runners_fails_in_the_end(bench: Bench) -> None:
    job = bench.submit()
    for _ in range(3):
        runner = bench.runner(max_takeovers=2)
        runner.threads.holding = True  # and then it is gone, while it plans
        runner.turn(2)
        bench.clock.advance(LEASE_SECONDS)
    (done,) = bench.runner(max_takeovers=2).finish(job)
    assert done.state == JobState.FAILED
    assert done.error
    assert done.error["code"] == "runner_lost"
