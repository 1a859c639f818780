"""Best approximations of low rank, from the smaller of a matrix's two Gram matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from merging.ops.spectral import eigh

_MAX_DOUBLE = 2048
"""Up to here the Gram matrix is formed and decomposed in float64: squaring singular values loses
half of the digits."""


class Truncation(NamedTuple):
    """The part of rank K of a matrix T (O×I) with the largest singular values.

    Attributes:
        left: O×K.
        right: K×I; ``left @ right`` is the approximation.
        directions: K×I, the right singular vectors times their singular values, but for a rotation:
            ``directions.T @ directions`` is the approximation's Gram matrix.
    """

    left: torch.Tensor
    right: torch.Tensor
    directions: torch.Tensor


def truncate(T: torch.Tensor, rank: int) -> Truncation:
    """The best approximation of that rank."""
    if T.shape[0] <= T.shape[1]:
        left = _leading_eigenvectors(T, rank)
        right = left.t() @ T
        return Truncation(left, right, right)
    right = _leading_eigenvectors(T.t(), rank).t()
    left = T @ right.t()
    return Truncation(left, right, left.norm(dim=0).unsqueeze(1) * right)


def _leading_eigenvectors(X: torch.Tensor, count: int) -> torch.Tensor:
    """Eigenvectors of ``X Xᵀ`` for its largest eigenvalues, one column each."""
    factor = X.double() if len(X) <= _MAX_DOUBLE else X
    _, vectors = eigh(factor @ factor.t())
    return vectors[:, -count:].to(X.dtype)
