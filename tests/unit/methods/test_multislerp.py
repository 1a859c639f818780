import numpy as np
import pytest
import torch

from merging.errors import NumericalError, RecipeError
from tests.support.tensors import make_models, merge, relative_difference

WEIGHTS = [0.5, 1.0, 0.25]


def _multislerp(vectors: list[np.ndarray], weights: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    lengths = np.array([np.linalg.norm(v) for v in vectors])
    units = [v / n for v, n in zip(vectors, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    way = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    angle = np.linalg.norm(way) + eps
    return (np.cos(angle) * mean + np.sin(angle) / angle * way) * (weights * lengths).sum()


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula(has_base: bool, normalize: bool, dtype: torch.dtype) -> None:
    base, experts = make_models((24, 40), 3, rms=0.02, dtype=dtype)
    merged = merge(
        "multislerp",
        base if has_base else None,
        experts,
        {"normalize_weights": normalize},
        [{"weight": weight} for weight in WEIGHTS],
    )
    origin = base.double().numpy() if has_base else 0.0
    weights = np.array(WEIGHTS)
    weights = weights / weights.sum() if normalize else weights
    vectors = [expert.double().numpy() - origin for expert in experts]
    assert relative_difference(merged, origin + _multislerp(vectors, weights)) < 1e-6


def test_two_opposite_tensors_are_averaged() -> None:
    _, (expert,) = make_models((8, 8), 1)
    merged = merge("multislerp", None, [expert, -2 * expert])
    torch.testing.assert_close(merged, -0.5 * expert)


def test_directions_that_cancel_out_are_an_error_that_names_the_tensor() -> None:
    _, (expert,) = make_models((8, 8), 1)
    weights = [{"weight": 1.0}, {"weight": 1.0}, {"weight": 2.0}]
    with pytest.raises(NumericalError, match="'up' cancel out") as raised:
        merge("multislerp", None, [expert, expert, -expert], {}, weights, tensor_name="up")
    assert raised.value.code == "did_not_converge"


def test_weights_that_add_up_to_nothing_are_an_error_that_names_the_tensor() -> None:
    _, experts = make_models((8, 8), 2)
    weights = [{"weight": 1.0}, {"weight": -1.0}]
    with pytest.raises(RecipeError, match="'up' add up to 0") as raised:
        merge("multislerp", None, experts, {}, weights, tensor_name="up")
    assert raised.value.code == "bad_parameter"
