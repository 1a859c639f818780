"""Methods that solve a layer's problem: what their declarations have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from merging.method import Cost, Geometry, MergeFunction, MergeMethod, Step, Task
from merging.ops.forms import LayerShape, cheapest
from merging.ops.layer_method import LayerMethod, LayerVariant, shared_entries, shared_flops

if TYPE_CHECKING:
    import torch

_FLOAT32_BYTES = 4


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


def layer_cost(geometry: Geometry, variants: Sequence[LayerVariant]) -> Cost:
    """The cost of variants that share a problem, of one tensor."""
    shape = LayerShape(*geometry.matrix, geometry.num_experts, geometry.ranks)
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
