import numpy as np
import pytest
import torch

from tests.support.tensors import make_models, merge


@pytest.mark.parametrize("t", [0.0, 1e-5, 1e-4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula(t: float, dtype: torch.dtype) -> None:
    base, experts = make_models((24, 40), 1, dtype=dtype)
    merged = merge("nearswap", base, experts, {"t": t})
    origin, target = (tensor.double().numpy() for tensor in (base, experts[0]))
    weight = np.clip(t / np.maximum(np.abs(target - origin), 1e-6), 0, 1)
    expected = weight * target + (1 - weight) * origin
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_no_entry_moves_further_than_t_and_near_ones_go_all_the_way() -> None:
    base, (expert,) = make_models((24, 40), 1)
    moved = merge("nearswap", base, [expert], {"t": 1e-4}) - base
    assert float(moved.abs().max()) <= 1.001e-4
    is_near = (expert - base).abs() < 0.9e-4
    torch.testing.assert_close((base + moved)[is_near], expert[is_near])
