"""Merging one tensor as the weight matrix of a linear layer: O output rows × I input columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from merging.errors import NumericalError
from merging.ops.blocks import block_size, work_dtype
from merging.ops.figures import describe_solution, describe_start, warn
from merging.ops.forms import Flops, LayerShape, cheapest
from merging.ops.gram_form import GramProblem
from merging.ops.precision import float32_products
from merging.ops.problem import LayerProblem, SolveError
from merging.ops.row_form import RowProblem


class LayerTask(Protocol):
    """What is used of a method's task."""

    tensor_name: str
    parameters: Any
    expert_parameters: Sequence[Any]
    transposed: bool
    figures: dict[str, Any]


Solve = Callable[[LayerProblem], torch.Tensor]
"""The merged update (O×I) of a problem with two task vectors or more that are not zero; it may be
``problem.total``, which is given up."""


def merge_layer(
    base: torch.Tensor,
    experts: Iterator[torch.Tensor],
    task: LayerTask,
    *,
    flops: Callable[[LayerShape], Flops],
    solve: Solve,
    keep_weighted_total: bool = False,
) -> torch.Tensor:
    """Merge a tensor: sum up its problem in the cheapest form, solve it, add it to the base.

    A single task vector that is not zero is returned as it is. Figures and warnings go to the task.

    Args:
        base: Tensor of the base model.
        experts: Tensors of the experts, read one at a time.
        task: Of the method; its parameters have a ``scale``.
        flops: Operations by form for a shape.
        solve: What the method does.
        keep_weighted_total: The method uses ``problem.combine(-1)``.

    Raises:
        NumericalError: ``did_not_converge`` if it cannot be solved with these parameters.
    """
    columns, rows = as_matrix(base, transposed=task.transposed).shape[::-1]
    by_form = flops(LayerShape(rows, columns, len(task.expert_parameters)))
    form = cheapest(by_form)

    def new_problem(like: torch.Tensor) -> LayerProblem:
        if form == "rows":
            return RowProblem(like, len(task.expert_parameters))
        return GramProblem(like, keep_weighted_total=keep_weighted_total)

    with float32_products(base.device):
        problem = read_problem(base, experts, new_problem, transposed=task.transposed)
    return solve_layer(base, problem, task, flops=by_form[form], solve=solve)


def solve_layer(
    base: torch.Tensor, problem: LayerProblem, task: LayerTask, *, flops: float, solve: Solve
) -> torch.Tensor:
    """Solve a problem that has been read, add the update to the base; see :func:`merge_layer`."""
    with float32_products(base.device):
        task.figures.update(describe_start(problem), flops=flops)
        M = problem.total
        if problem.num_nonzero > 1:
            with naming(task):
                M = solve(problem)
        task.figures.update(describe_solution(problem, M, task.figures))
        if warnings := warn(problem, task.figures):
            task.figures["warnings"] = warnings
    return add_to_base(base, M, scale=task.parameters.scale, transposed=task.transposed)


@contextmanager
def naming(task: LayerTask) -> Iterator[None]:
    """Turns a problem that cannot be solved into an error that names the tensor.

    Raises:
        NumericalError: ``did_not_converge``.
    """
    try:
        yield
    except SolveError as error:
        raise NumericalError(
            f"Cannot solve {task.tensor_name!r}: {error}.",
            code="did_not_converge",
            context={"tensor_name": task.tensor_name},
        ) from error


def as_matrix(tensor: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """A view of the tensor with one row per output.

    Trailing dimensions are unrolled into columns, as in a convolution; a vector or a scalar is one
    row. ``transposed`` says that the tensor is stored in×out.
    """
    matrix = tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)
    return matrix.t() if transposed else matrix


def read_problem(
    base: torch.Tensor,
    experts: Iterator[torch.Tensor],
    new_problem: Callable[[torch.Tensor], LayerProblem],
    *,
    transposed: bool,
) -> LayerProblem:
    """Sum up the problem of a layer, one expert at a time, holding on to no stored tensor.

    The work dtype is settled by the base and the first expert, before the others are seen.

    Args:
        base: Tensor of the base model.
        experts: Tensors of the experts.
        new_problem: Makes the empty problem for matrices like the one given.
        transposed: The tensors are stored in×out.
    """
    problem: LayerProblem | None = None
    T = torch.empty(0)
    for expert in experts:
        if problem is None:
            T = new_task_vector(base, expert, transposed=transposed)
            problem = new_problem(T)
        write_task_vector(T, base, expert, transposed=transposed)
        del expert  # its memory may be used again from here on
        problem.accumulate(T)
    assert problem is not None, "recipes without experts are refused"
    problem.finish()
    return problem


def new_task_vector(base: torch.Tensor, expert: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """An uninitialised matrix for task vectors, in the work dtype of the two."""
    shape = as_matrix(base, transposed=transposed).shape
    return torch.empty(shape, dtype=work_dtype((base, expert)), device=base.device)


def write_task_vector(
    T: torch.Tensor, base: torch.Tensor, expert: torch.Tensor, *, transposed: bool
) -> None:
    """Write expert minus base to a matrix, both raised to its dtype first."""
    T.copy_(as_matrix(expert, transposed=transposed))
    for T_rows, base_rows in _row_blocks(T, as_matrix(base, transposed=transposed)):
        T_rows.sub_(base_rows)


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
