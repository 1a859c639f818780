import numpy as np
import pytest
import torch

from tests.support import oracle
from tests.support.tensors import make_models, merge


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_base_plus_the_scaled_weighted_sum(normalize: bool, dtype: torch.dtype) -> None:
    base, experts = make_models((37, 53), 3, dtype=dtype)
    weights = [0.2, 1.0, -0.4]
    merged = merge(
        "task_arithmetic",
        base,
        experts,
        {"lambda": 0.3, "normalize": normalize},
        [{"weight": w} for w in weights],
    )
    expected = oracle.task_arithmetic(base, experts, weights, scale=0.3, normalize=normalize)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-7)


def test_lambda_is_written_back_under_the_name_that_recipes_use() -> None:
    from merging.method import get_method

    parameters = get_method("task_arithmetic").parameters.model_validate({"lambda": 0.5})
    assert parameters.model_dump()["lambda"] == 0.5
    assert "lambda" in parameters.model_json_schema()["properties"]


def test_weights_that_cancel_are_not_divided_by() -> None:
    base, experts = make_models((4, 4), 3)
    weights = [0.1, 0.2, -0.3]
    merged = merge(
        "task_arithmetic", base, experts, {"normalize": True}, [{"weight": w} for w in weights]
    )
    expected = oracle.task_arithmetic(base, experts, weights)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6)


def test_float64_is_kept() -> None:
    base, experts = make_models((9, 4), 2, dtype=torch.float64)
    merged = merge("task_arithmetic", base, experts)
    expected = oracle.task_arithmetic(base, experts, [1, 1])
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-15)


def test_base_and_experts_may_differ_in_dtype() -> None:
    base, experts = make_models((16, 8), 2)
    mixed = [experts[0].half(), experts[1].bfloat16()]
    merged = merge("task_arithmetic", base, mixed)
    expected = oracle.task_arithmetic(base, mixed, [1, 1])
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6)
