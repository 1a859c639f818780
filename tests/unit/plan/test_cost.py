from __future__ import annotations

from typing import Any

import pytest

from merging.method import Cost, Geometry, MergeMethod, all_methods
from merging.ops.blocks import TILE_MULTIPLE
from merging.plan.cost import (
    Budgets,
    Load,
    group_limit,
    problem_cost,
    tile_entries,
)

MiB = 1 << 20
GiB = 1 << 30


def method(**changes: Any) -> MergeMethod:
    """A method that holds three float32 copies of its tensor and does ten operations an entry."""

    def cost(geometry: Geometry, parameters: Any) -> Cost:
        return Cost(10.0 * geometry.num_entries, 12 * geometry.num_entries)

    return MergeMethod(
        name="x", title="", summary="", source="", merge=lambda *_: None, cost=cost, **changes
    )  # type: ignore[arg-type] # never called


def load(entries: int, num_experts: int, *, base: bool = True) -> Load:
    """A BF16 tensor, merged into BF16."""
    return Load(
        shape=(entries // 64, 64),
        transposed=False,
        base_bytes=2 * entries * base,
        expert_bytes=(2 * entries,) * num_experts,
        item_size=2,
    )


def test_whole_tensor_method_holds_all_inputs_workspace_and_result() -> None:
    found = problem_cost([(method(separable="whole"), None)], load(MiB, 3), Budgets(GiB))
    assert found.host_bytes == (4 * 2 + 12 + 2) * MiB
    assert found.device_bytes == (4 * 2 + 12) * MiB
    assert found.flops == 10.0 * MiB


def test_streaming_method_holds_base_and_two_experts_however_many_there_are() -> None:
    streaming = method(separable="rows", streaming=True)
    costs = {
        problem_cost([(streaming, None)], load(MiB, n), Budgets(GiB)).host_bytes for n in (2, 3, 30)
    }
    assert costs == {(3 * 2 + 12 + 2) * MiB}


def test_elementwise_method_is_bounded_by_its_tile() -> None:
    elementwise = method(separable="elementwise")
    budget = 64 * MiB
    costs = [
        problem_cost([(elementwise, None)], load(entries, 3), Budgets(budget)).host_bytes
        for entries in (64 * MiB, 256 * MiB, 1024 * MiB)
    ]
    assert len(set(costs)) == 1
    assert costs[0] <= budget


def test_small_tensor_of_an_elementwise_method_costs_what_it_is() -> None:
    found = problem_cost([(method(separable="elementwise"), None)], load(1024, 3), Budgets(GiB))
    assert found.host_bytes == (4 * 2 + 12 + 2) * 1024


def test_copy_holds_a_tile_and_its_cast() -> None:
    found = problem_cost([(None, None)], load(1024, 0), Budgets(GiB))
    assert (found.host_bytes, found.flops) == ((2 + 2) * 1024, 0.0)


def test_result_counts_even_if_a_method_declares_no_workspace() -> None:
    def no_workspace(geometry: Geometry, parameters: Any) -> Cost:
        return Cost(0.0, 0)

    careless = MergeMethod(
        name="x", title="", summary="", source="", merge=lambda *_: None, cost=no_workspace,
        separable="whole",
    )  # type: ignore[arg-type] # never called  # fmt: skip
    assert (
        problem_cost([(careless, None)], load(1024, 1), Budgets(GiB)).device_bytes
        == (2 * 2 + 4) * 1024
    )


def test_empty_tensor_costs_nothing() -> None:
    empty = Load(shape=(0, 8), transposed=False, base_bytes=0, expert_bytes=(0, 0), item_size=2)
    for separable in ("elementwise", "whole"):
        found = problem_cost([(method(separable=separable), None)], empty, Budgets(GiB))
        assert (found.host_bytes, found.flops) == (0, 0.0)


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_method_has_a_cost_that_grows_with_the_tensor(name: str) -> None:
    registered = all_methods()[name]
    parameters = registered.parameters()
    small, large = (
        problem_cost(
            [(registered, parameters)],
            load(n, 2, base=registered.needs_base),
            Budgets(1 << 40),
        )
        for n in (64 * 64, 64 * 1024)
    )
    assert 0 < small.flops < large.flops
    assert 0 < small.host_bytes < large.host_bytes


def test_transposed_tensor_costs_as_its_transpose() -> None:
    def of_columns(geometry: Geometry, parameters: Any) -> Cost:
        return Cost(float(geometry.matrix[1]), 0)

    counting = MergeMethod(
        name="x", title="", summary="", source="", merge=lambda *_: None, cost=of_columns
    )  # type: ignore[arg-type] # never called
    stored = Load((8, 32), transposed=True, base_bytes=0, expert_bytes=(512,), item_size=2)
    assert problem_cost([(counting, None)], stored, Budgets(GiB)).flops == 8.0


def test_tiles_are_whole_multiples_and_share_a_quarter_of_the_budget() -> None:
    entries, num_bytes = 10**9, 8 * 10**9
    for budget in (64 * MiB, GiB, 64 * GiB):
        tile = tile_entries(entries, num_bytes, budget)
        assert tile % TILE_MULTIPLE == 0
        assert tile * 8 <= group_limit(budget) <= max(budget // 4, MiB)
    assert tile_entries(entries, 100 * entries, MiB) == TILE_MULTIPLE
