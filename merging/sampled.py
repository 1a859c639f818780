"""Methods that look at samples (docs/calibration.md): what their declarations have in common.

A method declares a step for linear layers (:data:`LINEAR`), and one for the scales of norms
(:data:`NORM`) if it has a rule for them. These get, for every expert in order, its tensor and what
was measured there, one at a time and both flat; ``task.shape`` has the tensor's shape. What is
measured at a linear layer of width I are the rows of its inputs: their Gram matrix (I×I) or, where
there can only be fewer than I, the rows themselves and zeros. At a norm these are the sums of
squares of its normalised inputs. Behind either stands the number of rows.

Nothing is measured at biases: a step for them (:data:`BIAS`) gets the experts alone, whole. Other
tensors are merged by the method's own function.

Instead of all these, a method may have a step for tensors with the diagonal of their Fisher
information (:data:`FISHER`): it gets every expert's tensor and that, of the same shape, in turns;
and as ``task.given``, of each expert, the Frobenius norm of the diagonals of all its tensors and
how many entries these have.
"""

from __future__ import annotations

from typing import Any

from merging.method import Cost, Geometry

LINEAR = "linear"
NORM = "norm"
BIAS = "bias"
FISHER = "fisher"
_FLOAT_BYTES = 4


def mean_cost(geometry: Geometry, _: Any) -> Cost:
    """The mean of updates: three buffers of the tensor's size."""
    entries = geometry.num_entries
    return Cost(2.0 * geometry.num_experts * entries, 3 * _FLOAT_BYTES * entries)


def features_cost(geometry: Geometry, _: Any) -> Cost:
    """Of each expert a product with its Gram matrix, once more to make that of rows; one solve.

    Half of what is read are statistics. Held: Σ V H, the mean, one expert and the right side in
    float64; the Gram matrices' sum, one more, and the solve's in float64.
    """
    rows, columns = geometry.matrix
    num_experts = geometry.num_experts // 2
    sums = num_experts * (2.0 * rows * columns**2 + 2.0 * columns**3)
    solve = 9.0 * columns**3 + 2.0 * rows * columns**2
    entries = 8 * rows * columns + 8 * columns**2
    return Cost(sums + solve, _FLOAT_BYTES * entries)


def norm_cost(geometry: Geometry, _: Any) -> Cost:
    """A few vectors."""
    entries = geometry.num_entries
    return Cost(4.0 * geometry.num_experts * entries, 8 * _FLOAT_BYTES * entries)
