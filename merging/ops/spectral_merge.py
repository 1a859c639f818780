"""Updates made from singular vectors of task vectors: TSV-M, Iso-C, Iso-CTS.

Shapes: task vectors T_i are O×I, s = min(O, I), n of them are not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from merging.ops.problem import SolveError

_ROUNDING = 10
"""Singular values below so many units of rounding of the largest are 0 but for rounding."""


class Triplets(NamedTuple):
    """Leading singular triplets of a matrix: left (O×K), values (K), right (K×I)."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def leading_triplets(M: torch.Tensor, count: int) -> Triplets:
    """So many singular triplets, largest first.

    Raises:
        SolveError: The decomposition failed.
    """
    try:
        U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # public, not exported
        raise SolveError("a matrix has no singular values; are all inputs finite?") from error
    return Triplets(U[:, :count], S[:count], Vt[:count])


def without_rounding(part: Triplets, like: torch.Tensor | None = None) -> Triplets:
    """Triplets less those whose value is 0 but for rounding.

    Their vectors mean nothing, and would push those that do aside: an adapter has as many
    directions as its rank.

    Args:
        part: The triplets.
        like: Singular values, largest first, of what rounding was made with; by default the part's.
    """
    largest = (part.values if like is None else like)[:1]
    limit = _ROUNDING * torch.finfo(part.values.dtype).eps * largest
    count = int((part.values > limit).sum())
    return Triplets(part.left[:, :count], part.values[:count], part.right[:count])


def polar_factor(M: torch.Tensor) -> torch.Tensor:
    """The matrix with orthonormal columns (or rows) nearest to M: P Qᵀ of its decomposition."""
    left, _, right = leading_triplets(M, min(M.shape))
    return left @ right


def decorrelate(parts: Sequence[Triplets], values: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of singular triplets, whose vectors are made orthogonal to one another first.

    Source: Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv:2412.00081, algorithm 1.

    Args:
        parts: Triplets of several matrices, together at most s.
        values: Singular values in place of their own.
    """
    left = polar_factor(torch.cat([part.left for part in parts], dim=1))
    right = polar_factor(torch.cat([part.right for part in parts], dim=0))
    if values is None:
        values = torch.cat([part.values for part in parts])
    return (left * values) @ right


def common_and_task_specific(
    vectors: Sequence[torch.Tensor], total: torch.Tensor, common_share: float
) -> torch.Tensor:
    """Iso-CTS: directions of the sum, and of what each task vector has beyond them, all alike.

    Source: Marczak et al., "No Task Left Behind", ICML 2025, arXiv:2502.04959, algorithm 2.

    Args:
        vectors: The T_i.
        total: Their sum.
        common_share: Of the s directions that are to be the sum's; rounded so that the rest
            divides by n.
    """
    size, count = min(total.shape), len(vectors)
    each = round((size - int(common_share * size)) / count)
    common = without_rounding(leading_triplets(total, size - each * count))
    parts = [
        without_rounding(
            leading_triplets(T - common.left @ (common.left.mT @ T), each), like=common.values
        )
        for T in vectors
    ]
    values = torch.cat([*(part.values for part in parts), common.values])
    return decorrelate([*parts, common], values.mean().expand(len(values)))
