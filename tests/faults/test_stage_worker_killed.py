"""A worker is killed while it makes an intermediate file: the file is made again, whole."""

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
from tests.support.checkpoints import Family, make_family
from tests.support.merges import recipe, weight_bytes
from tests.support.pools import REPOSITORY, collect, ends, fail, finish
from workers.messages import PoolEvent, ShardDone, ShardProgress, ShardStarted, ShardTask
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


def plan_isotropic(family: Family, output: Path) -> Plan:
    """The first stage solves all layers."""
    document = parse_recipe(recipe(family, "iso_wudi"))
    return make_plan(document, open_storage(), MergeOptions(), str(output))


def plan_divided(family: Family, output: Path) -> Plan:
    """The second stage solves rows of one layer."""
    document = parse_recipe(recipe(family, "wudi", steps=2000))
    return make_plan(document, open_storage(), MergeOptions(workers=6), str(output))


def has_solved_some(events: list[PoolEvent]) -> bool:
    return any(isinstance(event, ShardProgress) and event.tensors_solved for event in events)


def has_started(events: list[PoolEvent]) -> bool:
    return any(isinstance(event, ShardStarted) for event in events)


@pytest.mark.parametrize(
    ("make", "step", "is_under_way", "size"),
    [(plan_isotropic, "updates", has_solved_some, 384), (plan_divided, "rows", has_started, 192)],
)
def test_an_made_file_is_whole_or_not_there(
    pool: RayPool, tmp_path: Path, make, step: str, is_under_way, size: int
) -> None:
    storage = open_storage()
    family = make_family(tmp_path / "models", num_experts=2, hidden=size, layers=1)
    plan = make(family, tmp_path / "out")
    digest, needed = plan.digest, shards_needed(plan)
    steps = [plan.settings[shard.problems[0].setting].step for shard in plan.shards]
    prepare_output(plan, storage)
    receipts: list[Receipt] = []
    for shard in plan.shards:
        versions = {index: receipts[index].versions for index in needed[shard.index]}
        work = plan.work(shard.index, digest, versions)
        if shard.index == steps.index(step):
            pool.submit(ShardTask("staged", 1, work, device="cpu"))
            events = collect(pool, is_under_way)
            (worker,) = {e.worker for e in events if isinstance(e, ShardProgress | ShardStarted)}
            os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
            assert fail(pool).error["code"] == "worker_lost"
            assert not Path(file_uri(plan.output_uri, digest, shard)).exists()
            assert read_receipt(storage, plan.output_uri, digest, shard) is None
        pool.submit(ShardTask("staged", 2, work, device="cpu"))
        (end,) = ends(finish(pool))
        assert isinstance(end, ShardDone)
        receipts.append(end.receipt)
    publish(plan, receipts, storage)
    run_plan(make(family, tmp_path / "expected"), storage)
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "expected")
    assert not (tmp_path / "out" / ".mergeyard").exists()
