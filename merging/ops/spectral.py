"""Spectral filters: solutions of a layer's problem direction by direction of A.

With A = V diag(λ) Vᵀ, the least-squares solution is Σ_k B v_k v_kᵀ / λ_k. A filter takes of it a
share f_k in each direction and keeps the plain sum M₀ of the task vectors in the rest
(Wei et al., 2026, arXiv:2606.07289)::

    M = M₀ (I − V f Vᵀ) + B V (f/λ) Vᵀ = M₀ + [(B V)/λ − M₀ V] f Vᵀ

The second form costs three products of O rows and as many columns as f has entries that are not 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from merging.ops.layer_method import LayerTask
from merging.ops.problem import LayerProblem, SolveError

EIGENVALUE_FLOOR = 1e-8
"""Smaller eigenvalues are raised to this, as in the authors' code."""

_ROUNDING = 10
"""Eigenvalues below so many units of rounding of the largest are 0 but for rounding."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvalues and eigenvectors of a problem's A.

    Attributes:
        values: Ascending, not below the floor; float64.
        vectors: One column each.
        num_zero: How many of the values are 0 but for rounding.
        num_left_out: Eigenvalues of the layer's I×I matrix that are not among these since they are
            0: coordinates may have fewer columns than the layer.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    num_zero: int
    num_left_out: int

    @property
    def effective_rank(self) -> float:
        """(Σ √λ)² / Σ λ over all I eigenvalues."""
        floor = EIGENVALUE_FLOOR * self.num_left_out
        roots = float(self.values.sqrt().sum()) + math.sqrt(EIGENVALUE_FLOOR) * self.num_left_out
        return roots * roots / (float(self.values.sum()) + floor)


def decompose(problem: LayerProblem) -> Spectrum:
    """The spectrum of a problem's A, in its dtype.

    Eigenvalues that are 0 but for rounding are set to the floor, which they would have without.

    Raises:
        SolveError: The decomposition failed.
    """
    values, vectors = eigh(problem.A)
    limit = _ROUNDING * torch.finfo(values.dtype).eps * values[-1]
    is_zero = values <= limit
    values = values.double().masked_fill(is_zero, 0).clamp(min=EIGENVALUE_FLOOR)
    return Spectrum(values, vectors, int(is_zero.sum()), problem.num_columns - len(values))


def eigh(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (ascending) and eigenvectors of a symmetric matrix.

    Raises:
        SolveError: The decomposition failed.
    """
    try:
        values, vectors = torch.linalg.eigh(A)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # public, not exported
        raise SolveError("its matrix has no eigenvalues; are all inputs finite?") from error
    return values, vectors


def exponential_gains(spectrum: Spectrum, t: float) -> torch.Tensor:
    """1 − exp(−λ t): what gradient flow from the sum has done at time t."""
    return -torch.expm1(-t * spectrum.values)


def hard_gains(spectrum: Spectrum, count: int) -> torch.Tensor:
    """1 for the ``count`` largest eigenvalues, 0 for the others."""
    return keep_largest(torch.ones_like(spectrum.values), count)


def keep_largest(gains: torch.Tensor, count: int) -> torch.Tensor:
    """The gains of the ``count`` largest eigenvalues; 0 for the others."""
    kept = gains.clone()
    kept[: max(0, len(gains) - count)] = 0
    return kept


def apply_filter(
    problem: LayerProblem,
    spectrum: Spectrum,
    gains: torch.Tensor,
    *,
    from_zero: bool = False,
    row_block: int = 0,
) -> torch.Tensor:
    """The filtered solution of a problem, written over its ``total``.

    Directions without an eigenvalue hold nothing of M₀ or B: what rounding left there is not
    divided by it.

    Args:
        problem: Read to the end.
        spectrum: Of its A.
        gains: f, of each eigenvalue.
        from_zero: Take 0 for M₀ where the filter does not reach.
        row_block: Rows solved at a time; 0 means all.
    """
    first = max(spectrum.num_zero, int((gains != 0).to(torch.uint8).argmax()))
    values, V = spectrum.values[first:], spectrum.vectors[:, first:]
    f = gains[first:].to(V.dtype)
    f_over_values = (gains[first:] / values).to(V.dtype)
    for rows in problem.row_blocks(row_block):
        shares = (problem.B[rows] @ V).mul_(f_over_values)
        if from_zero:
            problem.store(rows, shares @ V.t())
        else:
            M0 = problem.combine(1, rows)
            shares.sub_((M0 @ V).mul_(f))
            problem.store(rows, torch.addmm(M0, shares, V.t()))
    return problem.total


def solve_in_used_directions(problem: LayerProblem, task: LayerTask) -> torch.Tensor:
    """The least-squares solution in the ⌈effective rank⌉ strongest directions, the sum in the rest.

    Written over the problem's ``total``. Both ranks go to the task's figures.
    """
    spectrum = problem.once(decompose)
    rank = math.ceil(spectrum.effective_rank)
    task.figures.update(effective_rank=spectrum.effective_rank, filter_rank=rank)
    return apply_filter(problem, spectrum, hard_gains(spectrum, rank), row_block=task.row_block)
