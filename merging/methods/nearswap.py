"""NearSwap: takes the expert's value where it is near the base's, less of it where it is far.

Source: alchemonaut, QuartetAnemoi-70B (2024), as in mergekit (Goddard et al., arXiv:2403.13257):
weight of the expert min(1, t / |W1 − W0|), entry by entry.
Differences from the source: none.

Needs the base model. Separable anywhere: each entry of the result depends on that entry alone.
Precision: computed in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: 6 N flops for N entries; two blocks of scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.blocks import block_size, blocks_of, elementwise_workspace, work_dtype
from merging.parameters import TouchParameters

if TYPE_CHECKING:
    import torch

_SMALLEST = 1e-6


class NearswapParameters(TouchParameters):
    """Recipe-level parameters."""

    t: float = Field(
        default=1e-4,
        ge=0,
        description=(
            "Largest change of an entry: it goes all the way to the expert where that is no further"
            " than this, and this far where it is. 0 gives the base."
        ),
    )


def merge_nearswap(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, or a tile of one."""
    import torch

    assert base is not None
    (expert,) = experts
    dtype = work_dtype((base, expert))
    merged_N = torch.empty(base.numel(), dtype=dtype, device=base.device)
    base_N, expert_N = base.reshape(-1), expert.reshape(-1)
    size = min(block_size(base.device), base.numel())
    scratch = torch.empty((2, size), dtype=dtype, device=base.device)
    for block in blocks_of(base.numel(), base.device):
        target = merged_N[block].copy_(expert_N[block])
        origin, weight = scratch[:, : target.numel()]
        origin.copy_(base_N[block])
        target.sub_(origin)
        torch.abs(target, out=weight)
        weight.clamp_(min=_SMALLEST).reciprocal_().mul_(task.parameters.t).clamp_(max=1)
        target.mul_(weight).add_(origin)
    return merged_N.view(base.shape)


def nearswap_cost(geometry: Geometry, parameters: NearswapParameters) -> Cost:
    """Half a dozen operators per entry."""
    del parameters
    num_entries = geometry.num_entries
    return Cost(6.0 * num_entries, elementwise_workspace(num_entries, num_buffers=2))


register(
    MergeMethod(
        name="nearswap",
        title="NearSwap",
        summary=(
            "Strengthens what two models agree on: entries go to the second model's value where it"
            " is near, and hardly move where it is far."
        ),
        source="alchemonaut 2024; as in mergekit, arXiv:2403.13257",
        merge=merge_nearswap,
        cost=nearswap_cost,
        parameters=NearswapParameters,
        max_experts=1,
    )
)
