"""Functions of A by Chebyshev polynomials: products only, no decomposition.

A solution M₀ + (B − M₀ A) g(A) is a polynomial in A where g is one, and every smooth g is one on
the interval of A's eigenvalues to any accuracy. A term costs one product of O×I and I×I, whatever
g is; its number grows with the steepness of g, for (1 − exp(−λt)) / λ like √(t λ_max). Where an
eigendecomposition is slow (many columns, few rows, a GPU) this is the cheaper way.

Source: Trefethen, "Approximation Theory and Approximation Practice" (2013), chapters 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from merging.ops.precision import Precision, float32_products, right_product
from merging.ops.problem import LayerProblem, SolveError

_MARGIN = 1.1
"""The interval ends this far above the largest eigenvalue found, which is found from below."""

_FINEST = 1e-14
"""Coefficients are exact to less than this share of the largest value."""

_MAX_DEGREE = 4096

Values = npt.NDArray[np.float64]
Function = Callable[[Values], Values]
"""A function of eigenvalues, entry by entry, in float64."""


def exponential(t: float) -> Function:
    """(1 − exp(−λt)) / λ: gradient flow from M₀ up to time t."""

    def g(values: Values) -> Values:
        nonzero = np.maximum(values, 1e-12 / t)
        shares: Values = -np.expm1(-t * nonzero) / nonzero
        return shares

    return g


def momentum_descent(steps: int, learning_rate: float, momentum: float) -> Function:
    """What gradient descent with momentum has done after so many steps from M₀."""

    def g(values: Values) -> Values:
        x, velocity = np.zeros_like(values), np.zeros_like(values)
        for _ in range(steps):
            velocity = momentum * velocity + 2 * (values * x - 1)
            x = x - learning_rate * velocity
        return x

    return g


def largest_eigenvalue(A: torch.Tensor) -> float:
    """The largest eigenvalue of a symmetric matrix, or a few per cent less.

    Block power iteration from a fixed start; deterministic.
    """
    generator = torch.Generator().manual_seed(0)
    block = torch.randn((len(A), min(16, len(A))), generator=generator, dtype=torch.float64)
    basis = block.to(A)
    for _ in range(10):
        basis = torch.linalg.qr(A @ basis).Q
    return float(torch.linalg.eigvalsh(basis.t() @ A @ basis)[-1])


def expand_function(g: Function, end: float, dtype: torch.dtype) -> list[float]:
    """Chebyshev coefficients of g on [0, end], up to the last that counts in the dtype.

    Those left out are below one unit of rounding of g's largest value, and fall off fast.

    Raises:
        SolveError: g is not finite, or too steep for a polynomial.
    """
    tolerance = max(_FINEST, torch.finfo(dtype).eps)
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(g(np.linspace(0, end, 65))).max()
    degree = 32
    while degree <= _MAX_DEGREE and np.isfinite(largest):
        found = _interpolate(g, end, degree)
        last = int(np.flatnonzero(np.abs(found) > tolerance * largest)[-1:].sum())
        if last <= degree * 3 // 4:
            return [float(coefficient) for coefficient in found[: last + 1]]
        degree *= 2
    raise SolveError("its iteration diverges; use a smaller learning_rate or fewer steps")


def _interpolate(g: Function, end: float, degree: int) -> Values:
    """Coefficients of the polynomial through g at the extrema of the last one: a cosine transform.

    numpy's own interpolation loses digits with the square of the degree.
    """
    values = g(end * (np.cos(np.pi * np.arange(degree + 1) / degree) + 1) / 2)
    found: Values = np.fft.rfft(np.concatenate([values, values[-2:0:-1]])).real / degree
    found[[0, -1]] /= 2
    return found


def polynomial_solution(
    problem: LayerProblem,
    coefficients: Sequence[float],
    end: float,
    *,
    start_scale: float = 1.0,
    row_block: int = 0,
    precision: Precision = "highest",
) -> torch.Tensor:
    """M₀ + (B − M₀ A) p(A), written over the problem's ``total``.

    Args:
        problem: Read to the end.
        coefficients: Of p, in Chebyshev polynomials on [0, end].
        end: Not below the largest eigenvalue of A.
        start_scale: M₀ is the sum of the task vectors times this.
        row_block: Rows solved at a time; 0 means all.
        precision: Of the products.
    """
    shifted = (4 / end) * problem.A
    shifted.diagonal().sub_(2)  # twice A, moved to [-1, 1]
    for rows in problem.row_blocks(row_block):
        M0 = problem.combine(1, rows) * start_scale
        multiply = right_product(shifted, len(M0), precision)
        current = torch.addmm(problem.B[rows], M0, problem.A, alpha=-1)
        solution = M0.add_(current, alpha=coefficients[0])
        previous, scratch = torch.zeros_like(current), torch.empty_like(current)
        with float32_products(shifted.device, precision):
            for number, coefficient in enumerate(coefficients[1:]):
                multiply(current, scratch)
                following = scratch.mul_(0.5) if number == 0 else scratch.sub_(previous)
                previous, current, scratch = current, following, previous
                solution.add_(current, alpha=coefficient)
        problem.store(rows, solution)
    return problem.total


def interval_end(A: torch.Tensor) -> float:
    """Where to end the interval of A's eigenvalues; never 0."""
    return max(_MARGIN * largest_eigenvalue(A), math.ulp(1.0))
