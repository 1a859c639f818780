"""The merged update of adapters as an adapter: the best one of a rank.

Task vectors T_i = c_i B_i A_i have all rows in the span of the stacked A_i, and so has the update
of a method that does not turn them out of it (all that work on singular values and vectors, and
sums). With an orthonormal basis Q (I×N, N = Σ R_i) of the span the update is M = (M Q) Qᵀ, and the
singular value decomposition of the thin M Q gives that of M: its first ``rank`` terms are the best
approximation of that rank (Eckart and Young 1936), and M itself if ``rank`` ≥ N. An update that
leaves the span (Adam steps entry by entry) is decomposed whole.
"""

from __future__ import annotations

import torch

_IN_SPAN = 1e-5
"""Share of an update's norm that rounding may put outside of the span."""


def factor_update(
    update: torch.Tensor, span: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best factors of a rank, of equal norms.

    Args:
        update: O×I.
        span: Rows in whose span those of the update lie if all is well (N×I).
        rank: Of the factors.

    Returns:
        A (rank×I), B (O×rank), and the share of the update's norm that B A lacks.
    """
    norm = torch.linalg.vector_norm(update)
    up, down = update.new_zeros(len(update), rank), update.new_zeros(rank, update.shape[1])
    if norm == 0:
        return down, up, 0.0
    Q = torch.linalg.qr(span.t()).Q
    core = update @ Q
    if torch.linalg.vector_norm(update - core @ Q.t()) <= _IN_SPAN * norm:
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        Vh = Vh @ Q.t()
    else:
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    kept = min(rank, len(S))
    root = S[:kept].sqrt()
    up[:, :kept] = U[:, :kept] * root
    down[:kept] = root.unsqueeze(1) * Vh[:kept]
    lacking = torch.linalg.vector_norm(update - up @ down) / norm
    return down, up, float(lacking)
