import pytest
import torch

from tests.support import oracle
from tests.support.tensors import make_models, merge, relative_difference

WEIGHTS = [0.75, 1.0, 0.5]
LAMBDAS = [0.2, 0.6, 0.4]


@pytest.mark.parametrize("min_tasks", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-5)])
def test_equals_the_formula(min_tasks: int, dtype: torch.dtype, tolerance: float) -> None:
    base, experts = make_models((61, 83), 3, dtype=dtype, base_rms=0)
    settings = [{"weight": w, "mask_lambda": a} for w, a in zip(WEIGHTS, LAMBDAS, strict=True)]
    parameters = {"lambda": 0.3, "min_tasks": min_tasks}
    merged = merge("consensus_ta", base, experts, parameters, settings)
    vectors = oracle.task_vectors(base, experts)
    total = sum(w * T for w, T in zip(WEIGHTS, vectors, strict=True))
    expected = 0.3 * oracle.consensus(total, vectors, LAMBDAS, min_tasks)
    assert relative_difference(merged, expected) < tolerance


def test_what_a_single_task_needs_is_removed() -> None:
    experts = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])]
    merged = merge("consensus_ta", torch.zeros(3), experts)
    assert merged.tolist() == [0.0, 2.0, 0.0]
    merged = merge("consensus_ta", torch.zeros(3), experts, {"min_tasks": 1})
    assert merged.tolist() == [1.0, 2.0, 0.0]


def test_the_scale_comes_after_the_masks() -> None:
    base, experts = make_models((20, 30), 3, base_rms=0)
    whole = merge("consensus_ta", base, experts)
    torch.testing.assert_close(merge("consensus_ta", base, experts, {"lambda": 0.5}), 0.5 * whole)
