"""What a merge report says beyond the plan: figures, warnings, times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.plan.plan import Plan
from merging.plan.timing import shard_seconds
from merging.receipts import ProblemFigures, Receipt
from merging.report import build_report
from merging.storage.router import open_storage
from tests.support.checkpoints import Family, make_family
from tests.support.merges import plan_merge
from tests.support.rates import RATES, rates


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", num_experts=2)


@pytest.fixture
def plan(family: Family, tmp_path: Path) -> Plan:
    return plan_merge(family, "wudi_cfs", open_storage(), tmp_path / "out", max_shard_size="150kB")


@pytest.fixture
def receipts(plan: Plan) -> list[Receipt]:
    """Of the shards, as a worker with known rates wrote them."""
    assert len(plan.shards) > 1
    return [
        run_shard(plan.work(shard.index, plan.digest), open_storage(), rates=RATES)
        for shard in plan.shards
    ]


def with_figures(receipt: Receipt, figures: dict[str, dict[str, Any]]) -> Receipt:
    problems = tuple(
        ProblemFigures(p.tensor_name, p.method, p.solve_seconds, figures.get(p.tensor_name, {}))
        for p in receipt.problems
    )
    return msgspec.structs.replace(receipt, problems=problems)


def test_totals_sum_up_what_was_done(plan: Plan, receipts: list[Receipt]) -> None:
    report = build_report(plan, receipts)
    totals, tensors = report["totals"], report["tensors"]
    solved = [tensor for tensor in tensors if tensor["method"] == "wudi_cfs"]
    assert totals["tensors"] == plan.totals.tensors
    assert totals["layers_solved"] == len(solved) > 0
    removed = [tensor["interference_removed"] for tensor in solved]
    assert totals["interference_removed"] == pytest.approx(sum(removed) / len(removed))
    assert totals["flops"] == pytest.approx(plan.totals.flops, rel=0.01)


def test_without_solved_layers_there_is_no_mean(family: Family, tmp_path: Path) -> None:
    storage = open_storage()
    report = run_plan(plan_merge(family, "linear", storage, tmp_path / "out"), storage)
    assert report["totals"]["interference_removed"] is None
    assert report["totals"]["layers_solved"] == 0


def test_warnings_of_one_kind_are_told_once(plan: Plan, receipts: list[Receipt]) -> None:
    names = [p.tensor_name for p in receipts[0].problems]
    other = receipts[1].problems[0].tensor_name
    figures = {
        names[0]: {"warnings": ["The spread is 3.5 times 1e-05.", "It is odd."]},
        names[1]: {"warnings": ["The spread is 12 times 2."]},
    }
    first = with_figures(receipts[0], figures)
    second = with_figures(receipts[1], {other: {"warnings": ["The spread is 7 times 8."]}})
    report = build_report(plan, [first, second, *receipts[2:]])
    assert report["warnings"] == [
        f"3 tensors ({names[0]}, {names[1]}, {other}), with figures of the first:"
        " The spread is 3.5 times 1e-05.",
        f"{names[0]}: It is odd.",
    ]
    assert report["tensors"][0]["warnings"] == figures[names[0]]["warnings"]


def test_warnings_of_the_plan_come_first(plan: Plan, receipts: list[Receipt]) -> None:
    warned = msgspec.structs.replace(plan, warnings=("Mind the gap.",))
    name = receipts[0].problems[0].tensor_name
    first = with_figures(receipts[0], {name: {"warnings": ["Odd."]}})
    report = build_report(warned, [first, *(with_figures(r, {}) for r in receipts[1:])])
    assert report["warnings"] == ["Mind the gap.", f"{name}: Odd."]


def test_times_are_sums_over_shards_by_stage(plan: Plan, receipts: list[Receipt]) -> None:
    report = build_report(plan, receipts)
    for stage in ("fetch", "solve", "write", "total"):
        expected = sum(receipt.seconds[stage] for receipt in receipts)
        assert report["seconds"][stage] == pytest.approx(expected, abs=1e-3)
    for stage in ("read", "write"):
        assert all(0 < r.busy_seconds[stage] <= r.seconds["total"] for r in receipts)
        expected = sum(receipt.busy_seconds[stage] for receipt in receipts)
        assert report["busy_seconds"][stage] == pytest.approx(expected, abs=1e-3)


def test_the_estimate_is_what_each_worker_knew_of_its_shard(
    plan: Plan, receipts: list[Receipt]
) -> None:
    slow = rates(read={"file": 1e3})
    mixed = [receipts[0], *(msgspec.structs.replace(r, rates=slow) for r in receipts[1:])]
    estimate = build_report(plan, mixed)["estimate"]
    stages = [
        shard_seconds(plan, shard, RATES if shard.index == 0 else slow) for shard in plan.shards
    ]
    for stage in ("read", "solve", "write", "total"):
        expected = sum(getattr(found, stage) for found in stages)
        assert estimate[stage] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("known", [None, rates(read={"s3": 1e9})])
def test_where_a_worker_knew_nothing_there_is_no_estimate(
    plan: Plan, receipts: list[Receipt], known: Any
) -> None:
    mixed = [msgspec.structs.replace(receipts[0], rates=known), *receipts[1:]]
    assert build_report(plan, mixed)["estimate"] is None


def test_receipts_keep_their_rates(plan: Plan, receipts: list[Receipt]) -> None:
    data = msgspec.json.encode(receipts[0])
    assert msgspec.json.decode(data, type=Receipt) == receipts[0]
    assert receipts[0].rates == RATES
