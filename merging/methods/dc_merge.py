"""DC-Merge: what tasks say in a basis that covers the strongest directions of all of them.

Source: "DC-Merge", CVPR 2026, arXiv:2603.06242, and the authors' code for full fine-tuning: of each
of n task vectors ⌊min(O, I)/n⌋ singular triplets are kept, T̂_i; their left and right vectors,
replaced by the nearest orthonormal ones, are the bases U and V. Each C_i = Uᵀ T̂_i V keeps its
largest entries; these are merged entry by entry (mean of those with the sign of their sum), and of
the result C the blocks of each task's own directions remain: the update is U C Vᵀ. The authors'
code for adapters smooths the singular values of each T̂_i first.
Differences from the source: an expert equal to the base takes no part; a layer that a single expert
changed gets that expert's task vector; triplets beyond the rank of a task vector, as that of an
adapter, are left out, since their vectors are rounding and push the others aside.

Needs the base model. Not separable. Experts are read one at a time.
Precision: float32 (float64 if the base or the first expert is), one rounding at the end.
Deterministic: yes. The sign of singular vectors cancels.
Cost: n + 2 singular value decompositions, about 14 O I min(O, I) flops each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from merging.calibrated import CalibratedScale, UpdateRule
from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.forms import SVD_FLOPS
from merging.parameters import TouchParameters

if TYPE_CHECKING:
    import torch

    from merging.ops.calibration import Calibration


class DcMergeParameters(TouchParameters):
    """Recipe-level parameters."""

    scale: CalibratedScale = 1.0
    density: float = Field(
        default=0.001,
        gt=0,
        le=1,
        description=(
            "Share of the entries of each task's update in the common basis that are kept, largest"
            " magnitudes first; at least one."
        ),
    )
    smoothing: Literal["none", "linear", "average"] = Field(
        default="none",
        description=(
            "What the kept singular values of a task become, with the same sum: themselves; values"
            " that fall off in a straight line ('linear'); or their mean. The authors smooth those"
            " of adapters."
        ),
    )
    rho: float = Field(
        default=5.0,
        ge=1,
        description="With 'linear', the largest value over the smallest, unless it is less before.",
    )


def find_update(
    base: torch.Tensor, experts: Iterator[torch.Tensor], task: Task
) -> tuple[torch.Tensor, Calibration]:
    """A layer's update. Reports norms and the share of the task vectors that is kept."""
    from merging.ops.cover import merge_in_cover, smoothed
    from merging.ops.spectral_merge import Triplets, leading_triplets, without_rounding
    from merging.ops.task_sums import update_by_sums

    given = task.parameters
    parts: list[Triplets] = []

    def visit(T: torch.Tensor) -> None:
        count = max(1, min(T.shape) // len(task.expert_parameters))
        part = without_rounding(leading_triplets(T, count))
        parts.append(smoothed(part, given.smoothing, given.rho))

    return update_by_sums(
        base, experts, task, lambda _: merge_in_cover(parts, given.density), visit=visit
    )


def dc_merge_cost(geometry: Geometry, parameters: DcMergeParameters) -> Cost:
    """A decomposition for each expert and two more; the triplets and the C_i of all are held."""
    del parameters
    entries, smaller = geometry.num_entries, min(geometry.matrix)
    flops = SVD_FLOPS * (geometry.num_experts + 2) * entries * smaller
    sides = sum(geometry.matrix) * smaller
    held = (4 + geometry.num_experts) * smaller**2
    return Cost(flops, 4 * (6 * entries + held + 3 * sides))


RULE = UpdateRule(find=find_update, cost=dc_merge_cost, streaming=True, calibrated="calibrated")

register(
    MergeMethod(
        name="dc_merge",
        title="DC-Merge",
        summary=(
            "Merges what each task says in a basis that covers the strongest directions of all of"
            " them, and keeps every task to its own directions. Needs no data."
        ),
        source="DC-Merge, CVPR 2026, arXiv:2603.06242",
        merge=RULE.merge(),
        cost=dc_merge_cost,
        parameters=DcMergeParameters,
        separable="whole",
        streaming=True,
        takes_adapters=True,
        default_touch="linear",
        default_rest="mean",
        staged=RULE.staged(),
    )
)
