"""Model Breadcrumbs with TIES: drop smallest and largest entries, elect signs, merge what agrees.

Source: Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024, arXiv:2312.06795, section 3,
with the sign election of Yadav et al., NeurIPS 2023, arXiv:2306.01708.
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


class BreadcrumbsTiesParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=False,
        description=(
            "Divide each entry by the weights of the experts that agree with its sign; false sums"
            " them."
        ),
    )
    rescale: bool = Field(
        default=False,
        description="Scale what is left of each task vector to the L1 norm that it had.",
    )


def merge_breadcrumbs_ties(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor."""
    return merge_band(base, experts, task, elect_signs=True)


register(
    MergeMethod(
        name="breadcrumbs_ties",
        title="Model Breadcrumbs with TIES",
        summary=(
            "Drops the smallest entries of each task vector, and the very largest as outliers, then"
            " elects a sign per entry and merges the entries that agree with it."
        ),
        source="Davari and Belilovsky, ECCV 2024, arXiv:2312.06795; Yadav et al., arXiv:2306.01708",
        merge=merge_breadcrumbs_ties,
        cost=band_cost,
        parameters=BreadcrumbsTiesParameters,
        expert_parameters=BandParameters,
        separable="whole",
        rounds=True,
        staged=band_passes(elect_signs=True),
    )
)
