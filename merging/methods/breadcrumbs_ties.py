"""Model Breadcrumbs with TIES: drop smallest and largest entries, elect signs, merge what agrees.

Source: Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024, arXiv:2312.06795, section 3,
with the sign election of Yadav et al., NeurIPS 2023, arXiv:2306.01708.
Differences from the source: as in mergekit, ``density`` is what is left and ``gamma`` what is cut
off the top, of each tensor; fewer large entries are cut where the two add up to more than 1.

Needs the base model. Not separable: thresholds depend on the whole tensor.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes; of equal magnitudes at a threshold the lowest flat index counts as the largest.
Cost: two selections and 12 E N flops for E experts of N entries; E + 8 blocks of scratch.
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
from merging.ops.blocks import work_dtype

if TYPE_CHECKING:
    import torch

    from merging.ops.task_vectors import Sparsify


class BreadcrumbsTiesParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=False,
        description=(
            "Divide each entry by the weights of the experts that agree with its sign; false sums"
            " them."
        ),
    )
    rescale: bool = Field(
        default=False,
        description="Scale what is left of each task vector to the L1 norm that it had.",
    )


class BreadcrumbsTiesExpertParameters(WeightParameters):
    """Parameters of an expert."""

    density: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Share of the task vector's entries to keep in each tensor. The paper keeps about 0.9;"
            " 1 drops nothing."
        ),
    )
    gamma: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="Share of the largest entries to drop, as outliers, where density is under 1.",
    )


def merge_breadcrumbs_ties(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor."""
    from merging.ops.bands import KeepBand, RestoreNorms
    from merging.ops.task_vectors import combine_task_vectors

    assert base is not None
    tensors = list(experts)

    def new_band() -> KeepBand:
        densities = [parameters.density for parameters in task.expert_parameters]
        gammas = [parameters.gamma for parameters in task.expert_parameters]
        return KeepBand(base, tensors, densities, gammas)

    sparsify: Sparsify = new_band()
    if task.parameters.rescale:
        sparsify = RestoreNorms(base, tensors, new_band, work_dtype((base, *tensors)))
    return combine_task_vectors(
        base,
        tensors,
        [parameters.weight for parameters in task.expert_parameters],
        scale=task.parameters.scale,
        normalize=task.parameters.normalize,
        elect_signs=True,
        sparsify=sparsify,
        out=task.out,
    )


def breadcrumbs_ties_cost(geometry: Geometry, parameters: BreadcrumbsTiesParameters) -> Cost:
    """Selection looks at each magnitude a few times; the rest is a dozen operators per entry."""
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    return Cost(
        flops=(80.0 if parameters.rescale else 40.0) * num_experts * num_entries,
        workspace_bytes=num_entries // 4 + geometry.block_bytes(num_buffers=num_experts + 14),
    )


register(
    MergeMethod(
        name="breadcrumbs_ties",
        title="Model Breadcrumbs with TIES",
        summary=(
            "Drops the smallest entries of each task vector, and the very largest as outliers, then"
            " elects a sign per entry and merges the entries that agree with it."
        ),
        source="Davari and Belilovsky, ECCV 2024, arXiv:2312.06795; Yadav et al., arXiv:2306.01708",
        merge=merge_breadcrumbs_ties,
        cost=breadcrumbs_ties_cost,
        parameters=BreadcrumbsTiesParameters,
        expert_parameters=BreadcrumbsTiesExpertParameters,
        separable="whole",
        rounds=True,
    )
)
