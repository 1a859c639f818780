"""SLERP: from the base to one expert along the arc between them.

Source: Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985, section 3.3; for model
weights as in mergekit (Goddard et al., arXiv:2403.13257): each tensor is one vector.
Differences from the source: vectors keep their lengths, as in mergekit; where the cosine is beyond
±0.9995 the way is straight.

Needs the base model. The angle is that of whole tensors: it is found in memory, or by reading the
inputs once more (:mod:`merging.angles`).
Precision: angles in float64, the sum in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: 12 N flops for N entries; a few blocks of scratch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from merging.angles import ByAngles
from merging.method import MergeMethod, Task, register
from merging.parameters import TouchParameters

if TYPE_CHECKING:
    import torch

_LINEAR_FROM = 0.9995


class SlerpParameters(TouchParameters):
    """Recipe-level parameters."""

    t: float = Field(
        default=0.5,
        description=(
            "Where on the arc: 0 gives the base model, 1 the expert. Beyond them it goes on."
        ),
    )


def arc_weights(products: torch.Tensor, task: Task) -> torch.Tensor:
    """Weights of base and expert."""
    from merging.ops.combinations import slerp_weights

    return slerp_weights(products, task.parameters.t, linear_from=_LINEAR_FROM)


ANGLES = ByAngles(weights=arc_weights, ignores=frozenset({"t"}), base="input")

register(
    MergeMethod(
        name="slerp",
        title="SLERP (spherical interpolation)",
        summary=(
            "Goes from the base to one other model along the arc between them, tensor by tensor,"
            " which keeps lengths where a straight line would shorten them. Takes two models."
        ),
        source="Shoemake, SIGGRAPH 1985; for weights as in mergekit, arXiv:2403.13257",
        merge=ANGLES.merge(),
        cost=ANGLES.cost,
        parameters=SlerpParameters,
        max_experts=1,
        separable="whole",
        rounds=True,
        staged=ANGLES.staged(),
    )
)
