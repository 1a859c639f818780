"""Adam on a layer's problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.optim.adam import adam

from merging.ops.precision import Precision, float32_products
from merging.ops.problem import LayerProblem

_BETA1 = 0.9
_BETA2 = 0.999

_RATE_PER_RMS = 0.037
"""WUDI's 1e-5 divided by the root mean square of its authors' CLIP task vectors, 2.7e-4."""

_EPSILON_PER_RMS = 1e-8 / 2.7e-4
"""Adam's customary epsilon, likewise."""


def adam_rates(
    problem: LayerProblem, learning_rate: float | Literal["auto"]
) -> tuple[float, float]:
    """Learning rate and epsilon for a layer.

    ``auto`` follows the size of the task vectors, so that the result scales with them; a number is
    used as it is, with epsilon 1e-8.
    """
    if learning_rate == "auto":
        return _RATE_PER_RMS * problem.rms, _EPSILON_PER_RMS * problem.rms
    return learning_rate, 1e-8


def adam_on_problem(
    M: torch.Tensor,
    problem: LayerProblem,
    *,
    steps: int,
    learning_rate: float,
    epsilon: float,
    row_block: int = 0,
    precision: Precision = "highest",
) -> None:
    """Take Adam steps on M, in place.

    Algorithm 1 of Kingma and Ba (ICLR 2015) with torch's default betas. The update is torch's own
    fused kernel: a single pass over M, the gradient and both moments; nothing in the loop allocates
    or waits for a device. Half the gradient with half the epsilon makes the same steps as the
    gradient. Rows of M do not see one another: they may be solved a block at a time.

    Args:
        M: Start (O×I), contiguous; becomes the result.
        problem: Gives the gradient.
        steps: Number of steps; all of them are taken.
        learning_rate: Step size, in the unit of M.
        epsilon: Added to the root of the second moment, in the unit of the gradient.
        row_block: Rows solved at a time; 0 means all.
        precision: Of the products in the steps.
    """
    if not M.numel():
        return
    for rows in problem.row_blocks(row_block):
        half_gradient = problem.half_gradient(rows, precision)
        with float32_products(M.device, precision):
            take_adam_steps(
                M[rows],
                half_gradient,
                steps=steps,
                learning_rate=learning_rate,
                epsilon=epsilon / 2,
            )


def take_adam_steps(
    M: torch.Tensor,
    write_gradient: Callable[[torch.Tensor, torch.Tensor], None],
    *,
    steps: int,
    learning_rate: float,
    epsilon: float,
) -> None:
    """Take Adam steps on a matrix, in place.

    Args:
        M: Start, contiguous; becomes the result.
        write_gradient: Writes the gradient at its first argument to its second.
        steps: Number of steps; all of them are taken.
        learning_rate: Step size, in the unit of M.
        epsilon: Added to the root of the second moment, in the unit of the gradient.
    """
    gradient = torch.empty_like(M)
    first, second = torch.zeros_like(M), torch.zeros_like(M)
    steps_taken = torch.zeros((), dtype=torch.float32, device=M.device)
    for _ in range(steps):
        write_gradient(M, gradient)
        adam(
            [M],
            [gradient],
            [first],
            [second],
            [],
            [steps_taken],
            fused=True,
            amsgrad=False,
            beta1=_BETA1,
            beta2=_BETA2,
            lr=learning_rate,
            weight_decay=0.0,
            eps=epsilon,
            maximize=False,
        )
