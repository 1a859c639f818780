"""RegMean: the weights of each linear layer whose outputs are nearest to the experts' on samples.

Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023,
arXiv:2212.09849, eq. 3. Of inputs X_i (tokens×I) that a linear layer gets in expert i and
H_i = X_iᵀX_i per token, with all but the diagonal scaled by α::

    W* = (Σ_i W_i H̃_i) (Σ_i H̃_i)⁻¹ ,   H̃_i = α H_i + (1 − α) diag(H_i)

All other tensors are the experts' mean.

Differences from the source: H_i is divided by its number of tokens (the authors' code by that of
examples), so that a task with longer samples does not weigh more; inputs that are zero in all
experts' samples, where the matrix is singular, take the mean of the weights (by a ridge of 1e-7 of
the mean eigenvalue).

Needs samples (docs/calibration.md) and no base model. Experts are read one at a time.
Precision: sums in float32 (float64 if an expert is), solved in float64 for up to 4096 columns; one
rounding at the end. Deterministic: yes.
Cost: 2 E O I² and a factorisation of I×I, beside the run of the samples.
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


class RegMeanParameters(TouchParameters):
    """Recipe-level parameters."""

    alpha: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description=(
            "α, the factor on all but the diagonal of the Gram matrices. 1 trusts the samples"
            " wholly and fails with few of them; 0 averages input by input. 0.9 to 0.95 is usual."
        ),
    )


def merge_regmean(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """A tensor without statistics, or a tile of one: the mean."""
    from merging.ops.features import mean_update

    del base, task
    return mean_update(None, experts, 1.0)


register(
    MergeMethod(
        name="regmean",
        title="RegMean",
        summary=(
            "The weights of every linear layer that come nearest to the experts' outputs on a few"
            " unlabelled samples per expert. Needs no base model."
        ),
        source="Jin et al., ICLR 2023, arXiv:2212.09849, eq. 3",
        merge=merge_regmean,
        cost=mean_cost,
        parameters=RegMeanParameters,
        calibrated={LINEAR: REGRESSION},
        needs_base=False,
        default_touch="linear",
        default_rest="mean",
    )
)
