"""Estimates of time: arithmetic on a plan and round rates."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from merging.options import MergeOptions
from merging.plan.plan import Plan, Source
from merging.plan.planner import make_plan
from merging.plan.summary import plan_summary
from merging.plan.timing import estimate_seconds, shard_seconds
from merging.recipe import parse_recipe
from tests.support.header_checkpoints import llama_tensors, put_checkpoint
from tests.support.memory_storage import MemoryStorage
from tests.support.rates import RATES, rates

MODELS = ("mem://models/base", "mem://models/math", "mem://models/code")
FAST = 1e18


def plan(method: str = "wudi", *, dtype: str = "BF16", **options: Any) -> Plan:
    storage = MemoryStorage()
    for uri in MODELS:
        put_checkpoint(storage, uri, llama_tensors(dtype=dtype))
    recipe = {
        "merge_method": method,
        "base_model": MODELS[0],
        "models": [{"model": uri} for uri in MODELS[1:]],
    }
    return make_plan(parse_recipe(recipe), storage, MergeOptions(**options), "mem://out/merged")


def test_stages_follow_from_bytes_and_operations() -> None:
    found = plan("task_arithmetic")
    [shard] = found.shards
    stages = shard_seconds(found, shard, RATES)
    assert stages is not None
    assert stages.read == pytest.approx(found.totals.bytes_read / 1e6)
    assert stages.write == pytest.approx(shard.size / 1e6)
    assert stages.solve > found.totals.flops / 1e9
    assert stages.total == pytest.approx(max(stages.read, stages.solve, stages.write), abs=0.1)


@pytest.mark.parametrize(
    ("slow", "stage"),
    [
        ({"read": {"mem": 1.0}}, "read"),
        ({"written": {"mem": 1.0}}, "write"),
        ({"steps": ((64, 1.0), (128, 1.0))}, "solve"),
    ],
)
def test_the_slowest_stage_sets_the_time(slow: dict[str, Any], stage: str) -> None:
    found = plan()
    quick = {"read": {"mem": FAST}, "written": {"mem": FAST}, "operations": FAST, "entries": FAST}
    estimate = estimate_seconds(found, rates(**quick | slow), 1)
    assert estimate is not None
    assert getattr(estimate.seconds, stage) == pytest.approx(estimate.total_seconds, rel=1e-3)


def test_layers_go_by_the_rate_of_products_and_the_rest_by_that_of_entries() -> None:
    found = plan()
    by_method = {
        name: sum(
            p.flops for p in found.shards[0].problems if found.settings[p.setting].method == name
        )
        for name in ("wudi", "linear")
    }
    slow_products = rates(steps=((64, 10.0), (128, 10.0)), operations=FAST, entries=FAST)
    slow_entries = rates(steps=((64, FAST), (128, FAST)), operations=10.0, entries=FAST)
    products, entries = (
        shard_seconds(found, found.shards[0], chosen) for chosen in (slow_products, slow_entries)
    )
    assert products is not None
    assert entries is not None
    assert products.solve == pytest.approx(by_method["wudi"] / 10, rel=1e-3)
    assert entries.solve > by_method["linear"] / 10


def test_shards_go_to_the_slot_that_is_free_first() -> None:
    found = plan(max_shard_size="20kB")
    assert len(found.shards) > 4
    one, two, many = (estimate_seconds(found, RATES, slots) for slots in (1, 2, 1000))
    assert one is not None
    assert two is not None
    assert many is not None
    assert one.total_seconds == pytest.approx(sum(one.shards)) == one.seconds.total
    assert two.total_seconds < one.total_seconds
    assert two.total_seconds >= one.total_seconds / 2
    assert many.total_seconds == max(many.shards)
    assert one.shards == two.shards == many.shards


def test_more_threads_multiply_products_on_a_cpu_only() -> None:
    products = {"operations": FAST, "entries": FAST, "steps": ((64, 1.0), (128, 1.0))}
    for device, factor in (("cpu", 0.25), ("cuda:0 NVIDIA H100", 1.0)):
        chosen = rates(device=device, **products)
        single, several = (
            shard_seconds(made, made.shards[0], chosen) for made in (plan(), plan(threads=4))
        )
        assert single is not None
        assert several is not None
        assert several.solve == pytest.approx(factor * single.solve, rel=1e-3)


def test_float64_takes_twice_as_long() -> None:
    products = rates(operations=FAST, entries=FAST, steps=((64, 1.0), (128, 1.0)))
    single, double = (
        shard_seconds(made, made.shards[0], products) for made in (plan(), plan(dtype="F64"))
    )
    assert single is not None
    assert double is not None
    assert double.solve == pytest.approx(2 * single.solve, rel=1e-3)


def test_what_a_shard_is_given_is_read_too() -> None:
    found = plan()
    [shard] = found.shards
    problem, *others = shard.problems
    given = (Source(0, 8, 1008, "U8"), Source(0, 8, 1008, "U8"))
    more = msgspec.structs.replace(
        shard, problems=(msgspec.structs.replace(problem, given=given), *others)
    )
    before, after = shard_seconds(found, shard, RATES), shard_seconds(found, more, RATES)
    assert before is not None
    assert after is not None
    assert after.read - before.read == pytest.approx(1000 / 1e6)


@pytest.mark.parametrize("unknown", ["read", "written"])
def test_nothing_is_said_of_storage_that_was_never_used(unknown: str) -> None:
    assert estimate_seconds(plan(), rates(**{unknown: {"s3": 1e9}}), 1) is None


def test_the_estimate_is_no_part_of_the_plan() -> None:
    found = plan()
    estimate = estimate_seconds(found, RATES, 3)
    summary = plan_summary(found, estimate)
    assert summary["plan_digest"] == plan_summary(found)["plan_digest"]
    assert plan_summary(found)["estimate"] is None
    assert summary["estimate"] == msgspec.to_builtins(estimate)
    assert summary["estimate"]["slots"] == 3
    assert summary["estimate"]["device"] == "cpu"
    assert set(summary["estimate"]["seconds"]) == {"read", "solve", "write", "total"}
