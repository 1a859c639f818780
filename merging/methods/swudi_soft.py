"""SWUDI-soft: gradient flow on WUDI's problem, stopped at time t, in closed form.

Source: Wei et al., 2026, arXiv:2606.07289 (``iwudi`` in the authors' code). With the eigenvalues λ
and eigenvectors V of WUDI's A (:mod:`merging.ops.problem`) and the sum M₀ of the task vectors::

    M = M₀ (I − V f Vᵀ) + B V (f/λ) Vᵀ ,   f_k = 1 − exp(−λ_k t)

which is M₀ + (B − M₀ A) g(A) with the smooth function g(λ) = (1 − exp(−λt)) / λ. It is computed by
an eigendecomposition (:mod:`merging.ops.spectral`), or from products alone by a Chebyshev
polynomial (:mod:`merging.ops.chebyshev`), whichever takes fewer operations; the two agree within
rounding. An expert equal to the base takes no part in a layer. The result scales with the task
vectors.

Needs the base model. Separable by output rows given A (I×I). Experts are read one at a time.
Precision: float32 (float64 if the base or the first expert is), one rounding at the end.
Deterministic: yes.
Cost: up to 4 E O I² flops and 12 I³ + 6 O I², or about 7 √t O I² if that is less, for E experts of
O×I; fewer where E O < I.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from merging.layered import Precision, cost_by, merge_by
from merging.method import MergeMethod, register
from merging.ops.forms import (
    Flops,
    Form,
    LayerShape,
    direct_entries,
    direct_flops,
    eigh_flops,
    exponential_degree,
    problem_size,
)
from merging.ops.layer_method import LayerMethod
from merging.parameters import UpdateParameters

if TYPE_CHECKING:
    import torch

    from merging.ops.layer_method import LayerTask
    from merging.ops.problem import LayerProblem

_MAX_DEGREE = 80
"""Where A is singular, a polynomial multiplies rounding by t: 3e-5 of the update at degree 45, 1e-4
at 70 (float32). A decomposition knows these directions and leaves them out."""

_DEVICE_EIGH = 16
"""How much slower a GPU decomposes than a CPU, beside their products; an estimate, not measured."""


class SwudiSoftParameters(UpdateParameters):
    """Recipe-level parameters."""

    t: float = Field(
        default=300.0,
        gt=0,
        le=1e6,
        description=(
            "Time of the flow away from the sum of the task vectors, in the unit of 1 over the"
            " eigenvalues of A, whose mean is the number of experts over the layer's columns. Near"
            " 0 the sum; very large the least interference, which overfits."
        ),
    )
    precision: Precision = "highest"


def solve_swudi_soft(problem: LayerProblem, task: LayerTask) -> torch.Tensor:
    """The filtered solution. Reports which way was taken as figures."""
    from merging.ops import chebyshev, spectral

    parameters: SwudiSoftParameters = task.parameters
    end = chebyshev.interval_end(problem.A)
    slowness = 1 if problem.A.device.type == "cpu" else _DEVICE_EIGH
    rows, size = problem.B.shape
    if _prefers_products(rows, size, exponential_degree(parameters.t, end), slowness):
        g = chebyshev.exponential(parameters.t)
        terms = chebyshev.expand_function(g, end, problem.A.dtype)
        task.figures.update(solver="chebyshev", degree=len(terms) - 1)
        return chebyshev.polynomial_solution(
            problem, terms, end, row_block=task.row_block, precision=parameters.precision
        )
    spectrum = problem.once(spectral.decompose)
    task.figures.update(solver="eigh", effective_rank=spectrum.effective_rank)
    gains = spectral.exponential_gains(spectrum, parameters.t)
    return spectral.apply_filter(problem, spectrum, gains, row_block=task.row_block)


def _prefers_products(rows: int, size: int, degree: int, slowness: float = 1) -> bool:
    """Whether a polynomial takes fewer operations than a decomposition."""
    by_products = 2.0 * degree * rows * size**2
    return degree <= _MAX_DEGREE and by_products < slowness * eigh_flops(rows, size)


def _flops(shape: LayerShape, parameters: SwudiSoftParameters) -> Flops:
    """Sums over experts, then a decomposition or a polynomial.

    For eigenvalues up to 1; what they are is seen when the experts are read.
    """
    degree = exponential_degree(parameters.t)

    def solve(size: int) -> float:
        if _prefers_products(shape.rows, size, degree):
            return 2.0 * degree * shape.rows * size**2
        return eigh_flops(shape.rows, size)

    return direct_flops(shape, solve)


def _decomposes(shape: LayerShape, form: Form, parameters: SwudiSoftParameters) -> bool:
    size = problem_size(shape, form)
    return not _prefers_products(shape.rows, size, exponential_degree(parameters.t))


def _entries(shape: LayerShape, form: Form, row_block: int, parameters: SwudiSoftParameters) -> int:
    """Memory for either way."""
    updates = 7 if parameters.precision == "high" else 4
    return direct_entries(shape, form, row_block, matrices=3, updates=updates)


LAYER = LayerMethod(solve=solve_swudi_soft, flops=_flops, entries=_entries, decomposes=_decomposes)

register(
    MergeMethod(
        name="swudi_soft",
        title="SWUDI-soft",
        summary=(
            "What WUDI's early stop does, as an exact filter with one parameter: every direction"
            " moves from the sum of the task vectors towards the least interference."
        ),
        source="Wei et al., 2026, arXiv:2606.07289",
        merge=merge_by(LAYER),
        cost=cost_by(LAYER),
        layer=LAYER,
        parameters=SwudiSoftParameters,
        separable="rows",
        streaming=True,
        takes_adapters=True,
        default_touch="linear",
        default_rest="mean",
    )
)
