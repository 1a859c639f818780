"""Consensus Task Arithmetic: the sum of the task vectors where several tasks need it.

Source: Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML
2024, arXiv:2405.07813, sections 4 and 5: task i needs an entry of the multi-task vector τ if
|T_i| > λ_i |τ - T_i| (its TALL mask, equation 5); entries that fewer than k tasks need are removed.
Differences from the source: λ_i is a parameter, where the paper chooses it for each task from 0.2
to 0.6 by accuracy on validation data; experts have weights.

Needs the base model. Separable anywhere: each entry of the result depends on that entry alone.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: 8 E N flops for E experts of N entries; a few blocks of scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.blocks import elementwise_workspace
from merging.parameters import TaskVectorParameters, WeightParameters

if TYPE_CHECKING:
    import torch


class ConsensusTaParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    min_tasks: int = Field(
        default=2,
        ge=1,
        description=(
            "Fewest tasks that need an entry which is kept: 1 removes what no task needs, 2 what a"
            " single one does as well. The paper's k."
        ),
    )


class ConsensusTaExpertParameters(WeightParameters):
    """Parameters of an expert."""

    mask_lambda: float = Field(
        default=0.4,
        ge=0,
        description=(
            "How much larger an entry of the task vector has to be than what the others add to it,"
            " for the task to need it. The paper chooses 0.2 to 0.6 for each task; 0 keeps all that"
            " the task changed."
        ),
    )


def merge_consensus_ta(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, or a tile of one."""
    from merging.ops.consensus import keep_consensus
    from merging.ops.task_vectors import combine_task_vectors

    assert base is not None
    tensors = list(experts)
    weights = [parameters.weight for parameters in task.expert_parameters]
    merged = combine_task_vectors(
        base, tensors, weights, scale=1.0, normalize=False, add_base=False
    )
    return keep_consensus(
        merged,
        base,
        tensors,
        [parameters.mask_lambda for parameters in task.expert_parameters],
        min_tasks=task.parameters.min_tasks,
        scale=task.parameters.scale,
    )


def consensus_ta_cost(geometry: Geometry, parameters: ConsensusTaParameters) -> Cost:
    """Two passes over the task vectors of a tile."""
    del parameters
    num_entries = geometry.num_entries
    return Cost(
        flops=8.0 * geometry.num_experts * num_entries,
        workspace_bytes=elementwise_workspace(num_entries, num_buffers=5),
    )


register(
    MergeMethod(
        name="consensus_ta",
        title="Consensus Task Arithmetic (TALL masks)",
        summary=(
            "Adds up the task vectors and removes the entries that no task needs, or a single one:"
            " what is useful to several tasks remains."
        ),
        source="Wang et al., ICML 2024, arXiv:2405.07813, section 5",
        merge=merge_consensus_ta,
        cost=consensus_ta_cost,
        parameters=ConsensusTaParameters,
        expert_parameters=ConsensusTaExpertParameters,
        min_experts=2,
    )
)
