"""DARE with TIES: drop random entries, rescale the rest, then elect signs and merge what agrees.

Source: Yu et al., "Language Models are Super Mario", ICML 2024, arXiv:2311.03099, section 3.2,
with the sign election and disjoint merge of Yadav et al., NeurIPS 2023, arXiv:2306.01708.
Differences from the sources: ``density`` is 1 − p, as in mergekit (whose own rescaling restores the
L1 norm of a tensor instead; ours is the paper's); a sum of exactly 0 elects the positive sign.

Needs the base model. Separable anywhere: each entry of the result depends on that entry alone.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic given the seed: each mask bit is a function of (seed, expert's position, tensor name,
flat index), whatever the order, the cut or the device.
Cost: 24 E N operations for E experts of N entries; E + 6 blocks of scratch.
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


class DareTiesParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=False,
        description=(
            "Divide each entry by the weights of the experts that agree with its sign; false sums"
            " them."
        ),
    )
    rescale: bool = Field(
        default=True,
        description="Divide kept entries by the density, so that the expected sum is unchanged.",
    )


def merge_dare_ties(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, or a tile of one."""
    return merge_random_share(base, experts, task, elect_signs=True)


def dare_ties_cost(geometry: Geometry, parameters: DareTiesParameters) -> Cost:
    """A dozen integer operators make each mask bit; buffers of 32 bits per entry."""
    del parameters
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    return Cost(
        flops=24.0 * num_experts * num_entries,
        workspace_bytes=geometry.block_bytes(num_buffers=num_experts + 6),
    )


register(
    MergeMethod(
        name="dare_ties",
        title="DARE-TIES",
        summary=(
            "Drops a random share of each task vector's entries and rescales the rest, then elects"
            " a sign per entry and merges the entries that agree with it."
        ),
        source=(
            "Yu et al., ICML 2024, arXiv:2311.03099; Yadav et al., NeurIPS 2023, arXiv:2306.01708"
        ),
        merge=merge_dare_ties,
        cost=dare_ties_cost,
        parameters=DareTiesParameters,
        expert_parameters=RandomShareParameters,
        symmetric=False,
        rounds=True,
    )
)
