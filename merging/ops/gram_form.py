"""The layer's problem through I×I sums over experts, which are read once and forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from merging.ops.blocks import block_size, inner_product
from merging.ops.forms import Form, is_wide
from merging.ops.precision import Precision, right_product
from merging.ops.problem import DenseProblem, HalfGradient

_SYMMETRIC_BLOCKS = 4
"""10 of 16 blocks are computed; more blocks save little and multiply slower."""

_MIN_SYMMETRIC = 512
"""Below, blocks are too small to multiply at full speed."""


class GramProblem(DenseProblem):
    """A and B as in :mod:`merging.ops.problem`; coordinates of an update are the update itself.

    A loss is what is left when c cancels against the rest: below about 1e-6 of c (float32) it is
    rounding.

    Args:
        like: A matrix of the layer's shape.
        keep_weighted_total: Sum up Σ w_i T_i too, for ``combine(-1)``.
        num_columns: I of the layer, where ``like`` has fewer columns (:mod:`merging.ops.low_rank`).
    """

    form: ClassVar[Form] = "gram"

    def __init__(
        self,
        like: torch.Tensor,
        *,
        keep_weighted_total: bool = False,
        num_columns: int | None = None,
    ) -> None:
        super().__init__(like)
        self.num_columns = num_columns or like.shape[1]
        self.A = like.new_zeros((like.shape[1], like.shape[1]))
        self.B = torch.zeros_like(like)
        self._weighted_total = torch.zeros_like(like) if keep_weighted_total else None

    def combine(self, power: int, rows: slice) -> torch.Tensor:
        """Rows of Σ T_i itself (not a copy), or of the weighted sum if it was kept."""
        combined = self.total if power == 1 else self._weighted_total
        assert combined is not None, "keep_weighted_total was not asked for"
        return combined[rows]

    def store(self, rows: slice, X_rows: torch.Tensor) -> None:
        """Copy."""
        self.total[rows].copy_(X_rows)

    def half_gradient(self, rows: slice, precision: Precision) -> HalfGradient:
        """One product with A a call."""
        B_rows = self.B[rows]
        multiply = right_product(self.A, B_rows.shape[0], precision)

        def half_gradient(M_rows: torch.Tensor, out: torch.Tensor) -> None:
            multiply(M_rows, out)
            out.sub_(B_rows)

        return half_gradient

    def loss(self, M: torch.Tensor) -> float:
        """L(M), with a workspace of a few rows."""
        return max(0.0, self.c + self.loss_of_rows(M))

    def loss_of_rows(self, M: torch.Tensor) -> float:
        """L(M) − c, which is a sum over rows."""
        num_rows = max(64, block_size(M.device) // max(1, M.shape[1]))
        loss = 0.0
        for M_rows, B_rows in zip(M.split(num_rows), self.B.split(num_rows), strict=True):
            loss += inner_product(M_rows, torch.addmm(B_rows, M_rows, self.A, beta=-2))
        return loss

    def add_term(self, target: torch.Tensor, directions: torch.Tensor) -> None:
        """Add ‖(M − target) directionsᵀ‖²_F, of a target (O×I) and directions (K×I), to the loss.

        What a method adds whose terms are not WUDI's.
        """
        image = target @ directions.t()
        self.A.addmm_(directions.t(), directions)
        self.B.addmm_(image, directions)
        self.c += inner_product(image, image)

    def finish(self) -> None:
        """Copy the half of A that was left out."""
        mirror(self.A)

    def _add(self, T: torch.Tensor, norm: float) -> None:
        if is_wide(*T.shape):
            gram = symmetric_product(T)
            self.B.addmm_(gram, T, alpha=norm)
            add_upper_product(self.A, T.t())
        else:
            gram = symmetric_product(T.t())
            self.B.addmm_(T, gram, alpha=norm)
            self.A.add_(gram)
        self._note_gram(gram, norm)
        if self._weighted_total is not None:
            self._weighted_total.add_(T, alpha=1 / norm)


class GramRows(GramProblem):
    """Some rows of a problem that has been summed up elsewhere.

    Args:
        A: Of the whole problem.
        B: Its rows.
        total: Likewise.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor, total: torch.Tensor) -> None:
        DenseProblem.__init__(self, total)  # there is nothing to sum up
        self.A, self.B, self.total = A, B, total
        self._weighted_total = None


def symmetric_product(X: torch.Tensor) -> torch.Tensor:
    """``X Xᵀ`` at five eighths of the operations if X has many rows."""
    product = X.new_zeros((len(X), len(X)))
    add_upper_product(product, X)
    mirror(product)
    return product


def add_upper_product(out: torch.Tensor, X: torch.Tensor) -> None:
    """Add the blocks of ``X Xᵀ`` that are not below the diagonal."""
    for block, _ in _diagonal_blocks(len(X)):
        out[block, block.start :].addmm_(X[block], X[block.start :].t())


def mirror(out: torch.Tensor) -> None:
    """Write blocks above the diagonal over those below."""
    for block, after in _diagonal_blocks(len(out)):
        out[after, block] = out[block, after].t()


def _diagonal_blocks(size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows, and the rows after each."""
    step = size if size < _MIN_SYMMETRIC else -(-size // _SYMMETRIC_BLOCKS)
    for start in range(0, size, max(1, step)):
        yield slice(start, start + step), slice(start + step, None)
