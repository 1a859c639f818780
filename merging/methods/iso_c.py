"""Iso-C: the sum of the task vectors with all directions equally strong.

Source: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
Subspaces", ICML 2025, arXiv:2502.04959, algorithm 1: with U S Vᵀ the decomposition of Σ T_i, the
update is mean(S) U Vᵀ, times a factor that the paper tunes (1 to 1.5).
Differences from the source: the factor follows a rule unless a number is given
(:mod:`merging.calibrated`); directions that no expert has stay empty, so that adapters are not
filled up with noise; a layer that a single expert changed gets that expert's task vector.

Needs the base model. Not separable. Experts are read one at a time.
Precision: float32 (float64 if the base or the first expert is), one rounding at the end.
Deterministic: yes. Cost: a singular value decomposition, about 14 O I min(O, I) flops.
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


class IsoCParameters(TouchParameters):
    """Recipe-level parameters."""

    scale: CalibratedScale = "calibrated"


def find_update(
    base: torch.Tensor, experts: Iterator[torch.Tensor], task: Task
) -> tuple[torch.Tensor, Calibration]:
    """A layer's update. Reports norms and the share of the task vectors that is kept."""
    from merging.ops.isotropic import flatten_spectrum
    from merging.ops.task_sums import update_by_sums

    return update_by_sums(base, experts, task, lambda sums: flatten_spectrum(sums.total))


def iso_c_cost(geometry: Geometry, parameters: IsoCParameters) -> Cost:
    """One decomposition; the sum, the weighted sum, a task vector, and what LAPACK takes."""
    del parameters
    entries, smaller = geometry.num_entries, min(geometry.matrix)
    flops = SVD_FLOPS * entries * smaller + 4.0 * geometry.num_experts * entries
    return Cost(flops, 4 * (7 * entries + 4 * smaller**2))


RULE = UpdateRule(find=find_update, cost=iso_c_cost, streaming=True, calibrated="calibrated")

register(
    MergeMethod(
        name="iso_c",
        title="Iso-C",
        summary=(
            "The sum of the task vectors with a flat spectrum, so that no task's strong directions"
            " drown another's. Needs no data."
        ),
        source="Marczak et al., ICML 2025, arXiv:2502.04959, algorithm 1",
        merge=RULE.merge(),
        cost=iso_c_cost,
        parameters=IsoCParameters,
        separable="whole",
        streaming=True,
        takes_adapters=True,
        default_touch="linear",
        default_rest="mean",
        staged=RULE.staged(),
    )
)
