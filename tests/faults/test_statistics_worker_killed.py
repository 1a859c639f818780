"""Ray workers run experts on samples; one is killed in a block, which another does again."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan, file_uri
from merging.plan.planner import make_plan
from merging.plan.stages import shards_needed
from merging.publish import prepare_output, publish
from merging.receipts import Receipt, read_receipt
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.calibrated import calibrated_recipe, write_models
from tests.support.merges import weight_bytes
from tests.support.pools import REPOSITORY, collect, ends, fail, finish
from workers.messages import ShardDone, ShardStarted, ShardTask
from workers.ray_pool import RayPool
from workers.ray_wire import RayOptions

pytest_plugins = ["tests.support.ray_fixtures"]
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def pool(ray_options: RayOptions) -> Iterator[RayPool]:
    """Runs the real engine."""
    made = RayPool(ray_options)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir("/"):
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        assert made.slots() == 2
    yield made
    made.close()


def plan_of(models: list[Path], output: Path) -> Plan:
    recipe = parse_recipe(calibrated_recipe(models))
    return make_plan(recipe, open_storage(), MergeOptions(), str(output))


def test_a_block_that_was_lost_is_run_again_and_two_workers_make_the_bytes_of_one(
    pool: RayPool, tmp_path: Path
) -> None:
    models, storage = write_models(tmp_path / "models", "llama", 2), open_storage()
    plan = plan_of(models, tmp_path / "out")
    digest, needed = plan.digest, shards_needed(plan)
    prepare_output(plan, storage)
    receipts: dict[int, Receipt] = {}
    killed = plan.shards[2]
    while len(receipts) < len(plan.shards):
        ready = [
            shard
            for shard in plan.shards
            if shard.index not in receipts and needed[shard.index] <= receipts.keys()
        ][:2]
        works = {
            shard.index: plan.work(
                shard.index, digest, {i: receipts[i].versions for i in needed[shard.index]}
            )
            for shard in ready
        }
        if killed in ready:
            pool.submit(ShardTask("run", 1, works[killed.index], device="cpu"))
            events = collect(pool, lambda seen: any(isinstance(e, ShardStarted) for e in seen))
            [worker] = {event.worker for event in events if isinstance(event, ShardStarted)}
            os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
            assert fail(pool).error["code"] == "worker_lost"
            assert not Path(file_uri(plan.output_uri, digest, killed)).exists()
            assert read_receipt(storage, plan.output_uri, digest, killed) is None
        for work in works.values():
            pool.submit(ShardTask("run", 2, work, device="cpu"))
        for end in ends(finish(pool, len(works))):
            assert isinstance(end, ShardDone)
            receipts[end.receipt.shard_index] = end.receipt
    assert len({receipt.worker for receipt in receipts.values()}) > 1
    publish(plan, list(receipts.values()), storage)
    run_plan(plan_of(models, tmp_path / "expected"), storage)
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "expected")
