"""The layer's problem through I×I sums over experts, which are read once and forgotten."""

from __future__ import annotations

from typing import ClassVar

import torch

from merging.ops.blocks import block_size, inner_product
from merging.ops.forms import Form
from merging.ops.precision import Precision, right_product
from merging.ops.problem import HalfGradient, LayerProblem

_SYMMETRIC_BLOCKS = 4
"""10 of 16 blocks are computed; more blocks save little and multiply slower."""

_MIN_SYMMETRIC = 512
"""Below, blocks are too small to multiply at full speed."""


class GramProblem(LayerProblem):
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
        num_rows = max(64, block_size(M.device) // max(1, M.shape[1]))
        loss = self.c
        for M_rows, B_rows in zip(M.split(num_rows), self.B.split(num_rows), strict=True):
            loss += inner_product(M_rows, torch.addmm(B_rows, M_rows, self.A, beta=-2))
        return max(0.0, loss)

    def add_term(self, target: torch.Tensor, directions: torch.Tensor) -> None:
        """Add ‖(M − target) directionsᵀ‖²_F, of a target (O×I) and directions (K×I), to the loss.

        What a method adds whose terms are not WUDI's.
        """
        image = target @ directions.t()
        self.A.addmm_(directions.t(), directions)
        self.B.addmm_(image, directions)
        self.c += inner_product(image, image)

    def _add(self, T: torch.Tensor, norm: float) -> None:
        gram = symmetric_product(T.t())
        self.A.add_(gram)
        if 2 * T.shape[0] < T.shape[1]:
            self.B.addmm_(T @ T.t(), T, alpha=norm)
        else:
            self.B.addmm_(T, gram, alpha=norm)
        if self._weighted_total is not None:
            self._weighted_total.add_(T, alpha=1 / norm)
        self._note_gram(gram, norm)


def symmetric_product(X: torch.Tensor) -> torch.Tensor:
    """``X Xᵀ`` at five eighths of the operations if X has many rows: half is copied over."""
    num_rows = X.shape[0]
    product = X.new_empty((num_rows, num_rows))
    size = num_rows if num_rows < _MIN_SYMMETRIC else -(-num_rows // _SYMMETRIC_BLOCKS)
    for start in range(0, num_rows, max(1, size)):
        block = slice(start, start + size)
        torch.mm(X[block], X[start:].t(), out=product[block, start:])
        product[start + size :, block] = product[block, start + size :].t()
    return product
