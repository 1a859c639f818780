"""Task Arithmetic: the base plus a weighted sum of task vectors.

Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089,
section 2: W = W0 + λ Σ_i weight_i T_i.
Differences from the source: a weight per expert beside the common λ, as in mergekit.

Needs the base model. Separable anywhere: each entry of the result depends on that entry alone.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: 3 E N flops for E experts of N entries; a few blocks of scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.parameters import TaskVectorParameters, WeightParameters

if TYPE_CHECKING:
    import torch


class TaskArithmeticParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=False,
        description="Divide the sum by the sum of the weights: the mean task vector, not the sum.",
    )
    rescale: bool = Field(
        default=False,
        description="Accepted for mergekit recipes; changes nothing, since nothing is dropped.",
    )


class TaskArithmeticExpertParameters(WeightParameters):
    """Parameters of an expert."""

    density: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Accepted for mergekit recipes; changes nothing, since nothing is dropped.",
    )


def merge_task_arithmetic(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, or a tile of one."""
    from merging.ops.task_vectors import combine_task_vectors

    assert base is not None
    return combine_task_vectors(
        base,
        list(experts),
        [parameters.weight for parameters in task.expert_parameters],
        scale=task.parameters.scale,
        normalize=task.parameters.normalize,
        out=task.out,
    )


def task_arithmetic_cost(geometry: Geometry, parameters: TaskArithmeticParameters) -> Cost:
    """A difference, a product and a sum per expert and entry."""
    del parameters
    num_entries = geometry.num_entries
    return Cost(
        flops=3.0 * geometry.num_experts * num_entries,
        workspace_bytes=geometry.block_bytes(num_buffers=4),
    )


register(
    MergeMethod(
        name="task_arithmetic",
        title="Task Arithmetic",
        summary=(
            "Adds the experts' task vectors to the base, each with its weight. The reference that"
            " other task-vector methods improve on; λ of 0.3 to 0.4 is usual for many experts."
        ),
        source="Ilharco et al., ICLR 2023, arXiv:2212.04089, section 2",
        merge=merge_task_arithmetic,
        cost=task_arithmetic_cost,
        parameters=TaskArithmeticParameters,
        expert_parameters=TaskArithmeticExpertParameters,
        rounds=True,
    )
)
