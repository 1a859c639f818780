"""Methods that solve a layer's problem: what their declarations have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from merging.method import Cost, Divided, Geometry, MergeFunction, MergeMethod, Step, Task
from merging.ops.forms import LayerShape, cheapest
from merging.ops.layer_method import (
    NUM_ROWS,
    NUM_SUMS,
    LayerMethod,
    LayerVariant,
    shared_entries,
    shared_flops,
)

if TYPE_CHECKING:
    import torch

_FLOAT32_BYTES = 4

Precision = Annotated[
    Literal["highest", "high", "medium"],
    Field(
        description=(
            "Of the iteration's products on a GPU: 'highest' is float32; 'high' splits operands"
            " over bfloat16 tensor cores, at nearly float32's accuracy; 'medium' is TF32. A CPU"
            " computes in float32 whatever it says. Sums over experts are always float32."
        ),
    ),
]
"""The parameter of iterative methods that says how exactly they multiply."""


def merge_by(layer: LayerMethod) -> MergeFunction:
    """The function of a method with this solver."""

    def merge(
        base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
    ) -> torch.Tensor:
        from merging.ops.layers import merge_layer

        assert base is not None
        [(_, merged)] = merge_layer(base, experts, [(layer, task)])
        return merged

    return merge


def cost_by(layer: LayerMethod) -> Callable[[Geometry, Any], Cost]:
    """The cost function of a method with this solver."""

    def cost(geometry: Geometry, parameters: Any) -> Cost:
        return layer_cost(geometry, [LayerVariant(layer, parameters)])

    return cost


def divide_by(layer: LayerMethod) -> Divided:
    """How a method with this solver divides a layer."""
    assert layer.rows is not None
    solver = layer.rows

    def sum_up(
        base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
    ) -> torch.Tensor:
        from merging.ops import divided

        assert base is not None
        return divided.sum_up(base, experts, task, layer)

    def solve(_: torch.Tensor | None, parts: Iterator[torch.Tensor], task: Task) -> torch.Tensor:
        from merging.ops import divided

        return divided.solve_rows(parts, task, solver)

    def join(base: torch.Tensor | None, parts: Iterator[torch.Tensor], task: Task) -> torch.Tensor:
        from merging.ops import divided

        assert base is not None
        return divided.join_rows(base, parts, task)

    def sums_cost(geometry: Geometry, parameters: Any) -> Cost:
        shape = _shape(geometry)
        problem = layer.problem(parameters)
        loss = 2.0 * shape.rows * shape.columns**2
        result = shape.columns * (shape.columns + 2 * shape.rows)
        entries = problem.entries(shape, "gram") + result
        return Cost(problem.flops(shape)["gram"] + loss, _FLOAT32_BYTES * entries)

    def rows_cost(geometry: Geometry, parameters: Any) -> Cost:
        shape = _shape(geometry)
        preparing = layer.problem(parameters).flops(shape)["gram"]
        entries = layer.entries(shape, "gram", 0, parameters) + shape.rows * shape.columns
        return Cost(layer.flops(shape, parameters)["gram"] - preparing, _FLOAT32_BYTES * entries)

    def join_cost(geometry: Geometry, _: Any) -> Cost:
        return Cost(2.0 * geometry.num_entries, 2 * _FLOAT32_BYTES * geometry.num_entries)

    def applies(geometry: Geometry, parameters: Any) -> bool:
        return cheapest(layer.flops(_shape(geometry), parameters)) == "gram"

    return Divided(
        sums=Step(
            merge=sum_up, cost=sums_cost, separable="whole", streaming=True, takes_adapters=True
        ),
        rows=Step(merge=solve, cost=rows_cost, separable="whole", flat=True),
        join=Step(merge=join, cost=join_cost, separable="whole", streaming=True, flat=True),
        num_sums=NUM_SUMS,
        num_rows=NUM_ROWS,
        applies=applies,
    )


def _shape(geometry: Geometry) -> LayerShape:
    return LayerShape(*geometry.matrix, geometry.num_experts, geometry.ranks)


def layer_cost(geometry: Geometry, variants: Sequence[LayerVariant]) -> Cost:
    """The cost of variants that share a problem, of one tensor."""
    shape = _shape(geometry)
    flops = shared_flops(shape, variants)
    form = cheapest(flops)
    entries = shared_entries(shape, form, geometry.row_block, variants)
    return Cost(flops[form], _FLOAT32_BYTES * entries)


def group_by_problem(variants: Sequence[tuple[Step | None, Any]]) -> list[list[int]]:
    """Places of variants (with their parameters), together where they share a layer's problem.

    What solves no such problem (and copies, None) stands alone.
    """
    groups: dict[str | int, list[int]] = {}
    for place, (step, parameters) in enumerate(variants):
        layer = step.layer if isinstance(step, MergeMethod) else None
        key = layer.problem(parameters).name if layer else place
        groups.setdefault(key, []).append(place)
    return list(groups.values())
