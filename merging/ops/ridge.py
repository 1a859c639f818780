"""A layer's problem with a ridge, solved directly."""

from __future__ import annotations

import torch

from merging.ops.forms import MAX_DOUBLE_COLUMNS
from merging.ops.problem import LayerProblem, SolveError


def ridge_solution(
    problem: LayerProblem, *, rho: float, omega: float | None = None, row_block: int = 0
) -> torch.Tensor:
    """M with ``M (Σ w_i (T_iᵀT_i + ω_i I)) = Σ w_i T_i (T_iᵀT_i + ω_i I)``.

    Written over the problem's ``total``.

    Args:
        problem: Read to the end.
        rho: ω_i is ``rho ‖T_i‖²_F / I``, unless ``omega`` is given.
        omega: ω_i, the same for all; needs the problem's weighted total.
        row_block: Rows solved at a time; 0 means all.

    Raises:
        SolveError: The ridge is too small beside what is singular.
    """
    if omega is None:
        pull, power = rho / problem.num_columns, 1
        ridge = pull * problem.num_nonzero
    else:
        pull, power = omega, -1
        ridge = omega * sum(norm**-2 for norm in problem.nonzero_norms)
    factor = _factorise(problem.A, ridge)
    for rows in problem.row_blocks(row_block):
        right = torch.add(problem.B[rows], problem.combine(power, rows), alpha=pull)
        solution = torch.cholesky_solve(right.t().to(factor.dtype), factor)
        problem.store(rows, solution.t().to(right.dtype))
    return problem.total


def _factorise(A: torch.Tensor, ridge: float) -> torch.Tensor:
    """The Cholesky factor of A + ridge · I, in float64 unless A is large.

    Raises:
        SolveError: The matrix is not positive definite.
    """
    dtypes = [A.dtype, torch.float64] if len(A) > MAX_DOUBLE_COLUMNS else [torch.float64]
    for dtype in dtypes:
        ridged = A.to(dtype, copy=True)
        ridged.diagonal().add_(ridge)
        factor: torch.Tensor
        factor, info = torch.linalg.cholesky_ex(ridged)
        del ridged
        if int(info) == 0:
            return factor
    raise SolveError(
        f"its matrix with ridge {ridge:.3g} is not positive definite; use a larger rho or omega"
    )
