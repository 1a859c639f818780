"""RobustMerge: adapters merged factor by factor.

Shapes: adapters B_i A_i with B_i O×R_i and A_i R_i×I; R is the largest R_i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from merging.ops.layers import as_layer, new_task_vector, write_task_vector
from merging.ops.low_rank import Adapter, Expert
from merging.ops.problem import norm_of
from merging.ops.spectral_merge import leading_triplets, without_rounding

Factors = tuple[torch.Tensor, torch.Tensor]
"""B (O×R) and A (R×I)."""


def read_factors(
    base: torch.Tensor, experts: Iterator[Expert], *, rank: int, transposed: bool
) -> list[Factors]:
    """The factors of all experts, read one at a time.

    Args:
        base: Tensor of the base model.
        experts: Adapters of the tensor; a whole tensor is factored first.
        rank: Directions at most of what is factored.
        transposed: Tensors are stored in×out.

    Raises:
        SolveError: A decomposition failed.
    """
    found: list[Factors] = []
    for expert in experts:
        if isinstance(expert, Adapter):
            adapter = as_layer(expert, transposed=transposed)
            found.append((adapter.up * adapter.scaling, adapter.down))
            continue
        T = new_task_vector(base, expert, transposed=transposed)
        write_task_vector(T, base, expert, transposed=transposed)
        found.append(_factor(T, rank))
    return found


def merge_factors(
    factors: Sequence[Factors], base: torch.Tensor, *, density: float, quantile: float, gain: float
) -> torch.Tensor:
    """The product of merged factors (O×I).

    Both factors keep their largest entries. What that takes from a row of A_i says how much its
    direction is worth, s_ir = Σ|A_ir| / Σ|kept A_ir|, of which the smaller ones are raised to their
    quantile; A is the sum of the kept A_i, B the mean of the kept B_i with these weights. An
    adapter of a smaller rank has no say in the rows that it lacks.

    Source: Zeng et al., "RobustMerge: Parameter-Efficient Model Merging for MLLMs with Direction
    Robustness", NeurIPS 2025, arXiv:2502.17159.

    Args:
        factors: Of each expert.
        base: Tensor of the layer, O×I.
        density: Share of a factor's entries that are kept.
        quantile: Weights below this quantile are raised to it.
        gain: Factor on both merged factors.
    """
    rank = max(len(A) for _, A in factors)
    like = factors[0][1]
    merged_B = like.new_zeros((base.shape[0], rank))
    merged_A = like.new_zeros((rank, base.shape[1]))
    total = like.new_zeros(rank)
    for B, A in factors:
        own = len(A)
        if not own or not A.numel() or not B.numel():
            continue
        kept = _keep_largest(A, density)
        left = kept.abs().sum(dim=1)
        worth = A.abs().sum(dim=1) / left.where(left > 0, torch.inf)
        worth.clamp_(min=float(worth.sort().values[min(int(own * quantile), own - 1)]))
        merged_A[:own] += kept
        merged_B[:, :own] += _keep_largest(B, density) * worth
        total[:own] += worth
    merged_B.mul_(gain).div_(total.where(total > 0, 1))
    return merged_B @ merged_A.mul_(gain)


def _keep_largest(M: torch.Tensor, density: float) -> torch.Tensor:
    """The entries that are not below the ⌊(1 - density) N⌋-th smallest magnitude of N."""
    magnitudes = M.abs()
    place = max(1, int(M.numel() * (1 - density)))
    return M * (magnitudes >= magnitudes.reshape(-1).kthvalue(place).values)


def _factor(T: torch.Tensor, rank: int) -> Factors:
    """Balanced factors of a task vector; the largest entry of each column of B is positive."""
    if norm_of(T) == 0:
        return T[:, :0], T[:0]
    part = without_rounding(leading_triplets(T, rank))
    largest = part.left.gather(0, part.left.abs().argmax(dim=0, keepdim=True))
    roots = part.values.sqrt() * largest[0].sign()
    return part.left * roots, roots[:, None] * part.right
