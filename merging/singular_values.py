"""The step that may follow any method: calibration of its update's singular values.

Plans know it by a name of its own (:data:`SVC`, also the parameter that asks for it). It is given
what the method made and reads the base and the experts once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from merging.method import Cost, Geometry, Step, Task
from merging.ops.forms import SVD_FLOPS

if TYPE_CHECKING:
    import torch

SVC = "svc"


def _calibrate(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    from merging.ops.singular_values import calibrate_singular_values

    assert base is not None
    merged = task.given[0].view(base.shape)
    return calibrate_singular_values(base, merged, experts, task.parameters.svc, task)


def _cost(geometry: Geometry, parameters: Any) -> Cost:
    """A decomposition and a product for each expert, in float64."""
    del parameters
    entries, smaller = geometry.num_entries, min(geometry.matrix)
    flops = 2 * (SVD_FLOPS + 2.0 * geometry.num_experts) * entries * smaller
    return Cost(flops, 8 * (7 * entries + 4 * smaller**2))


CALIBRATE = Step(
    merge=_calibrate, cost=_cost, separable="whole", streaming=True, takes_adapters=True
)
