"""DELLA: drop entries at random, small ones more likely, elect signs, merge what agrees.

Source: Deep, Bhardwaj and Poria, "DELLA-Merging: Reducing Interference in Model Merging through
Magnitude-Based Sampling", arXiv:2406.11617, section 3.
Differences from the source: as in mergekit, ``density`` is 1 − p and probabilities rise with ranks
in a row from density − ε to density + ε; ``rescale`` restores each tensor's L1 norm, where the
paper divides every entry by its own probability (the same on average).

Needs the base model. Not separable: ranks are those of whole rows, norms those of whole tensors.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic given the seed: each random bit is a function of (seed, expert's position, tensor
name, flat index), whatever the order or the device; of equal magnitudes the lower index ranks
lower.
Cost: a sort of every row; E + 8 blocks of scratch for E experts, or as many rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from merging.method import (
    Cost,
    Geometry,
    MergeMethod,
    Task,
    TaskVectorParameters,
    WeightParameters,
    register,
)

if TYPE_CHECKING:
    import torch

_SORTED_BYTES = 32
"""Of an entry while its row is sorted; rows that are shorter than a block are sorted together."""


class DellaParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=True,
        description=(
            "Divide each entry by the weights of the experts that agree with its sign; false sums"
            " them."
        ),
    )
    rescale: bool = Field(
        default=True,
        description="Scale what is left of each task vector to the L1 norm that it had.",
    )


class DellaExpertParameters(WeightParameters):
    """Parameters of an expert."""

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


def merge_della(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor."""
    from merging.ops.bands import merge_by_rank

    assert base is not None
    return merge_by_rank(
        base,
        list(experts),
        task.parameters,
        task.expert_parameters,
        seed=task.seed,
        tensor_name=task.tensor_name,
        elect_signs=True,
        out=task.out,
    )


def della_cost(geometry: Geometry, parameters: DellaParameters) -> Cost:
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


register(
    MergeMethod(
        name="della",
        title="DELLA",
        summary=(
            "Drops entries of each task vector at random, small ones more likely, rescales the"
            " rest, then elects a sign per entry and merges the entries that agree with it."
        ),
        source="Deep et al., DELLA-Merging, arXiv:2406.11617",
        merge=merge_della,
        cost=della_cost,
        parameters=DellaParameters,
        expert_parameters=DellaExpertParameters,
        separable="whole",
        rounds=True,
        symmetric=False,
    )
)
