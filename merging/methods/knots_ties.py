"""KnOTS-TIES: TIES on task vectors that were turned into a common basis first.

Source: Stoica et al., "Model Merging with SVD to Tie the Knots", ICLR 2025, arXiv:2410.19735,
section 4: with U S [V_1 … V_n]ᵀ the decomposition of the task vectors side by side, the parts
S V_iᵀ are merged by TIES (Yadav et al., NeurIPS 2023, arXiv:2306.01708) and the update is U times
the result. The paper trims over all layers together and keeps 0.2 (vision) or all (Llama).
Differences from the source: directions below a millionth of the largest singular value are left
out, where the authors' code leaves out those below 1e-5 in itself; a sum of exactly 0 elects the
positive sign; experts have weights.

Needs the base model, and all experts at once. Not separable.
Precision: the basis in float64, the rest in float32 (float64 if the base or the first expert is),
one rounding at the end.
Deterministic: yes. The sign of singular vectors cancels.
Cost: 2 E O² I operations for E experts in float64, an eigendecomposition of O×O (of adapters: of
as many rows as they have ranks), 4 E O² I in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Staged, Step, Task, register
from merging.ops.forms import EIGH_FLOPS
from merging.parameters import TaskVectorParameters, WeightParameters
from merging.thresholds import Thresholds, group_by_density, keep_beyond, own_densities

if TYPE_CHECKING:
    import torch

    from merging.ops.quantiles import Row
    from merging.ops.selection import Rank
    from merging.ops.sparsify import KeepFromThresholds


class KnotsTiesParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=True,
        description=(
            "Divide each entry by the weights of the experts that agree with its sign; false sums"
            " them."
        ),
    )
    scope: Literal["tensor", "global"] = Field(
        default="global",
        description=(
            "Of what 'density' is a share: of the whole model ('global', the paper): one threshold"
            " for each expert over all layers; or of each 'tensor', which reads the models once"
            " and not three times."
        ),
    )


class KnotsTiesExpertParameters(WeightParameters):
    """Parameters of an expert."""

    density: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Share of the task vector's entries in the common basis to keep, largest magnitudes"
            " first; 1 trims nothing."
        ),
    )


def merge_knots_ties(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, trimmed by itself."""
    import torch

    from merging.ops.sparsify import keep_largest

    def keep(parts: list[torch.Tensor]) -> KeepFromThresholds:
        return keep_largest(torch.zeros_like(parts[0]), parts, own_densities(task))

    return _merge_aligned(base, experts, task, keep)


def finish_knots_ties(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor with thresholds that are known."""
    return _merge_aligned(base, experts, task, lambda parts: keep_beyond(task, parts[0].view(-1)))


def _merge_aligned(
    base: torch.Tensor | None,
    experts: Iterator[torch.Tensor],
    task: Task,
    keep: Callable[[list[torch.Tensor]], KeepFromThresholds],
) -> torch.Tensor:
    import torch

    from merging.ops.alignment import align
    from merging.ops.layers import add_to_base, naming
    from merging.ops.precision import float32_products
    from merging.ops.task_vectors import combine_task_vectors

    assert base is not None
    with float32_products(base.device), naming(task):
        basis, parts = align(base, experts, transposed=task.transposed)
        merged = combine_task_vectors(
            torch.zeros_like(parts[0]),
            parts,
            [parameters.weight for parameters in task.expert_parameters],
            scale=1.0,
            normalize=task.parameters.normalize,
            elect_signs=True,
            sparsify=keep(parts),
        )
        task.figures["rank"] = basis.shape[1]
        return add_to_base(base, basis @ merged, task)


def _rows(base: torch.Tensor, experts: Iterator[torch.Tensor], task: Task) -> list[Row | None]:
    """Magnitudes of the task vectors in the common basis, which may have fewer rows."""
    from merging.ops.alignment import align
    from merging.ops.layers import naming
    from merging.ops.precision import float32_products
    from merging.ops.quantiles import row_of

    with float32_products(base.device), naming(task):
        _, parts = align(base, experts, transposed=task.transposed)
    return [
        row_of(part.view(-1)) if density < 1 else None
        for part, density in zip(parts, own_densities(task), strict=True)
    ]


def _ranks(task: Task) -> list[Rank | None]:
    from merging.ops.selection import first_beyond_largest

    return [first_beyond_largest(d) if d < 1 else None for d in own_densities(task)]


def knots_ties_cost(geometry: Geometry, parameters: KnotsTiesParameters) -> Cost:
    """Gram matrices in float64, a decomposition, products; the C_i of all experts are held."""
    del parameters
    (rows, columns), num_experts = geometry.matrix, geometry.num_experts
    directions = min(sum(geometry.ranks) or rows, rows)
    entries = geometry.num_entries
    flops = num_experts * (4 + 4) * entries * directions + 2 * EIGH_FLOPS * float(directions) ** 3
    held = (num_experts + 4) * entries + 2 * 4 * directions**2 + 2 * directions * min(columns, 4096)
    return Cost(flops, 4 * (held + rows * directions))


THRESHOLDS = Thresholds(
    name="",
    rows=_rows,
    ranks=_ranks,
    cost=knots_ties_cost,
    separable="whole",
    takes_adapters=True,
)

register(
    MergeMethod(
        name="knots_ties",
        title="KnOTS-TIES",
        summary=(
            "Turns the task vectors into a common basis, so that they can be compared entry by"
            " entry, and merges them there as TIES does. Made for adapters."
        ),
        source="Stoica et al., ICLR 2025, arXiv:2410.19735; Yadav et al., arXiv:2306.01708",
        merge=merge_knots_ties,
        cost=knots_ties_cost,
        parameters=KnotsTiesParameters,
        expert_parameters=KnotsTiesExpertParameters,
        separable="whole",
        takes_adapters=True,
        default_touch="linear",
        default_rest="mean",
        staged=Staged(
            reductions=THRESHOLDS.reductions(),
            finish=Step(
                merge=finish_knots_ties,
                cost=knots_ties_cost,
                separable="whole",
                takes_adapters=True,
            ),
            group=group_by_density,
        ),
    )
)
