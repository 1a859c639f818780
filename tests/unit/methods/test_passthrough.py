import torch

from tests.support.tensors import make_models, merge


def test_a_tensor_is_taken_over_bit_for_bit() -> None:
    _, (tensor,) = make_models((24, 40), 1, dtype=torch.bfloat16)
    assert torch.equal(merge("passthrough", None, [tensor]).bfloat16(), tensor)


def test_a_factor_is_applied_once_in_float32() -> None:
    _, (tensor,) = make_models((24, 40), 1, dtype=torch.bfloat16)
    merged = merge("passthrough", None, [tensor], {}, {"scale": 0.3})
    assert torch.equal(merged, tensor.float() * 0.3)
    assert torch.equal(merge("passthrough", None, [tensor], {}, {"scale": 0.0}), 0 * tensor.float())
