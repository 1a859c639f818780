import numpy as np
import pytest
import torch

from merging.ops.gram_form import GramProblem, symmetric_product
from merging.ops.problem import LayerProblem
from merging.ops.row_form import RowProblem
from tests.support import oracle

SHAPE = (6, 40)


@pytest.fixture
def vectors() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(size=SHAPE) * scale for scale in (1.0, 3.0, 0.5)]


def _read(problem: LayerProblem, vectors: list[np.ndarray]) -> LayerProblem:
    for T in vectors:
        problem.accumulate(torch.from_numpy(T.copy()))
    problem.finish()
    return problem


def _empty(form: str, shape: tuple[int, int] = SHAPE, num_experts: int = 4) -> LayerProblem:
    like = torch.zeros(shape, dtype=torch.float64)
    if form == "rows":
        return RowProblem(like, num_experts)
    return GramProblem(like, keep_weighted_total=True)


def _sums(vectors: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pairs = [(1 / np.sum(T**2), T) for T in vectors]
    return (
        sum(w * T.T @ T for w, T in pairs),
        sum(w * T @ T.T @ T for w, T in pairs),
        sum(w * T for w, T in pairs),
    )


@pytest.mark.parametrize("shape", [SHAPE, (40, 6), (9, 9)])
def test_sums_are_those_of_the_formulas(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    vectors = [generator.normal(size=shape) * scale for scale in (1.0, 3.0, 0.5)]
    problem = _read(_empty("gram", shape), vectors)
    A, B, weighted = _sums(vectors)
    np.testing.assert_allclose(problem.A, A, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(problem.B, B, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(problem.combine(-1, slice(0, 99)), weighted, rtol=1e-10)
    assert float(problem.A.trace()) == pytest.approx(len(vectors))


@pytest.mark.parametrize("form", ["gram", "rows"])
def test_what_is_known_of_task_vectors_does_not_depend_on_the_form(
    form: str, vectors: list[np.ndarray]
) -> None:
    problem = _read(_empty(form), vectors)
    np.testing.assert_allclose(problem.total, sum(vectors), rtol=1e-12)
    assert problem.norms == pytest.approx([np.linalg.norm(T) for T in vectors])
    assert problem.rms == pytest.approx(np.sqrt(np.mean([T**2 for T in vectors])))
    squares = [np.sum((T @ T.T) ** 2) / np.sum(T**2) ** 2 for T in vectors]
    assert problem.gram_squares == pytest.approx(squares)
    assert problem.c == pytest.approx(oracle.wudi_loss(vectors, np.zeros(SHAPE)))
    assert float((problem.A**2).sum()) == pytest.approx(np.sum(_sums(vectors)[0] ** 2))
    assert problem.num_columns == SHAPE[1]


@pytest.mark.parametrize("form", ["gram", "rows"])
def test_coordinates_are_stored_as_the_updates_that_they_stand_for(
    form: str, vectors: list[np.ndarray]
) -> None:
    problem = _read(_empty(form), vectors)
    _, B, weighted = _sums(vectors)
    for expected, coordinates in (
        (weighted, lambda rows: problem.combine(-1, rows)),
        (B, lambda rows: problem.B[rows]),
        (sum(vectors), lambda rows: problem.combine(1, rows)),
    ):
        stored = _read(_empty(form), vectors)
        for rows in stored.row_blocks(4):
            stored.store(rows, coordinates(rows))
        np.testing.assert_allclose(stored.total, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("form", ["gram", "rows"])
def test_the_loss_is_the_interference(form: str, vectors: list[np.ndarray]) -> None:
    problem = _read(_empty(form), vectors)
    for M in (sum(vectors), np.ones(SHAPE), np.zeros(SHAPE)):
        assert problem.loss(torch.from_numpy(M)) == pytest.approx(oracle.wudi_loss(vectors, M))


@pytest.mark.parametrize("form", ["gram", "rows"])
def test_a_zero_task_vector_is_counted_and_takes_no_part(
    form: str, vectors: list[np.ndarray]
) -> None:
    without = _read(_empty(form), vectors)
    zero = np.zeros(SHAPE)
    problem = _read(_empty(form), [vectors[0], zero, *vectors[1:]])
    assert torch.equal(problem.A, without.A)
    assert torch.equal(problem.B, without.B)
    assert problem.norms[1] == 0
    assert problem.num_nonzero == 3


@pytest.mark.parametrize("shape", [(3, 5), (511, 7), (512, 4), (515, 9), (1030, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_symmetric_products_are_products(shape: tuple[int, int], transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    size = shape[::-1] if transposed else shape
    X = torch.randn(size, generator=generator, dtype=torch.float64)
    X = X.t() if transposed else X
    product = symmetric_product(X)
    torch.testing.assert_close(product, X @ X.t(), rtol=1e-12, atol=1e-12)
