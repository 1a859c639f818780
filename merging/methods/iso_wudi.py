"""ISO-WUDI: WUDI's solution with a flat spectrum, as large as the task vectors ask for.

Source: this project; there is no publication. It joins three published parts: the update M₀ of
SWUDI-A (Wei et al., 2026, arXiv:2606.07289), the isotropic spectrum of Iso-C (Marczak et al., ICML
2025, arXiv:2502.04959), and in place of its tuned factor a rule. Per layer
(:mod:`merging.ops.isotropic`)::

    M₀ = U S Vᵀ     I = mean(S) U Vᵀ     p = (1/n) Σ_i ⟨I, T_i⟩ / ‖T_i‖²_F

and for the whole model one scale, s = mean over layers of 1/p (layers with p ≤ 0 left out); the
result is W0 + s I. The rule asks that, on average, the whole of every task vector is kept. A layer
that a single expert changed gets that expert's task vector, and takes no part in the rule.

The scale depends on all layers: a first pass over the models leaves I of each layer, and p, in
intermediate files, and a second one adds s I to the base.

How good it is depends on the models. Text classifiers of eight tasks on one small encoder kept
95.7 % of the experts' accuracy (SWUDI-A 91.4, WUDI 88.5); on the demo's causal language models it
kept 45 % of the experts' gain, SWUDI-A 64 %. Untested on large models: compare, and look at the
reported scale.

Needs the base model. Not separable. Experts are read one at a time.
Precision: float32 (float64 if the base or the first expert is), one rounding at the end.
Deterministic: yes. The sign of singular vectors cancels.
Cost: SWUDI-A's and a singular value decomposition, about 14 O I min(O, I) flops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from merging.method import (
    Cost,
    Geometry,
    MergeMethod,
    Reduction,
    Staged,
    Step,
    Task,
    TouchParameters,
    register,
)
from merging.ops.forms import LayerShape, cheapest, filter_entries, filter_flops, reading_entries

if TYPE_CHECKING:
    import torch

    from merging.ops.isotropic import Calibration

_NUM_FIGURES = 8
"""Fields of :class:`merging.ops.isotropic.Calibration`."""


class IsoWudiParameters(TouchParameters):
    """Recipe-level parameters."""

    scale: float | Literal["auto"] = Field(
        default="auto",
        description=(
            "Factor on the isotropic update of every layer. 'auto' follows the rule, one factor for"
            " the whole model; it is in the report."
        ),
    )


def merge_iso_wudi(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one weight matrix, as if it were the whole model. Reports losses, norms, scale."""
    from merging.ops.isotropic import isotropic_update, scale_for

    assert base is not None
    update, calibration = isotropic_update(base, experts, task)
    scale = task.parameters.scale
    if scale == "auto":
        scale = scale_for([calibration.kept])
    return _add(base, update, scale if calibration.is_isotropic else 1.0, calibration, task)


def _find_update(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """A layer's isotropic update and its calibration, one after the other."""
    import torch

    from merging.ops.isotropic import isotropic_update

    assert base is not None
    update, calibration = isotropic_update(base, experts, task)
    return torch.cat([update.reshape(-1), update.new_tensor(calibration)])


def _find_scale(_: torch.Tensor | None, kept: Iterator[torch.Tensor], task: Task) -> torch.Tensor:  # noqa: ARG001 - declared
    import torch

    from merging.ops.isotropic import scale_for

    return torch.tensor([scale_for([float(one) for one in kept])], dtype=torch.float64)


def _finish(base: torch.Tensor | None, update: Iterator[torch.Tensor], task: Task) -> torch.Tensor:
    """Add a layer's update, or a tile of it, at the model's scale."""
    from merging.ops.isotropic import Calibration

    assert base is not None
    found, numbers = task.given
    calibration = Calibration(*numbers.tolist())
    scale = float(found) if calibration.is_isotropic else 1.0
    return _add(base, next(update), scale, calibration, task)


def _add(
    base: torch.Tensor, update: torch.Tensor, scale: float, calibration: Calibration, task: Task
) -> torch.Tensor:
    task.figures.update(calibration.describe(scale))
    return (update * scale).add_(base.to(update.dtype))


def iso_wudi_cost(geometry: Geometry, parameters: IsoWudiParameters) -> Cost:  # noqa: ARG001 - declared
    """SWUDI-A, a singular value decomposition, two losses."""
    shape = LayerShape(*geometry.matrix, geometry.num_experts)
    flops = filter_flops(shape)
    form = cheapest(flops)
    entries, smaller = shape.rows * shape.columns, min(shape.rows, shape.columns)
    reading = reading_entries(shape, form) + entries
    solving = filter_entries(shape, form, 0) + 5 * entries + 4 * smaller**2
    return Cost(
        flops[form] + 16.0 * entries * smaller + 4.0 * entries * shape.columns,
        4 * max(reading, solving),
    )


def _adding_cost(geometry: Geometry, parameters: IsoWudiParameters) -> Cost:  # noqa: ARG001 - declared
    return Cost(flops=2.0 * geometry.num_entries, workspace_bytes=8 * geometry.num_entries)


def _small_cost(geometry: Geometry, parameters: IsoWudiParameters) -> Cost:  # noqa: ARG001 - declared
    return Cost(flops=2.0 * geometry.num_experts, workspace_bytes=64 * geometry.num_experts)


def _group(parameters: IsoWudiParameters, experts: Sequence[Any]) -> Any:  # noqa: ARG001 - declared
    """All tensors share the scale, unless it is given."""
    return "model" if parameters.scale == "auto" else None


STAGED = Staged(
    reductions=(
        Reduction(
            name="updates",
            map=Step(merge=_find_update, cost=iso_wudi_cost, separable="whole", streaming=True),
            entries=lambda g: g.num_entries + _NUM_FIGURES,
            part=lambda g: slice(g.num_entries, g.num_entries + 1),
            combine=Step(
                merge=_find_scale, cost=_small_cost, separable="whole", streaming=True, flat=True
            ),
            combined_entries=lambda _: 1,
            combined_dtype="F64",
        ),
    ),
    finish=Step(merge=_finish, cost=_adding_cost),
    group=_group,
    keeps_map=True,
)

register(
    MergeMethod(
        name="iso_wudi",
        title="ISO-WUDI",
        summary=(
            "SWUDI-A's update with all directions equally strong, as large as keeps the experts'"
            " task vectors whole. Needs no data and no hyperparameter; better than SWUDI-A on"
            " classifiers of many tasks, worse on the demo's language models."
        ),
        source=(
            "This project, unpublished; from SWUDI-A (arXiv:2606.07289) and Iso-C"
            " (arXiv:2502.04959)"
        ),
        merge=merge_iso_wudi,
        cost=iso_wudi_cost,
        parameters=IsoWudiParameters,
        separable="whole",
        streaming=True,
        default_touch="linear",
        default_rest="mean",
        staged=STAGED,
    )
)
