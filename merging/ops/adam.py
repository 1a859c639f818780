"""Adam on a quadratic: the loss ⟨M A, M⟩ − 2⟨M, B⟩, whose gradient is 2 (M A − B)."""

from __future__ import annotations

import math

import torch

_BETA1 = 0.9
_BETA2 = 0.999


def adam_on_quadratic(
    M: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    epsilon: float,
    row_block: int = 0,
) -> None:
    """Take Adam steps on M, in place.

    The update rule of Kingma and Ba (ICLR 2015), algorithm 1, with epsilon outside the square root
    of the bias-corrected second moment; the same as ``torch.optim.Adam`` with its default betas.
    Given A, rows of M do not see one another: they may be solved a block at a time.

    Args:
        M: Start, rows×columns, contiguous; becomes the result.
        A: Symmetric, columns×columns.
        B: rows×columns.
        steps: Number of steps; all of them are taken.
        learning_rate: Step size, in the unit of M.
        epsilon: Added to the root of the second moment, in the unit of the gradient.
        row_block: Rows solved at a time; 0 means all.
    """
    row_block = min(row_block or M.shape[0], M.shape[0])
    if not steps or not M.numel():
        return
    buffers = M.new_empty((3, row_block, M.shape[1]))
    for M_rows, B_rows in zip(M.split(row_block), B.split(row_block), strict=True):
        gradient, first, second = buffers[:, : M_rows.shape[0]]
        first.zero_()
        second.zero_()
        for step in range(1, steps + 1):
            torch.addmm(B_rows, M_rows, A, beta=-2, alpha=2, out=gradient)
            first.lerp_(gradient, 1 - _BETA1)
            second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            # m̂ / (√v̂ + ε) with both bias corrections moved into two scalars.
            root = math.sqrt(1 - _BETA2**step)
            denominator = torch.sqrt(second, out=gradient).add_(epsilon * root)
            M_rows.addcdiv_(first, denominator, value=-learning_rate * root / (1 - _BETA1**step))
