"""OPCM: experts added one after another, each without what is in the way of those before it.

Source: Tang et al., "Merging Models on the Fly Without Retraining: A Sequential Approach to
Scalable Continual Model Merging", NeurIPS 2025, arXiv:2501.09522, section 4, and FusionBench's
code. With U S Vᵀ the decomposition of the sum so far of a linear layer and r its first singular
value beyond a share α of their total, the next T loses the block of the first r directions of
either side and, in the others, the diagonal of Uᵀ T V. All other tensors are added as they are.
After each expert the whole model's update is scaled to the experts' mean norm so far; since that
changes no direction, it is done once, at the end.
Differences from the source: experts come in the recipe's order; directions in which the sum so far
holds nothing but rounding lose nothing.

Needs the base model. Not separable: the last scale depends on all tensors. Experts are read one at
a time.
Precision: float32 (float64 if the base or the first expert is), one rounding at the end.
Deterministic: yes, and the order of experts matters. The sign of singular vectors cancels.
Cost: E - 1 singular value decompositions for E experts, about 14 O I min(O, I) flops each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import (
    Cost,
    Geometry,
    MergeMethod,
    Reduction,
    Staged,
    Step,
    Task,
    register,
)
from merging.ops.blocks import elementwise_workspace
from merging.ops.forms import SVD_FLOPS
from merging.parameters import TouchParameters
from merging.roles import describe_tensor

if TYPE_CHECKING:
    import torch


class OpcmParameters(TouchParameters):
    """Recipe-level parameters."""

    alpha: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description=(
            "Share of the singular values' total that is protected from the next expert: 0 lets"
            " it change all but the diagonal."
        ),
    )


def merge_opcm(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor as if it were the whole model."""
    assert base is not None
    update, squares = _add_up(base, experts, task)
    return _scaled(base, update, _scale([squares]), task)


def find_update(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """A tensor's update before it is scaled, its squared norm, and those of the task vectors."""
    import torch

    assert base is not None
    update, squares = _add_up(base, experts, task)
    return torch.cat([update.view(-1), update.new_tensor(squares)])


def find_scale(_: torch.Tensor | None, squares: Iterator[torch.Tensor], task: Task) -> torch.Tensor:
    """Of the whole model."""
    import torch

    del task
    return torch.tensor([_scale([found.tolist() for found in squares])], dtype=torch.float64)


def finish_opcm(
    base: torch.Tensor | None, update: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Add a tensor's update, or a tile of it, at the model's scale."""
    assert base is not None
    scale, _ = task.given
    return _scaled(base, next(update), float(scale), task)


def _add_up(
    base: torch.Tensor, experts: Iterator[torch.Tensor], task: Task
) -> tuple[torch.Tensor, list[float]]:
    from merging.ops.layers import naming
    from merging.ops.precision import float32_products
    from merging.ops.sequence import add_in_sequence

    is_linear = describe_tensor(task.tensor_name, base.shape, {}).is_linear
    with float32_products(base.device), naming(task):
        return add_in_sequence(base, experts, task.parameters.alpha if is_linear else None)


def _scale(squares: list[list[float]]) -> float:
    """The mean norm of the experts' task vectors over the update's, of all tensors together."""
    update, *experts = (math.sqrt(math.fsum(found)) for found in zip(*squares, strict=True))
    return sum(experts) / len(experts) / update if update > 0 else 1.0


def _scaled(base: torch.Tensor, update: torch.Tensor, scale: float, task: Task) -> torch.Tensor:
    task.figures["scale"] = scale
    return (update.view(base.shape) * scale).add_(base.to(update.dtype))


def opcm_cost(geometry: Geometry, parameters: OpcmParameters) -> Cost:
    """A decomposition for each expert but the first; the sum, a task vector, what LAPACK takes."""
    del parameters
    entries, smaller = geometry.num_entries, min(geometry.matrix)
    if len(geometry.shape) != 2:
        return Cost(2.0 * geometry.num_experts * entries, 4 * 4 * entries)
    flops = geometry.num_experts * (SVD_FLOPS + 6.0) * entries * smaller
    return Cost(flops, 4 * (7 * entries + 4 * smaller**2))


def _adding_cost(geometry: Geometry, parameters: OpcmParameters) -> Cost:
    del parameters
    workspace = elementwise_workspace(geometry.num_entries, num_buffers=0)
    return Cost(2.0 * geometry.num_entries, 2 * workspace)


def _small_cost(geometry: Geometry, parameters: OpcmParameters) -> Cost:
    del parameters
    return Cost(2.0 * geometry.num_experts, 1024 * geometry.num_experts)


STAGED = Staged(
    reductions=(
        Reduction(
            name="updates",
            map=Step(
                merge=find_update,
                cost=opcm_cost,
                separable="whole",
                streaming=True,
                takes_adapters=True,
            ),
            entries=lambda g, _: g.num_entries + 1 + g.num_experts,
            part=lambda g: slice(g.num_entries, None),
            combine=Step(
                merge=find_scale, cost=_small_cost, separable="whole", streaming=True, flat=True
            ),
            combined_entries=lambda _: 1,
            combined_dtype="F64",
        ),
    ),
    finish=Step(merge=finish_opcm, cost=_adding_cost),
    group=lambda _parameters, _experts: "model",
    keeps_map=True,
)

register(
    MergeMethod(
        name="opcm",
        title="OPCM (orthogonal projection-based continual merging)",
        summary=(
            "Adds experts one after another, each without the directions that those before it use,"
            " and keeps the update as large as a single expert's. The order of models matters."
        ),
        source="Tang et al., NeurIPS 2025, arXiv:2501.09522, section 4",
        merge=merge_opcm,
        cost=opcm_cost,
        parameters=OpcmParameters,
        separable="whole",
        streaming=True,
        takes_adapters=True,
        symmetric=False,
        staged=STAGED,
    )
)
