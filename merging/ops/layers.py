"""Merging one tensor as the weight matrix of a linear layer: O output rows × I input columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from merging.errors import NumericalError
from merging.ops.blocks import block_size, work_dtype
from merging.ops.figures import describe_solution, describe_start, warn
from merging.ops.forms import LayerShape, cheapest
from merging.ops.gram_form import GramProblem
from merging.ops.layer_method import LayerMethod, LayerTask, LayerVariant, Reading, shared_flops
from merging.ops.low_rank import Adapter, Expert, FactorProblem
from merging.ops.precision import float32_products
from merging.ops.problem import DenseProblem, LayerProblem, SolveError
from merging.ops.row_form import RowProblem

Solve = Callable[[LayerProblem], torch.Tensor]
"""Solution of a problem, as :attr:`LayerMethod.solve`."""

SolverTask = tuple[LayerMethod, LayerTask]


def merge_layer(
    base: torch.Tensor, experts: Iterator[Expert], tasks: Sequence[SolverTask]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Merge a tensor in one or several variants that share a problem.

    The problem is summed up once, in the form that is cheapest for all of them; what does not
    depend on a variant's parameters is computed once; variants that differ in ``scale`` alone share
    their solution. A single task vector that is not zero is returned as it is. Figures and warnings
    go to the tasks.

    Args:
        base: Tensor of the base model.
        experts: Tensors of the experts or adapters of the tensor, read one at a time.
        tasks: Solvers with their tasks, all of one tensor and one problem.

    Yields:
        The place of a variant among ``tasks``, and its merged tensor.

    Raises:
        NumericalError: ``did_not_converge`` if it cannot be solved with these parameters.
    """
    method, task = tasks[0]
    columns, rows = as_matrix(base, transposed=task.transposed).shape[::-1]
    shape = LayerShape(rows, columns, len(task.expert_parameters), task.ranks)
    variants = [LayerVariant(method, task.parameters) for method, task in tasks]
    form = cheapest(shared_flops(shape, variants))
    needs_weighted_total = any(m.needs_weighted_total(t.parameters) for m, t in tasks)
    reading = Reading(form, shape.num_experts, task.transposed, needs_weighted_total)
    with float32_products(base.device), naming(task):
        problem = variants[0].problem.read(base, experts, reading)
    total = problem.total
    groups = _group_by_solution(tasks)
    for number, group in enumerate(groups):
        if number + 1 < len(groups):
            problem.total = total.clone()  # a solver gives it up
        method, task = tasks[group[0]]
        task.figures["flops"] = method.flops(shape, task.parameters)[form]
        M = _solve(base, problem, method, task)
        for place in group:
            task = tasks[place][1]
            task.figures.update(tasks[group[0]][1].figures)
            update = M if place == group[-1] else M.clone()
            yield place, add_to_base(base, update, task)
        problem.total = total


def _group_by_solution(tasks: Sequence[SolverTask]) -> list[list[int]]:
    """Places of variants, together where they differ in scale alone."""
    groups: dict[tuple[int, str], list[int]] = {}
    for place, (method, task) in enumerate(tasks):
        parameters = task.parameters.model_copy(update={"scale": 1.0})
        groups.setdefault((id(method), parameters.model_dump_json()), []).append(place)
    return list(groups.values())


def _solve(
    base: torch.Tensor, problem: LayerProblem, method: LayerMethod, task: LayerTask
) -> torch.Tensor:
    """The merged update, with figures."""
    with float32_products(base.device):
        task.figures.update(problem.once(describe_start))
        M = problem.total
        if problem.num_nonzero > 1:
            with naming(task):
                M = method.solve(problem, task)
        task.figures.update(describe_solution(problem, M, task.figures))
        if warnings := warn(problem, task.figures):
            task.figures["warnings"] = warnings
    return M


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


def read_problem(base: torch.Tensor, experts: Iterator[Expert], reading: Reading) -> LayerProblem:
    """Sum up the problem of a layer, one expert at a time, holding on to no stored tensor.

    The work dtype is settled by the base and the first expert, before the others are seen.

    Args:
        base: Tensor of the base model.
        experts: Tensors of the experts or adapters of the tensor.
        reading: What is needed of it.
    """
    if reading.form == "factors":
        return _read_adapters(base, experts, transposed=reading.transposed)
    problem: DenseProblem | None = None
    T = torch.empty(0)
    for expert in experts:
        if problem is None:
            T = new_task_vector(base, expert, transposed=reading.transposed)
            problem = _new_problem(T, reading)
        write_task_vector(T, base, expert, transposed=reading.transposed)
        del expert  # its memory may be used again from here on
        problem.accumulate(T)
    assert problem is not None, "recipes without experts are refused"
    problem.finish()
    return problem


def _read_adapters(
    base: torch.Tensor, experts: Iterator[Expert], *, transposed: bool
) -> LayerProblem:
    """The problem of a layer whose experts are all adapters, without a dense task vector."""
    adapters = [as_layer(expert, transposed=transposed) for expert in experts]
    return FactorProblem(new_task_vector(base, adapters[0], transposed=transposed), adapters)


def as_layer(expert: Expert, *, transposed: bool) -> Adapter:
    """An adapter of a stored tensor as one of the layer, O×I."""
    assert isinstance(expert, Adapter), "a task has ranks only where all experts are adapters"
    return expert.transpose() if transposed else expert


def _new_problem(like: torch.Tensor, reading: Reading) -> DenseProblem:
    if reading.form == "rows":
        return RowProblem(like, reading.num_experts)
    return GramProblem(like, keep_weighted_total=reading.keep_weighted_total)


def new_task_vector(base: torch.Tensor, expert: Expert, *, transposed: bool) -> torch.Tensor:
    """An uninitialised matrix for task vectors, in the work dtype of the two."""
    shape = as_matrix(base, transposed=transposed).shape
    like = expert.up if isinstance(expert, Adapter) else expert
    return torch.empty(shape, dtype=work_dtype((base, like)), device=base.device)


def write_task_vector(
    T: torch.Tensor, base: torch.Tensor, expert: Expert, *, transposed: bool
) -> None:
    """Write expert minus base to a matrix, both raised to its dtype first, or an adapter's part."""
    if isinstance(expert, Adapter):
        as_layer(expert, transposed=transposed).write(T)
        return
    T.copy_(as_matrix(expert, transposed=transposed))
    for T_rows, base_rows in _row_blocks(T, as_matrix(base, transposed=transposed)):
        T_rows.sub_(base_rows)


def read_task_vectors(
    base: torch.Tensor, experts: Iterator[Expert], *, transposed: bool
) -> list[torch.Tensor]:
    """The task vectors (O×I) of all experts, in memory of their own."""
    vectors: list[torch.Tensor] = []
    for expert in experts:
        T = new_task_vector(base, expert, transposed=transposed)
        write_task_vector(T, base, expert, transposed=transposed)
        vectors.append(T)
    return vectors


def add_to_base(base: torch.Tensor, M: torch.Tensor, task: LayerTask) -> torch.Tensor:
    """``base + scale · M`` in the shape of the base and the dtype of M, which is used up."""
    M.mul_(task.parameters.scale)
    for M_rows, base_rows in _row_blocks(M, as_matrix(base, transposed=task.transposed)):
        M_rows.add_(base_rows)
    return (M.t() if task.transposed else M).reshape(base.shape)


def _row_blocks(
    matrix: torch.Tensor, stored: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of a matrix beside the same rows of a stored one, raised to the first one's dtype."""
    num_rows = max(1, block_size(matrix.device) // max(1, matrix.shape[1]))
    for rows, stored_rows in zip(matrix.split(num_rows), stored.split(num_rows), strict=True):
        yield rows, stored_rows.to(matrix.dtype)
