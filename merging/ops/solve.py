"""Linear systems with a symmetric positive definite matrix on the right."""

from __future__ import annotations

import torch


def solve_from_right(
    B: torch.Tensor, A: torch.Tensor, ridge: float, max_double_columns: int
) -> torch.Tensor | None:
    """M with ``M (A + ridge · I) = B``, by Cholesky factorisation.

    Args:
        B: rows×columns.
        A: columns×columns, symmetric.
        ridge: Added to the diagonal.
        max_double_columns: Up to this size the work is done in float64; above it, in A's dtype
            first and in float64 if that fails.

    Returns:
        M in B's dtype, contiguous; None if the matrix is not positive definite.
    """
    dtypes = [A.dtype, torch.float64] if A.shape[0] > max_double_columns else [torch.float64]
    for dtype in dtypes:
        ridged = A.to(dtype, copy=True)
        ridged.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(ridged)
        del ridged
        if int(info) == 0:
            solution = torch.cholesky_solve(B.t().to(dtype), factor)
            return solution.t().to(B.dtype).contiguous()
    return None
