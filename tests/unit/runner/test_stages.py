"""Jobs whose plan has intermediate files."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from merging.errors import MergeError
from merging.plan.plan import Plan, file_uri
from merging.plan.planner import make_plan
from service.jobs.states import JobState, ShardState
from service.runner import steps
from tests.support.fake_pool import FakePool
from tests.support.runner_bench import LEASE_SECONDS, NUM_TENSORS, Bench
from tests.support.staged import in_two_stages
from workers.messages import ShardTask

FIRST = 3
"""Shards of the first stage; as many are in the second."""


@pytest.fixture(autouse=True)
def _plans_have_two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_staged(*arguments: Any) -> Plan:
        return in_two_stages(make_plan(*arguments), 1200)

    monkeypatch.setattr(steps, "make_plan", make_staged)


def intermediate_uri(bench: Bench, job_id: str, index: int) -> str:
    plan = bench.store.load_plan(job_id)
    assert plan is not None
    return file_uri(plan.output_uri, plan.digest, plan.shards[index])


def test_what_a_shard_needs_is_done_before_it_is_handed_out(bench: Bench) -> None:
    job = bench.submit()
    done: set[int] = set()

    def check(task: ShardTask) -> None:
        needed = {file.shard for file in task.work.files if file.shard is not None}
        assert needed <= done
        assert needed or task.work.shard.index < FIRST
        done.add(task.work.shard.index)

    (ended,) = bench.runner(FakePool(bench.storage, slots=8, script=check)).finish(job)
    assert ended.state == JobState.SUCCEEDED
    assert done == set(range(2 * FIRST))
    progress = ended.progress
    assert (progress.shards_done, progress.shards_total) == (2 * FIRST, 2 * FIRST)
    assert (progress.tensors_done, progress.tensors_total) == (NUM_TENSORS, NUM_TENSORS)
    assert progress.bytes_done == progress.bytes_total
    assert not any(name.startswith(".mergeyard") for name in bench.output(job))
    kinds = [shard.kind for shard in bench.store.shards(job.id)]
    assert kinds == ["intermediate"] * FIRST + ["weights"] * FIRST
    assert ended.output
    assert len(ended.output["files"]) == FIRST


def test_a_new_runner_goes_on_in_the_second_stage(bench: Bench) -> None:
    job = bench.submit()
    dead = bench.runner(FakePool(bench.storage, slots=1), max_in_flight_shards=1)
    dead.turn_until(lambda: dead.pool.indexes(job.id) == [0, 1, 2, 3])
    bench.clock.advance(LEASE_SECONDS)
    runner = bench.runner()
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED
    assert runner.pool.indexes(job.id) == [3, 4, 5]


@pytest.mark.parametrize("folder", ["", "mem://kept"])
@pytest.mark.parametrize("loss", ["deleted", "overwritten"])
def test_an_made_file_that_is_lost_is_made_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, loss: str, folder: str
) -> None:
    """Also where it was kept for other jobs, one of which replaced it, or whoever removes them."""
    plan = steps.make_plan

    def keep(*arguments: Any) -> Plan:
        made = plan(*arguments)
        kept = (msgspec.structs.replace(s, folder=folder) for s in made.shards[:FIRST])
        return msgspec.structs.replace(made, shards=(*kept, *made.shards[FIRST:]))

    monkeypatch.setattr(steps, "make_plan", keep)
    job = bench.submit()
    lost: list[int] = []

    def lose(task: ShardTask) -> None:
        if task.work.shard.index == FIRST and not lost:
            lost.append(FIRST)
            uri = intermediate_uri(bench, job.id, 0)
            data = bench.storage.read_bytes(uri, limit=1 << 20)
            bench.storage.delete(uri)
            if loss == "overwritten":
                bench.storage.write_bytes(uri, data)

    runner = bench.runner(FakePool(bench.storage, slots=1, script=lose))
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED
    assert sorted(runner.pool.indexes(job.id)) == [0, 0, 1, 2, 3, 3, 4, 5]
    rows = bench.store.shards(job.id)
    assert [row.attempt for row in rows] == [2, 1, 1, 2, 1, 1]
    assert all(row.state == ShardState.SUCCEEDED for row in rows)


def test_readers_that_fail_later_do_not_have_the_file_made_twice(bench: Bench) -> None:
    job = bench.submit(options={"max_shard_size": 4000})
    first_stage_done = FakePool(bench.storage, slots=4)
    runner = bench.runner(first_stage_done)
    runner.turn_until(lambda: len(runner.pool.indexes(job.id)) == 2 * FIRST)
    uri = intermediate_uri(bench, job.id, 0)
    bench.storage.delete(uri)
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED
    assert runner.pool.indexes(job.id).count(0) == 2


def test_a_file_that_gets_lost_again_and_again_fails_the_job(bench: Bench) -> None:
    job = bench.submit()

    def lose(task: ShardTask) -> MergeError | None:
        if task.work.shard.index == FIRST:
            bench.storage.delete(intermediate_uri(bench, job.id, 0))
        return None

    runner = bench.runner(FakePool(bench.storage, slots=1, script=lose))
    (done,) = runner.finish(job)
    assert done.state == JobState.FAILED
    assert done.error
    assert done.error["code"] == "storage_not_found"
