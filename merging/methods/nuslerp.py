"""NuSLERP: spherical interpolation between two experts, or between their task vectors.

Source: Shoemake, SIGGRAPH 1985, section 3.3, in the form that mergekit calls NuSLERP (Goddard et
al., arXiv:2403.13257): weights instead of t, and a choice of what counts as a vector.
Differences from the source: none; angles are in float64, so nearly parallel inputs lose nothing.

Uses the base model if the recipe names one: it then interpolates task vectors. Not separable: the
angle is that of whole tensors.
Precision: angles in float64, the sum in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: 12 N flops for N entries; a few blocks of scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import (
    Cost,
    Geometry,
    MergeMethod,
    Task,
    TouchParameters,
    WeightParameters,
    register,
)

if TYPE_CHECKING:
    import torch

_LINEAR_FROM = 1 - 1e-12
_ZERO_WEIGHTS = 1e-6


class NuslerpParameters(TouchParameters):
    """Recipe-level parameters."""

    nuslerp_flatten: bool = Field(
        default=True,
        description="A tensor is one vector; false interpolates its rows or columns one by one.",
    )
    nuslerp_row_wise: bool = Field(
        default=False,
        description=(
            "Without nuslerp_flatten: vectors run along the first dimension of a tensor instead of"
            " its last, as in mergekit."
        ),
    )


def merge_nuslerp(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor."""
    from merging.ops.combinations import combine, inner_products, slerp_weights

    tensors = list(experts)
    first, second = (parameters.weight for parameters in task.expert_parameters)
    total = first + second
    t = 0.5 if abs(total) < _ZERO_WEIGHTS else second / total
    by_rows = not task.parameters.nuslerp_flatten
    is_turned = by_rows and task.parameters.nuslerp_row_wise and tensors[0].ndim > 1
    if is_turned:
        tensors = [tensor.transpose(0, -1) for tensor in tensors]
        base = None if base is None else base.transpose(0, -1)
    products = inner_products(tensors, base, by_rows=by_rows)
    weights = slerp_weights(products, t, linear_from=_LINEAR_FROM)
    merged = combine(tensors, weights, base, by_rows=by_rows, out=task.out)
    return merged.transpose(0, -1).contiguous() if is_turned else merged


def nuslerp_cost(geometry: Geometry, parameters: NuslerpParameters) -> Cost:
    """Three inner products in float64, and a sum of two; vectors along columns are copied."""
    num_entries = geometry.num_entries
    workspace = geometry.block_bytes(num_buffers=8)
    if parameters.nuslerp_row_wise and not parameters.nuslerp_flatten:
        workspace += 4 * 4 * num_entries
    return Cost(12.0 * num_entries, workspace)


register(
    MergeMethod(
        name="nuslerp",
        title="NuSLERP",
        summary=(
            "Spherical interpolation between two models by weights; with a base model, between"
            " their task vectors."
        ),
        source="Shoemake, SIGGRAPH 1985; as in mergekit, arXiv:2403.13257",
        merge=merge_nuslerp,
        cost=nuslerp_cost,
        parameters=NuslerpParameters,
        expert_parameters=WeightParameters,
        needs_base=False,
        optional_base=True,
        min_experts=2,
        max_experts=2,
        separable="whole",
        rounds=True,
        default_rest="mean",
    )
)
