"""DOGE: one correction for all task vectors of a layer, found by projected gradient descent.

Shapes: task vectors T_i are O×I, E of them; s = min(O, I).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merging.ops.adam import take_adam_steps
from merging.ops.spectral_merge import leading_triplets, without_rounding


def shared_directions(vectors: Sequence[torch.Tensor], divisor: int) -> torch.Tensor:
    """⌊s / divisor⌋ output directions (columns) that the task vectors share most.

    Those of the largest singular values of the ⌊s / E⌋ leading left singular vectors of every task
    vector, side by side.

    Raises:
        SolveError: A decomposition failed.
    """
    smaller = min(vectors[0].shape)
    each = smaller // len(vectors)
    leading = [without_rounding(leading_triplets(T, each)).left for T in vectors]
    return leading_triplets(torch.cat(leading, dim=1), smaller // divisor).left


def find_correction(
    vectors: Sequence[torch.Tensor],
    factors: Sequence[float],
    shared: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
) -> torch.Tensor:
    """Δ (O×I) by Adam from 0, with gradients that have nothing in the shared directions.

    Of Σ_j Σ_rows [Σ_columns T_j ∘ (T_j - Σ_i λ_i (T_i + Δ))]². There is one number r for each task
    vector and row, so a gradient takes one pass over the task vectors each way.

    Source: Wei et al., "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent",
    ICML 2025, arXiv:2501.01230, section 4.

    Args:
        vectors: The T_i.
        factors: The λ_i.
        shared: Orthonormal columns (O×K).
        steps: Of Adam.
        learning_rate: In the unit of the task vectors.
    """
    total = sum(factors)
    weighted = torch.zeros_like(vectors[0])
    for T, factor in zip(vectors, factors, strict=True):
        weighted.add_(T, alpha=factor)
    targets = torch.stack([(T * (T - weighted)).sum(dim=1) for T in vectors])

    def write_gradient(correction: torch.Tensor, out: torch.Tensor) -> None:
        out.zero_()
        for T, target in zip(vectors, targets, strict=True):
            residual = target - total * (T * correction).sum(dim=1)
            out.addcmul_(T, residual[:, None], value=-2 * total)
        out.sub_(shared @ (shared.mT @ out))

    correction = torch.zeros_like(weighted)
    take_adam_steps(
        correction, write_gradient, steps=steps, learning_rate=learning_rate, epsilon=1e-8
    )
    return correction


def merge_corrected(
    vectors: Sequence[torch.Tensor],
    factors: Sequence[float],
    thresholds: Sequence[float],
    correction: torch.Tensor,
) -> torch.Tensor:
    """Σ_i λ_i (T_i + Δ), of each only where |T_i| is not below its threshold."""
    merged = torch.zeros_like(correction)
    for T, factor, threshold in zip(vectors, factors, thresholds, strict=True):
        is_kept = T.abs().to(torch.float32) >= threshold
        merged.add_((T + correction).mul_(is_kept).mul_(factor))
    return merged
