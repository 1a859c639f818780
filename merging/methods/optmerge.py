"""OptMerge ("WUDI v2"): WUDI against low-rank task vectors only.

Source: Wei et al., ICLR 2026, arXiv:2505.19892. Each of E task vectors T_i is represented by its
K = ⌊min(O, I) / E⌋ largest singular directions, P_i = S_K V_Kᵀ, and M minimises
L(M) = Σ_i w_i ‖(M − T̂_i) P_iᵀ‖²_F with w_i = 1 / ‖T_i‖²_F. Two variants:

========  ==================================  ==========  ==================================
variant   target T̂_i                          start       optimiser
========  ==================================  ==========  ==================================
``full``  mean + rank K part of (T_i − mean)  Σ T_i       Adam, 300 steps
``lora``  rank K part of T_i                  mean T_i    gradient descent, momentum .9, 300 steps
========  ==================================  ==========  ==================================

Differences from the source: gradients come from sums (:mod:`merging.ops.problem`); Adam's rate
follows the size of the task vectors unless a number is given; steps with momentum are a polynomial
in A and are taken all at once (:mod:`merging.ops.chebyshev`); factors are not rounded to bfloat16;
an expert equal to the base takes no part in a layer, where the source divides by 0.

Adapters of no higher rank than K lose nothing to the truncation: the problem is WUDI's, and is
solved through their factors (:mod:`merging.ops.low_rank`).

Needs the base model, and all experts at once: the mean comes before what is made of each.
Precision: float32 (float64 if the base or the first expert is), singular vectors of up to 2048
rows or columns in float64; one rounding at the end.
Deterministic: yes. The sign of singular vectors cancels.
Cost: for s = min(O, I), one or two decompositions (2 O I s + 24 s³ flops) for each expert, and
2 O I² for each of 300 steps, or of about 10 in variant ``lora``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from merging.layered import Precision, cost_by, merge_by
from merging.method import MergeMethod, register
from merging.ops.forms import (
    EIGH_FLOPS,
    Flops,
    Form,
    LayerShape,
    adam_entries,
    preparing_flops,
    reading_entries,
)
from merging.ops.layer_method import LayerMethod, ProblemKind, Reading
from merging.parameters import PresetParameters, Presets

if TYPE_CHECKING:
    import torch

    from merging.ops.layer_method import LayerTask
    from merging.ops.low_rank import Expert
    from merging.ops.problem import LayerProblem

_MOMENTUM = 0.9
_DESCENT_RATE = 1e-4
"""Of the published settings; gradient descent follows the size of the task vectors by itself."""

_DESCENT_PRODUCTS = 12
"""Products that stand for all steps with momentum, generously."""


class OptMergeParameters(PresetParameters):
    """Recipe-level parameters."""

    presets: ClassVar[Presets] = {
        "internvl": {"variant": "full", "learning_rate": 1e-5, "scale": 0.1},
        "qwen2-vl-lora": {"variant": "lora", "learning_rate": 1e-4},
    }

    preset: Literal["internvl", "qwen2-vl-lora"] | None = Field(
        default=None,
        description="The authors' setting. Fills in what the recipe does not give.",
    )
    variant: Literal["full", "lora"] = Field(
        default="full",
        description=(
            "'full' for experts whose every weight was tuned; 'lora' for merged-in adapters, which"
            " moves a little way from the mean of the task vectors."
        ),
    )
    steps: int = Field(
        default=300, ge=0, le=100_000, description="Optimiser steps. 0 gives the start."
    )
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description=(
            "Step size. 'auto' takes 0.037 times the root mean square of the layer's task vectors"
            " with Adam, and 1e-4 with gradient descent."
        ),
    )
    precision: Precision = "highest"


def _low_rank_terms(*, center: bool) -> ProblemKind:
    """OptMerge's problem, with the mean in the targets or without."""

    def read(base: torch.Tensor, experts: Iterator[Expert], reading: Reading) -> LayerProblem:
        from merging.ops.layers import read_problem
        from merging.ops.low_rank_terms import read_low_rank_terms

        if reading.form == "factors":
            return read_problem(base, experts, reading)
        return read_low_rank_terms(
            base, list(experts), transposed=reading.transposed, center=center
        )

    def flops(shape: LayerShape) -> Flops:
        """Decompositions of each task vector, and the sums."""
        rows, columns, num_experts, _ = shape
        side = min(rows, columns)
        product = 2.0 * rows * columns
        decomposition = product * 2 * side + 2.0 * EIGH_FLOPS * side**3
        flops: dict[Form, float] = {
            "gram": num_experts * (1 + center) * decomposition + product * (3 * side + columns)
        }
        truncated = shape.total_rank if center else max(shape.ranks, default=0)
        if 0 < truncated <= side // num_experts:
            flops["factors"] = preparing_flops(shape)["factors"]
        return flops

    return ProblemKind(
        name=f"optmerge, {'centred' if center else 'as they are'}",
        read=read,
        flops=flops,
        entries=_reading_entries,
    )


def _reading_entries(shape: LayerShape, form: Form) -> int:
    """T, its target and the mean; the sums; a decomposition in float64. Or adapters."""
    if form == "factors":
        return reading_entries(shape, form)
    side = min(shape.rows, shape.columns)
    return _sums(shape) + 12 * side * side + 5 * shape.rows * shape.columns


def _sums(shape: LayerShape) -> int:
    """Numbers of A, B and the sum of the task vectors."""
    return shape.columns**2 + 2 * shape.rows * shape.columns


_PROBLEMS = {"full": _low_rank_terms(center=True), "lora": _low_rank_terms(center=False)}


def solve_optmerge(problem: LayerProblem, task: LayerTask) -> torch.Tensor:
    """Adam, or gradient descent. Reports the learning rate as a figure."""
    return _adam(problem, task) if task.parameters.variant == "full" else _descent(problem, task)


def _adam(problem: LayerProblem, task: LayerTask) -> torch.Tensor:
    from merging.ops.adam import adam_on_problem, adam_rates

    learning_rate, epsilon = adam_rates(problem, task.parameters.learning_rate)
    task.figures["learning_rate"] = learning_rate
    task.figures["learning_rate_over_rms"] = learning_rate / problem.rms
    adam_on_problem(
        problem.total,
        problem,
        steps=task.parameters.steps,
        learning_rate=learning_rate,
        epsilon=epsilon,
        precision=task.parameters.precision,
    )
    return problem.total


def _descent(problem: LayerProblem, task: LayerTask) -> torch.Tensor:
    from merging.ops import chebyshev

    rate = task.parameters.learning_rate
    learning_rate = _DESCENT_RATE if rate == "auto" else rate
    end = chebyshev.interval_end(problem.A)
    g = chebyshev.momentum_descent(task.parameters.steps, learning_rate, _MOMENTUM)
    terms = chebyshev.expand_function(g, end, problem.A.dtype)
    task.figures.update(learning_rate=learning_rate, degree=len(terms) - 1)
    return chebyshev.polynomial_solution(
        problem,
        terms,
        end,
        start_scale=1 / problem.num_nonzero,
        precision=task.parameters.precision,
    )


def _flops(shape: LayerShape, parameters: OptMergeParameters) -> Flops:
    """What reading takes, then a product (or one forth and one back) per step and for losses."""
    is_full = parameters.variant == "full"
    steps = parameters.steps if is_full else _DESCENT_PRODUCTS
    product = 2.0 * shape.rows * shape.columns
    products: dict[Form, float] = {
        "gram": product * shape.columns * (steps + 2),
        "factors": product * shape.total_rank * (2 * steps + 2),
    }
    if not is_full:  # its steps are in coordinates
        N = shape.total_rank
        products["factors"] = 2.0 * shape.rows * N * N * steps + 3 * product * N
    preparing = _PROBLEMS[parameters.variant].flops(shape)
    return {form: flops + products[form] for form, flops in preparing.items()}


def _entries(shape: LayerShape, form: Form, _: int, parameters: OptMergeParameters) -> int:
    """The sums, and what a step writes."""
    if form == "factors":
        return adam_entries(shape, form, 0, is_split=parameters.precision == "high")
    entries = _sums(shape) + 2 * shape.columns**2 + 5 * shape.rows * shape.columns
    if parameters.precision == "high":
        entries += 2 * shape.columns**2 + 3 * shape.rows * shape.columns
    return entries


LAYER = LayerMethod(
    solve=solve_optmerge,
    flops=_flops,
    entries=_entries,
    problem=lambda parameters: _PROBLEMS[parameters.variant],
)

register(
    MergeMethod(
        name="optmerge",
        title="OptMerge (WUDI v2)",
        summary=(
            "WUDI against the main directions of each task vector only, for multimodal models and"
            " adapters; published with a small final scale."
        ),
        source="Wei et al., ICLR 2026, arXiv:2505.19892",
        merge=merge_by(LAYER),
        cost=cost_by(LAYER),
        layer=LAYER,
        parameters=OptMergeParameters,
        separable="whole",
        takes_adapters=True,
        adapter_note=(
            "OptMerge's published setting for adapters is variant 'lora' (preset qwen2-vl-lora)."
        ),
        default_touch="linear",
        default_rest="mean",
    )
)
