"""Arcee Fusion: take over from one expert the entries that matter most, and only those.

Source: mergekit's ``arcee_fusion`` (Goddard et al., arXiv:2403.13257): an entry matters by the size
of its change times the divergence between its rows' softmaxes; those above the median plus 1.5
interquartile ranges are taken over.
Differences from the source: quartiles are exact, where mergekit samples large tensors at random.

Needs the base model. Not separable: quartiles are those of whole tensors.
Precision: in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: a softmax, three selections, and 20 N flops for N entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.blocks import elementwise_workspace
from merging.parameters import TouchParameters

if TYPE_CHECKING:
    import torch


def merge_arcee_fusion(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor. Reports the share of entries that were taken over."""
    from merging.ops.importance import fuse_important

    assert base is not None
    (expert,) = experts
    merged, share = fuse_important(base, expert)
    task.figures["share_taken_over"] = share
    return merged


def arcee_fusion_cost(geometry: Geometry, parameters: TouchParameters) -> Cost:
    """Softmaxes and selections; importances are held beside the result, and rows in blocks."""
    del parameters
    num_entries = geometry.num_entries
    return Cost(
        flops=100.0 * num_entries,
        workspace_bytes=4 * 2 * num_entries + elementwise_workspace(num_entries, num_buffers=12),
    )


register(
    MergeMethod(
        name="arcee_fusion",
        title="Arcee Fusion",
        summary=(
            "Takes over from a second model the entries whose change matters most, and leaves the"
            " others as they are in the base."
        ),
        source="As in mergekit, arXiv:2403.13257",
        merge=merge_arcee_fusion,
        cost=arcee_fusion_cost,
        parameters=TouchParameters,
        max_experts=1,
        separable="whole",
    )
)
