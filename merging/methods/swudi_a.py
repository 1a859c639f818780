"""SWUDI-A: WUDI's problem solved exactly in as many directions as the task vectors really use.

Source: Wei et al., 2026, arXiv:2606.07289 (``aswudi`` in the authors' code). With the eigenvalues λ
and eigenvectors V of WUDI's A (:mod:`merging.ops.problem`)::

    M = M₀ (I − V f Vᵀ) + B V (f/λ) Vᵀ ,   f_k = 1 for the K largest λ, else 0
    K = ⌈(Σ √λ)² / Σ λ⌉

M₀ is the sum of the task vectors. K is the effective rank of the task vectors' singular values, so
that there is nothing to choose; the result scales with the task vectors.
Differences from the source: directions in which no task vector has anything, which exact arithmetic
leaves alone, are left alone (:func:`merging.ops.spectral.decompose`); an expert equal to the base
takes no part in a layer.

Needs the base model. Separable by output rows given A (I×I). Experts are read one at a time.
Precision: float32 (float64 if the base or the first expert is), one rounding at the end.
Deterministic: yes. The sign of eigenvectors cancels.
Cost: up to 4 E O I² + 12 I³ + 6 O I² flops for E experts of O×I; fewer where E O < I.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merging.layered import cost_by, merge_by
from merging.method import MergeMethod, register
from merging.ops.forms import Flops, Form, LayerShape, filter_entries, filter_flops
from merging.ops.layer_method import LayerMethod
from merging.parameters import UpdateParameters

if TYPE_CHECKING:
    import torch

    from merging.ops.layer_method import LayerTask
    from merging.ops.problem import LayerProblem


class SwudiAParameters(UpdateParameters):
    """Recipe-level parameters."""


def solve_swudi_a(problem: LayerProblem, task: LayerTask) -> torch.Tensor:
    """The filtered solution. Reports the effective rank as a figure."""
    from merging.ops.spectral import solve_in_used_directions

    return solve_in_used_directions(problem, task)


def _flops(shape: LayerShape, _: SwudiAParameters) -> Flops:
    """Sums over experts, an eigendecomposition and three products."""
    return filter_flops(shape)


def _entries(shape: LayerShape, form: Form, row_block: int, _: SwudiAParameters) -> int:
    return filter_entries(shape, form, row_block)


LAYER = LayerMethod(solve=solve_swudi_a, flops=_flops, entries=_entries, decomposes=lambda *_: True)

register(
    MergeMethod(
        name="swudi_a",
        title="SWUDI-A",
        summary=(
            "WUDI's problem solved directly in the directions that the task vectors use. Needs no"
            " data and no hyperparameter; as accurate as the best setting of WUDI and several times"
            " cheaper."
        ),
        source="Wei et al., 2026, arXiv:2606.07289",
        merge=merge_by(LAYER),
        cost=cost_by(LAYER),
        layer=LAYER,
        parameters=SwudiAParameters,
        separable="rows",
        streaming=True,
        takes_adapters=True,
        default_touch="linear",
        default_rest="mean",
        recommended=True,
    )
)
