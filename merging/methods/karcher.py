"""Karcher mean: the point on the sphere that is nearest to all experts, along arcs.

Source: Karcher, "Riemannian center of mass and mollifier smoothing", 1977; for models
arXiv:2603.04972. Iteration: average the logarithms of the directions at the current mean, go there
along the arc, until the step is below a tolerance; the length is the mean of the lengths.
Differences from the source: uniform weights, as in mergekit.

Uses no base model. Angles are those of whole tensors: they are found in memory, or by reading the
inputs once more (:mod:`merging.angles`).
Precision: angles in float64, the sum in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: 2 E² + 2 E flops per entry for E experts whatever the number of
iterations, which happen on coefficients of the inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from merging.angles import ByAngles
from merging.method import MergeMethod, Task, register
from merging.parameters import TouchParameters

if TYPE_CHECKING:
    import torch


class KarcherParameters(TouchParameters):
    """Recipe-level parameters."""

    max_iter: int = Field(default=10, ge=0, le=10_000, description="Most iterations.")
    tol: float = Field(
        default=1e-5,
        gt=0,
        description="Iteration ends with a step below this angle, in radians; as for lengths.",
    )


def mean_weights(products: torch.Tensor, task: Task) -> torch.Tensor:
    """Weights of the experts in their mean. Reports the number of iterations."""
    import torch

    lengths = products[0].diagonal().sqrt()
    is_valid = lengths > task.parameters.tol
    if len(lengths) == 1 or not bool(is_valid.any()):
        return torch.full_like(lengths, 1 / len(lengths))[None]
    mean = _mean_direction(products[0], is_valid, task)
    return (mean * lengths.mean())[None]


def _mean_direction(products: torch.Tensor, is_valid: torch.Tensor, task: Task) -> torch.Tensor:
    """Coefficients of the inputs in the mean direction; ⟨x, y⟩ is x · products · y."""
    import torch

    tol = task.parameters.tol

    def length(x: torch.Tensor) -> torch.Tensor:
        return (x @ products @ x).clamp(min=0).sqrt()

    units = torch.diag(is_valid / products.diagonal().sqrt().where(is_valid, 1))[is_valid]
    mean = units.mean(dim=0)
    mean = units[0] if length(mean) < tol else mean / length(mean)
    for number in range(task.parameters.max_iter):
        cosines = (units @ products @ mean).clamp(-1, 1)
        angles = torch.acos(cosines)
        factors = (angles / torch.sin(angles)).where(angles >= tol, 0)
        way = (factors[:, None] * (units - torch.outer(cosines, mean))).mean(dim=0)
        step = length(way)
        task.figures["iterations"] = number
        if step < tol:
            break
        mean = torch.cos(step) * mean + torch.sin(step) / step * way
        mean = mean / length(mean)
    return mean


ANGLES = ByAngles(weights=mean_weights, ignores=frozenset({"max_iter", "tol"}), base="unused")

register(
    MergeMethod(
        name="karcher",
        title="Karcher mean",
        summary=(
            "The mean of the models' directions on a sphere, with the mean of their lengths:"
            " spherical averaging without a favourite."
        ),
        source="Karcher 1977; for models arXiv:2603.04972",
        merge=ANGLES.merge(),
        cost=ANGLES.cost,
        parameters=KarcherParameters,
        needs_base=False,
        separable="whole",
        rounds=True,
        staged=ANGLES.staged(),
        default_rest="mean",
    )
)
