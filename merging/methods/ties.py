"""TIES: trim small entries, elect a sign per entry, average what agrees with it.

Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
arXiv:2306.01708, algorithm 1.
Differences from the source: as in mergekit, the trim takes the largest entries of each *tensor*
unless ``scope`` is ``global``; a sum of exactly 0 elects the positive sign; experts have weights.

Needs the base model. Not separable: the trim's threshold depends on the whole tensor, or model. It
is found in memory, or by reading the inputs twice before they are merged
(:mod:`merging.ops.quantiles`).
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes; of equal magnitudes at a tensor's threshold the lowest flat indices are kept, at
a model's all (as in the authors' code).
Cost: a selection and 12 E N flops for E experts of N entries; E + 5 blocks of scratch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from merging.method import Cost, Geometry, MergeMethod, Staged, Step, Task, register
from merging.norms import norms_pass, with_known_norms
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

    from merging.ops.norms import Norms
    from merging.ops.sparsify import KeepFromThresholds
    from merging.ops.task_vectors import Sparsify


class TiesParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=True,
        description=(
            "Divide each entry by the weights of the experts that agree with its sign (the paper's"
            " disjoint mean); false sums them."
        ),
    )
    scope: Literal["tensor", "global"] = Field(
        default="tensor",
        description=(
            "Of what 'density' is a share: of each 'tensor', as in mergekit, or of the whole model"
            " ('global', the paper): one threshold for each expert over all tensors of the same"
            " density. Reads the models three times."
        ),
    )
    rescale: bool = Field(
        default=False,
        description=(
            "Scale what is left of each task vector to the L1 norm that it had in the tensor; not"
            " with a global scope."
        ),
    )

    @model_validator(mode="after")
    def _check_scope(self) -> Self:
        if self.rescale and self.scope == "global":
            raise ValueError(
                "'rescale' restores the norm of each tensor, which a global scope changes on"
                " purpose: leave one of them out"
            )
        return self


class TiesExpertParameters(WeightParameters):
    """Parameters of an expert."""

    density: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Share of the task vector's entries to keep, largest magnitudes first: in each tensor,"
            " or in the whole model ('scope'). The paper keeps 0.2; 1 trims nothing."
        ),
    )


def merge_ties(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor."""
    from merging.ops.norms import RestoreNorms, factors_of, measure_norms
    from merging.ops.sparsify import keep_largest

    assert base is not None
    tensors = list(experts)
    keep = keep_largest(base, tensors, own_densities(task))
    if not task.parameters.rescale:
        return _merge_trimmed(base, tensors, task, keep)
    norms = measure_norms(base, tensors, keep.afresh())
    return _merge_trimmed(base, tensors, task, RestoreNorms(keep, factors_of(norms)))


def finish_ties(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, or the next tile of one, with thresholds that are known."""
    assert base is not None
    tensors = list(experts)
    keep = with_known_norms(_known_trim(base, tensors, task), task)
    return _merge_trimmed(base, tensors, task, keep)


def _known_trim(
    base: torch.Tensor, experts: Sequence[torch.Tensor], task: Task
) -> KeepFromThresholds:
    from merging.ops.sparsify import block_like

    return keep_beyond(task, block_like(base, experts))


def _trim_norms(base: torch.Tensor, experts: Sequence[torch.Tensor], task: Task) -> list[Norms]:
    from merging.ops.norms import measure_norms

    return measure_norms(base, experts, _known_trim(base, experts, task))


def _merge_trimmed(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    task: Task,
    keep: Sparsify,
) -> torch.Tensor:
    from merging.ops.task_vectors import combine_task_vectors

    return combine_task_vectors(
        base,
        experts,
        [parameters.weight for parameters in task.expert_parameters],
        scale=task.parameters.scale,
        normalize=task.parameters.normalize,
        elect_signs=True,
        sparsify=keep,
        out=task.out,
    )


def ties_cost(geometry: Geometry, parameters: TiesParameters) -> Cost:
    """Selection looks at each magnitude a few times; the rest is a dozen operators per entry."""
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    return Cost(
        flops=(30.0 if parameters.rescale else 20.0) * num_experts * num_entries,
        workspace_bytes=num_entries // 4 + geometry.block_bytes(num_buffers=num_experts + 9),
    )


def _finish_cost(geometry: Geometry, parameters: TiesParameters) -> Cost:
    return Cost(
        flops=14.0 * geometry.num_experts * geometry.num_entries,
        workspace_bytes=ties_cost(geometry, parameters).workspace_bytes,
    )


THRESHOLDS = of_task_vectors(own_densities, has_global_scope)

register(
    MergeMethod(
        name="ties",
        title="TIES-Merging",
        summary=(
            "Keeps the largest entries of each task vector, elects a sign per entry, and averages"
            " the entries that agree with it. For several experts that pull in different"
            " directions."
        ),
        source="Yadav et al., NeurIPS 2023, arXiv:2306.01708, algorithm 1",
        merge=merge_ties,
        cost=ties_cost,
        parameters=TiesParameters,
        expert_parameters=TiesExpertParameters,
        separable="whole",
        rounds=True,
        staged=Staged(
            reductions=(*THRESHOLDS.reductions(), norms_pass(_trim_norms, _finish_cost)),
            finish=Step(merge=finish_ties, cost=_finish_cost, rounds=True),
            group=group_by_density,
        ),
    )
)
