"""SCE's three steps: select by variance, weigh by energy, average what agrees with a sign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from merging.ops.blocks import block_size, blocks_of, inner_product, work_dtype
from merging.ops.sparsify import KeepFromThresholds, count_above, kth_largest

_NO_ENERGY = 1e-6


def merge_by_energy(
    base: torch.Tensor, experts: Sequence[torch.Tensor], share: float
) -> tuple[torch.Tensor, list[float]]:
    """Merge one tensor.

    Args:
        base: Base tensor, any float dtype.
        experts: Tensors of the same shape.
        share: Of the entries whose variance is not 0, to be selected.

    Returns:
        Tensor of that shape, float32 (float64 if an input is), and the experts' weights.
    """
    merged_N = torch.empty(base.numel(), dtype=work_dtype((base, *experts)), device=base.device)
    threshold = _threshold(base, experts, share, merged_N)
    weights = _weights(base, experts, threshold, merged_N)
    for block, vectors in _selected(base, experts, threshold, merged_N):
        signs = torch.where(vectors.sum(dim=0) >= 0, 1.0, -1.0)
        shares = (vectors.sign() == signs) * vectors.new_tensor(weights)[:, None]
        total = (vectors * shares).sum(dim=0) / shares.sum(dim=0).clamp_(min=_NO_ENERGY)
        merged_N[block].copy_(base.reshape(-1)[block]).add_(total)
    return merged_N.view(base.shape), weights


def _threshold(
    base: torch.Tensor, experts: Sequence[torch.Tensor], share: float, scratch_N: torch.Tensor
) -> tuple[float, int]:
    """The smallest variance that is selected, and how many entries with just that one are."""
    if share == 1 or not base.numel():
        return 0.0, 0
    for block, vectors in _blocks(base, experts, scratch_N):
        scratch_N[block] = vectors.var(dim=0, correction=0)
    count = int(share * int(scratch_N.count_nonzero()))
    if not count:
        return float("inf"), 0
    threshold = kth_largest(scratch_N, count)
    return threshold, count - count_above(scratch_N, threshold)


def _weights(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    threshold: tuple[float, int],
    like: torch.Tensor,
) -> list[float]:
    energies = [0.0] * len(experts)
    for _, vectors in _selected(base, experts, threshold, like):
        for number, vector in enumerate(vectors):
            energies[number] += inner_product(vector, vector) / base.numel()
    total = sum(energies)
    if total < _NO_ENERGY:
        return [1 / len(experts)] * len(experts)
    return [energy / total for energy in energies]


def _selected(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    threshold: tuple[float, int],
    like: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of task vectors, with entries that are not selected made 0."""
    keep = KeepFromThresholds([threshold[0]], [threshold[1]], like)
    for block, vectors in _blocks(base, experts, like):
        if threshold[0]:
            variances = vectors.var(dim=0, correction=0)
            keep(0, variances, block.start)
            vectors.mul_(variances != 0)
        yield block, vectors


def _blocks(
    base: torch.Tensor, experts: Sequence[torch.Tensor], like: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of all task vectors, E×n."""
    base_N, experts_N = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    size = min(block_size(base.device), base.numel())
    scratch = torch.empty((1 + len(experts), size), dtype=like.dtype, device=base.device)
    for block in blocks_of(base.numel(), base.device):
        origin = scratch[0, : base_N[block].numel()].copy_(base_N[block])
        vectors = scratch[1:, : origin.numel()]
        for vector, expert_N in zip(vectors, experts_N, strict=True):
            vector.copy_(expert_N[block]).sub_(origin)
        yield block, vectors
