import pytest
import torch

from merging.ops import chebyshev, spectral
from merging.ops.gram_form import GramProblem
from merging.ops.problem import LayerProblem
from merging.ops.row_form import RowProblem
from tests.support import oracle
from tests.support.tensors import make_models, merge, relative_difference

# rows, columns, experts: square; fewer rows; more rows; task vectors with fewer rows than columns.
SHAPES = [(64, 64, 4), (24, 96, 8), (96, 24, 3), (32, 128, 3), (16, 128, 3)]


@pytest.mark.parametrize(("rows", "columns", "num_experts"), SHAPES)
@pytest.mark.parametrize("t", [5, 300])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_is_where_the_flow_from_the_sum_is_at_that_time(
    rows: int, columns: int, num_experts: int, t: float, dtype: torch.dtype, tolerance: float
) -> None:
    base, experts = make_models((rows, columns), num_experts, dtype=dtype, base_rms=0)
    expected = oracle.flow_update(oracle.task_vectors(base, experts), t=t)
    assert relative_difference(merge("swudi_soft", base, experts, {"t": t}), expected) < tolerance


def _problem(form: str, dtype: torch.dtype) -> LayerProblem:
    base, experts = make_models((24, 160), 4, dtype=dtype, base_rms=0)
    problem = GramProblem(base) if form == "gram" else RowProblem(base, 4)
    for expert in experts:
        problem.accumulate(expert.clone())
    problem.finish()
    return problem


@pytest.mark.parametrize("form", ["gram", "rows"])
@pytest.mark.parametrize(
    ("dtype", "t", "tolerance"),
    [
        (torch.float64, 0.1, 1e-12),
        (torch.float64, 300, 1e-12),
        (torch.float64, 30_000, 1e-10),
        (torch.float32, 0.1, 1e-5),
        (torch.float32, 30, 1e-5),
        (torch.float32, 300, 1e-5),
        (torch.float32, 1300, 1e-4),
    ],
)
def test_polynomial_and_decomposition_agree(
    form: str, dtype: torch.dtype, t: float, tolerance: float
) -> None:
    """On a singular A, the harder case: rounding in its null space is multiplied by t."""
    problem = _problem(form, dtype)
    end = chebyshev.interval_end(problem.A)
    terms = chebyshev.expand_function(chebyshev.exponential(t), end, dtype)
    by_products = chebyshev.polynomial_solution(problem, terms, end)
    problem = _problem(form, dtype)  # solving has written over the first
    spectrum = spectral.decompose(problem)
    gains = spectral.exponential_gains(spectrum, t)
    by_eigenvalues = spectral.apply_filter(problem, spectrum, gains)
    assert relative_difference(by_products, by_eigenvalues.double().numpy()) < tolerance


@pytest.mark.parametrize(
    ("shape", "t", "solver"), [((4, 400), 100, "chebyshev"), ((64, 64), 3e4, "eigh")]
)
def test_takes_the_cheaper_way(shape: tuple[int, int], t: float, solver: str) -> None:
    base, experts = make_models(shape, 200 if shape[0] == 4 else 3, dtype=torch.float64)
    figures: dict[str, object] = {}
    merged = merge("swudi_soft", base, experts, {"t": t}, figures=figures)
    assert figures["solver"] == solver
    assert ("degree" in figures) == (solver == "chebyshev")
    expected = oracle.flow_update(oracle.task_vectors(base, experts), t=t)
    assert relative_difference(merged - base, expected) < 1e-7


def test_little_time_gives_the_sum() -> None:
    base, experts = make_models((16, 16), 3, dtype=torch.float64)
    merged = merge("swudi_soft", base, experts, {"t": 1e-9})
    expected = oracle.task_arithmetic(base, experts, [1] * 3)
    assert relative_difference(merged, expected) < 1e-9


def test_an_expert_equal_to_the_base_changes_nothing() -> None:
    base, experts = make_models((16, 24), 3)
    with_base = merge("swudi_soft", base, [experts[0], base, *experts[1:]])
    assert torch.equal(with_base, merge("swudi_soft", base, experts))


def test_scale_multiplies_the_update() -> None:
    base, experts = make_models((8, 12), 3, dtype=torch.float64)
    full = merge("swudi_soft", base, experts) - base
    part = merge("swudi_soft", base, experts, {"scale": 0.3}) - base
    torch.testing.assert_close(part, 0.3 * full, rtol=1e-9, atol=1e-15)
