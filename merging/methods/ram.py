"""RAM: what one expert alone has changed is kept whole, what several have changed is averaged.

Source: "Reinforced Agent Merging", arXiv:2601.13572; as in mergekit: an expert has changed an entry
if its task vector there is larger than ``epsilon``.
Differences from the source: none.

Needs the base model. Separable anywhere: each entry of the result depends on that entry alone.
Precision: computed in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: 6 E N flops for E experts of N entries; a few blocks of scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.blocks import elementwise_workspace
from merging.parameters import TouchParameters

if TYPE_CHECKING:
    import torch


class RamParameters(TouchParameters):
    """Recipe-level parameters."""

    epsilon: float = Field(
        default=1e-5,
        ge=0,
        description="Entries of a task vector up to this size count as unchanged, and are dropped.",
    )


def merge_ram(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, or a tile of one."""
    from merging.ops.changed_entries import average_changed

    assert base is not None
    return average_changed(base, list(experts), task.parameters.epsilon)


def ram_cost(geometry: Geometry, parameters: RamParameters) -> Cost:
    """Half a dozen operators per entry of an expert."""
    del parameters
    num_entries = geometry.num_entries
    return Cost(
        flops=6.0 * geometry.num_experts * num_entries,
        workspace_bytes=elementwise_workspace(num_entries, num_buffers=geometry.num_experts + 4),
    )


register(
    MergeMethod(
        name="ram",
        title="RAM (Reinforced Agent Merging)",
        summary=(
            "Keeps in full what one expert alone has changed, and averages what several have"
            " changed: for experts trained by reinforcement, whose updates are sparse."
        ),
        source="Reinforced Agent Merging, arXiv:2601.13572",
        merge=merge_ram,
        cost=ram_cost,
        parameters=RamParameters,
    )
)
