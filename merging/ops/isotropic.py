"""A layer's merged update with a flat spectrum, and how large it has to be.

With SWUDI-A's update M₀ = U S Vᵀ (:mod:`merging.ops.spectral`) and the mean over the singular
values that are not 0 but for rounding::

    I = mean(S) U Vᵀ        p = (1/n) Σ_i ⟨I, T_i⟩ / ‖T_i‖²_F

p says how much of each task vector's own direction survives in I, on average. The sum over experts
is one product with W = Σ_i T_i / ‖T_i‖²_F, which is summed up as the experts are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from merging.ops.blocks import inner_product
from merging.ops.calibration import Calibration
from merging.ops.figures import describe_start, warn
from merging.ops.forms import LayerShape, cheapest, filter_flops
from merging.ops.layer_method import LayerTask, Reading
from merging.ops.layers import as_matrix, naming, read_problem
from merging.ops.precision import float32_products
from merging.ops.problem import LayerProblem, SolveError
from merging.ops.spectral import solve_in_used_directions


def isotropic_update(
    base: torch.Tensor, experts: Iterator[torch.Tensor], task: LayerTask
) -> tuple[torch.Tensor, Calibration]:
    """I of a layer in the shape of its tensor, and its calibration.

    Args:
        base: Tensor of the base model.
        experts: Tensors of the experts, read one at a time.
        task: Gets figures and warnings.

    Raises:
        NumericalError: ``did_not_converge``.
    """
    columns, rows = as_matrix(base, transposed=task.transposed).shape[::-1]
    shape = LayerShape(rows, columns, len(task.expert_parameters))
    form = cheapest(filter_flops(shape))
    reading = Reading(form, shape.num_experts, task.transposed, keep_weighted_total=True)
    with float32_products(base.device), naming(task):
        problem = read_problem(base, experts, reading)
        start = describe_start(problem)
        task.figures.update(start, flops=filter_flops(shape)[form])
        if warnings := warn(problem, task.figures):
            task.figures["warnings"] = warnings
        if problem.num_nonzero > 1:
            update = flatten_spectrum(solve_in_used_directions(problem, task))
            calibration = _calibrate(problem, update, start)
            task.figures["kept"] = calibration.kept
        else:
            update = problem.total
            calibration = Calibration(0, 0, start["sum_norm"], start["sum_norm"])
    return (update.t() if task.transposed else update).reshape(base.shape), calibration


def flatten_spectrum(M: torch.Tensor) -> torch.Tensor:
    """M with all singular values that are not 0 set to their mean.

    Those that are 0 but for rounding have directions that mean nothing, and stay out.

    Raises:
        SolveError: The decomposition failed.
    """
    try:
        U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # public, not exported
        raise SolveError("its update has no singular values; are all inputs finite?") from error
    rounding = max(M.shape) * torch.finfo(S.dtype).eps * S[0]
    rank = int(S.gt(rounding).sum())
    return (U[:, :rank] * S[:rank].mean()) @ Vt[:rank] if rank else torch.zeros_like(M)


def _calibrate(problem: LayerProblem, update: torch.Tensor, start: dict[str, Any]) -> Calibration:
    """Weigh an update against the task vectors; the problem's ``total`` is used up."""
    update = update.contiguous()
    above, below = problem.loss(update), problem.loss(-update)
    everything = slice(0, len(update))
    problem.store(everything, problem.combine(-1, everything))
    return Calibration(
        kept=inner_product(update, problem.total) / problem.num_nonzero,
        is_merged=1,
        norm=inner_product(update, update) ** 0.5,
        sum_norm=start["sum_norm"],
        loss_before=start["loss_before"],
        quadratic=(above + below) / 2 - problem.c,
        linear=(below - above) / 4,
        constant=problem.c,
    )
