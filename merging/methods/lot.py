"""LOT Merging: the layer-wise optimal update, by a few unlabelled samples per task.

Source: Sun et al., "Towards Minimizing Feature Drift in Model Merging: Layer-wise Task Vector
Fusion", NeurIPS 2025, arXiv:2505.23859. Of updates T_i = W_i − W0 and inputs X_i (tokens×I) that a
linear layer O×I gets in expert i, H_i = X_iᵀX_i, it takes the one that drifts least from the
experts' outputs, Σ_i ‖X_i (T − T_i)ᵀ‖²_F::

    T* = (Σ_i T_i H_i) (Σ_i H_i)⁺

    norm scale, per channel c:   T*[c] = Σ_i q_i[c] T_i[c] / Σ_i q_i[c]

with q_i the sums of squares of the normalised inputs. Biases and all other tensors take the mean of
the updates; everything is W0 + λ T*.

Differences from the source: the pseudo-inverse there has a hidden cut-off, that of float32, on
which the method depends when samples are few; here a ridge r = ρ · trace(Σ H_i)/I does that work,
pulling what samples say little of to the mean of the updates::

    T* = (Σ_i T_i H_i + r mean(T)) (Σ_i H_i + r I)⁻¹

``solver: pinv`` keeps the pseudo-inverse with a relative cut-off of its own (1e-4), and the preset
``paper`` its exact setting. x̂ of norms is computed from the input, exactly.

Needs the base model and samples (docs/calibration.md). Experts are read one at a time.
Precision: sums in float32 (float64 if an expert is), the ridge solved in float64 for up to 4096
columns; one rounding at the end. Deterministic: yes.
Cost: 2 E O I² and a factorisation of I×I, beside the run of the samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from merging.method import MergeMethod, Step, Task, register
from merging.parameters import PresetParameters, Presets
from merging.sampled import LINEAR, NORM, by_expert, features_cost, mean_cost, norm_cost

if TYPE_CHECKING:
    import torch


class LotParameters(PresetParameters):
    """Recipe-level parameters."""

    presets: ClassVar[Presets] = {"paper": {"solver": "pinv", "rtol": None}}

    preset: Literal["paper"] | None = Field(
        default=None,
        description="The authors' setting: float32's own cut-off. Fills in what is not given.",
    )
    solver: Literal["ridge", "pinv"] = Field(
        default="ridge",
        description=(
            "How directions are treated that the samples say little of: a 'ridge' pulls them to the"
            " mean of the updates; 'pinv' leaves them as they are in the base."
        ),
    )
    ridge: float = Field(
        default=1e-3,
        gt=0,
        description=(
            "Of the ridge, relative to the mean eigenvalue of the inputs' Gram matrix. Too small"
            " overfits few samples; much above 1 gives the mean."
        ),
    )
    rtol: float | None = Field(
        default=1e-4,
        gt=0,
        lt=1,
        description=(
            "Of 'pinv': eigenvalues below this share of the largest count as zero. None is"
            " float32's own cut-off, as in the paper."
        ),
    )


def merge_lot(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """A tensor without statistics, or a tile of one: the mean of the updates, times λ."""
    from merging.ops.features import mean_update

    return mean_update(base, experts, task.parameters.scale)


def merge_linear(
    base: torch.Tensor | None, inputs: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """The weight of a linear layer. Reports the samples' rows and the update's norm."""
    from merging.ops.features import is_measured, read_features, solve_pinv, solve_ridge

    assert base is not None
    parameters = task.parameters
    sums = read_features(inputs, task, base=base)
    if not is_measured(sums.rows, task.figures):
        update = sums.mean
    elif parameters.solver == "ridge":
        update = solve_ridge(sums, parameters.ridge)
    else:
        update = solve_pinv(sums, parameters.rtol)
    task.figures["update_norm"] = parameters.scale * float(update.double().norm())
    update = update.t() if task.transposed else update
    return update.mul(parameters.scale).add_(base.to(update.dtype))


def merge_norm(
    base: torch.Tensor | None, inputs: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """The scale of a norm; a channel that no sample reached takes the mean of the updates."""
    import torch

    from merging.ops.features import is_measured

    assert base is not None
    work = torch.float64 if base.dtype == torch.float64 else torch.float32
    start = base.to(work)
    weighted, weights, total = (torch.zeros_like(start) for _ in range(3))
    rows = []
    for tensor in inputs:
        update = tensor.to(work) - start
        statistic = next(inputs)
        squares = statistic[:-1].to(work)
        weighted.addcmul_(squares, update)
        weights.add_(squares)
        total.add_(update)
        rows.append(int(statistic[-1]))
    is_measured(rows, task.figures)
    update = torch.where(weights > 0, weighted / weights, total / len(rows))
    return update.mul_(task.parameters.scale).add_(start)


register(
    MergeMethod(
        name="lot",
        title="LOT Merging",
        summary=(
            "The update of every layer that changes the experts' outputs least, by a few unlabelled"
            " samples per expert: closed form, no training."
        ),
        source="Sun et al., NeurIPS 2025, arXiv:2505.23859",
        merge=merge_lot,
        cost=mean_cost,
        parameters=LotParameters,
        calibrated={
            LINEAR: Step(
                merge=by_expert(merge_linear),
                cost=features_cost,
                separable="whole",
                streaming=True,
                flat=True,
            ),
            NORM: Step(
                merge=merge_norm, cost=norm_cost, separable="whole", streaming=True, flat=True
            ),
        },
        default_touch="all",
    )
)
