"""Products with a fixed matrix, as exactly as asked.

On a CPU every product is a float32 one (float64 for float64 problems). On a CUDA device:

``highest``
    float32 throughout; the tensor cores' TF32 is turned off even if the process turned it on.
``high``
    Tensor cores at nearly float32's accuracy: each operand is split into two bfloat16 numbers,
    X = Xh + Xl with 16 bits of the 24, and Xh Ah + Xh Al + Xl Ah are summed in float32 by a single
    bfloat16 product of three times the inner dimension. What is left out, Xl Al, is below 2⁻¹⁶.
``medium``
    TF32: 11 bits of each operand, summed in float32.

Sums over experts are always formed at ``highest``: an error in them would stay in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["highest", "high", "medium"]

Product = Callable[[torch.Tensor, torch.Tensor], None]
"""``product(X, out)`` writes ``X @ A`` for the A that it was made for."""


def right_product(A: torch.Tensor, num_rows: int, precision: Precision) -> Product:
    """A function that multiplies by A from the right again and again without allocating.

    Args:
        A: The right operand, inner×columns.
        num_rows: Rows of the left operands.
        precision: As in the module's text; ``medium`` takes effect within
            :func:`float32_products`.
    """
    if precision == "high" and A.is_cuda and A.dtype == torch.float32:
        return SplitProduct(A, num_rows)

    def product(X: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(X, A, out=out)

    return product


class SplitProduct:
    """float32 products on bfloat16 tensor cores, by splitting operands in two.

    On devices without such products the same numbers are multiplied in float32, which shows the
    accuracy and is of no other use.
    """

    def __init__(self, A: torch.Tensor, num_rows: int) -> None:
        high, low = _split(A)
        self._right = torch.cat([high, low, high])
        self._left = A.new_empty((num_rows, len(self._right)), dtype=torch.bfloat16)
        self._remainder = A.new_empty((num_rows, len(A)))

    def __call__(self, X: torch.Tensor, out: torch.Tensor) -> None:
        """Write ``X @ A`` to ``out``."""
        first, second, third = self._left.chunk(3, dim=1)
        first.copy_(X)
        second.copy_(first)
        third.copy_(torch.sub(X, first, out=self._remainder))
        if X.is_cuda:
            torch.mm(self._left, self._right, out_dtype=torch.float32, out=out)
        else:
            torch.mm(self._left.float(), self._right.float(), out=out)


def _split(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bfloat16 tensors that add up to A but for 2⁻¹⁷ of its entries."""
    high = A.to(torch.bfloat16)
    return high, (A - high).to(torch.bfloat16)


@contextmanager
def float32_products(device: torch.device, precision: Precision = "highest") -> Iterator[None]:
    """What CUDA makes of float32 products meanwhile: TF32 under ``medium``, else float32.

    The setting belongs to the process; it is put back afterwards.
    """
    before = torch.get_float32_matmul_precision()
    is_loose = precision == "medium" and device.type == "cuda"
    torch.set_float32_matmul_precision("high" if is_loose else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
