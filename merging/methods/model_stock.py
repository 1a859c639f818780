"""Model Stock: from the base towards the experts' mean, as far as their angles say.

Source: Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024,
arXiv:2403.19522, eq. 5: t = n cos θ / (1 + (n − 1) cos θ), result t · mean + (1 − t) · base.
Differences from the source: for more than two experts cos θ is the mean over pairs, as in mergekit;
a layer whose denominator is 0 stays with the base.

Needs the base model. Angles are those of whole tensors, or of rows: they are found in memory, or by
reading the inputs once more (:mod:`merging.angles`).
Precision: angles in float64, the sum in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: 2 E² + 2 E flops per entry for E experts; a few blocks of scratch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from merging.angles import ByAngles
from merging.method import MergeMethod, Task, register
from merging.parameters import TouchParameters

if TYPE_CHECKING:
    import torch

_SINGULAR = 1e-6
_SHORT = 1e-6
"""Products of lengths below this count as this much: of an expert that is all but the base."""


class ModelStockParameters(TouchParameters):
    """Recipe-level parameters."""

    filter_wise: bool = Field(
        default=False,
        description="Each row of a tensor has its own angle, instead of one for the tensor.",
    )


def stock_weights(products: torch.Tensor, task: Task) -> torch.Tensor:
    """Weights of the task vectors. Reports the mean cosine and ratio as figures."""
    import torch

    count = products.shape[-1]
    lengths = products.diagonal(dim1=1, dim2=2).sqrt()
    longest = (lengths[:, :, None] * lengths[:, None, :]).clamp(min=_SHORT)
    first, second = torch.triu_indices(count, count, offset=1, device=products.device)
    cosine = (products / longest).clamp(-1, 1)[:, first, second].mean(dim=1)
    denominator = 1 + (count - 1) * cosine
    is_singular = denominator.abs() < _SINGULAR
    ratio = (count * cosine / denominator.where(~is_singular, 1)).where(~is_singular, 0)
    task.figures["mean_cosine"] = float(cosine.mean())
    task.figures["mean_ratio"] = float(ratio.mean())
    return (ratio / count)[:, None].expand(-1, count)


ANGLES = ByAngles(
    weights=stock_weights,
    kind=lambda parameters: "rows" if parameters.filter_wise else "tensor",
)

register(
    MergeMethod(
        name="model_stock",
        title="Model Stock",
        summary=(
            "Moves from the base towards the experts' mean, as far as the angles between task"
            " vectors say: for fine-tunes of one task that differ by chance."
        ),
        source="Jang et al., ECCV 2024, arXiv:2403.19522, eq. 5",
        merge=ANGLES.merge(),
        cost=ANGLES.cost,
        parameters=ModelStockParameters,
        min_experts=2,
        separable="whole",
        rounds=True,
        staged=ANGLES.staged(),
    )
)
