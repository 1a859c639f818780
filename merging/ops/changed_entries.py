"""Merging by which experts have changed an entry at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from merging.ops.blocks import block_size, blocks_of, work_dtype


def average_changed(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    epsilon: float,
    unique_factors: Sequence[float] | None = None,
) -> torch.Tensor:
    """Base plus, in each entry, the mean of the task vectors that are larger there than epsilon.

    Args:
        base: Base tensor, any float dtype.
        experts: Tensors of the same shape.
        epsilon: Entries up to this size count as 0.
        unique_factors: One per expert, on entries that it alone has changed.

    Returns:
        Tensor of that shape, float32 (float64 if an input is).
    """
    merged_N = torch.empty(base.numel(), dtype=work_dtype((base, *experts)), device=base.device)
    for block, origin, vectors in _changed_blocks(base, experts, epsilon):
        counts = sum((vector != 0).to(origin.dtype) for vector in vectors)
        assert isinstance(counts, torch.Tensor)
        total = merged_N[block].zero_()
        for number, vector in enumerate(vectors):
            if unique_factors is not None:
                vector.mul_(torch.where(counts == 1, unique_factors[number], 1.0))
            total.add_(vector)
        total.div_(counts.clamp_(min=1)).add_(origin)
    return merged_N.view(base.shape)


def count_changed(
    base: torch.Tensor, experts: Sequence[torch.Tensor], epsilon: float
) -> list[tuple[int, int]]:
    """Of each expert, how many entries it alone has changed, and how many others have too."""
    unique, shared = [0] * len(experts), [0] * len(experts)
    for _, _, vectors in _changed_blocks(base, experts, epsilon):
        changed = torch.stack(vectors) != 0
        is_shared = changed.sum(dim=0) > 1
        for number, mask in enumerate(changed):
            both = int((mask & is_shared).sum())
            shared[number] += both
            unique[number] += int(mask.sum()) - both
    return list(zip(unique, shared, strict=True))


def _changed_blocks(
    base: torch.Tensor, experts: Sequence[torch.Tensor], epsilon: float
) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
    """Blocks of the base and of the task vectors, with small entries made 0."""
    dtype = work_dtype((base, *experts))
    base_N, experts_N = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    size = min(block_size(base.device), base.numel())
    scratch = torch.empty((1 + len(experts), size), dtype=dtype, device=base.device)
    for block in blocks_of(base.numel(), base.device):
        origin, *vectors = scratch[:, : base_N[block].numel()]
        origin.copy_(base_N[block])
        for vector, expert_N in zip(vectors, experts_N, strict=True):
            vector.copy_(expert_N[block]).sub_(origin)
            vector.mul_(vector.abs() > epsilon)
        yield block, origin, vectors
