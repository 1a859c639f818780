"""Row blocks: chosen at planning, from shapes and budgets alone."""

from __future__ import annotations

from typing import Any

import pytest

from merging.errors import MergeError, PlanError
from merging.method import Cost, Geometry, MergeMethod, all_methods
from merging.options import MergeOptions
from merging.plan.cost import Budgets, Load, ProblemCost, problem_cost
from merging.plan.plan import Plan, Problem
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from tests.support.header_checkpoints import put_checkpoint
from tests.support.memory_storage import MemoryStorage

TiB = 1 << 40
BASE, MATH, CODE = "mem://models/base", "mem://models/math", "mem://models/code"
BY_ROWS = [name for name, method in all_methods().items() if method.separable == "rows"]


def by_rows(**changes: Any) -> MergeMethod:
    """A method that holds the matrix once and ten numbers for each entry of a block."""

    def cost(geometry: Geometry, parameters: Any) -> Cost:
        rows, columns = geometry.matrix
        return Cost(1.0, 4 * columns * (rows + 10 * (geometry.row_block or rows)))

    fields: dict[str, Any] = {"separable": "rows", "streaming": True, **changes}
    return MergeMethod(
        name="x", title="", summary="", source="", merge=lambda *_: None, cost=cost, **fields
    )  # type: ignore[arg-type] # never called


def load(rows: int, columns: int, **changes: Any) -> Load:
    size = 2 * rows * columns
    fields: dict[str, Any] = {"transposed": False, "item_size": 2, **changes}
    shape = (columns, rows) if fields["transposed"] else (rows, columns)
    return Load(shape=shape, base_bytes=size, expert_bytes=(size, size, size), **fields)


def cost(budgets: Budgets, *, method: MergeMethod | None = None, **fields: Any) -> ProblemCost:
    return problem_cost([(method or by_rows(), None)], load(1000, 64, **fields), budgets)


WHOLE = cost(Budgets(TiB))
SMALLEST = cost(Budgets(0))


def test_what_fits_is_solved_whole() -> None:
    assert cost(Budgets(WHOLE.host_bytes)) == WHOLE
    assert WHOLE.row_block == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_the_block_is_the_largest_multiple_of_64_rows_that_fits(transposed: bool) -> None:
    previous = 0
    for budget in range(SMALLEST.host_bytes, WHOLE.host_bytes, 10_000):
        found = cost(Budgets(budget), transposed=transposed)
        assert found.row_block % 64 == 0
        assert previous <= found.row_block < 1000
        assert found.host_bytes <= budget
        larger = found.host_bytes + 4 * 64 * 10 * 64
        assert larger > budget or found.row_block + 64 >= 1000
        previous = found.row_block
    assert previous == 960


def test_where_nothing_fits_the_cost_is_that_of_64_rows() -> None:
    assert SMALLEST.row_block == 64
    assert cost(Budgets(SMALLEST.host_bytes)) == SMALLEST
    assert cost(Budgets(SMALLEST.host_bytes - 1)) == SMALLEST


@pytest.mark.parametrize("rows", [1, 63, 64])
def test_a_matrix_of_one_block_is_never_cut(rows: int) -> None:
    assert problem_cost([(by_rows(), None)], load(rows, 64), Budgets(0)).row_block == 0


def test_methods_that_need_the_whole_matrix_are_never_cut() -> None:
    assert cost(Budgets(0), method=by_rows(separable="whole")).row_block == 0


def test_with_a_device_budget_workspace_counts_there_and_not_on_the_host() -> None:
    inputs, result = 3 * 2 * 64_000, 2 * 64_000
    found = cost(Budgets(TiB, TiB))
    assert found.host_bytes == inputs + result
    assert found.device_bytes == WHOLE.device_bytes == inputs + 4 * 11 * 64_000


def test_blocks_are_chosen_for_the_device_budget() -> None:
    found = cost(Budgets(TiB, WHOLE.device_bytes - 1))
    assert found.row_block == 960
    assert found.device_bytes < WHOLE.device_bytes
    assert cost(Budgets(TiB, WHOLE.device_bytes)).row_block == 0


def test_float64_inputs_double_the_workspace() -> None:
    double = cost(Budgets(TiB), is_double=True)
    assert double.device_bytes - WHOLE.device_bytes == 4 * 11 * 64_000


@pytest.mark.parametrize("name", BY_ROWS)
def test_smaller_blocks_never_take_more_memory(name: str) -> None:
    method = all_methods()[name]
    parameters = method.parameters()
    for shape in ((1024, 256), (256, 1024), (64, 4096)):
        taken = [
            method.cost(Geometry(shape, 3, row_block=block), parameters).workspace_bytes
            for block in (64, 128, 192, 256, 0)
        ]
        assert taken == sorted(taken)


# In a plan


@pytest.fixture
def storage() -> MemoryStorage:
    memory = MemoryStorage()
    for uri in (BASE, MATH, CODE):
        put_checkpoint(memory, uri, {"model.layers.0.mlp.up_proj.weight": ("BF16", (2048, 128))})
    return memory


def plan(storage: MemoryStorage, **options: Any) -> Plan:
    recipe = {
        "merge_method": "wudi",
        "base_model": BASE,
        "models": [{"model": MATH}, {"model": CODE}],
    }
    return make_plan(parse_recipe(recipe), storage, MergeOptions(**options), "mem://out/merged")


def problem(found: Plan) -> Problem:
    return found.shards[0].problems[0]


def refusal(storage: MemoryStorage, **options: Any) -> MergeError:
    with pytest.raises(PlanError) as caught:
        plan(storage, **options)
    assert caught.value.code == "does_not_fit"
    return caught.value


def test_a_layer_too_large_as_a_whole_is_planned_in_blocks_with_a_warning(
    storage: MemoryStorage,
) -> None:
    whole = plan(storage)
    blocked = plan(storage, memory_budget=whole.totals.max_host_bytes - 1)
    assert (problem(whole).row_block, whole.warnings) == (0, ())
    assert problem(blocked).row_block > 0
    assert "Too large for memory_budget as a whole" in blocked.warnings[0]
    assert f"blocks of {problem(blocked).row_block} rows or more" in blocked.warnings[0]
    assert blocked.totals.max_host_bytes <= blocked.memory_budget
    assert Plan.from_json(blocked.to_json()) == blocked


def test_only_what_does_not_fit_in_blocks_is_refused(storage: MemoryStorage) -> None:
    error = refusal(storage, memory_budget="1MiB")
    needed = error.context["needed_bytes"]
    assert "in blocks of 64 rows" in error.detail
    assert needed < plan(storage).totals.max_host_bytes
    assert plan(storage, memory_budget=needed).totals.max_host_bytes <= needed
    assert refusal(storage, memory_budget=needed - 1).context["needed_bytes"] == needed


def test_a_device_that_is_too_small_is_named_with_what_it_needs(storage: MemoryStorage) -> None:
    error = refusal(storage, device_memory_budget="1MiB")
    needed = error.context["needed_bytes"]
    assert f"needs {needed} bytes of GPU memory" in error.detail
    assert f"Set device_memory_budget to {needed} or more" in error.detail
    assert error.context["device_memory_budget"] == 1 << 20
    found = plan(storage, device_memory_budget=needed)
    assert found.device_memory_budget == needed
    assert found.totals.max_device_bytes <= needed


def test_the_host_of_a_gpu_needs_room_for_inputs_and_results_only(storage: MemoryStorage) -> None:
    size = 2 * 2048 * 128
    assert plan(storage, device_memory_budget="1GiB").totals.max_host_bytes == 4 * size
    assert plan(storage, memory_budget=4 * size, device_memory_budget="1GiB").shards
    assert (
        "host memory"
        in refusal(storage, memory_budget=4 * size - 1, device_memory_budget="1GiB").detail
    )
