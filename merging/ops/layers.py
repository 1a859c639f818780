"""Tensors as the matrices of linear layers: O output rows × I input columns."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from merging.ops.blocks import block_size, work_dtype
from merging.ops.quadratic import QuadraticProblem


def as_matrix(tensor: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """A view of the tensor with one row per output.

    Trailing dimensions are unrolled into columns, as in a convolution; a vector or a scalar is one
    row. ``transposed`` says that the tensor is stored in×out.
    """
    matrix = tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)
    return matrix.t() if transposed else matrix


def read_task_vectors(
    base: torch.Tensor,
    experts: Iterator[torch.Tensor],
    *,
    transposed: bool,
    keep_weighted_total: bool = False,
) -> QuadraticProblem:
    """Sum up the quadratic problem of a layer, one expert at a time, holding on to none.

    The work dtype is settled by the base and the first expert, before the others are seen.
    """
    base_matrix = as_matrix(base, transposed=transposed)
    problem: QuadraticProblem | None = None
    for expert in experts:
        if problem is None:
            dtype = work_dtype((base, expert))
            T = torch.empty(base_matrix.shape, dtype=dtype, device=base.device)
            problem = QuadraticProblem(T, keep_weighted_total=keep_weighted_total)
        T.copy_(as_matrix(expert, transposed=transposed))
        del expert  # its memory may be used again from here on
        for T_rows, base_rows in _row_blocks(T, base_matrix):
            T_rows.sub_(base_rows)
        problem.accumulate(T)
    assert problem is not None, "recipes without experts are refused"
    return problem


def add_to_base(
    base: torch.Tensor, M: torch.Tensor, *, scale: float, transposed: bool
) -> torch.Tensor:
    """``base + scale · M`` in the shape of the base and the dtype of M, which is used up."""
    M.mul_(scale)
    for M_rows, base_rows in _row_blocks(M, as_matrix(base, transposed=transposed)):
        M_rows.add_(base_rows)
    return (M.t() if transposed else M).reshape(base.shape)


def _row_blocks(
    matrix: torch.Tensor, stored: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of a matrix beside the same rows of a stored one, raised to the first one's dtype."""
    num_rows = max(1, block_size(matrix.device) // max(1, matrix.shape[1]))
    for rows, stored_rows in zip(matrix.split(num_rows), stored.split(num_rows), strict=True):
        yield rows, stored_rows.to(matrix.dtype)
