"""ISO-WUDI: WUDI's solution with a flat spectrum, as large as the task vectors ask for.

Source: this project; there is no publication. It joins three published parts: the update M₀ of
SWUDI-A (Wei et al., 2026, arXiv:2606.07289), the isotropic spectrum of Iso-C (Marczak et al., ICML
2025, arXiv:2502.04959), and in place of its tuned factor a rule. Per layer
(:mod:`merging.ops.isotropic`)::

    M₀ = U S Vᵀ     I = mean(S) U Vᵀ     p = (1/n) Σ_i ⟨I, T_i⟩ / ‖T_i‖²_F

and for the whole model one scale, s = mean over layers of 1/p (layers with p ≤ 0 left out); the
result is W0 + s I. The rule asks that, on average, the whole of every task vector is kept. A layer
that a single expert changed gets that expert's task vector, and takes no part in the rule.

The scale depends on all layers (:mod:`merging.calibrated`): a first pass over the models leaves I
of each layer, and p, in intermediate files, and a second one adds s I to the base.

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

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from merging.calibrated import UpdateRule
from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.forms import (
    SVD_FLOPS,
    LayerShape,
    cheapest,
    filter_entries,
    filter_flops,
    reading_entries,
)
from merging.parameters import TouchParameters

if TYPE_CHECKING:
    import torch

    from merging.ops.calibration import Calibration


class IsoWudiParameters(TouchParameters):
    """Recipe-level parameters."""

    scale: float | Literal["auto"] = Field(
        default="auto",
        description=(
            "Factor on the isotropic update of every layer. 'auto' follows the rule, one factor for"
            " the whole model; it is in the report."
        ),
    )


def find_update(
    base: torch.Tensor, experts: Iterator[torch.Tensor], task: Task
) -> tuple[torch.Tensor, Calibration]:
    """A layer's isotropic update. Reports losses, norms and the share that is kept."""
    from merging.ops.isotropic import isotropic_update

    return isotropic_update(base, experts, task)


def iso_wudi_cost(geometry: Geometry, parameters: IsoWudiParameters) -> Cost:  # noqa: ARG001 - declared
    """SWUDI-A, a singular value decomposition, two losses."""
    shape = LayerShape(*geometry.matrix, geometry.num_experts)
    flops = filter_flops(shape)
    form = cheapest(flops)
    entries, smaller = shape.rows * shape.columns, min(shape.rows, shape.columns)
    reading = reading_entries(shape, form) + entries
    solving = filter_entries(shape, form, 0) + 5 * entries + 4 * smaller**2
    return Cost(
        flops[form] + SVD_FLOPS * entries * smaller + 4.0 * entries * shape.columns,
        4 * max(reading, solving),
    )


RULE = UpdateRule(find=find_update, cost=iso_wudi_cost, streaming=True, calibrated="auto")

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
        merge=RULE.merge(),
        cost=iso_wudi_cost,
        parameters=IsoWudiParameters,
        separable="whole",
        streaming=True,
        default_touch="linear",
        default_rest="mean",
        staged=RULE.staged(),
    )
)
