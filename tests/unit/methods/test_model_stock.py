import numpy as np
import pytest
import torch

from tests.support.tensors import make_models, merge, relative_difference


def _model_stock(base: np.ndarray, experts: list[np.ndarray], axis: int | None) -> np.ndarray:
    vectors = [expert - base for expert in experts]
    keep = axis is not None
    cosines = []
    for i, first in enumerate(vectors):
        for second in vectors[i + 1 :]:
            norms = [np.sqrt((v * v).sum(axis=axis, keepdims=keep)) for v in (first, second)]
            product = (first * second).sum(axis=axis, keepdims=keep)
            cosines.append(product / np.maximum(norms[0] * norms[1], 1e-6))
    cosine = sum(cosines) / len(cosines)
    count = len(experts)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * sum(experts) / count + (1 - t) * base


@pytest.mark.parametrize(("filter_wise", "axis"), [(False, None), (True, -1)])
@pytest.mark.parametrize("num_experts", [2, 4])
@pytest.mark.parametrize("shape", [(24, 40), (40,), (3, 4, 5)])
def test_equals_the_formula(
    filter_wise: bool, axis: int | None, num_experts: int, shape: tuple[int, ...]
) -> None:
    base, experts = make_models(shape, num_experts, rms=0.02)
    common = make_models(shape, 1, seed=9, rms=0.03)[1][0]
    experts = [expert + common for expert in experts]
    figures: dict[str, float] = {}
    merged = merge("model_stock", base, experts, {"filter_wise": filter_wise}, figures=figures)
    doubles = [expert.double().numpy() for expert in experts]
    expected = _model_stock(base.double().numpy(), doubles, axis)
    assert relative_difference(merged, expected) < 1e-5
    assert 0 < figures["mean_cosine"] < 1


def test_equal_experts_are_taken_over() -> None:
    base, (expert,) = make_models((24, 40), 1, rms=0.02)
    torch.testing.assert_close(merge("model_stock", base, [expert] * 3), expert)


def test_updates_that_cancel_out_leave_the_base() -> None:
    base, (expert,) = make_models((24, 40), 1, rms=0.02)
    opposite = 2 * base - expert
    torch.testing.assert_close(merge("model_stock", base, [expert, opposite]), base)
