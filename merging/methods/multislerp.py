"""Multi-SLERP: a weighted mean of several experts on a sphere, by way of one tangent space.

Source: mergekit's ``multislerp`` (Goddard et al., arXiv:2403.13257): directions are projected onto
the tangent space at their weighted mean, averaged there, and brought back to the sphere; the length
is the weighted mean of the lengths.
Differences from the source: short lengths are raised to eps, not enlarged by it; it all happens on
coefficients of the inputs.

Uses the base model if the recipe names one: it then merges task vectors. Not separable: angles are
those of whole tensors.
Precision: angles in float64, the sum in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: E² + 2 E flops per entry for E experts; a few blocks of scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.errors import NumericalError, RecipeError
from merging.method import (
    Cost,
    Geometry,
    MergeMethod,
    Task,
    TouchParameters,
    WeightParameters,
    register,
)

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


def merge_multislerp(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor.

    Raises:
        RecipeError: ``bad_parameter`` if weights that should be normalised add up to 0.
        NumericalError: ``did_not_converge`` if the directions of three tensors or more cancel out.
    """
    from merging.ops.combinations import combine, inner_products

    tensors = list(experts)
    products = inner_products(tensors, base)
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
        if len(tensors) > 2:
            raise NumericalError(
                f"The weighted directions of {task.tensor_name!r} cancel out, so they have no mean"
                " on the sphere. Change the weights.",
                code="did_not_converge",
                context={"tensor_name": task.tensor_name},
            )
        found = weights
    return combine(tensors, found[None], base, out=task.out)


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


def multislerp_cost(geometry: Geometry, parameters: MultislerpParameters) -> Cost:
    """Inner products in float64, and a weighted sum."""
    del parameters
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    return Cost(
        flops=(2.0 * num_experts**2 + 2 * num_experts) * num_entries,
        workspace_bytes=geometry.block_bytes(num_buffers=2 * num_experts + 5),
    )


register(
    MergeMethod(
        name="multislerp",
        title="Multi-SLERP",
        summary=(
            "A weighted mean of directions on a sphere, for any number of models; with a base model"
            " it merges task vectors."
        ),
        source="As in mergekit, arXiv:2403.13257",
        merge=merge_multislerp,
        cost=multislerp_cost,
        parameters=MultislerpParameters,
        expert_parameters=WeightParameters,
        needs_base=False,
        optional_base=True,
        separable="whole",
        rounds=True,
        default_rest="mean",
    )
)
