"""Consensus TIES: what TIES makes of the task vectors, where several tasks need it.

Source: Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML
2024, arXiv:2405.07813, sections 4 and 5, on the multi-task vector of TIES (Yadav et al., NeurIPS
2023, arXiv:2306.01708) with the sum of agreeing entries: task i needs an entry of it, τ, if
|T_i| > λ_i |τ - T_i| (its TALL mask, equation 5); entries that fewer than k tasks need are removed.
Differences from the source: λ_i is a parameter, where the paper chooses it for each task from 0.2
to 0.6 by accuracy on validation data; a sum of exactly 0 elects the positive sign; experts have
weights.

Needs the base model. Not separable: the trim's threshold depends on the whole model, or tensor.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: two histograms and 20 E N flops for E experts of N entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Staged, Step, Task, register
from merging.ops.bins import FINE_BINS, numbers_of
from merging.ops.blocks import elementwise_workspace, work_dtype
from merging.parameters import TaskVectorParameters, WeightParameters
from merging.thresholds import (
    group_by_density,
    has_global_scope,
    keep_beyond,
    of_task_vectors,
    own_densities,
)

if TYPE_CHECKING:
    import torch


class ConsensusTiesParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=False,
        description=(
            "Divide each entry by the weights of the experts that agree with its sign; false, as in"
            " the paper, sums them."
        ),
    )
    min_tasks: int = Field(
        default=2,
        ge=1,
        description=(
            "Fewest tasks that need an entry which is kept: 1 removes what no task needs, 2 what a"
            " single one does as well. The paper's k."
        ),
    )
    scope: Literal["tensor", "global"] = Field(
        default="global",
        description=(
            "Of what 'density' is a share: of the whole model ('global', the paper), for which the"
            " models are read three times; or of each 'tensor'. With adapters alone the"
            " model is what they change."
        ),
    )


class ConsensusTiesExpertParameters(WeightParameters):
    """Parameters of an expert."""

    density: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="Share of the task vector's entries that TIES keeps; 1 trims nothing.",
    )
    mask_lambda: float = Field(
        default=0.4,
        ge=0,
        description=(
            "How much larger an entry of the task vector has to be than what the others add to it,"
            " for the task to need it. The paper chooses 0.2 to 0.6 for each task; 0 keeps all that"
            " the task changed."
        ),
    )


def merge_consensus_ties(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, trimmed by itself."""
    assert base is not None
    tensors = list(experts)
    found = THRESHOLDS.of_tensor(base, tensors, task)
    return finish_consensus_ties(base, iter(tensors), replace(task, given=(found, found)))


def finish_consensus_ties(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, or the next tile of one, with thresholds that are known."""
    import torch

    from merging.ops.consensus import keep_consensus
    from merging.ops.task_vectors import combine_task_vectors

    assert base is not None
    tensors = list(experts)
    merged_N = torch.empty(base.numel(), dtype=work_dtype((base, *tensors)), device=base.device)
    merged = combine_task_vectors(
        base,
        tensors,
        [parameters.weight for parameters in task.expert_parameters],
        scale=1.0,
        normalize=task.parameters.normalize,
        elect_signs=True,
        sparsify=keep_beyond(task, merged_N),
        out=merged_N,
        add_base=False,
    )
    return keep_consensus(
        merged,
        base,
        tensors,
        [parameters.mask_lambda for parameters in task.expert_parameters],
        min_tasks=task.parameters.min_tasks,
        scale=task.parameters.scale,
    )


def consensus_ties_cost(geometry: Geometry, parameters: ConsensusTiesParameters) -> Cost:
    """Two histograms for each expert, and two passes over the task vectors."""
    finish = _finish_cost(geometry, parameters)
    return Cost(
        flops=finish.flops + 12.0 * geometry.num_experts * geometry.num_entries,
        workspace_bytes=finish.workspace_bytes
        + 2 * 8 * geometry.num_experts * numbers_of(geometry.num_entries, FINE_BINS),
    )


def _finish_cost(geometry: Geometry, _: ConsensusTiesParameters) -> Cost:
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    return Cost(
        flops=22.0 * num_experts * num_entries,
        workspace_bytes=elementwise_workspace(num_entries, num_buffers=num_experts + 9),
    )


THRESHOLDS = of_task_vectors(own_densities, has_global_scope)

register(
    MergeMethod(
        name="consensus_ties",
        title="Consensus TIES (TALL masks)",
        summary=(
            "Merges the task vectors as TIES does and removes the entries that no task needs, or a"
            " single one: what is useful to several tasks remains."
        ),
        source="Wang et al., ICML 2024, arXiv:2405.07813; Yadav et al., arXiv:2306.01708",
        merge=merge_consensus_ties,
        cost=consensus_ties_cost,
        parameters=ConsensusTiesParameters,
        expert_parameters=ConsensusTiesExpertParameters,
        min_experts=2,
        separable="whole",
        staged=Staged(
            reductions=THRESHOLDS.reductions(),
            finish=Step(merge=finish_consensus_ties, cost=_finish_cost),
            group=group_by_density,
        ),
    )
)
