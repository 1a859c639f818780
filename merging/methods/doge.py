"""DOGE (adaptive projective gradient descent): task vectors of one size, with a common correction.

Source: Wei et al., "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent",
ICML 2025, arXiv:2501.01230, section 4, with task arithmetic, and FusionBench's code (by the same
authors). Per layer: λ_i = η / ‖T_i‖_F; a correction Δ of all task vectors, by Adam on
Σ_j Σ_rows [Σ_columns T_j ∘ (T_j - Σ_i λ_i (T_i + Δ))]² with gradients that have nothing in the
directions that tasks share; the update is Σ_i λ_i m_i ∘ (T_i + Δ), where m_i keeps the largest
entries of T_i in the whole model.
Differences from the source: the linear layers of any model, where the authors' code takes the
encoder's weights; an expert equal to the base takes no part in a layer; directions beyond the rank
of a task vector are left out.

η and the learning rate are in the unit of weights: the update of a layer has a norm of about η √E
whatever the experts did. Published for CLIP; for other models η has to be found.

Needs the base model, and all experts at once. Not separable: what is kept depends on the whole
model.
Precision: float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. The sign of singular vectors cancels.
Cost: E + 1 singular value decompositions for E experts and, for each step, 4 E O I operations and a
product with the shared directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Staged, Step, Task, register
from merging.ops.bins import FINE_BINS, numbers_of
from merging.ops.forms import SVD_FLOPS
from merging.parameters import UpdateParameters
from merging.thresholds import of_task_vectors

if TYPE_CHECKING:
    import torch


class DogeParameters(UpdateParameters):
    """Recipe-level parameters."""

    eta: float = Field(
        default=0.07,
        ge=0,
        description=(
            "η, the norm to which every task vector of a layer is scaled. 0.07 is the paper's for"
            " CLIP; it does not follow the size of the task vectors."
        ),
    )
    density: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description=(
            "Share of each task vector's entries in the whole model that take part, largest"
            " magnitudes first."
        ),
    )
    subspace: int = Field(
        default=6,
        ge=1,
        description=(
            "The correction leaves alone one in so many output directions, those that tasks share"
            " most."
        ),
    )
    steps: int = Field(default=400, ge=0, description="Of Adam on the correction.")
    learning_rate: float = Field(
        default=1e-4, gt=0, description="Of Adam, in the unit of the task vectors."
    )


def merge_doge(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor as if it were the whole model."""
    assert base is not None
    tensors = list(experts)
    found = THRESHOLDS.of_tensor(base, tensors, task)
    return finish_doge(base, iter(tensors), replace(task, given=(found,)))


def finish_doge(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor with thresholds that are known. Reports norms."""
    from merging.ops.blocks import inner_product
    from merging.ops.layers import add_to_base, naming, read_task_vectors
    from merging.ops.precision import float32_products
    from merging.ops.projective import find_correction, merge_corrected, shared_directions
    from merging.ops.quantiles import read_thresholds

    assert base is not None
    given = task.parameters
    with float32_products(base.device), naming(task):
        vectors = read_task_vectors(base, experts, transposed=task.transposed)
        norms = [inner_product(T, T) ** 0.5 for T in vectors]
        task.figures["expert_norms"] = norms
        factors = [given.eta / norm if norm > 0 else 0.0 for norm in norms]
        correction = find_correction(
            vectors,
            factors,
            shared_directions(vectors, given.subspace),
            steps=given.steps if any(factors) else 0,
            learning_rate=given.learning_rate,
        )
        thresholds = [found.value for found in read_thresholds(task.given[-1])]
        update = merge_corrected(vectors, factors, thresholds, correction)
        task.figures["update_norm"] = abs(given.scale) * inner_product(update, update) ** 0.5
        return add_to_base(base, update, task)


def doge_cost(geometry: Geometry, parameters: DogeParameters) -> Cost:
    """Decompositions and steps; the task vectors of all experts are held."""
    (rows, columns), num_experts = geometry.matrix, geometry.num_experts
    entries, smaller = geometry.num_entries, min(rows, columns)
    shared = smaller // parameters.subspace
    flops = float(SVD_FLOPS * (num_experts + 1) * entries * smaller)
    flops += parameters.steps * (4.0 * num_experts + 4.0 * shared) * entries
    held = (num_experts + 7) * entries + 2 * (rows + columns) * smaller + 4 * smaller**2
    return Cost(flops, 4 * held + 2 * 8 * num_experts * numbers_of(entries, FINE_BINS))


THRESHOLDS = of_task_vectors(
    lambda task: [task.parameters.density] * len(task.expert_parameters),
    is_global=lambda _: True,
)

register(
    MergeMethod(
        name="doge",
        title="DOGE (adaptive projective gradient descent)",
        summary=(
            "Scales the task vectors of a layer to one size and corrects what they do to one"
            " another by gradient descent, outside of the directions that they share. Made for"
            " CLIP; needs no data."
        ),
        source="Wei et al., ICML 2025, arXiv:2501.01230, section 4",
        merge=merge_doge,
        cost=doge_cost,
        parameters=DogeParameters,
        separable="whole",
        default_touch="linear",
        staged=Staged(
            reductions=THRESHOLDS.reductions(),
            finish=Step(merge=finish_doge, cost=doge_cost, separable="whole"),
            group=lambda parameters, _: parameters.density if parameters.density < 1 else None,
        ),
    )
)
