"""TSV-M: the leading singular vectors of every task, made orthogonal to one another, added up.

Source: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR
2025, arXiv:2412.00081, algorithm 1: of each of n task vectors ⌊min(O, I)/n⌋ singular triplets are
kept; left and right vectors of all are replaced by the nearest orthonormal ones.
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
from typing import TYPE_CHECKING

from merging.calibrated import CalibratedScale, UpdateRule
from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.forms import SVD_FLOPS
from merging.parameters import TouchParameters

if TYPE_CHECKING:
    import torch

    from merging.ops.calibration import Calibration


class TsvMParameters(TouchParameters):
    """Recipe-level parameters."""

    scale: CalibratedScale = 1.0


def find_update(
    base: torch.Tensor, experts: Iterator[torch.Tensor], task: Task
) -> tuple[torch.Tensor, Calibration]:
    """A layer's update. Reports norms and the share of the task vectors that is kept."""
    from merging.ops.spectral_merge import (
        Triplets,
        decorrelate,
        leading_triplets,
        without_rounding,
    )
    from merging.ops.task_sums import update_by_sums

    parts: list[Triplets] = []

    def visit(T: torch.Tensor) -> None:
        count = max(1, min(T.shape) // len(task.expert_parameters))
        parts.append(without_rounding(leading_triplets(T, count)))

    return update_by_sums(base, experts, task, lambda _: decorrelate(parts), visit=visit)


def tsv_m_cost(geometry: Geometry, parameters: TsvMParameters) -> Cost:
    """A decomposition for each expert and two more; the triplets of all are held."""
    del parameters
    entries, smaller = geometry.num_entries, min(geometry.matrix)
    flops = SVD_FLOPS * (geometry.num_experts + 2) * entries * smaller
    sides = sum(geometry.matrix) * smaller
    return Cost(flops, 4 * (6 * entries + 4 * smaller**2 + 3 * sides))


RULE = UpdateRule(find=find_update, cost=tsv_m_cost, streaming=True, calibrated="calibrated")

register(
    MergeMethod(
        name="tsv_m",
        title="TSV-M (task singular vectors)",
        summary=(
            "Keeps the strongest singular directions of every task and makes them orthogonal to one"
            " another, so that tasks do not overlap. Needs no data."
        ),
        source="Gargiulo et al., CVPR 2025, arXiv:2412.00081, algorithm 1",
        merge=RULE.merge(),
        cost=tsv_m_cost,
        parameters=TsvMParameters,
        separable="whole",
        streaming=True,
        takes_adapters=True,
        default_touch="linear",
        default_rest="mean",
        staged=RULE.staged(),
    )
)
