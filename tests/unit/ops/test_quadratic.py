import numpy as np
import pytest
import torch

from merging.ops.quadratic import QuadraticProblem
from tests.support import oracle


@pytest.fixture
def vectors() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(size=(6, 9)) * scale for scale in (1.0, 3.0, 0.5)]


@pytest.fixture
def problem(vectors: list[np.ndarray]) -> QuadraticProblem:
    problem = QuadraticProblem(torch.zeros(6, 9, dtype=torch.float64), keep_weighted_total=True)
    for T in vectors:
        problem.accumulate(torch.from_numpy(T.copy()))
    return problem


def test_sums_are_those_of_the_formulas(
    problem: QuadraticProblem, vectors: list[np.ndarray]
) -> None:
    weights = [1 / np.sum(T**2) for T in vectors]
    pairs = list(zip(weights, vectors, strict=True))
    np.testing.assert_allclose(problem.A, sum(w * T.T @ T for w, T in pairs), rtol=1e-10)
    np.testing.assert_allclose(problem.B, sum(w * T @ T.T @ T for w, T in pairs), rtol=1e-10)
    np.testing.assert_allclose(problem.total, sum(vectors), rtol=1e-12)
    np.testing.assert_allclose(problem.weighted_total, sum(w * T for w, T in pairs), rtol=1e-10)
    assert problem.weight_sum == pytest.approx(sum(weights))
    assert problem.norms == pytest.approx([np.linalg.norm(T) for T in vectors])
    assert problem.rms == pytest.approx(np.sqrt(np.mean([T**2 for T in vectors])))
    assert float(problem.A.trace()) == pytest.approx(len(vectors))


def test_the_loss_is_the_interference(problem: QuadraticProblem, vectors: list[np.ndarray]) -> None:
    for M in (sum(vectors), np.ones((6, 9)), np.zeros((6, 9))):
        assert problem.loss(torch.from_numpy(M)) == pytest.approx(oracle.wudi_loss(vectors, M))


def test_a_zero_task_vector_is_counted_and_takes_no_part(problem: QuadraticProblem) -> None:
    A, B = problem.A.clone(), problem.B.clone()
    problem.accumulate(torch.zeros(6, 9, dtype=torch.float64))
    assert torch.equal(problem.A, A)
    assert torch.equal(problem.B, B)
    assert problem.norms[-1] == 0
    assert problem.num_nonzero == 3
