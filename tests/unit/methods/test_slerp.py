import numpy as np
import pytest
import torch

from tests.support.tensors import make_models, merge, relative_difference


def _slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    cosine = (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.4])
@pytest.mark.parametrize("rms", [2.7e-4, 0.02, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula_on_the_arc_and_on_the_straight(
    t: float, rms: float, dtype: torch.dtype
) -> None:
    base, experts = make_models((24, 40), 1, rms=rms, dtype=dtype)
    merged = merge("slerp", base, experts, {"t": t})
    expected = _slerp(base.double().numpy(), experts[0].double().numpy(), t)
    assert relative_difference(merged, expected) < 1e-6


def test_equal_lengths_stay_what_they_are() -> None:
    base, (expert,) = make_models((24, 40), 1, rms=0.5)
    expert = expert * (base.norm() / expert.norm())
    merged = merge("slerp", base, [expert], {"t": 0.5})
    assert float(merged.norm()) == pytest.approx(float(base.norm()), rel=1e-6)


def test_opposite_tensors_are_interpolated_on_the_straight() -> None:
    base, _ = make_models((24, 40), 0)
    torch.testing.assert_close(merge("slerp", base, [-base], {"t": 0.25}), 0.5 * base)


def test_a_tensor_of_zeros_has_no_direction_to_turn_from() -> None:
    base = torch.zeros(4, 4)
    expert = torch.eye(4)
    torch.testing.assert_close(
        merge("slerp", base, [expert], {"t": 0.5}), expert * np.sin(np.pi / 4)
    )
