"""Model Breadcrumbs: drop the smallest and the very largest entries, add up the rest.

Source: Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024, arXiv:2312.06795, section 3.
Differences from the source: as in mergekit, ``density`` is what is left and ``gamma`` what is cut
off the top, of each tensor; fewer large entries are cut where the two add up to more than 1.

Needs the base model. Not separable: thresholds depend on the whole tensor.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes; of equal magnitudes at a threshold the lowest flat index counts as the largest.
Cost: two selections and 12 E N flops for E experts of N entries; E + 8 blocks of scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import MergeMethod, Task, register
from merging.parameters import TaskVectorParameters
from merging.sparsified import BandParameters, band_cost, band_passes, merge_band

if TYPE_CHECKING:
    import torch


class BreadcrumbsParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=False,
        description="Divide the sum by the sum of the weights: the mean task vector, not the sum.",
    )
    rescale: bool = Field(
        default=False,
        description="Scale what is left of each task vector to the L1 norm that it had.",
    )


def merge_breadcrumbs(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor."""
    return merge_band(base, experts, task, elect_signs=False)


register(
    MergeMethod(
        name="breadcrumbs",
        title="Model Breadcrumbs",
        summary=(
            "Drops the smallest entries of each task vector, and the very largest as outliers, then"
            " adds up what is left."
        ),
        source="Davari and Belilovsky, ECCV 2024, arXiv:2312.06795",
        merge=merge_breadcrumbs,
        cost=band_cost,
        parameters=BreadcrumbsParameters,
        expert_parameters=BandParameters,
        separable="whole",
        rounds=True,
        staged=band_passes(elect_signs=False),
    )
)
