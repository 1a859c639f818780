"""WUDI: per linear layer, the update that interferes least with what each expert has learned.

Source: Cheng et al., "Whoever Started the Interference Should End It", ICML 2025, arXiv:2503.08099,
eq. 21 and algorithm 1: starting from the sum of the task vectors, 300 steps of Adam on
L(M) = Σ_i w_i ‖(M − T_i) T_iᵀ‖²_F with w_i = 1 / ‖T_i‖²_F; the result is W0 + M.
Differences from the source: the gradient comes from sums over experts, or from all their rows,
instead of automatic differentiation (:mod:`merging.ops.problem`), equal but for rounding; the
learning rate follows the size of the task vectors unless a number is given, since Adam with the
paper's 1e-5 does something else on updates that are larger or smaller than the paper's; an expert
equal to the base takes no part in a layer, where the source divides 0 by 0.

The early stop regularises: more steps give a smaller loss, and not a better model.

Needs the base model. Separable by output rows given A (I×I). Experts are read one at a time.
Precision: float32 (float64 if the base or the first expert is), one rounding at the end.
Deterministic: yes, given the plan's row blocks.
Cost: up to 4 E O I² flops once and 2 O I² per step, for E experts of O×I; 4 E O² I per step where
that is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from merging.layered import Precision, cost_by, divide_by, merge_by
from merging.method import MergeMethod, register
from merging.ops.forms import Flops, Form, LayerShape, adam_entries, adam_flops
from merging.ops.layer_method import LayerMethod, RowSolver
from merging.parameters import PresetParameters, Presets

if TYPE_CHECKING:
    import torch

    from merging.ops.layer_method import LayerTask
    from merging.ops.problem import LayerProblem


class WudiParameters(PresetParameters):
    """Recipe-level parameters."""

    presets: ClassVar[Presets] = {
        "paper-vit": {"learning_rate": 1e-5, "steps": 300, "touch": "wudi-vit", "rest": "base"},
        "paper-roberta": {"learning_rate": 2e-5, "steps": 300, "touch": "linear", "rest": "base"},
    }

    preset: Literal["paper-vit", "paper-roberta"] | None = Field(
        default=None,
        description=(
            "Settings of the authors' code: learning rate, steps, which tensors are merged and what"
            " the others become. Fills in what the recipe does not give."
        ),
    )
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
    precision: Precision = "highest"


def solve_wudi(problem: LayerProblem, task: LayerTask) -> torch.Tensor:
    """Adam from the sum of the task vectors."""
    return _descend(problem, task, _rates(problem, task))


def _rates(problem: LayerProblem, task: LayerTask) -> tuple[float, float]:
    """Learning rate and epsilon. Reports the learning rate as figures."""
    from merging.ops.adam import adam_rates

    learning_rate, epsilon = adam_rates(problem, task.parameters.learning_rate)
    task.figures["learning_rate"] = learning_rate
    task.figures["learning_rate_over_rms"] = learning_rate / problem.rms
    return learning_rate, epsilon


def _descend(problem: LayerProblem, task: LayerTask, rates: Sequence[float]) -> torch.Tensor:
    from merging.ops.adam import adam_on_problem

    parameters: WudiParameters = task.parameters
    learning_rate, epsilon, *_ = rates
    adam_on_problem(
        problem.total,
        problem,
        steps=parameters.steps,
        learning_rate=learning_rate,
        epsilon=epsilon,
        row_block=task.row_block,
        precision=parameters.precision,
    )
    return problem.total


def _flops(shape: LayerShape, parameters: WudiParameters) -> Flops:
    """Sums over experts or all their rows, then one or two products per step."""
    return adam_flops(shape, parameters.steps)


def _entries(shape: LayerShape, form: Form, row_block: int, parameters: WudiParameters) -> int:
    return adam_entries(shape, form, row_block, is_split=parameters.precision == "high")


LAYER = LayerMethod(
    solve=solve_wudi,
    flops=_flops,
    entries=_entries,
    rows=RowSolver(prepare=_rates, solve=_descend),
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
        merge=merge_by(LAYER),
        cost=cost_by(LAYER),
        layer=LAYER,
        divided=divide_by(LAYER),
        parameters=WudiParameters,
        separable="rows",
        streaming=True,
        takes_adapters=True,
        adapter_note=(
            "WUDI's Adam leaves the span of adapters: the merged update grows, and most of it is no"
            " expert's. swudi_a, swudi_soft and wudi_cfs stay in it, and cost a fraction."
        ),
        default_touch="linear",
        default_rest="mean",
    )
)
