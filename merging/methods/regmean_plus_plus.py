"""RegMean++: RegMean block after block, on what comes out of the merged blocks before.

Source: Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for
Model Merging", arXiv:2508.03121. The weights of a linear layer are RegMean's::

    W* = (Σ_i W_i H̃_i) (Σ_i H̃_i)⁻¹ ,   H̃_i = α H_i + (1 − α) diag(H_i)

with H_i = X_iᵀX_i per token of the inputs that the layer gets in block b of expert i; but what goes
into that block is what comes out of the *merged* blocks 1 … b−1 on the samples of expert i, where
RegMean takes what comes out of the expert's own. All other tensors are the experts' mean.

Differences from the source: as of ``regmean``; layers behind the last block see what comes out of
the expert's last block.

Needs samples (docs/calibration.md) and no base model. Blocks are merged one after another, the
experts' parts of each side by side; each block is a file of the output at least.
Precision: sums in float32 (float64 if an expert is), solved in float64 for up to 4096 columns; one
rounding at the end, which is what the next block sees. Deterministic: yes.
Cost: as ``regmean``, and each expert's samples go through the merged blocks too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import MergeMethod, Task, register
from merging.parameters import TouchParameters
from merging.sampled import LINEAR, REGRESSION, mean_cost

if TYPE_CHECKING:
    import torch


class RegMeanPlusPlusParameters(TouchParameters):
    """Recipe-level parameters."""

    alpha: float = Field(
        default=0.95,
        ge=0,
        le=1,
        description=(
            "α, the factor on all but the diagonal of the Gram matrices. 1 trusts the samples"
            " wholly and fails with few of them; 0 averages input by input."
        ),
    )


def merge_regmean_plus_plus(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """A tensor without statistics, or a tile of one: the mean."""
    from merging.ops.features import mean_update

    del base, task
    return mean_update(None, experts, 1.0)


register(
    MergeMethod(
        name="regmean_plus_plus",
        title="RegMean++",
        summary=(
            "RegMean block after block: the samples of each expert come through the merged blocks"
            " before, so that every layer is fitted to what it will get. Needs no base model."
        ),
        source="Nguyen et al., 2025, arXiv:2508.03121",
        merge=merge_regmean_plus_plus,
        cost=mean_cost,
        parameters=RegMeanPlusPlusParameters,
        calibrated={LINEAR: REGRESSION},
        sequential=True,
        needs_base=False,
        default_touch="linear",
        default_rest="mean",
    )
)
