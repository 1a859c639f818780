import numpy as np
import pytest

from tests.support.tensors import make_models, merge


def _softmax(rows: np.ndarray) -> np.ndarray:
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True) + 1e-8


@pytest.mark.parametrize("shape", [(31, 47), (200,), (2, 3, 50)])
def test_equals_the_formula(shape: tuple[int, ...]) -> None:
    base, (expert,) = make_models(shape, 1, rms=0.05)
    figures: dict[str, float] = {}
    merged = merge("arcee_fusion", base, [expert], figures=figures)
    origin, target = base.double().numpy(), expert.double().numpy()
    p, q = _softmax(target), _softmax(origin)
    scores = np.abs(target - origin) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    ordered = np.sort(scores, axis=None)
    low, median, high = (ordered[int(share * (scores.size - 1))] for share in (0.25, 0.5, 0.75))
    is_taken = scores >= median + 1.5 * (high - low)
    assert 0 < is_taken.mean() < 0.3
    expected = np.where(is_taken, target, origin)
    differs = ~np.isclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-9)
    assert differs.mean() < 0.01  # entries at the threshold, by rounding
    assert figures["share_taken_over"] == pytest.approx(is_taken.mean(), abs=0.01)
