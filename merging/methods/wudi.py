"""WUDI: per linear layer, the update that interferes least with what each expert has learned.

Source: Cheng et al., "Whoever Started the Interference Should End It", ICML 2025, arXiv:2503.08099,
eq. 21 and algorithm 1: starting from the sum of the task vectors, 300 steps of Adam on
L(M) = Σ_i w_i ‖(M − T_i) T_iᵀ‖²_F with w_i = 1 / ‖T_i‖²_F; the result is W0 + M.
Differences from the source: the gradient is 2 (M A − B) from sums over experts instead of automatic
differentiation (:mod:`merging.ops.quadratic`), equal but for rounding; the learning rate follows
the size of the task vectors unless a number is given, since Adam with the paper's 1e-5 does
something else on updates that are larger or smaller than the paper's; an expert equal to the base
takes no part in a layer, where the source divides 0 by 0.

The early stop regularises: more steps give a smaller loss, and not a better model.

Needs the base model. Separable by output rows given A (I×I). Experts are read one at a time.
Precision: float32 (float64 if the base or the first expert is), one rounding at the end.
Deterministic: yes, given the plan's row blocks.
Cost: 4 E O I² flops once and 2 O I² per step, for E experts of O×I.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Task, TouchParameters, register

if TYPE_CHECKING:
    import torch

_RATE_PER_RMS = 0.037
"""The paper's 1e-5 divided by the root mean square of its CLIP task vectors, 2.7e-4."""

_EPSILON_PER_RMS = 1e-8 / 2.7e-4
"""Adam's customary epsilon, likewise."""


class WudiParameters(TouchParameters):
    """Recipe-level parameters."""

    steps: int = Field(
        default=300,
        ge=0,
        le=100_000,
        description="Adam steps. 0 gives the sum of the task vectors; very many overfit the layer.",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description=(
            "Adam's step size. 'auto' takes 0.037 times the root mean square of the layer's task"
            " vectors, so that the result scales with them; a number is used as it is, with epsilon"
            " 1e-8 (the paper: 1e-5)."
        ),
    )
    scale: float = Field(
        default=1.0, description="Factor on the merged update before it is added to the base."
    )


def merge_wudi(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one weight matrix. Reports losses, norms and the learning rate as figures."""
    from merging.ops.adam import adam_on_quadratic
    from merging.ops.layers import add_to_base, read_task_vectors

    assert base is not None
    parameters: WudiParameters = task.parameters
    problem = read_task_vectors(base, experts, transposed=task.transposed)
    task.figures.update(problem.describe_start())
    M = problem.total
    if problem.num_nonzero > 1:  # fewer: the sum is the minimum
        if parameters.learning_rate == "auto":
            learning_rate, epsilon = _RATE_PER_RMS * problem.rms, _EPSILON_PER_RMS * problem.rms
        else:
            learning_rate, epsilon = parameters.learning_rate, 1e-8
        adam_on_quadratic(
            M,
            problem.A,
            problem.B,
            steps=parameters.steps,
            learning_rate=learning_rate,
            epsilon=epsilon,
            row_block=task.row_block,
        )
        task.figures["learning_rate"] = learning_rate
        task.figures["learning_rate_over_rms"] = learning_rate / problem.rms
    task.figures.update(problem.describe_solution(M, task.figures))
    return add_to_base(base, M, scale=parameters.scale, transposed=task.transposed)


def wudi_cost(geometry: Geometry, parameters: WudiParameters) -> Cost:
    """Sums over experts, then one product of O×I and I×I per step.

    Held at once: while reading, A and one Gram matrix, B, ΣT and T; while solving, A, B and M, and
    of a row block the gradient and both moments.
    """
    rows, columns = geometry.matrix
    product = 2.0 * rows * columns * columns
    block = min(geometry.row_block or rows, rows)
    reading = 2 * columns * columns + 3 * rows * columns
    solving = columns * columns + (2 * rows + 3 * block) * columns
    return Cost(
        flops=product * (2 * geometry.num_experts + parameters.steps + 2),
        workspace_bytes=4 * max(reading, solving),
    )


register(
    MergeMethod(
        name="wudi",
        title="WUDI-Merging",
        summary=(
            "Finds, for each linear layer, the update that interferes least with what every expert"
            " has learned. Needs no data; made for experts of different tasks whose task vectors"
            " are of similar size."
        ),
        source="Cheng et al., ICML 2025, arXiv:2503.08099, eq. 21 and algorithm 1",
        merge=merge_wudi,
        cost=wudi_cost,
        parameters=WudiParameters,
        separable="rows",
        streaming=True,
        default_touch="linear",
        default_rest="mean",
        recommended=True,
    )
)
