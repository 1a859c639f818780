from collections.abc import Callable

import numpy as np
import pytest
import torch

from merging.ops import chebyshev, spectral
from merging.ops.layers import Solve
from merging.ops.low_rank import Adapter, solve_adapters
from merging.ops.problem import LayerProblem
from merging.ops.ridge import ridge_solution
from tests.support import oracle
from tests.support.tensors import relative_difference

RANKS = (4, 2, 7)
SCALINGS = (2.0, 0.5, 1.0)


def _adapters(rows: int, columns: int) -> list[Adapter]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        Adapter(normal(rows, rank), normal(rank, columns), scaling)
        for rank, scaling in zip(RANKS, SCALINGS, strict=True)
    ]


def _dense(adapter: Adapter) -> np.ndarray:
    return (adapter.scaling * adapter.up @ adapter.down).numpy()


def _ridge(problem: LayerProblem) -> torch.Tensor:
    return ridge_solution(problem, rho=0.1)


def _absolute_ridge(problem: LayerProblem) -> torch.Tensor:
    return ridge_solution(problem, rho=1.0, omega=0.3)


def _soft(problem: LayerProblem) -> torch.Tensor:
    spectrum = spectral.decompose(problem)
    return spectral.apply_filter(problem, spectrum, spectral.exponential_gains(spectrum, 30))


def _polynomial(problem: LayerProblem) -> torch.Tensor:
    end = chebyshev.interval_end(problem.A)
    terms = chebyshev.expand_function(chebyshev.exponential(30), end, torch.float64)
    return chebyshev.polynomial_solution(problem, terms, end)


def _swudi(problem: LayerProblem) -> torch.Tensor:
    spectrum = spectral.decompose(problem)
    gains = spectral.exponential_gains(spectrum, 30)
    gains = spectral.keep_largest(gains, -(-problem.num_columns // 10))
    return spectral.apply_filter(problem, spectrum, gains)


def _swudi_a(problem: LayerProblem) -> torch.Tensor:
    spectrum = spectral.decompose(problem)
    rank = int(np.ceil(spectrum.effective_rank))
    return spectral.apply_filter(problem, spectrum, spectral.hard_gains(spectrum, rank))


Dense = Callable[[list[np.ndarray]], np.ndarray]

CASES: list[tuple[Solve, Dense]] = [
    (_ridge, lambda Ts: oracle.cfs_update(Ts, [0.1 * np.sum(T**2) / T.shape[1] for T in Ts])),
    (_absolute_ridge, lambda Ts: oracle.cfs_update(Ts, [0.3] * len(Ts))),
    (_soft, lambda Ts: oracle.flow_update(Ts, t=30)),
    (_polynomial, lambda Ts: oracle.flow_update(Ts, t=30)),
    (_swudi, lambda Ts: oracle.swudi_update(Ts, t=30, r=0.1)),
    (_swudi_a, oracle.swudi_a_update),
]


@pytest.mark.parametrize(("rows", "columns"), [(60, 90), (90, 60)])
@pytest.mark.parametrize(("solve", "dense"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_cores_give_what_dense_task_vectors_give(
    rows: int, columns: int, solve: Solve, dense: Dense
) -> None:
    adapters = _adapters(rows, columns)
    merged = solve_adapters(adapters, solve)
    expected = dense([_dense(adapter) for adapter in adapters])
    assert merged.up.shape == (rows, sum(RANKS))
    assert merged.down.shape == (sum(RANKS), columns)
    assert relative_difference(_dense(merged), expected) < 1e-10


def test_more_ranks_than_columns_are_no_trouble() -> None:
    adapters = _adapters(9, 10)
    merged = solve_adapters(adapters, _ridge)
    expected = CASES[0][1]([_dense(adapter) for adapter in adapters])
    assert relative_difference(_dense(merged), expected) < 1e-10


def test_one_adapter_is_returned_as_it_is_but_for_its_factors() -> None:
    adapter = _adapters(20, 30)[0]
    nothing = Adapter(torch.zeros_like(adapter.up), adapter.down)
    merged = solve_adapters([nothing, adapter], _ridge)
    assert relative_difference(_dense(merged), _dense(adapter)) < 1e-12
