"""TIES: trim small entries, elect a sign per entry, average what agrees with it.

Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
arXiv:2306.01708, algorithm 1.
Differences from the source: as in mergekit, the trim takes the largest entries of each *tensor*
and not of the whole model, so that tensors stay independent; a sum of exactly 0 elects the
positive sign; experts have weights.

Needs the base model. Not separable: the trim's threshold depends on the whole tensor.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes; of equal magnitudes at the threshold the lowest flat indices are kept.
Cost: a selection and 12 E N flops for E experts of N entries; E + 5 blocks of scratch.
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
    TaskVectorParameters,
    WeightParameters,
    register,
)
from merging.ops.blocks import elementwise_workspace, work_dtype

if TYPE_CHECKING:
    import torch


class TiesParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=True,
        description=(
            "Divide each entry by the weights of the experts that agree with its sign (the paper's"
            " disjoint mean); false sums them."
        ),
    )


class TiesExpertParameters(WeightParameters):
    """Parameters of an expert."""

    density: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Share of the task vector's entries to keep in each tensor, largest magnitudes first."
            " The paper keeps 0.2; 1 trims nothing."
        ),
    )


def merge_ties(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor."""
    import torch

    from merging.ops.sparsify import KeepLargest
    from merging.ops.task_vectors import combine_task_vectors

    assert base is not None
    tensors = list(experts)
    densities = [parameters.density for parameters in task.expert_parameters]
    # The result's memory serves the search for the thresholds first: nothing else is as large.
    merged_N = torch.empty(base.numel(), dtype=work_dtype((base, *tensors)), device=base.device)
    return combine_task_vectors(
        base,
        tensors,
        [parameters.weight for parameters in task.expert_parameters],
        scale=task.parameters.scale,
        normalize=task.parameters.normalize,
        elect_signs=True,
        sparsify=KeepLargest(base, tensors, densities, scratch_N=merged_N),
        out=merged_N,
    )


def ties_cost(geometry: Geometry, parameters: TiesParameters) -> Cost:
    """Selection looks at each magnitude a few times; the rest is a dozen operators per entry."""
    del parameters
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    return Cost(
        flops=20.0 * num_experts * num_entries,
        workspace_bytes=elementwise_workspace(num_entries, num_buffers=num_experts + 5),
    )


register(
    MergeMethod(
        name="ties",
        title="TIES-Merging",
        summary=(
            "Keeps the largest entries of each task vector, elects a sign per entry, and averages"
            " the entries that agree with it. For several experts that pull in different"
            " directions."
        ),
        source="Yadav et al., NeurIPS 2023, arXiv:2306.01708, algorithm 1 (trimmed per tensor)",
        merge=merge_ties,
        cost=ties_cost,
        parameters=TiesParameters,
        expert_parameters=TiesExpertParameters,
        separable="whole",
    )
)
