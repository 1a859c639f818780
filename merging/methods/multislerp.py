"""Multi-SLERP: a weighted mean of several experts on a sphere, by way of one tangent space.

Source: mergekit's ``multislerp`` (Goddard et al., arXiv:2403.13257): directions are projected onto
the tangent space at their weighted mean, averaged there, and brought back to the sphere; the length
is the weighted mean of the lengths.
Differences from the source: short lengths are raised to eps, not enlarged by it; it all happens on
coefficients of the inputs.

Uses the base model if the recipe names one: it then merges task vectors. Angles are those of whole
tensors: they are found in memory, or by reading the inputs once more (:mod:`merging.angles`).
Precision: angles in float64, the sum in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: E² + 2 E flops per entry for E experts; a few blocks of scratch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from merging.angles import ByAngles
from merging.errors import NumericalError, RecipeError
from merging.method import MergeMethod, Task, register
from merging.parameters import TouchParameters, WeightParameters

if TYPE_CHECKING:
    import torch


class MultislerpParameters(TouchParameters):
    """Recipe-level parameters."""

    normalize_weights: bool = Field(
        default=True, description="Divide the weights by their sum first."
    )
    eps: float = Field(
        default=1e-8, gt=0, description="Shortest length that anything is divided by."
    )


def mean_weights(products: torch.Tensor, task: Task) -> torch.Tensor:
    """Weights of the experts in their mean.

    Raises:
        RecipeError: ``bad_parameter`` if weights that should be normalised add up to 0.
        NumericalError: ``did_not_converge`` if the directions of three tensors or more cancel out.
    """
    weights = products.new_tensor([parameters.weight for parameters in task.expert_parameters])
    if task.parameters.normalize_weights:
        if weights.sum() == 0:
            raise RecipeError(
                f"The weights of {task.tensor_name!r} add up to 0, so that they cannot be"
                " normalised. Change the weights or set normalize_weights to false.",
                code="bad_parameter",
                context={"tensor_name": task.tensor_name},
            )
        weights = weights / weights.sum()
    found = _sphere_weights(products[0], weights, task.parameters.eps)
    if found is None:
        if len(weights) > 2:
            raise NumericalError(
                f"The weighted directions of {task.tensor_name!r} cancel out, so they have no mean"
                " on the sphere. Change the weights.",
                code="did_not_converge",
                context={"tensor_name": task.tensor_name},
            )
        found = weights
    return found[None]


def _sphere_weights(
    products: torch.Tensor, weights: torch.Tensor, eps: float
) -> torch.Tensor | None:
    """Coefficients of the inputs in the mean; None if their weighted directions cancel out.

    Vectors are written in the inputs' coefficients, so that ⟨x, y⟩ is x · products · y.
    """
    import torch

    lengths = products.diagonal().sqrt()
    if len(weights) == 1:
        return torch.ones_like(weights)
    units = torch.diag(1 / lengths.clamp(min=eps))
    mean = weights @ units
    length = (mean @ products @ mean).clamp(min=0).sqrt()
    if length < eps:
        return weights if bool((lengths == 0).all()) else None
    mean = mean / length
    tangents = units - torch.outer(units @ products @ mean, mean)
    way = weights @ tangents
    angle = (way @ products @ way).clamp(min=0).sqrt() + eps
    direction = mean * torch.cos(angle) + way * (torch.sin(angle) / angle)
    return direction * (lengths @ weights)


ANGLES = ByAngles(weights=mean_weights, ignores=frozenset({"normalize_weights", "eps"}))

register(
    MergeMethod(
        name="multislerp",
        title="Multi-SLERP",
        summary=(
            "A weighted mean of directions on a sphere, for any number of models; with a base model"
            " it merges task vectors."
        ),
        source="As in mergekit, arXiv:2403.13257",
        merge=ANGLES.merge(),
        cost=ANGLES.cost,
        parameters=MultislerpParameters,
        expert_parameters=WeightParameters,
        needs_base=False,
        optional_base=True,
        separable="whole",
        rounds=True,
        staged=ANGLES.staged(),
        default_rest="mean",
    )
)
