"""OPCM: task vectors added up one after another, projected away from what is there already.

Shapes: task vectors T are O×I, as they are stored: a projection from both sides is the same for the
transpose.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from merging.ops.blocks import inner_product
from merging.ops.layers import new_task_vector, write_task_vector
from merging.ops.low_rank import Expert
from merging.ops.spectral_merge import leading_triplets, without_rounding


def add_in_sequence(
    base: torch.Tensor, experts: Iterator[Expert], alpha: float | None
) -> tuple[torch.Tensor, list[float]]:
    """The sum of task vectors, each projected first, and ‖·‖²_F of it and of every task vector.

    Args:
        base: Tensor of the base model.
        experts: Tensors of the experts, or adapters of the tensor, read one at a time.
        alpha: Share of the singular values' total that is protected; None adds without projecting.

    Raises:
        SolveError: A decomposition failed.
    """
    total: torch.Tensor | None = None
    T = torch.empty(0)
    squares: list[float] = []
    for expert in experts:
        if total is None:
            T = new_task_vector(base, expert, transposed=False)
            total = torch.zeros_like(T)
        write_task_vector(T, base, expert, transposed=False)
        del expert  # its memory may be used again from here on
        squares.append(inner_product(T, T))
        if alpha is not None and len(squares) > 1:
            remove_what_is_in_use(T, total, alpha)
        total.add_(T)
    assert total is not None, "recipes without experts are refused"
    return total, [inner_product(total, total), *squares]


def remove_what_is_in_use(T: torch.Tensor, total: torch.Tensor, alpha: float) -> None:
    """Project a task vector, in place.

    With U S Vᵀ the decomposition of the total, Uᵀ T V loses its diagonal and the block of the first
    r directions of either side.

    Source: Tang et al., NeurIPS 2025, arXiv:2501.09522, section 4.2.

    Args:
        T: Task vector.
        total: What is there already.
        alpha: r is the first singular value, from 0, at which more than this share of all is there.
    """
    U, S, Vt = without_rounding(leading_triplets(total, min(total.shape)))
    if not len(S):
        return
    rank = int((S.cumsum(0) / S.sum() > alpha).to(torch.uint8).argmax())
    first = U[:, :rank] @ (U[:, :rank].mT @ T @ Vt[:rank].mT) @ Vt[:rank]
    diagonal = ((U[:, rank:].mT @ T) * Vt[rank:]).sum(dim=1)
    T.sub_(first).sub_((U[:, rank:] * diagonal) @ Vt[rank:])
