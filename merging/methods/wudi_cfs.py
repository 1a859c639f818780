"""WUDI-CFS: WUDI's layer-wise problem with a ridge, solved in closed form.

Source: Cheng et al., "Whoever Started the Interference Should End It", ICML 2025, arXiv:2503.08099,
eq. 20 (the appendix repeats it with T_i T_iᵀ, of the wrong size for layers that are not square)::

    M = [Σ_i w_i T_i (T_iᵀT_i + ω_i I)] [Σ_i w_i (T_iᵀT_i + ω_i I)]⁻¹ ,   w_i = 1 / ‖T_i‖²_F

Differences from the source: unless ``omega`` is given, the ridge is relative, ω_i = ρ ‖T_i‖²_F / I,
so that the result scales with the task vectors; a Cholesky factorisation instead of a
pseudo-inverse; an expert equal to the base takes no part in a layer.

Needs the base model. Separable by output rows given A (I×I). Experts are read one at a time.
Precision: sums in float32 (float64 if the base or the first expert is), solved in float64 for up to
4096 columns; one rounding at the end. Deterministic: yes.
Cost: 4 E O I² + I³/3 + 2 O I² flops for E experts of O×I.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.errors import NumericalError
from merging.method import Cost, Geometry, MergeMethod, Task, TouchParameters, register

if TYPE_CHECKING:
    import torch

_MAX_DOUBLE_COLUMNS = 4096
"""Up to here the factorisation runs in float64; beyond, float64 is tried if float32 fails."""


class WudiCfsParameters(TouchParameters):
    """Recipe-level parameters."""

    omega: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Ridge ω in absolute terms, as in the paper (1e-5 there). Larger pulls towards the"
            " weighted mean of the task vectors; the right size depends on theirs. Replaces rho."
        ),
    )
    rho: float = Field(
        default=0.1,
        gt=0,
        description=(
            "Ridge relative to the mean eigenvalue of each task vector's Gram matrix. Near 0 the"
            " least interference, which overfits; much above 1 the mean of the task vectors."
        ),
    )
    scale: float = Field(
        default=1.0, description="Factor on the merged update before it is added to the base."
    )


def merge_wudi_cfs(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one weight matrix. Reports losses and norms as figures.

    Raises:
        NumericalError: ``did_not_converge`` if the ridge is too small for a factorisation.
    """
    from merging.ops.layers import add_to_base, read_task_vectors
    from merging.ops.solve import solve_from_right

    assert base is not None
    omega, rho = task.parameters.omega, task.parameters.rho
    problem = read_task_vectors(
        base, experts, transposed=task.transposed, keep_weighted_total=omega is not None
    )
    task.figures.update(problem.describe_start())
    M = problem.total
    if problem.num_nonzero > 1:  # fewer: the sum is the minimum
        if problem.weighted_total is not None:
            ridge = omega * problem.weight_sum
            pull = problem.weighted_total.mul_(omega)
        else:
            ridge = rho * problem.num_nonzero / M.shape[1]
            pull = problem.total.mul_(rho / M.shape[1])
        solution = solve_from_right(pull.add_(problem.B), problem.A, ridge, _MAX_DOUBLE_COLUMNS)
        if solution is None:
            raise NumericalError(
                f"wudi_cfs cannot solve {task.tensor_name!r}: its matrix with ridge {ridge:.3g} is"
                " not positive definite in float64. Use a larger rho or omega.",
                code="did_not_converge",
                context={"tensor_name": task.tensor_name, "ridge": ridge},
            )
        M = solution
    task.figures.update(problem.describe_solution(M, task.figures))
    return add_to_base(base, M, scale=task.parameters.scale, transposed=task.transposed)


def wudi_cfs_cost(geometry: Geometry, parameters: WudiCfsParameters) -> Cost:
    """Sums over experts, a factorisation, two triangular solves with O right-hand sides.

    Held at once while solving in float64: A, the ridged matrix and its factor; B, ΣT, the
    right-hand sides and the solution. Reading needs less.
    """
    rows, columns = geometry.matrix
    extra = 0 if parameters.omega is None else rows * columns
    return Cost(
        flops=(
            4.0 * (geometry.num_experts + 1) * rows * columns**2
            + columns**3 / 3
            + 2.0 * rows * columns**2
        ),
        workspace_bytes=4 * (5 * columns * columns + 6 * rows * columns + extra),
    )


register(
    MergeMethod(
        name="wudi_cfs",
        title="WUDI-CFS (closed form)",
        summary=(
            "WUDI's problem with a ridge, solved directly: a little less accurate in the paper"
            " than WUDI and many times cheaper."
        ),
        source="Cheng et al., ICML 2025, arXiv:2503.08099, eq. 20",
        merge=merge_wudi_cfs,
        cost=wudi_cfs_cost,
        parameters=WudiCfsParameters,
        separable="rows",
        streaming=True,
        default_touch="linear",
        default_rest="mean",
    )
)
