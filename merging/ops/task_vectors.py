"""Combining task vectors entry by entry: sparsify, weigh, elect signs, sum, add to the base.

The pieces of what mergekit calls generalized task arithmetic. Shapes: N entries of one flat tensor
(or of a block of it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from merging.ops.blocks import block_size, result_for, rounded_blocks, work_dtype

Sparsify = Callable[[int, torch.Tensor, int], None]
"""``sparsify(expert, task_vector_N, start)`` zeroes (and rescales) entries of a block in place.

``expert`` counts from 0; ``start`` is the block's first flat index in the tensor or tile at hand.
Blocks of one expert come in ascending order.
"""

_ZERO_WEIGHT = 1e-8
"""Sums of weights below this are 0 but for rounding (0.1 + 0.2 − 0.3)."""


def combine_task_vectors(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scale: float,
    normalize: bool,
    elect_signs: bool = False,
    sparsify: Sparsify | None = None,
    out: torch.Tensor | None = None,
    add_base: bool = True,
) -> torch.Tensor:
    """``base + scale · Σ weight · task vector``, entry by entry.

    Args:
        base: Base tensor, any float dtype.
        experts: Tensors of the same shape.
        weights: One factor per expert.
        scale: λ.
        normalize: Divide the sum by the sum of the weights in it, unless that is 0.
        elect_signs: Leave out, in each entry, task vectors whose sign is not that of the weighted
            sum of all; a sum of 0 counts as positive, and zeros never take part.
        sparsify: Applied to each task vector before it is weighed.
        out: Flat, of any float dtype, for the result; by default new, float32 (float64 if an input
            is).
        add_base: False gives the merged task vector alone.

    Returns:
        Tensor of the base's shape.
    """
    dtype = work_dtype((base, *experts))
    num_entries = base.numel()
    merged_N = result_for(base, dtype, out)
    base_N = base.reshape(-1)
    experts_N = [expert.reshape(-1) for expert in experts]
    num_kept = len(experts) if elect_signs else 1
    size = min(block_size(base.device), num_entries)
    scratch = torch.empty((3 + num_kept, size), dtype=dtype, device=base.device)
    all_weights = sum(weights)

    for block, total in rounded_blocks(merged_N, dtype):
        total.zero_()
        origin, signs, divisor, *task_vectors = scratch[:, : total.numel()]
        origin.copy_(base_N[block])
        for number, (expert_N, weight) in enumerate(zip(experts_N, weights, strict=True)):
            task_vector = task_vectors[number % num_kept]
            task_vector.copy_(expert_N[block]).sub_(origin)
            if sparsify:
                sparsify(number, task_vector, block.start)
            if weight != 1:
                task_vector.mul_(weight)
            total.add_(task_vector)
        if elect_signs:
            _sum_elected(total, signs, divisor, task_vectors, weights, normalize=normalize)
        elif normalize and abs(all_weights) > _ZERO_WEIGHT:
            total.div_(all_weights)
        if scale != 1:
            total.mul_(scale)
        if add_base:
            total.add_(origin)
    return merged_N.view(base.shape)


def _sum_elected(
    total: torch.Tensor,
    signs: torch.Tensor,
    divisor: torch.Tensor,
    task_vectors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    normalize: bool,
) -> None:
    """Replace the sum over a block by the sum (or mean) of the entries that agree with its sign.

    Comparisons are in place, giving 0 and 1 as floats: five times as fast as making booleans.
    The weighted ``task_vectors`` are used up.
    """
    signs.copy_(total).ge_(0).mul_(2).sub_(1)
    total.zero_()
    divisor.zero_()
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        total.add_(task_vector.mul_(signs).clamp_(min=0))
        if normalize:
            agrees = task_vector.sign_()
            divisor.add_(agrees.mul_(weight) if weight != 1 else agrees)
    total.mul_(signs)
    if normalize:
        is_zero = signs.copy_(divisor).eq_(0)
        total.div_(divisor.add_(is_zero))
