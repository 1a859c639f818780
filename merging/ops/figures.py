"""What a merge says about a layer: sizes, interference before and after, and what to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from merging.ops.blocks import inner_product
from merging.ops.problem import LayerProblem

_LOSS_NOISE = 1e-6
"""Share of c below which a float32 loss says nothing."""

_MAX_NORM_SPREAD = 2.0
_USUAL_RATES = (0.005, 0.2)
_LOW_RANK_SHARE = 1 / 64


def describe_start(problem: LayerProblem) -> dict[str, Any]:
    """Figures of the task vectors and of their plain sum.

    ``participation_ratio`` is trace(A)² / ‖A‖²_F: in how many input directions, evenly used, the
    task vectors would have the same spread.
    """
    figures: dict[str, Any] = {
        "form": problem.form,
        "expert_norms": problem.norms,
        "sum_norm": math.sqrt(inner_product(problem.total, problem.total)),
    }
    if nonzero := problem.nonzero_norms:
        figures["norm_spread"] = max(nonzero) / min(nonzero)
        square = inner_product(problem.A, problem.A)
        figures["participation_ratio"] = float(problem.A.trace()) ** 2 / square
    if len(nonzero) > 1:
        figures["loss_before"] = problem.loss(problem.total)
    return figures


def describe_solution(
    problem: LayerProblem, M: torch.Tensor, start: Mapping[str, Any]
) -> dict[str, Any]:
    """Figures of a merged update, beside :func:`describe_start`'s."""
    norm = math.sqrt(inner_product(M, M))
    loss = problem.loss(M) if "loss_before" in start else None
    return describe_update(start, norm=norm, loss=loss, c=problem.c)


def describe_update(
    start: Mapping[str, Any], *, norm: float, loss: float | None, c: float
) -> dict[str, Any]:
    """The same from what is known of the update; without a problem there is no loss."""
    figures: dict[str, Any] = {"update_norm": norm}
    if start["sum_norm"] > 0:
        figures["norm_ratio"] = norm / start["sum_norm"]
    if loss is not None:
        figures["loss_after"] = loss
        if start["loss_before"] > _LOSS_NOISE * c:
            figures["interference_removed"] = 1 - loss / start["loss_before"]
    return figures


def warn(problem: LayerProblem, figures: Mapping[str, Any]) -> list[str]:
    """Sentences about what the literature knows as trouble; empty if there is none.

    Sources: unequal norms, "DisTaC" (2025); the learning rate, the trajectory's dependence on it
    (``docs/numerics.md``); few directions, the notes of Wei et al. on WUDI for adapters
    (arXiv:2505.19892).
    """
    warnings = []
    spread = figures.get("norm_spread", 1.0)
    if spread > _MAX_NORM_SPREAD:
        warnings.append(
            f"The largest task vector is {spread:.1f} times the smallest; methods that balance"
            " experts lose accuracy above about 2. Scale the experts' updates to similar size."
        )
    ratio = figures.get("learning_rate_over_rms")
    if ratio is None:
        return warnings
    lowest, highest = _USUAL_RATES
    if not lowest <= ratio <= highest:
        effect = "hardly moves from the sum" if ratio < lowest else "runs into over-fitting"
        warnings.append(
            f"The learning rate is {ratio:.2g} times the task vectors' root mean square, outside"
            f" {lowest} to {highest}; Adam then {effect}. Use learning_rate: auto."
        )
    num_directions = 1 / max(problem.gram_squares, default=1.0)
    smaller_side = min(problem.total.shape)
    if problem.gram_squares and num_directions < _LOW_RANK_SHARE * smaller_side:
        warnings.append(
            f"A task vector uses about {num_directions:.1f} of {smaller_side} directions, as those"
            " of adapters do. Adam leaves their span and the update grows; use swudi_a or wudi_cfs."
        )
    return warnings
