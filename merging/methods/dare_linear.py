"""DARE: drop random entries of each task vector and rescale the rest, then add them up.

Source: Yu et al., "Language Models are Super Mario", ICML 2024, arXiv:2311.03099, section 3.2:
T' = m ∘ T / (1 − p) with m ~ Bernoulli(1 − p) for each entry.
Differences from the source: ``density`` is 1 − p, as in mergekit (whose own rescaling restores the
L1 norm of a tensor instead; ours is the paper's).

Needs the base model. Separable anywhere: each entry of the result depends on that entry alone.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic given the seed: each mask bit is a function of (seed, expert's position, tensor name,
flat index), whatever the order, the cut or the device.
Cost: 16 E N operations for E experts of N entries; a few blocks of scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.parameters import TaskVectorParameters
from merging.sparsified import RandomShareParameters, merge_random_share

if TYPE_CHECKING:
    import torch


class DareLinearParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=False,
        description="Divide the sum by the sum of the weights: the mean task vector, not the sum.",
    )
    rescale: bool = Field(
        default=True,
        description="Divide kept entries by the density, so that the expected sum is unchanged.",
    )


def merge_dare_linear(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, or a tile of one."""
    return merge_random_share(base, experts, task, elect_signs=False)


def dare_linear_cost(geometry: Geometry, parameters: DareLinearParameters) -> Cost:
    """A dozen integer operators make each mask bit; buffers of 32 bits per entry."""
    del parameters
    num_entries = geometry.num_entries
    return Cost(
        flops=16.0 * geometry.num_experts * num_entries,
        workspace_bytes=geometry.block_bytes(num_buffers=7),
    )


register(
    MergeMethod(
        name="dare_linear",
        title="DARE (linear)",
        summary=(
            "Task arithmetic on task vectors of which a random share of entries was dropped and"
            " the rest rescaled. Reduces collisions between experts with small updates."
        ),
        source="Yu et al., ICML 2024, arXiv:2311.03099, section 3.2",
        merge=merge_dare_linear,
        cost=dare_linear_cost,
        parameters=DareLinearParameters,
        expert_parameters=RandomShareParameters,
        symmetric=False,
        rounds=True,
    )
)
