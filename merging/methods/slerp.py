"""SLERP: from the base to one expert along the arc between them.

Source: Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985, section 3.3; for model
weights as in mergekit (Goddard et al., arXiv:2403.13257): each tensor is one vector.
Differences from the source: vectors keep their lengths, as in mergekit; where the cosine is beyond
±0.9995 the way is straight.

Needs the base model. Not separable: the angle is that of whole tensors.
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
    register,
)

if TYPE_CHECKING:
    import torch

_LINEAR_FROM = 0.9995


class SlerpParameters(TouchParameters):
    """Recipe-level parameters."""

    t: float = Field(
        default=0.5,
        description=(
            "Where on the arc: 0 gives the base model, 1 the expert. Beyond them it goes on."
        ),
    )


def merge_slerp(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor."""
    from merging.ops.combinations import combine, inner_products, slerp_weights

    assert base is not None
    tensors = [base, *experts]
    weights = slerp_weights(inner_products(tensors), task.parameters.t, linear_from=_LINEAR_FROM)
    return combine(tensors, weights, out=task.out)


def slerp_cost(geometry: Geometry, parameters: SlerpParameters) -> Cost:
    """Three inner products in float64, and a sum of two."""
    del parameters
    num_entries = geometry.num_entries
    return Cost(12.0 * num_entries, geometry.block_bytes(num_buffers=8))


register(
    MergeMethod(
        name="slerp",
        title="SLERP (spherical interpolation)",
        summary=(
            "Goes from the base to one other model along the arc between them, tensor by tensor,"
            " which keeps lengths where a straight line would shorten them. Takes two models."
        ),
        source="Shoemake, SIGGRAPH 1985; for weights as in mergekit, arXiv:2403.13257",
        merge=merge_slerp,
        cost=slerp_cost,
        parameters=SlerpParameters,
        max_experts=1,
        separable="whole",
        rounds=True,
    )
)
