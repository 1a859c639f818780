"""EMR's unified task vector: elected signs, largest magnitudes, and who agrees where.

Shapes: N entries of one flat tensor (or of a tile of it), E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from merging.ops.blocks import block_size, blocks_of, result_for, rounded_blocks, work_dtype


def merge_elected(
    base: torch.Tensor, experts: Sequence[torch.Tensor], scale: float, out: torch.Tensor | None
) -> torch.Tensor:
    """``base + scale · τ_uni``.

    Source: Huang et al., NeurIPS 2024, arXiv:2405.17461, section 3.2: in each entry the sign of
    the mean, and the largest magnitude of the task vectors that have that sign. As in the authors'
    code a mean of 0 elects the negative sign.

    Args:
        base: Base tensor, any float dtype.
        experts: Tensors of the same shape.
        scale: Factor on τ_uni.
        out: Flat, of any float dtype, for the result; by default new, in the work dtype.

    Returns:
        Tensor of the base's shape.
    """
    dtype = work_dtype((base, *experts))
    merged_N = result_for(base, dtype, out)
    electing = _Electing(base, experts, dtype)
    for block, total in rounded_blocks(merged_N, dtype):
        origin, elected, _ = electing.elect(block)
        total.copy_(elected).mul_(scale).add_(origin)
    return merged_N.view(base.shape)


def agreement_masks(
    base: torch.Tensor, experts: Sequence[torch.Tensor], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each expert's task vector has the elected sign, and what its rescaler is made of.

    Args:
        base: Base tensor, or a tile of it.
        experts: Tensors of the same shape.
        scale: Factor on τ_uni, as in the merged tensor.

    Returns:
        Masks on the host, uint8, E×⌈N/8⌉: a bit for each entry in flat order, the first one the
        highest of its byte, as ``numpy.packbits`` has it. Sums in float64, E×2: of ``|T|`` and of
        ``|mask · scale · τ_uni|``.
    """
    num_entries, num_experts = base.numel(), len(experts)
    masks = torch.zeros((num_experts, -(-num_entries // 8)), dtype=torch.uint8)
    sums = torch.zeros((num_experts, 2), dtype=torch.float64, device=base.device)
    electing = _Electing(base, experts, work_dtype((base, *experts)))
    for block in blocks_of(num_entries, base.device):
        _, elected, task_vectors = electing.elect(block)
        for number, T in enumerate(task_vectors):
            agrees = T.sign().mul_(elected.sign()).gt(0)
            packed = np.packbits(agrees.cpu().numpy())
            first = block.start // 8
            masks[number, first : first + len(packed)] = torch.from_numpy(packed)
            sums[number, 0] += T.abs().sum(dtype=torch.float64)
            sums[number, 1] += (elected * agrees).abs_().sum(dtype=torch.float64) * abs(scale)
    return masks, sums.cpu()


def add_masked(
    base: torch.Tensor,
    shared: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """``base + scale · mask · (shared - base)``: a task's model out of the shared one.

    Args:
        base: Base tensor, or a tile of it.
        shared: As many entries.
        mask: As many bits, of the task's row of :func:`agreement_masks`.
        scale: The task's rescaler.
        out: As in :func:`merge_elected`.
    """
    dtype = work_dtype((base, shared))
    merged_N = result_for(base, dtype, out)
    base_N, shared_N = base.reshape(-1), shared.reshape(-1)
    for block, total in rounded_blocks(merged_N, dtype):
        first, size = block.start // 8, total.numel()
        packed = mask[first : first + -(-size // 8)].cpu().numpy()
        bits = torch.from_numpy(np.unpackbits(packed, count=size)).to(base.device)
        origin = base_N[block].to(dtype)
        total.copy_(shared_N[block]).sub_(origin).mul_(bits).mul_(scale).add_(origin)
    return merged_N.view(base.shape)


class _Electing:
    """Elects block after block, in scratch memory that is used again.

    Args:
        base: Base tensor.
        experts: Of the same shape.
        dtype: To compute in.
    """

    def __init__(
        self, base: torch.Tensor, experts: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> None:
        self._base_N = base.reshape(-1)
        self._experts_N = [expert.reshape(-1) for expert in experts]
        size = min(block_size(base.device), base.numel())
        self._scratch = torch.empty((4 + len(experts), size), dtype=dtype, device=base.device)

    def elect(self, block: slice) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Base, τ_uni and all task vectors of a block, which the next call overwrites."""
        origin, signs, elected, own, *task_vectors = self._scratch[:, : block.stop - block.start]
        origin.copy_(self._base_N[block])
        signs.zero_()
        for T, expert_N in zip(task_vectors, self._experts_N, strict=True):
            T.copy_(expert_N[block]).sub_(origin)
            signs.add_(T)
        signs.copy_(signs.gt(0)).mul_(2).sub_(1)
        elected.zero_()
        for T in task_vectors:
            torch.mul(T, signs, out=own)
            torch.maximum(elected, own, out=elected)
        return origin, elected.mul_(signs), task_vectors
