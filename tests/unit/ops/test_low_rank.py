from collections.abc import Callable

import numpy as np
import pytest
import torch

from merging.ops import chebyshev, spectral
from merging.ops.adam import adam_on_problem
from merging.ops.layers import Solve
from merging.ops.low_rank import Adapter, FactorProblem
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


def _solve(adapters: list[Adapter], solve: Solve) -> torch.Tensor:
    like = torch.empty(len(adapters[0].up), adapters[0].down.shape[1], dtype=torch.float64)
    return solve(FactorProblem(like, adapters))


@pytest.mark.parametrize(("rows", "columns"), [(60, 90), (90, 60)])
@pytest.mark.parametrize(("solve", "dense"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_factors_give_what_dense_task_vectors_give(
    rows: int, columns: int, solve: Solve, dense: Dense
) -> None:
    adapters = _adapters(rows, columns)
    expected = dense([_dense(adapter) for adapter in adapters])
    assert relative_difference(_solve(adapters, solve), expected) < 1e-10


@pytest.mark.parametrize(("rows", "columns"), [(40, 60), (60, 40)])
@pytest.mark.parametrize("row_block", [0, 16])
def test_adam_takes_the_steps_of_automatic_differentiation(
    rows: int, columns: int, row_block: int
) -> None:
    adapters = _adapters(rows, columns)
    problem = FactorProblem(torch.empty(rows, columns, dtype=torch.float64), adapters)
    start = problem.loss(problem.total)
    M = problem.total.clone()
    adam_on_problem(M, problem, steps=30, learning_rate=0.05, epsilon=1e-8, row_block=row_block)
    Ts = [_dense(adapter) for adapter in adapters]
    expected = oracle.wudi_update(Ts, steps=30, learning_rate=0.05, epsilon=1e-8)
    assert relative_difference(M, expected) < 1e-9
    assert problem.loss(M) < start


def test_more_ranks_than_columns_are_no_trouble() -> None:
    adapters = _adapters(9, 10)
    expected = CASES[0][1]([_dense(adapter) for adapter in adapters])
    assert relative_difference(_solve(adapters, _ridge), expected) < 1e-10


def test_adapters_of_zeros_or_of_rank_0_take_no_part() -> None:
    adapter, other = _adapters(20, 30)[:2]
    zeros = Adapter(torch.zeros_like(adapter.up), adapter.down)
    nothing = Adapter(adapter.up[:, :0], adapter.down[:0])
    problem = FactorProblem(torch.empty(20, 30, dtype=torch.float64), [zeros, adapter, nothing])
    assert [norm > 0 for norm in problem.norms] == [False, True, False]
    assert relative_difference(problem.total, _dense(adapter)) < 1e-12
    merged = _solve([zeros, adapter, nothing, other], _ridge)
    assert relative_difference(merged, CASES[0][1]([_dense(adapter), _dense(other)])) < 1e-10


def test_entries_are_the_same_bits_whatever_part_is_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    adapter = Adapter(
        torch.randn((150, 7), generator=generator), torch.randn((7, 33), generator=generator), 0.7
    )
    whole = adapter.entries(0, 150 * 33)
    assert relative_difference(whole.view(150, 33), _dense(adapter)) < 1e-6
    for start, end in [(0, 1), (0, 33), (70, 71), (64 * 33 - 1, 64 * 33 + 1), (100, 150 * 33)]:
        assert torch.equal(adapter.entries(start, end), whole[start:end])
