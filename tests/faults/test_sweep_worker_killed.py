"""A worker of a sweep is killed: no variant has half a file, and the shard is done again."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.publish import prepare_output, publish
from merging.receipts import Receipt, read_receipt
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import Family, make_family
from tests.support.merges import recipe, weight_bytes
from tests.support.pools import REPOSITORY, collect, ends, fail, finish
from workers.messages import PoolEvent, ShardDone, ShardProgress, ShardTask
from workers.ray_pool import RayPool
from workers.ray_wire import RayOptions

pytest_plugins = ["tests.support.ray_fixtures"]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

VARIANTS = ["many-steps", "other-rate"]


@pytest.fixture
def pool(ray_options: RayOptions) -> Iterator[RayPool]:
    """Runs the real engine."""
    made = RayPool(ray_options)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir("/"):
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        assert made.slots() == 2
    yield made
    made.close()


def sweep(family: Family, output: Path) -> Plan:
    document = {
        **recipe(family, "wudi", steps=4000),
        "sweep": [
            {"name": VARIANTS[0]},
            {"name": VARIANTS[1], "parameters": {"learning_rate": 1e-5}},
        ],
    }
    options = MergeOptions(max_shard_size=200_000)
    return make_plan(parse_recipe(document), open_storage(), options, str(output))


def is_under_way(events: list[PoolEvent]) -> bool:
    return any(isinstance(e, ShardProgress) and e.bytes_written > 0 for e in events)


def test_a_shard_whose_worker_was_killed_is_done_again_in_all_variants(
    pool: RayPool, tmp_path: Path
) -> None:
    storage = open_storage()
    family = make_family(tmp_path / "models", num_experts=2, layers=1)
    output = tmp_path / "sweep"
    plan = sweep(family, output)
    assert len(plan.shards) > 1
    prepare_output(plan, storage)
    receipts: list[Receipt] = []
    for shard in plan.shards:
        work = plan.work(shard.index, plan.digest)
        if shard.index == 1:
            pool.submit(ShardTask("swept", 1, work, device="cpu"))
            events = collect(pool, is_under_way)
            (worker,) = {e.worker for e in events if isinstance(e, ShardProgress)}
            os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
            assert fail(pool).error["code"] == "worker_lost"
            for variant in VARIANTS:
                assert not (output / variant / shard.file_name).exists()
            assert read_receipt(storage, str(output), plan.digest, shard, VARIANTS) is None
        pool.submit(ShardTask("swept", 2, work, device="cpu"))
        (end,) = ends(finish(pool))
        assert isinstance(end, ShardDone)
        receipts.append(end.receipt)
    publish(plan, receipts, storage)
    expected = tmp_path / "expected"
    run_plan(sweep(family, expected), storage)
    for variant in VARIANTS:
        assert weight_bytes(output / variant) == weight_bytes(expected / variant)
