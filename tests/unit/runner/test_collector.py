"""The collector: removes what is due, and leaves for later what it cannot remove."""

from __future__ import annotations

from typing import Any

import msgspec

from merging.errors import CheckpointError, MergeError, StorageError
from merging.plan.statistics_work import kept_name
from service.jobs.records import JobRecord
from service.jobs.states import JobState
from service.runner.collector import Collector, KeptStatistics
from tests.support.fake_pool import FakePool
from tests.support.jobs import tiny_plan
from tests.support.runner_bench import NUM_SHARDS, Bench
from workers.messages import ShardTask

KEPT = 3600.0


def fail_at_last_shard(bench: Bench) -> JobRecord:
    """A job that published all its shards but one."""
    job = bench.submit()

    def script(task: ShardTask) -> MergeError | None:
        is_last = task.work.shard.index == NUM_SHARDS - 1
        return CheckpointError("A tensor is missing.") if is_last else None

    (failed,) = bench.runner(FakePool(bench.storage, script=script)).finish(job)
    assert failed.state == JobState.FAILED
    return failed


def collector(bench: Bench) -> Collector:
    return Collector(bench.store, lambda: bench.storage, kept_seconds=KEPT)


def test_remains_are_kept_for_a_retry_and_removed_later(bench: Bench) -> None:
    one, other = fail_at_last_shard(bench), fail_at_last_shard(bench)
    collector(bench).collect_all()
    assert len(bench.output(one)) == 2 * (NUM_SHARDS - 1) + 1
    bench.clock.advance(KEPT)
    bench.store.retry(one.id)
    collector(bench).collect_all()
    assert bench.output(other) == set()
    runner = bench.runner()
    runner.turn_until(lambda: bench.store.get(one.id).is_terminal)
    assert runner.pool.indexes(one.id) == [NUM_SHARDS - 1]


def test_a_retry_after_that_starts_afresh_and_keeps_its_result(bench: Bench) -> None:
    job = fail_at_last_shard(bench)
    bench.clock.advance(KEPT)
    collector(bench).collect_all()
    bench.store.retry(job.id)
    runner = bench.runner()
    runner.turn_until(lambda: bench.store.get(job.id).is_terminal)
    assert bench.store.get(job.id).state == JobState.SUCCEEDED
    assert sorted(runner.pool.indexes(job.id)) == list(range(NUM_SHARDS))
    complete = bench.output(job)
    bench.clock.advance(2 * KEPT)
    collector(bench).collect_all()
    assert bench.output(job) == complete


def test_what_storage_refuses_is_tried_another_time_and_keeps_nothing_else(bench: Bench) -> None:
    jobs = [fail_at_last_shard(bench) for _ in range(2)]
    bench.clock.advance(KEPT)
    delete = bench.storage.delete

    def refuse(uri: str) -> Any:
        if uri.startswith(jobs[0].output_uri):
            raise StorageError("No.", code="denied")
        delete(uri)

    bench.storage.delete = refuse  # type: ignore[method-assign]
    collector(bench).collect_all()
    assert bench.output(jobs[0])
    assert bench.output(jobs[1]) == set()
    bench.storage.delete = delete  # type: ignore[method-assign]
    collector(bench).collect_all()
    assert bench.output(jobs[0]) == set()


def test_statistics_that_no_job_wants_are_removed_and_nothing_else(bench: Bench) -> None:
    wanted, unused = kept_name("wanted", 1), kept_name("unused", 1)
    others = ["model.safetensors", "statistics-00001-00001.safetensors", f"deeper/{unused}"]
    for name in (wanted, unused, *others):
        for ending in ("", ".json"):
            bench.storage.write_bytes(f"mem://kept/{name}{ending}", b"x")
    bench.submit()
    claim = bench.store.claim("other", 60)
    assert claim is not None
    plan = tiny_plan(claim.job.output_uri)
    first = msgspec.structs.replace(plan.shards[0], file_name=wanted, kind="intermediate")
    shards = (first, *plan.shards[1:])
    bench.store.save_plan(claim, msgspec.structs.replace(plan, shards=shards))
    statistics = KeptStatistics("mem://kept", KEPT)
    Collector(
        bench.store, lambda: bench.storage, kept_seconds=KEPT, statistics=statistics
    ).collect_statistics()
    left = {item.uri.removeprefix("mem://kept/") for item in bench.storage.list("mem://kept")}
    assert left == {f"{name}{ending}" for name in (wanted, *others) for ending in ("", ".json")}
