"""TALL masks: which entries of a merged task vector a task needs, and how many tasks do.

Shapes: N entries of one flat tensor (or of a tile of it).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merging.ops.blocks import block_size, blocks_of


def keep_consensus(
    merged: torch.Tensor,
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    mask_lambdas: Sequence[float],
    *,
    min_tasks: int,
    scale: float,
) -> torch.Tensor:
    """The base plus what enough tasks need of a merged task vector, which is used up.

    Task i needs an entry of τ if |T_i| > λ_i |τ - T_i|.

    Source: Wang et al., ICML 2024, arXiv:2405.07813, equation 5 and section 5.

    Args:
        merged: τ, in the work dtype.
        base: Base tensor, or a tile of it.
        experts: Expert tensors likewise.
        mask_lambdas: λ_i.
        min_tasks: Fewest tasks.
        scale: Factor on what is kept.
    """
    merged_N, base_N = merged.view(-1), base.reshape(-1)
    experts_N = [expert.reshape(-1) for expert in experts]
    size = min(block_size(base.device), base.numel())
    scratch = torch.empty((4, size), dtype=merged.dtype, device=base.device)
    for block in blocks_of(base.numel(), base.device):
        total = merged_N[block]
        origin, T, other, count = scratch[:, : total.numel()]
        origin.copy_(base_N[block])
        count.zero_()
        for expert_N, mask_lambda in zip(experts_N, mask_lambdas, strict=True):
            T.copy_(expert_N[block]).sub_(origin)
            torch.sub(total, T, out=other)
            count.add_(T.abs_().gt_(other.abs_().mul_(mask_lambda)))
        total.mul_(count.ge_(min_tasks)).mul_(scale).add_(origin)
    return merged
