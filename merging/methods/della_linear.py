"""DELLA without election: drop entries at random, small ones more likely, add up the rest.

Source: Deep, Bhardwaj and Poria, "DELLA-Merging: Reducing Interference in Model Merging through
Magnitude-Based Sampling", arXiv:2406.11617, section 3 without its election.
Differences from the source: as in mergekit, ``density`` is 1 − p and probabilities rise with ranks
in a row from density − ε to density + ε; ``rescale`` restores each tensor's L1 norm, where the
paper divides every entry by its own probability (the same on average).

Needs the base model. Not separable: ranks are those of whole rows, norms those of whole tensors.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic given the seed: each random bit is a function of (seed, expert's position, tensor
name, flat index), whatever the order, the cut or the device; equal magnitudes are kept with equal
probability, the mean of those of their ranks.
Cost: a sort of every row; E + 18 blocks of scratch for E experts, or as many rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import MergeMethod, Task, register
from merging.parameters import TaskVectorParameters
from merging.sparsified import ByRankParameters, by_rank_cost, by_rank_passes, merge_by_rank

if TYPE_CHECKING:
    import torch


class DellaLinearParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=False,
        description="Divide the sum by the sum of the weights: the mean task vector, not the sum.",
    )
    rescale: bool = Field(
        default=True,
        description="Scale what is left of each task vector to the L1 norm that it had.",
    )


def merge_della_linear(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor."""
    return merge_by_rank(base, experts, task, elect_signs=False)


register(
    MergeMethod(
        name="della_linear",
        title="DELLA (linear)",
        summary=(
            "Drops entries of each task vector at random, small ones more likely, rescales the"
            " rest, and adds them up."
        ),
        source="Deep et al., DELLA-Merging, arXiv:2406.11617",
        merge=merge_della_linear,
        cost=by_rank_cost,
        parameters=DellaLinearParameters,
        expert_parameters=ByRankParameters,
        separable="whole",
        rounds=True,
        staged=by_rank_passes(elect_signs=False),
        symmetric=False,
    )
)
