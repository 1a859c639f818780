"""Singular value calibration: directions that several tasks count twice are made smaller.

Shapes: the merged update D and task vectors T_i are O×I, n of the latter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from merging.ops.layer_method import LayerTask
from merging.ops.layers import as_matrix, naming, new_task_vector, write_task_vector
from merging.ops.low_rank import Expert
from merging.ops.precision import float32_products
from merging.ops.spectral_merge import leading_triplets


def calibrate_singular_values(
    base: torch.Tensor,
    merged: torch.Tensor,
    experts: Iterator[Expert],
    alpha: float,
    task: LayerTask,
) -> torch.Tensor:
    """A merged tensor with its update's singular values divided by how often tasks count them.

    With D = U S Vᵀ and q_ri = ⟨u_rᵀ D, u_rᵀ T_i⟩ / ‖u_rᵀ T_i‖², how much of task i's response in a
    direction the merged one has, S_r becomes S_r n / Σ_i max(α, q_ri).

    Source: "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", ICML 2026,
    arXiv:2602.05536, algorithm 1.

    Args:
        base: Tensor of the base model.
        merged: What the method made of it.
        experts: Tensors of the experts, or adapters of the tensor, read one at a time.
        alpha: α. A task without a response in a direction counts as α.
        task: Gets figures.

    Raises:
        NumericalError: ``did_not_converge``.
    """
    transposed = task.transposed
    with float32_products(base.device), naming(task):
        origin = as_matrix(base, transposed=transposed).double()
        D = as_matrix(merged, transposed=transposed).double().sub_(origin)
        U, S, Vt = leading_triplets(D, min(D.shape))
        response, counts, number = S[:, None] * Vt, torch.zeros_like(S), 0
        T = torch.empty(0)
        for expert in experts:
            if not number:
                T = new_task_vector(base, expert, transposed=transposed)
            write_task_vector(T, base, expert, transposed=transposed)
            del expert  # its memory may be used again from here on
            own = U.mT @ T.double()
            squares = own.square().sum(dim=1)
            share = (own * response).sum(dim=1) / squares.where(squares > 0, 1)
            counts.add_(share.where(squares > 0, alpha).clamp_(min=alpha))
            number += 1
        factors = number / counts
        energy = float(S.square().sum())
        after = float((S * factors).square().sum())
        task.figures["calibrated_norm_ratio"] = (after / energy) ** 0.5 if energy else 1.0
        result = origin.addmm_(U * (S * factors), Vt).to(T.dtype)
    return (result.t() if transposed else result).reshape(base.shape)
