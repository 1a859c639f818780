"""Solvers of layers, declared such that variants of a merge can share what they have in common.

A layer is merged in two phases: the experts are read into a problem (:mod:`merging.ops.problem`),
and the problem is solved. The first depends on the experts alone, and so does all that is known of
the problem's matrix, such as its eigenvectors: variants share both. The costs here count what is
shared once; for a single variant they are those of its merge.

Planning counts with this module, so torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from merging.ops.forms import (
    EIGH_FLOPS,
    Flops,
    Form,
    LayerShape,
    preparing_flops,
    problem_size,
    reading_entries,
)

if TYPE_CHECKING:
    import torch

    from merging.ops.low_rank import Expert
    from merging.ops.problem import LayerProblem


class LayerTask(Protocol):
    """What is used of a method's task."""

    tensor_name: str
    parameters: Any
    expert_parameters: Sequence[Any]
    row_block: int
    transposed: bool
    ranks: tuple[int, ...]
    figures: dict[str, Any]


class Reading(NamedTuple):
    """How a problem is to be read.

    Attributes:
        form: Of the problem.
        num_experts: How many experts there are.
        transposed: The tensors are stored in×out.
        keep_weighted_total: A solver uses ``problem.combine(-1)``.
    """

    form: Form
    num_experts: int
    transposed: bool
    keep_weighted_total: bool = False


def _read_wudi(base: torch.Tensor, experts: Iterator[Expert], reading: Reading) -> LayerProblem:
    from merging.ops.layers import read_problem

    return read_problem(base, experts, reading)


@dataclass(frozen=True, kw_only=True)
class ProblemKind:
    """A problem that solvers can share.

    Attributes:
        name: Tells kinds apart.
        read: Reads it from base and experts, which come one at a time.
        flops: Operations of that by form.
        entries: Numbers held meanwhile.
    """

    name: str
    read: Callable[[torch.Tensor, Iterator[Expert], Reading], LayerProblem] = _read_wudi
    flops: Callable[[LayerShape], Flops] = preparing_flops
    entries: Callable[[LayerShape, Form], int] = reading_entries


WUDI = ProblemKind(name="wudi")
"""The problem of :mod:`merging.ops.problem`."""


@dataclass(frozen=True, kw_only=True)
class RowSolver:
    """How rows of a layer are solved by themselves once A is known (in the form ``gram``).

    Attributes:
        prepare: Numbers (:data:`NUM_PREPARED` at the most) that depend on the whole problem.
            Figures go to the task.
        solve: The merged update of the rows that a problem has B and ΣT of, given these numbers;
            as :attr:`LayerMethod.solve` for all rows.
    """

    prepare: Callable[[LayerProblem, LayerTask], tuple[float, ...]]
    solve: Callable[[LayerProblem, LayerTask, Sequence[float]], torch.Tensor]


class KnownLayer(NamedTuple):
    """What is known of a layer once it is summed up, beside its matrices.

    Attributes:
        is_problem: Two task vectors or more are not zero: there is something to solve.
        sum_norm: ‖ΣT‖_F.
        loss_before: Of ΣT.
        c: Of the problem.
    """

    is_problem: float
    sum_norm: float
    loss_before: float
    c: float


class KnownRows(NamedTuple):
    """What is known of rows of an update: ``norm``², and their share of the loss without c."""

    square: float
    loss: float


NUM_PREPARED = 4

WORDS = 3
"""Entries of a float32 tensor that hold one float64 without loss."""

NUM_SUMS = WORDS * (len(KnownLayer._fields) + NUM_PREPARED)
"""Entries after A, B and ΣT of a layer that is divided."""

NUM_ROWS = WORDS * (len(KnownLayer._fields) + len(KnownRows._fields))
"""Entries after rows of its update."""


@dataclass(frozen=True, kw_only=True)
class LayerMethod:
    """A solver. Its parameters have a ``scale``, the factor on the update; all else is up to it.

    Attributes:
        solve: The merged update (O×I) of a problem with two task vectors or more that are not zero;
            it may be ``problem.total``, which is given up. The rest of the problem must stay as it
            is. Figures go to the task.
        flops: Operations of a whole merge by form, for a shape and parameters.
        entries: Numbers held while solving, for a shape, form, row block and parameters.
        decomposes: Whether it uses the eigenvectors of the problem's matrix, for a shape, form and
            parameters.
        needs_weighted_total: Whether it uses ``problem.combine(-1)``, for parameters.
        problem: Which problem it solves, for parameters.
        rows: How it solves rows by themselves, if a layer may be divided over workers.
    """

    solve: Callable[[LayerProblem, LayerTask], torch.Tensor]
    flops: Callable[[LayerShape, Any], Flops]
    entries: Callable[[LayerShape, Form, int, Any], int]
    decomposes: Callable[[LayerShape, Form, Any], bool] = lambda *_: False
    needs_weighted_total: Callable[[Any], bool] = lambda _: False
    problem: Callable[[Any], ProblemKind] = lambda _: WUDI
    rows: RowSolver | None = None


class LayerVariant(NamedTuple):
    """A solver with its parameters."""

    method: LayerMethod
    parameters: Any

    @property
    def problem(self) -> ProblemKind:
        """Which problem it solves."""
        return self.method.problem(self.parameters)


def shared_flops(shape: LayerShape, variants: Sequence[LayerVariant]) -> Flops:
    """Operations by form of variants that share their problem and its decomposition."""
    merges = [v.method.flops(shape, v.parameters) for v in variants]
    if len(merges) == 1:
        return merges[0]
    preparing = variants[0].problem.flops(shape)
    flops = {}
    for form in merges[0]:
        repeated = (len(variants) - 1) * preparing[form]
        if times := _num_decompositions(shape, form, variants):
            repeated += (times - 1) * EIGH_FLOPS * float(problem_size(shape, form)) ** 3
        flops[form] = sum(merge[form] for merge in merges) - repeated
    return flops


def shared_entries(
    shape: LayerShape, form: Form, row_block: int, variants: Sequence[LayerVariant]
) -> int:
    """Numbers held at once.

    With several variants these are, beside what the largest takes: the sum of the task vectors and
    a solution that is added to the base more than once, and the eigenvectors.
    """
    solving = max(v.method.entries(shape, form, row_block, v.parameters) for v in variants)
    entries = max(variants[0].problem.entries(shape, form), solving)
    if any(v.method.needs_weighted_total(v.parameters) for v in variants):
        entries += shape.rows * shape.columns
    if len(variants) > 1:
        entries += 2 * shape.rows * shape.columns
        if _num_decompositions(shape, form, variants):
            entries += problem_size(shape, form) ** 2
    return entries


def _num_decompositions(shape: LayerShape, form: Form, variants: Sequence[LayerVariant]) -> int:
    return sum(v.method.decomposes(shape, form, v.parameters) for v in variants)
