"""A layer divided over several workers: one sums up its problem, others solve rows of it.

What passes between them are flat tensors in the work dtype: A, B and ΣT of the problem, then rows
of the update, each followed by numbers that the next one needs. Rows are solved in the same blocks,
by the same operations, as by one worker: the result has the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch

from merging.ops.blocks import inner_product
from merging.ops.figures import describe_start, describe_update, warn
from merging.ops.forms import LayerShape
from merging.ops.gram_form import GramProblem, GramRows
from merging.ops.layer_method import (
    NUM_PREPARED,
    NUM_ROWS,
    WORDS,
    KnownLayer,
    KnownRows,
    LayerMethod,
    LayerTask,
    Reading,
    RowSolver,
)
from merging.ops.layers import add_to_base, as_matrix, naming
from merging.ops.precision import float32_products


def sum_up(
    base: torch.Tensor,
    experts: Iterator[torch.Tensor],
    task: LayerTask,
    layer: LayerMethod,
) -> torch.Tensor:
    """A, B, ΣT and numbers of a layer. Figures of its start, and warnings, go to the task."""
    assert layer.rows is not None
    reading = Reading("gram", len(task.expert_parameters), task.transposed)
    with float32_products(base.device), naming(task):
        problem = layer.problem(task.parameters).read(base, experts, reading)
        assert isinstance(problem, GramProblem)
        rows, columns = problem.total.shape
        shape = LayerShape(rows, columns, reading.num_experts)
        flops = layer.flops(shape, task.parameters)["gram"]
        task.figures.update(describe_start(problem), flops=flops)
        prepared: tuple[float, ...] = ()
        if problem.num_nonzero > 1:
            prepared = layer.rows.prepare(problem, task)
        if warnings := warn(problem, task.figures):
            task.figures["warnings"] = warnings
    known = KnownLayer(
        is_problem=float(problem.num_nonzero > 1),
        sum_norm=task.figures["sum_norm"],
        loss_before=task.figures.get("loss_before", 0.0),
        c=problem.c,
    )
    padding = (0.0,) * (NUM_PREPARED - len(prepared))
    numbers = _pack((*known, *prepared, *padding), problem.A)
    return torch.cat([problem.A.view(-1), problem.B.view(-1), problem.total.view(-1), numbers])


def solve_rows(parts: Iterator[torch.Tensor], task: LayerTask, rows: RowSolver) -> torch.Tensor:
    """Rows of the update, and numbers, from A, these rows of B and ΣT, and the layer's numbers."""
    A, B, total, numbers = parts
    size = math.isqrt(A.numel())
    values = _unpack(numbers)
    known = KnownLayer(*values[:-NUM_PREPARED])
    problem = GramRows(A.view(size, size), B.view(-1, size), total.view(-1, size).clone())
    M = problem.total
    with float32_products(A.device), naming(task):
        if known.is_problem:
            M = rows.solve(problem, task, values[-NUM_PREPARED:])
        found = KnownRows(inner_product(M, M), problem.loss_of_rows(M) if known.is_problem else 0.0)
    return torch.cat([M.view(-1), _pack((*known, *found), M)])


def join_rows(base: torch.Tensor, parts: Iterator[torch.Tensor], task: LayerTask) -> torch.Tensor:
    """The merged tensor from the results of :func:`solve_rows`. Reports figures of the update."""
    matrix = as_matrix(base, transposed=task.transposed)
    M = matrix.new_empty(0)
    first = 0
    known, rows = KnownLayer(0, 0, 0, 0), []
    for part in parts:
        if not first:
            M = torch.empty(matrix.shape, dtype=part.dtype, device=part.device)
        block = part[:-NUM_ROWS].view(-1, matrix.shape[1])
        M[first : first + len(block)] = block
        first += len(block)
        values = _unpack(part[-NUM_ROWS:])
        split = len(KnownLayer._fields)
        known = KnownLayer(*values[:split])
        rows.append(KnownRows(*values[split:]))
    loss = max(0.0, known.c + sum(found.loss for found in rows)) if known.is_problem else None
    norm = math.sqrt(sum(found.square for found in rows))
    task.figures.update(describe_update(known._asdict(), norm=norm, loss=loss, c=known.c))
    return add_to_base(base, M, task)


def _pack(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Numbers in a tensor's dtype, without loss: each float64 is the sum of three float32."""
    rest = torch.tensor(values, dtype=torch.float64)
    words = []
    for _ in range(WORDS):
        words.append(rest.float())
        rest = rest - words[-1]
    return torch.stack(words, 1).view(-1).to(like)


def _unpack(words: torch.Tensor) -> list[float]:
    """Inverse of :func:`_pack`."""
    return cast("list[float]", words.double().view(-1, WORDS).sum(1).tolist())
