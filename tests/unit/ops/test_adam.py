import numpy as np
import pytest
import torch

from merging.ops.adam import adam_on_problem
from merging.ops.gram_form import GramProblem
from merging.ops.problem import LayerProblem
from merging.ops.row_form import RowProblem
from tests.support import oracle


def _problem(kind: str, rows: int, columns: int) -> tuple[LayerProblem, list[np.ndarray]]:
    generator = np.random.default_rng(0)
    vectors = [generator.normal(size=(rows, columns)) * scale for scale in (1.0, 3.0, 0.5)]
    like = torch.zeros(rows, columns, dtype=torch.float64)
    problem = GramProblem(like) if kind == "gram" else RowProblem(like, 3)
    for T in vectors:
        problem.accumulate(torch.from_numpy(T.copy()))
    problem.finish()
    return problem, vectors


@pytest.mark.parametrize("kind", ["gram", "rows"])
@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (3, 20)])
@pytest.mark.parametrize("steps", [0, 1, 2, 100])
@pytest.mark.parametrize("epsilon", [1e-8, 0.5])
def test_takes_the_steps_of_torchs_adam_on_the_autograd_loss(
    kind: str, rows: int, columns: int, steps: int, epsilon: float
) -> None:
    problem, vectors = _problem(kind, rows, columns)
    expected = oracle.wudi_update(vectors, steps=steps, learning_rate=0.01, epsilon=epsilon)
    M = problem.total
    adam_on_problem(M, problem, steps=steps, learning_rate=0.01, epsilon=epsilon)
    np.testing.assert_allclose(M, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["gram", "rows"])
def test_solves_rows_in_blocks_of_which_the_last_may_be_short(kind: str) -> None:
    problem, _ = _problem(kind, 10, 40)
    whole, blocked = problem.total.clone(), problem.total.clone()
    adam_on_problem(whole, problem, steps=20, learning_rate=0.01, epsilon=1e-8)
    adam_on_problem(blocked, problem, steps=20, learning_rate=0.01, epsilon=1e-8, row_block=4)
    torch.testing.assert_close(blocked, whole, rtol=1e-12, atol=1e-12)
