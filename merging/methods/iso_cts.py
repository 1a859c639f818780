"""Iso-CTS: common directions of the sum, and directions of each task's own, all equally strong.

Source: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
Subspaces", ICML 2025, arXiv:2502.04959, algorithm 2.
Differences from the source: the factor on the update follows a rule unless a number is given
(:mod:`merging.calibrated`); directions that no expert has stay empty, so that adapters, which have
few, are not filled up with noise; an expert equal to the base takes no part; a layer that a single
expert changed gets that expert's task vector.

Needs the base model, and all experts at once: the common directions come first. Not separable.
Precision: float32 (float64 if the base or the first expert is), one rounding at the end.
Deterministic: yes. The sign of singular vectors cancels.
Cost: n + 3 singular value decompositions, about 14 O I min(O, I) flops each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.calibrated import CalibratedScale, UpdateRule
from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.forms import SVD_FLOPS
from merging.parameters import TouchParameters

if TYPE_CHECKING:
    import torch

    from merging.ops.calibration import Calibration


class IsoCtsParameters(TouchParameters):
    """Recipe-level parameters."""

    scale: CalibratedScale = "calibrated"
    common_space_fraction: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description=(
            "Share of directions taken from the sum of the task vectors; the others are shared out"
            " among the tasks. 1 gives Iso-C."
        ),
    )


def find_update(
    base: torch.Tensor, experts: Iterator[torch.Tensor], task: Task
) -> tuple[torch.Tensor, Calibration]:
    """A layer's update. Reports norms and the share of the task vectors that is kept."""
    from merging.ops.spectral_merge import common_and_task_specific
    from merging.ops.task_sums import update_by_sums

    vectors: list[torch.Tensor] = []
    share = task.parameters.common_space_fraction
    return update_by_sums(
        base,
        experts,
        task,
        lambda sums: common_and_task_specific(vectors, sums.total, share),
        visit=lambda T: vectors.append(T.clone()),
    )


def iso_cts_cost(geometry: Geometry, parameters: IsoCtsParameters) -> Cost:
    """Decompositions of the sum, of every expert, of both sides; all task vectors are held."""
    del parameters
    entries, smaller = geometry.num_entries, min(geometry.matrix)
    flops = SVD_FLOPS * (geometry.num_experts + 3) * entries * smaller
    sides = sum(geometry.matrix) * smaller
    held = (6 + geometry.num_experts) * entries
    return Cost(flops, 4 * (held + 4 * smaller**2 + 3 * sides))


RULE = UpdateRule(find=find_update, cost=iso_cts_cost, streaming=True, calibrated="calibrated")

register(
    MergeMethod(
        name="iso_cts",
        title="Iso-CTS",
        summary=(
            "Joins the common directions of all tasks with directions of each task's own, all"
            " equally strong: for many tasks. Needs no data."
        ),
        source="Marczak et al., ICML 2025, arXiv:2502.04959, algorithm 2",
        merge=RULE.merge(),
        cost=iso_cts_cost,
        parameters=IsoCtsParameters,
        separable="whole",
        streaming=True,
        takes_adapters=True,
        default_touch="linear",
        default_rest="mean",
        staged=RULE.staged(),
    )
)
