"""The layer's problem through the rows of its task vectors, for layers much wider than high.

With the R = E·O rows of all normalised task vectors stacked into S (R×I), and the norms of task
vectors n_i::

    A = SᵀS     B = C S     Σ T_i = J S     L(M) = ‖M Sᵀ − C‖²_F     ½ ∇L(M) = (M Sᵀ − C) S

where block i of C (O×R) is n_i S_i S_iᵀ and block i of J (O×R) is n_i times the identity. Every
function of A passes through S, g(A) Sᵀ = Sᵀ g(S Sᵀ): a solver that uses A through functions only
may run on K = S Sᵀ (R×R), C and J instead of A, B and Σ T_i, and its result X stands for M = X S.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from merging.ops.blocks import block_size, inner_product
from merging.ops.forms import Form
from merging.ops.gram_form import symmetric_product
from merging.ops.precision import Precision, right_product
from merging.ops.problem import DenseProblem, HalfGradient


class RowProblem(DenseProblem):
    """Holds the rows of all task vectors that take part; coordinates are O×R.

    Args:
        like: A matrix of the layer's shape.
        num_experts: How many task vectors will be added at the most.

    Attributes:
        S: Rows of the normalised task vectors that take part (R×I).
    """

    form: ClassVar[Form] = "rows"

    def __init__(self, like: torch.Tensor, num_experts: int) -> None:
        super().__init__(like)
        self.S = like.new_empty((num_experts * like.shape[0], like.shape[1]))

    def finish(self) -> None:
        """Multiply the rows with each other."""
        num_rows = self.total.shape[0]
        self.S = self.S[: num_rows * self.num_nonzero]
        self.A = symmetric_product(self.S)
        self.B = self.S.new_empty((num_rows, len(self.S)))
        for number, norm in enumerate(self.nonzero_norms):
            block = slice(number * num_rows, (number + 1) * num_rows)
            gram = self.A[block, block].contiguous()
            self._note_gram(gram, norm)
            torch.mul(gram, norm, out=self.B[:, block])

    def combine(self, power: int, rows: slice) -> torch.Tensor:
        """Rows of J, with the norms raised to that power."""
        num_rows = self.total.shape[0]
        combined = torch.zeros_like(self.B[rows])
        for number, norm in enumerate(self.nonzero_norms):
            combined.diagonal(number * num_rows + rows.start).fill_(norm**power)
        return combined

    def store(self, rows: slice, X_rows: torch.Tensor) -> None:
        """Multiply by S."""
        torch.mm(X_rows, self.S, out=self.total[rows])

    def half_gradient(self, rows: slice, precision: Precision) -> HalfGradient:
        """One product with Sᵀ and one with S a call."""
        C_rows = self.B[rows]
        to_rows = right_product(self.S.t(), len(C_rows), precision)
        to_columns = right_product(self.S, len(C_rows), precision)
        interference = torch.empty_like(C_rows)

        def half_gradient(M_rows: torch.Tensor, out: torch.Tensor) -> None:
            to_rows(M_rows, interference)
            to_columns(interference.sub_(C_rows), out)

        return half_gradient

    def loss(self, M: torch.Tensor) -> float:
        """L(M), with a workspace of a few rows."""
        num_rows = max(64, block_size(M.device) // max(1, M.shape[1]))
        loss = 0.0
        for M_rows, C_rows in zip(M.split(num_rows), self.B.split(num_rows), strict=True):
            interference = torch.addmm(C_rows, M_rows, self.S.t(), beta=-1)
            loss += inner_product(interference, interference)
        return loss

    def _add(self, T: torch.Tensor, norm: float) -> None:  # noqa: ARG002 - kept in norms
        end = self.num_nonzero * T.shape[0]
        self.S[end - T.shape[0] : end].copy_(T)
