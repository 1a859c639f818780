import numpy as np
import pytest
import torch

from tests.support.tensors import make_models, merge, relative_difference


def _slerp(a: np.ndarray, b: np.ndarray, t: float, axis: int | None) -> np.ndarray:
    keep = axis is not None
    lengths = [np.sqrt((x * x).sum(axis=axis, keepdims=keep)) for x in (a, b)]
    cosine = (a * b).sum(axis=axis, keepdims=keep) / (lengths[0] * lengths[1])
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize(
    ("parameters", "axis"),
    [
        ({}, None),
        ({"nuslerp_flatten": False}, -1),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0),
    ],
)
@pytest.mark.parametrize("shape", [(24, 40), (40,), (3, 4, 5)])
def test_equals_the_formula_for_each_kind_of_vector(
    has_base: bool, parameters: dict[str, bool], axis: int | None, shape: tuple[int, ...]
) -> None:
    base, experts = make_models(shape, 2, rms=0.02)
    weights = [{"weight": 0.3}, {"weight": 0.9}]
    merged = merge("nuslerp", base if has_base else None, experts, parameters, weights)
    origin = base.double().numpy() if has_base else 0.0
    first, second = (expert.double().numpy() - origin for expert in experts)
    expected = origin + _slerp(first, second, 0.75, axis)
    assert relative_difference(merged, expected) < 2e-6
    assert merged.is_contiguous()


def test_weights_that_cancel_out_meet_in_the_middle() -> None:
    _, experts = make_models((8, 8), 2, rms=0.02)
    weights = [{"weight": 1.0}, {"weight": -1.0}]
    half = merge("nuslerp", None, experts, {}, {"weight": 1.0})
    assert torch.equal(merge("nuslerp", None, experts, {}, weights), half)


def test_parallel_rows_are_interpolated_on_the_straight() -> None:
    _, (expert, _) = make_models((6, 8), 2, rms=0.02)
    other = expert.clone()
    other[:3] *= -2
    merged = merge("nuslerp", None, [expert, other], {"nuslerp_flatten": False}, {"weight": 1.0})
    torch.testing.assert_close(merged[:3], -0.5 * expert[:3])
    torch.testing.assert_close(merged[3:], expert[3:])
