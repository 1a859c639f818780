"""NuSLERP: spherical interpolation between two experts, or between their task vectors.

Source: Shoemake, SIGGRAPH 1985, section 3.3, in the form that mergekit calls NuSLERP (Goddard et
al., arXiv:2403.13257): weights instead of t, and a choice of what counts as a vector.
Differences from the source: none; angles are in float64, so nearly parallel inputs lose nothing.

Uses the base model if the recipe names one: it then interpolates task vectors. Angles are found in
memory, or by reading the inputs once more (:mod:`merging.angles`).
Precision: angles in float64, the sum in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: 12 N flops for N entries; a few blocks of scratch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from merging.angles import ByAngles
from merging.method import MergeMethod, Task, register
from merging.parameters import TouchParameters, WeightParameters

if TYPE_CHECKING:
    import torch

    from merging.ops.vectors import Kind

_LINEAR_FROM = 1 - 1e-12
_ZERO_WEIGHTS = 1e-6


class NuslerpParameters(TouchParameters):
    """Recipe-level parameters."""

    nuslerp_flatten: bool = Field(
        default=True,
        description="A tensor is one vector; false interpolates its rows or columns one by one.",
    )
    nuslerp_row_wise: bool = Field(
        default=False,
        description=(
            "Without nuslerp_flatten: vectors run along the first dimension of a tensor instead of"
            " its last, as in mergekit."
        ),
    )


def arc_weights(products: torch.Tensor, task: Task) -> torch.Tensor:
    """Weights of both experts."""
    from merging.ops.combinations import slerp_weights

    first, second = (parameters.weight for parameters in task.expert_parameters)
    total = first + second
    t = 0.5 if abs(total) < _ZERO_WEIGHTS else second / total
    return slerp_weights(products, t, linear_from=_LINEAR_FROM)


def _kind(parameters: NuslerpParameters) -> Kind:
    if parameters.nuslerp_flatten:
        return "tensor"
    return "columns" if parameters.nuslerp_row_wise else "rows"


ANGLES = ByAngles(weights=arc_weights, kind=_kind)

register(
    MergeMethod(
        name="nuslerp",
        title="NuSLERP",
        summary=(
            "Spherical interpolation between two models by weights; with a base model, between"
            " their task vectors."
        ),
        source="Shoemake, SIGGRAPH 1985; as in mergekit, arXiv:2403.13257",
        merge=ANGLES.merge(),
        cost=ANGLES.cost,
        parameters=NuslerpParameters,
        expert_parameters=WeightParameters,
        needs_base=False,
        optional_base=True,
        min_experts=2,
        max_experts=2,
        separable="whole",
        rounds=True,
        staged=ANGLES.staged(),
        default_rest="mean",
    )
)
