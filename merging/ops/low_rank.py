"""Adapters: task vectors as two thin factors, and a layer's problem solved through them.

Task vectors T_i = c_i B_i A_i of adapters (B_i: O×R_i, A_i: R_i×I, c_i the adapter's scaling) have
all rows in the span of the stacked A_i. With an orthonormal basis Q (I×N, N = Σ R_i) of these,
T_i = Y_i Qᵀ with Y_i = c_i B_i (A_i Q), and WUDI's sums over the Y_i (O×N) say all::

    A = Q Ã Qᵀ     B = B̃ Qᵀ     L(M) = ⟨P Ã, P⟩ − 2 ⟨P, B̃⟩ + c  with P = M Q

No I×I matrix is ever formed. Coordinates of an update are O×N: a solver that uses A through
functions only gives X, which stands for M = X Qᵀ, an adapter of rank N. Adam does not (it works
entry by entry, and leaves the span): it steps on M itself, with the gradient (M Q Ã − B̃) Qᵀ.

Cost: 4 I N² for the basis, the solver's on N columns in place of I, 2 O I N to expand its result;
4 O I N for a step of Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

from merging.ops.forms import Form
from merging.ops.gram_form import GramProblem
from merging.ops.precision import Precision, right_product
from merging.ops.problem import HalfGradient, LayerProblem

_ROW_BLOCK = 64
"""Entries are always computed in these rows of the tensor, whatever part is asked for, since a
product of other rows may round differently."""


class Adapter(NamedTuple):
    """``scaling · up @ down``, in the names of the LoRA paper B and A.

    Attributes:
        up: O×R; R is 0 for an adapter that leaves the layer alone.
        down: R×I.
        scaling: ``lora_alpha / r``, or ``lora_alpha / √r`` of rank-stabilised adapters.
    """

    up: torch.Tensor
    down: torch.Tensor
    scaling: float = 1.0

    def transpose(self) -> Adapter:
        """The same update of the layer stored the other way around."""
        return Adapter(self.down.t(), self.up.t(), self.scaling)

    def write(self, out: torch.Tensor) -> None:
        """Write the update to a matrix (O×I), computed in its dtype."""
        torch.mm(self.up.to(out.dtype), self.down.to(out.dtype), out=out)
        out.mul_(self.scaling)

    def entries(self, start: int, end: int) -> torch.Tensor:
        """The update's entries from one flat index to another.

        The bits of an entry do not depend on the range that is asked for.
        """
        columns = self.down.shape[1]
        found = self.up.new_empty(end - start)
        for top in range(start // columns // _ROW_BLOCK * _ROW_BLOCK, len(self.up), _ROW_BLOCK):
            if (first := top * columns) >= end:
                break
            product = (self.up[top : top + _ROW_BLOCK] @ self.down).view(-1).mul_(self.scaling)
            low, high = max(start, first), min(end, first + len(product))
            found[low - start : high - start] = product[low - first : high - first]
        return found


Expert = torch.Tensor | Adapter
"""An expert's tensor, or the update that makes it of the base."""


class FactorProblem(LayerProblem):
    """The problem of adapters, in an orthonormal basis of their inputs; see the module's text.

    Args:
        total: Memory for the sum of the task vectors (O×I), in the work dtype.
        adapters: In recipe order, in that dtype; those of rank 0 or of zeros take no part.

    Attributes:
        Q: The basis, I×N (I×I if N is larger).
    """

    form: ClassVar[Form] = "factors"

    def __init__(self, total: torch.Tensor, adapters: Sequence[Adapter]) -> None:
        super().__init__(total[:0])
        self.total = total
        self.Q = torch.linalg.qr(torch.cat([adapter.down for adapter in adapters]).t()).Q
        core = GramProblem(
            total.new_empty((len(total), self.Q.shape[1])),
            keep_weighted_total=True,
            num_columns=self.num_columns,
        )
        for adapter in adapters:
            core.accumulate((adapter.up @ (adapter.down @ self.Q)).mul_(adapter.scaling))
        core.finish()
        self._core = core
        self.A, self.B, self.c = core.A, core.B, core.c
        self.norms, self.gram_squares = core.norms, core.gram_squares
        self.store(slice(None), core.total)

    def combine(self, power: int, rows: slice) -> torch.Tensor:
        """Of the sums in coordinates."""
        return self._core.combine(power, rows)

    def store(self, rows: slice, X_rows: torch.Tensor) -> None:
        """Multiply by Qᵀ."""
        torch.mm(X_rows, self.Q.t(), out=self.total[rows])

    def half_gradient(self, rows: slice, precision: Precision) -> HalfGradient:
        """One product with Q Ã and one with Qᵀ a call."""
        B_rows = self.B[rows]
        to_coordinates = right_product(self.Q @ self.A, len(B_rows), precision)
        to_columns = right_product(self.Q.t(), len(B_rows), precision)
        image = torch.empty_like(B_rows)

        def half_gradient(M_rows: torch.Tensor, out: torch.Tensor) -> None:
            to_coordinates(M_rows, image)
            to_columns(image.sub_(B_rows), out)

        return half_gradient

    def loss(self, M: torch.Tensor) -> float:
        """L(M), of an update that need not lie in the span."""
        return self._core.loss(M @ self.Q)
