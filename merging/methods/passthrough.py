"""Passthrough: one model's tensors as they are, or times a factor.

Source: mergekit's ``passthrough`` (Goddard et al., arXiv:2403.13257).
Differences from the source: none.

Uses no base model. Separable anywhere. Precision: without a factor the result has the input's
values exactly; with one, a product in float32 (float64 if the input is), one rounding at the end.
Deterministic: yes. Cost: one flop per entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.blocks import elementwise_workspace, work_dtype
from merging.parameters import Parameters, TouchParameters

if TYPE_CHECKING:
    import torch


class PassthroughExpertParameters(Parameters):
    """Parameters of the model."""

    scale: float | None = Field(
        default=None, description="Factor on the tensor; nothing is changed without one."
    )


def merge_passthrough(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Take over one tensor, or a tile of one."""
    del base
    (tensor,) = experts
    (parameters,) = task.expert_parameters
    result = tensor.to(work_dtype((tensor,)), copy=True)
    return result if parameters.scale is None else result.mul_(parameters.scale)


def passthrough_cost(geometry: Geometry, parameters: TouchParameters) -> Cost:
    """A product per entry."""
    del parameters
    num_entries = geometry.num_entries
    return Cost(float(num_entries), elementwise_workspace(num_entries, num_buffers=0))


register(
    MergeMethod(
        name="passthrough",
        title="Passthrough",
        summary="Takes over the tensors of one model, or scales them: for stacking layers.",
        source="As in mergekit, arXiv:2403.13257",
        merge=merge_passthrough,
        cost=passthrough_cost,
        parameters=TouchParameters,
        expert_parameters=PassthroughExpertParameters,
        needs_base=False,
        max_experts=1,
        default_rest="mean",
    )
)
