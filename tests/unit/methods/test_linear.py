import numpy as np
import pytest
import torch

from merging.errors import RecipeError
from tests.support import oracle
from tests.support.tensors import make_models, merge


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_weighted_average(normalize: bool, dtype: torch.dtype) -> None:
    _, experts = make_models((37, 53), 3, dtype=dtype)
    weights = [0.2, 1.0, -0.4]
    merged = merge(
        "linear", None, experts, {"normalize": normalize}, [{"weight": w} for w in weights]
    )
    expected = oracle.linear(experts, weights, normalize=normalize)
    assert merged.dtype == torch.float32
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-7)


def test_weights_default_to_one() -> None:
    _, experts = make_models((5, 7), 4)
    np.testing.assert_allclose(
        merge("linear", None, experts).numpy(), oracle.linear(experts, [1] * 4), rtol=1e-6
    )


def test_the_mean_of_two_equal_experts_is_that_expert_to_the_bit() -> None:
    base, _ = make_models((64, 64), 0)
    assert torch.equal(merge("linear", None, [base, base]), base)


def test_float64_inputs_are_averaged_in_float64() -> None:
    _, experts = make_models((11, 3), 2, dtype=torch.float64)
    merged = merge("linear", None, [experts[0].float(), experts[1]])
    assert merged.dtype == torch.float64
    expected = oracle.linear([experts[0].float(), experts[1]], [1, 1])
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-15)


def test_weights_that_cancel_cannot_be_normalised() -> None:
    _, experts = make_models((2, 2), 2)
    with pytest.raises(RecipeError, match=r"'lm_head\.weight' add up to 0") as raised:
        merge(
            "linear", None, experts, {}, [{"weight": 1}, {"weight": -1}],
            tensor_name="lm_head.weight",
        )  # fmt: skip
    assert raised.value.code == "bad_parameter"
