"""SWUDI: WUDI's problem solved by a spectral filter instead of an early stop.

Source: Wei et al., 2026, arXiv:2606.07289. With A = V diag(λ) Vᵀ and the sums A and B of WUDI
(:mod:`merging.ops.problem`)::

    M = M₀ (I − V f Vᵀ) + B V (f/λ) Vᵀ ,   f_k = 1 − exp(−λ_k t) for the ⌈r I⌉ largest λ, else 0

M₀ is the sum of the task vectors: a direction that the filter leaves out keeps it. The time t is
that of gradient flow from M₀. The filter acts on A, which has no unit: the result scales with the
task vectors.
Differences from the source: directions in which no task vector has anything, which exact arithmetic
leaves alone, are left alone (:func:`merging.ops.spectral.decompose`); an expert equal to the base
takes no part in a layer; the official code's further knobs, off by default there, are not offered.

Needs the base model. Separable by output rows given A (I×I). Experts are read one at a time.
Precision: float32 (float64 if the base or the first expert is), one rounding at the end.
Deterministic: yes. The sign of eigenvectors cancels.
Cost: up to 4 E O I² + 12 I³ + 6 O I² flops for E experts of O×I; fewer where E O < I.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from merging.layered import cost_by, merge_by
from merging.method import MergeMethod, register
from merging.ops.forms import Flops, Form, LayerShape, filter_entries, filter_flops
from merging.ops.layer_method import LayerMethod
from merging.parameters import PresetParameters, Presets

if TYPE_CHECKING:
    import torch

    from merging.ops.layer_method import LayerTask
    from merging.ops.problem import LayerProblem


class SwudiParameters(PresetParameters):
    """Recipe-level parameters."""

    presets: ClassVar[Presets] = {
        "clip-vit-b-32": {"t": 1300.0, "r": 0.65},
        "clip-vit-b-16": {"t": 1800.0},
        "llama-3.2-3b": {"t": 300.0, "r": 0.85},
        "qwen2-vl-lora": {"t": 1300.0, "r": 0.01, "scale": 0.2},
        "internvl": {"t": 300.0, "r": 0.65, "scale": 0.1},
    }

    preset: (
        Literal["clip-vit-b-32", "clip-vit-b-16", "llama-3.2-3b", "qwen2-vl-lora", "internvl"]
        | None
    ) = Field(
        default=None,
        description=(
            "The authors' t, r and scale for that model. Fills in what the recipe does not give."
        ),
    )
    t: float = Field(
        default=300.0,
        gt=0,
        le=1e6,
        description=(
            "Time of the flow away from the sum of the task vectors, in the unit of 1 over the"
            " eigenvalues of A, whose mean is the number of experts over the layer's columns. Near"
            " 0 the sum; very large the least interference, which overfits."
        ),
    )
    r: float = Field(
        default=0.65,
        gt=0,
        le=1,
        description=(
            "Share of the input directions, of the largest eigenvalues, in which the sum is"
            " replaced. 1 is swudi_soft."
        ),
    )
    init: Literal["sum", "zero"] = Field(
        default="sum",
        description=(
            "What the update is where the filter does not reach: the 'sum' of the task vectors, or"
            " 'zero', which is safer with many experts."
        ),
    )


def solve_swudi(problem: LayerProblem, task: LayerTask) -> torch.Tensor:
    """The filtered solution. Reports the rank of the filter as a figure."""
    from merging.ops.spectral import apply_filter, decompose, exponential_gains, keep_largest

    parameters: SwudiParameters = task.parameters
    spectrum = problem.once(decompose)
    rank = math.ceil(parameters.r * problem.num_columns)
    gains = keep_largest(exponential_gains(spectrum, parameters.t), rank)
    task.figures.update(effective_rank=spectrum.effective_rank, filter_rank=rank)
    return apply_filter(
        problem, spectrum, gains, from_zero=parameters.init == "zero", row_block=task.row_block
    )


def _flops(shape: LayerShape, _: SwudiParameters) -> Flops:
    """Sums over experts, an eigendecomposition and three products."""
    return filter_flops(shape)


def _entries(shape: LayerShape, form: Form, row_block: int, _: SwudiParameters) -> int:
    return filter_entries(shape, form, row_block)


LAYER = LayerMethod(solve=solve_swudi, flops=_flops, entries=_entries, decomposes=lambda *_: True)

register(
    MergeMethod(
        name="swudi",
        title="SWUDI",
        summary=(
            "WUDI's problem solved in one go, in the strongest input directions only. Two"
            " parameters, published for a few models; swudi_a needs none."
        ),
        source="Wei et al., 2026, arXiv:2606.07289",
        merge=merge_by(LAYER),
        cost=cost_by(LAYER),
        layer=LAYER,
        parameters=SwudiParameters,
        separable="rows",
        streaming=True,
        takes_adapters=True,
        default_touch="linear",
        default_rest="mean",
    )
)
