"""Methods that thin task vectors out before they add them up, with TIES' election or without it.

DARE, Model Breadcrumbs and DELLA come in both forms; here is what the two have in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from merging.method import Cost, Geometry, Task, WeightParameters

if TYPE_CHECKING:
    import torch

    from merging.ops.task_vectors import Sparsify

_SORTED_BYTES = 32
"""Of an entry while its row is sorted; rows that are shorter than a block are sorted together."""


class RandomShareParameters(WeightParameters):
    """Parameters of an expert for DARE."""

    density: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Probability that an entry of the task vector is kept (1 − the paper's drop rate p)."
            " Large models bear 0.1 to 0.5; 1 drops nothing."
        ),
    )


class BandParameters(WeightParameters):
    """Parameters of an expert for Model Breadcrumbs."""

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


class ByRankParameters(WeightParameters):
    """Parameters of an expert for DELLA."""

    density: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Mean probability that an entry of the task vector is kept; 1 drops nothing.",
    )
    epsilon: float = Field(
        default=0.15,
        ge=0,
        lt=0.5,
        description=(
            "The largest entry of a row is kept with probability density + epsilon, the smallest"
            " with density - epsilon; both must lie between 0 and 1 where density is under 1."
        ),
    )

    @model_validator(mode="after")
    def _check_probabilities(self) -> Self:
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if self.density < 1 and not (low > 0 and high < 1):
            raise ValueError(
                f"density ± epsilon gives probabilities from {low:g} to {high:g}, which must lie"
                " between 0 and 1: make epsilon smaller"
            )
        return self


def merge_random_share(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task, *, elect_signs: bool
) -> torch.Tensor:
    """DARE: a random share of each task vector."""
    from merging.ops.sparsify import KeepRandom

    assert base is not None
    keep = KeepRandom(
        [parameters.density for parameters in task.expert_parameters],
        rescale=task.parameters.rescale,
        seed=task.seed,
        tensor_name=task.tensor_name,
        offset=task.offset,
        device=base.device,
    )
    return _combine(base, list(experts), task, keep, elect_signs=elect_signs)


def merge_band(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task, *, elect_signs: bool
) -> torch.Tensor:
    """Model Breadcrumbs: neither the smallest nor the very largest entries."""
    from merging.ops.bands import KeepBand, RestoreNorms
    from merging.ops.blocks import work_dtype

    assert base is not None
    tensors = list(experts)

    def new_band() -> KeepBand:
        densities = [parameters.density for parameters in task.expert_parameters]
        gammas = [parameters.gamma for parameters in task.expert_parameters]
        return KeepBand(base, tensors, densities, gammas)

    keep: Sparsify = new_band()
    if task.parameters.rescale:
        keep = RestoreNorms(base, tensors, new_band, work_dtype((base, *tensors)))
    return _combine(base, tensors, task, keep, elect_signs=elect_signs)


def merge_by_rank(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task, *, elect_signs: bool
) -> torch.Tensor:
    """DELLA: a random share of each task vector, large entries more likely."""
    from merging.ops.bands import KeepByRank, RestoreNorms
    from merging.ops.blocks import work_dtype
    from merging.ops.sparsify import KeepRandom

    assert base is not None
    tensors = list(experts)
    random = KeepRandom(
        [parameters.density for parameters in task.expert_parameters],
        rescale=False,
        seed=task.seed,
        tensor_name=task.tensor_name,
        offset=0,
        device=base.device,
    )
    rows = [t.reshape(1, -1) if t.ndim < 2 else t.flatten(1) for t in (base, *tensors)]
    by_rank = KeepByRank(rows[0], rows[1:], task.expert_parameters, random)
    keep: Sparsify = by_rank
    if task.parameters.rescale:
        keep = RestoreNorms(base, tensors, lambda: by_rank, work_dtype((base, *tensors)))
    return _combine(base, tensors, task, keep, elect_signs=elect_signs)


def _combine(
    base: torch.Tensor,
    experts: list[torch.Tensor],
    task: Task,
    keep: Sparsify,
    *,
    elect_signs: bool,
) -> torch.Tensor:
    from merging.ops.task_vectors import combine_task_vectors

    return combine_task_vectors(
        base,
        experts,
        [parameters.weight for parameters in task.expert_parameters],
        scale=task.parameters.scale,
        normalize=task.parameters.normalize,
        elect_signs=elect_signs,
        sparsify=keep,
        out=task.out,
    )


def band_cost(geometry: Geometry, parameters: Any) -> Cost:
    """Selection looks at each magnitude a few times; the rest is a dozen operators per entry."""
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    return Cost(
        flops=(80.0 if parameters.rescale else 40.0) * num_experts * num_entries,
        workspace_bytes=num_entries // 4 + geometry.block_bytes(num_buffers=num_experts + 14),
    )


def by_rank_cost(geometry: Geometry, parameters: Any) -> Cost:
    """Sorting takes a dozen operators' time per entry; what is kept is held, a byte each."""
    del parameters
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    columns = max(1, math.prod(geometry.shape[1:]) if len(geometry.shape) > 1 else num_entries)
    return Cost(
        flops=60.0 * num_experts * num_entries,
        workspace_bytes=num_experts * num_entries
        + geometry.block_bytes(num_buffers=num_experts + 10)
        + _SORTED_BYTES * columns,
    )
