"""RobustMerge (CoPA-Merging): adapters merged factor by factor, small directions strengthened.

Source: Zeng et al., "RobustMerge: Parameter-Efficient Model Merging for MLLMs with Direction
Robustness", NeurIPS 2025, arXiv:2502.17159 (first version: CoPA-Merging), and the authors' code:
of each factor of an adapter B_i A_i the largest 20 % of entries are kept; rows of A_i that lose
much by that weigh more, the weights below their own 0.8 quantile being raised to it; A is 2 Σ A_i,
B is twice the mean of the B_i with these weights.
Differences from the source: factors are paired by name; ranks may differ, and an adapter has no say
in rows that it lacks; adapters' own scalings are part of B_i; an expert that is a whole checkpoint
is factored first, by its largest singular values.

Needs the base model. Not separable. Experts are read one at a time, their factors are held.
Precision: float32 (float64 if the base or the first expert is), one rounding at the end.
Deterministic: yes; of a factored checkpoint, up to which of two equal entries is the largest.
Cost: 2 O I R operations for adapters of rank R; a singular value decomposition for each expert that
is a whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.forms import SVD_FLOPS
from merging.parameters import UpdateParameters

if TYPE_CHECKING:
    import torch


class RobustMergeParameters(UpdateParameters):
    """Recipe-level parameters."""

    density: float = Field(
        default=0.2, gt=0, le=1, description="Share of each factor's entries that are kept."
    )
    quantile: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description=(
            "Of a factor's rows by weight: smaller weights are raised to this quantile. 1 gives all"
            " rows of an adapter one weight."
        ),
    )
    gain: float = Field(
        default=2.0, ge=0, description="Factor on both merged factors; the update has its square."
    )
    rank: int = Field(
        default=16,
        ge=1,
        description="Directions into which an expert that is no adapter is factored, at most.",
    )


def merge_robust(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor. Reports the update's norm."""
    from merging.ops.blocks import inner_product
    from merging.ops.factors import merge_factors, read_factors
    from merging.ops.layers import add_to_base, as_matrix, naming
    from merging.ops.precision import float32_products

    assert base is not None
    given = task.parameters
    with float32_products(base.device), naming(task):
        factors = read_factors(base, experts, rank=given.rank, transposed=task.transposed)
        update = merge_factors(
            factors,
            as_matrix(base, transposed=task.transposed),
            density=given.density,
            quantile=given.quantile,
            gain=given.gain,
        )
        task.figures["update_norm"] = abs(given.scale) * inner_product(update, update) ** 0.5
        return add_to_base(base, update, task)


def robust_merge_cost(geometry: Geometry, parameters: RobustMergeParameters) -> Cost:
    """Factors of all experts; the update; what LAPACK takes where experts are factored."""
    (rows, columns), entries = geometry.matrix, geometry.num_entries
    smaller = min(rows, columns)
    ranks = geometry.ranks or (parameters.rank,) * geometry.num_experts
    held = 4 * sum(ranks) * (rows + columns) + 2 * entries
    flops = 2.0 * entries * max(ranks)
    if not geometry.ranks:
        flops += SVD_FLOPS * geometry.num_experts * entries * smaller
        held += 4 * entries + 4 * smaller**2
    return Cost(flops, 4 * held)


register(
    MergeMethod(
        name="robust_merge",
        title="RobustMerge (CoPA-Merging)",
        summary=(
            "Merges the two factors of adapters by themselves, the directions that trimming would"
            " weaken the most strengthened. Made for adapters of multimodal models."
        ),
        source="Zeng et al., NeurIPS 2025, arXiv:2502.17159",
        merge=merge_robust,
        cost=robust_merge_cost,
        parameters=RobustMergeParameters,
        separable="whole",
        streaming=True,
        takes_adapters=True,
        default_touch="linear",
        default_rest="mean",
    )
)
