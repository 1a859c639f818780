"""SCE: select the entries where experts differ most, weigh experts by energy, elect, average.

Source: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv:2408.07990, section 3.3:
Select, Calculate, Erase.
Differences from the source: as in mergekit, the share is one of the entries whose variance is not
0; energies are means of squares, and experts weigh the same where these add up to less than 1e-6
(task vectors of rms under about 6e-4).

Needs the base model. Not separable: the selection is among all entries of a tensor.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes; of equal variances at the threshold the lowest flat indices are selected.
Cost: a selection and 16 E N flops for E experts of N entries; E + 6 blocks of scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import (
    Cost,
    Geometry,
    MergeMethod,
    Task,
    TouchParameters,
    register,
)

if TYPE_CHECKING:
    import torch


class SceParameters(TouchParameters):
    """Recipe-level parameters."""

    select_topk: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description=(
            "Share of entries to merge, those with the largest variance over experts first; 1"
            " merges all, 0 gives the base."
        ),
    )
    int8_mask: bool = Field(
        default=False,
        description="Accepted for mergekit recipes; changes nothing, since no mask is ever stored.",
    )


def merge_sce(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor. Reports the experts' weights as figures."""
    from merging.ops.energies import merge_by_energy

    assert base is not None
    merged, weights = merge_by_energy(base, list(experts), task.parameters.select_topk, task.out)
    task.figures["expert_weights"] = weights
    return merged


def sce_cost(geometry: Geometry, parameters: SceParameters) -> Cost:
    """Three passes over the task vectors, and a selection."""
    del parameters
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    return Cost(
        flops=(24.0 * num_experts + 20) * num_entries,
        workspace_bytes=4 * num_entries
        + num_entries // 4
        + geometry.block_bytes(num_buffers=num_experts + 12),
    )


register(
    MergeMethod(
        name="sce",
        title="SCE (Select, Calculate, Erase)",
        summary=(
            "Selects the entries where the experts differ most, weighs experts by the size of their"
            " updates, and averages the entries that agree with an elected sign."
        ),
        source="Wan et al., FuseChat, arXiv:2408.07990, section 3.3",
        merge=merge_sce,
        cost=sce_cost,
        parameters=SceParameters,
        separable="whole",
        rounds=True,
    )
)
