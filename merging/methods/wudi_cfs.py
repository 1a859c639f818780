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
Cost: up to 4 E O I² + I³/3 + 2 O I² flops for E experts of O×I; fewer where E O < I.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from merging.layered import cost_by, merge_by
from merging.method import MergeMethod, register
from merging.ops.forms import Flops, Form, LayerShape, direct_entries, direct_flops, ridge_flops
from merging.ops.layer_method import LayerMethod
from merging.parameters import PresetParameters, Presets

if TYPE_CHECKING:
    import torch

    from merging.ops.layer_method import LayerTask
    from merging.ops.problem import LayerProblem


class WudiCfsParameters(PresetParameters):
    """Recipe-level parameters."""

    presets: ClassVar[Presets] = {"paper-vit": {"omega": 1e-5, "touch": "wudi-vit", "rest": "base"}}

    preset: Literal["paper-vit"] | None = Field(
        default=None,
        description=(
            "Settings of the authors' code: the ridge, which tensors are merged and what the others"
            " become. Fills in what the recipe does not give."
        ),
    )
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


def solve_wudi_cfs(problem: LayerProblem, task: LayerTask) -> torch.Tensor:
    """The closed form.

    Raises:
        SolveError: The ridge is too small for a factorisation.
    """
    from merging.ops.ridge import ridge_solution

    omega, rho = task.parameters.omega, task.parameters.rho
    return ridge_solution(problem, rho=rho, omega=omega, row_block=task.row_block)


def _flops(shape: LayerShape, _: WudiCfsParameters) -> Flops:
    """Sums over experts, a factorisation, two triangular solves with O right-hand sides."""
    return direct_flops(shape, lambda size: ridge_flops(shape.rows, size))


def _entries(shape: LayerShape, form: Form, row_block: int, _: WudiCfsParameters) -> int:
    """In float64: the ridged matrix and its factor; right-hand sides, in float32 too; solution."""
    return direct_entries(shape, form, row_block, matrices=4, updates=6)


LAYER = LayerMethod(
    solve=solve_wudi_cfs,
    flops=_flops,
    entries=_entries,
    needs_weighted_total=lambda parameters: parameters.omega is not None,
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
        merge=merge_by(LAYER),
        cost=cost_by(LAYER),
        layer=LAYER,
        parameters=WudiCfsParameters,
        separable="rows",
        streaming=True,
        takes_adapters=True,
        default_touch="linear",
        default_rest="mean",
    )
)
