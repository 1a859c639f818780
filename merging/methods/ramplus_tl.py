"""RAM+ per tensor: as RAM, with what one expert alone has changed made a little larger.

Source: "Reinforced Agent Merging", arXiv:2601.13572, RAM+; as mergekit's ``ramplus_tl``: the ratio
of shared to unique entries, from which the factor follows, is taken per tensor and not over the
whole model as in the paper.
Differences from the source: that one.

Needs the base model. Not separable: the ratio is that of whole tensors.
Precision: computed in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: 10 E N flops for E experts of N entries; a few blocks of scratch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.blocks import elementwise_workspace
from merging.parameters import TouchParameters

if TYPE_CHECKING:
    import torch


class RamplusTlParameters(TouchParameters):
    """Recipe-level parameters."""

    r: float = Field(
        default=0.1, ge=0, description="How much the factor grows with the ratio; 0 gives RAM."
    )
    alpha: float = Field(default=0.2, ge=0, description="Largest ratio that counts.")
    epsilon: float = Field(
        default=1e-5,
        ge=0,
        description="Entries of a task vector up to this size count as unchanged, and are dropped.",
    )


def merge_ramplus_tl(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor. Reports each expert's factor as figures."""
    from merging.ops.changed_entries import average_changed, count_changed

    assert base is not None
    tensors, parameters = list(experts), task.parameters
    factors = []
    for unique, shared in count_changed(base, tensors, parameters.epsilon):
        ratio = shared / unique if unique else math.inf if shared else 0.0
        factors.append(1 + parameters.r * min(ratio, parameters.alpha))
    task.figures["unique_factors"] = factors
    return average_changed(base, tensors, parameters.epsilon, factors)


def ramplus_tl_cost(geometry: Geometry, parameters: RamplusTlParameters) -> Cost:
    """Two passes of half a dozen operators per entry of an expert."""
    del parameters
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    return Cost(
        flops=12.0 * num_experts * num_entries,
        workspace_bytes=elementwise_workspace(num_entries, num_buffers=2 * num_experts + 4),
    )


register(
    MergeMethod(
        name="ramplus_tl",
        title="RAM+ (per tensor)",
        summary=(
            "RAM with entries that one expert alone has changed enlarged, the more the expert"
            " shares with others in the tensor."
        ),
        source="Reinforced Agent Merging, arXiv:2601.13572 (ratio per tensor)",
        merge=merge_ramplus_tl,
        cost=ramplus_tl_cost,
        parameters=RamplusTlParameters,
        separable="whole",
    )
)
