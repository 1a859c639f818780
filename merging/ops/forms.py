"""Which form of a layer's problem is cheapest, by counted operations.

The same problem can be written in the layer's I input columns, through I×I sums over experts
(``gram``, :mod:`merging.ops.gram_form`); in the rows of the E task vectors, R = E·O of them,
through the R×I matrix of these rows and R×R products (``rows``, :mod:`merging.ops.row_form`); and
that of adapters in the N input directions that they have between them (``factors``,
:mod:`merging.ops.low_rank`). All are exact. The first is the cheapest for nearly every layer of a
transformer; the second where a layer has few outputs and experts beside its inputs, R well below
I; the third where all experts are adapters, unless these are many or of high rank.

Planning counts with this module, so torch is not imported. Everything depends on shapes and
parameters alone: a plan and the worker that runs it come to the same form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

Form = Literal["gram", "rows", "factors"]
"""``gram``: through I×I sums over experts. ``rows``: through all rows of all task vectors.
``factors``: through those of adapters."""

Flops = Mapping[Form, float]
"""Operations of a whole merge by form; a form that is of no use is left out."""

EIGH_FLOPS = 12
"""An eigendecomposition of N×N takes as long as a product of so many N³ operations: 11 to 13 on a
CPU from 768 to 3072 columns (float32, MKL)."""

SVD_FLOPS = 16
"""Of N×M a singular value decomposition takes as long as so many N·M·min(N, M) operations."""

MAX_DOUBLE_COLUMNS = 4096
"""Up to here a ridge is factorised in float64; beyond, float64 is tried if float32 fails."""

_CHOLESKY_SHARE, _SOLVE_SHARE = 5, 3
"""An operation of a factorisation in float64, and of the triangular solves after it, takes as long
as so many of a float32 product: 3.7 to 8.6 and 2.7 to 5.6 on a CPU from 192 to 4096 columns."""

_SYMMETRIC_SHARE = 0.625
"""Share of a product whose result is symmetric that :func:`gram_form.symmetric_product` does."""


class LayerShape(NamedTuple):
    """Output rows and input columns of a layer, how many experts it has, and their ranks if all are
    adapters.
    """

    rows: int
    columns: int
    num_experts: int
    ranks: tuple[int, ...] = ()

    @property
    def stacked_rows(self) -> int:
        """Rows of all task vectors together, R."""
        return self.rows * self.num_experts

    @property
    def total_rank(self) -> int:
        """Input directions of all adapters together, N."""
        return min(sum(self.ranks), self.columns)


def is_wide(rows: int, columns: int) -> bool:
    """Whether ``(T Tᵀ) T`` takes fewer operations than ``T (TᵀT)``, with TᵀT at hand."""
    return 2 * rows < columns


def cheapest(flops: Flops) -> Form:
    """The form with the fewest operations."""
    return min(flops, key=lambda form: flops[form])


def adam_flops(shape: LayerShape, steps: int) -> Flops:
    """Operations of that many gradient steps on M, by form.

    A step is one O×I×I product, or one O×R×I (O×N×I) product forth and one back. Losses before and
    after are counted as one step each, or half of one.
    """
    forth_and_back = 4.0 * shape.rows * shape.stacked_rows * shape.columns
    step = 2.0 * shape.rows * shape.columns**2
    return _by_form(
        shape,
        gram=step * (steps + 2),
        rows=forth_and_back * (steps + 1),
        factors=4.0 * shape.rows * shape.total_rank * shape.columns * (steps + 1),
    )


def direct_flops(shape: LayerShape, solve: Callable[[int], float]) -> Flops:
    """Operations of a solution in closed form, by form.

    Args:
        shape: Of the layer.
        solve: Operations of a solution with a symmetric matrix of that many columns.
    """
    loss = 2.0 * shape.rows * shape.columns**2
    expand = 2.0 * shape.rows * shape.stacked_rows * shape.columns
    return _by_form(
        shape,
        gram=solve(shape.columns) + 2 * loss,
        rows=solve(shape.stacked_rows) + 3 * expand,
        factors=solve(shape.total_rank) + 6.0 * shape.rows * shape.total_rank * shape.columns,
    )


def preparing_flops(shape: LayerShape) -> Flops:
    """Operations of reading the experts into a problem, by the forms that are of use.

    Those other than ``gram`` are while they have fewer than I columns.
    """
    product = 2.0 * shape.stacked_rows * shape.columns
    expand = 2.0 * shape.rows * shape.columns * sum(shape.ranks)
    right = float(shape.columns)
    if is_wide(shape.rows, shape.columns):
        right = (1 + _SYMMETRIC_SHARE) * shape.rows
    flops: dict[Form, float] = {
        "gram": expand + product * (_SYMMETRIC_SHARE * shape.columns + right)
    }
    if shape.stacked_rows < shape.columns:
        flops["rows"] = expand + product * _SYMMETRIC_SHARE * shape.stacked_rows
    if 0 < shape.total_rank < shape.columns:
        flops["factors"] = _factor_flops(shape)
    return flops


def _factor_flops(shape: LayerShape) -> float:
    """A basis; every adapter in it; sums over experts; the sum of the task vectors."""
    N = shape.total_rank
    basis = 4.0 * shape.columns * N * N
    turned = 2.0 * (shape.rows + shape.columns) * N * sum(shape.ranks)
    sums = 2.0 * shape.stacked_rows * N * N * (1 + _SYMMETRIC_SHARE)
    return basis + turned + sums + 2.0 * shape.rows * shape.columns * N


def _by_form(shape: LayerShape, *, gram: float, rows: float, factors: float) -> Flops:
    """Add what preparing a form takes."""
    solving: dict[Form, float] = {"gram": gram, "rows": rows, "factors": factors}
    return {form: solving[form] + flops for form, flops in preparing_flops(shape).items()}


def problem_size(shape: LayerShape, form: Form) -> int:
    """Rows and columns of the problem's symmetric matrix."""
    sizes = {"gram": shape.columns, "rows": shape.stacked_rows, "factors": shape.total_rank}
    return sizes[form]


def exponential_degree(t: float, largest_eigenvalue: float = 1.0) -> int:
    """Degree of the polynomial that stands for (1 − exp(−λt)) / λ to float32's precision."""
    return math.ceil(3.5 * math.sqrt(t * largest_eigenvalue)) + 6


def eigh_flops(rows: int, columns: int) -> float:
    """Operations of a spectral filter on rows×columns: decomposition and three products."""
    return EIGH_FLOPS * float(columns) ** 3 + 6.0 * rows * columns**2


def ridge_flops(rows: int, columns: int) -> float:
    """Operations of a ridge on rows×columns, as of products that take as long: Cholesky's factor
    and two triangular solves.
    """
    flops = _CHOLESKY_SHARE * columns**3 / 3 + _SOLVE_SHARE * 2.0 * rows * columns**2
    return flops if columns <= MAX_DOUBLE_COLUMNS else flops / 2


def filter_flops(shape: LayerShape) -> Flops:
    """Operations of a spectral filter, by form."""
    return direct_flops(shape, lambda size: eigh_flops(shape.rows, size))


def filter_entries(shape: LayerShape, form: Form, row_block: int) -> int:
    """Numbers held while a spectral filter is computed: LAPACK takes two matrices for itself."""
    return direct_entries(shape, form, row_block, matrices=3, updates=3)


def reading_entries(shape: LayerShape, form: Form) -> int:
    """Numbers held while task vectors are read, T and ΣT among them."""
    entries = shape.rows * shape.columns
    if form == "gram":
        side = shape.rows if is_wide(shape.rows, shape.columns) else shape.columns
        return shape.columns**2 + side * side + 3 * entries
    if form == "factors":
        N = shape.total_rank
        return entries + 3 * shape.columns * sum(shape.ranks) + 2 * N * N + 5 * shape.rows * N
    return shape.stacked_rows * shape.columns + 2 * entries


def adam_entries(shape: LayerShape, form: Form, row_block: int, *, is_split: bool) -> int:
    """Numbers held while Adam runs: the problem, M, and of a row block what a step writes.

    ``is_split`` is precision ``high``, which holds operands three times over in two bytes.
    """
    block = min(row_block or shape.rows, shape.rows)
    inner = shape.columns
    entries = _prepared_entries(shape, form) + 3 * block * shape.columns
    if form != "gram":
        inner += problem_size(shape, form)
        entries += block * problem_size(shape, form)
    if form == "factors":
        entries += shape.columns * shape.total_rank
    if is_split:
        right = problem_size(shape, form) * shape.columns * (1 if form == "gram" else 2)
        entries += 3 * right // 2 + 5 * block * inner // 2
    return entries


def direct_entries(
    shape: LayerShape, form: Form, row_block: int, *, matrices: int, updates: int
) -> int:
    """Numbers held while a solution in closed form is computed.

    Args:
        shape: Of the layer.
        form: Of its problem.
        row_block: Rows solved at a time; 0 means all.
        matrices: Symmetric matrices beside A, counted in float32.
        updates: Copies of a row block in coordinates, likewise.
    """
    size = problem_size(shape, form)
    block = min(row_block or shape.rows, shape.rows)
    return _prepared_entries(shape, form) + matrices * size * size + updates * block * size


def _prepared_entries(shape: LayerShape, form: Form) -> int:
    """Numbers held of a problem that has been read, ΣT among them."""
    entries = shape.rows * shape.columns
    if form == "gram":
        return shape.columns**2 + 2 * entries
    if form == "factors":
        N = shape.total_rank
        return entries + shape.columns * N + N * N + 3 * shape.rows * N
    rows = shape.stacked_rows
    return entries + rows * shape.columns + rows * rows + shape.rows * rows
