import numpy as np
import pytest
import torch

from tests.support.tensors import make_models, merge


def _sce(base: np.ndarray, experts: list[np.ndarray], share: float) -> np.ndarray:
    vectors = np.stack([expert - base for expert in experts])
    if share < 1:
        variance = vectors.var(axis=0)
        count = int(share * np.count_nonzero(variance))
        order = np.argsort(-variance.ravel(), kind="stable")[:count]
        mask = np.zeros(variance.size)
        mask[order] = 1
        vectors = vectors * mask.reshape(variance.shape)
    energies = (vectors**2).reshape(len(vectors), -1).mean(axis=1)
    total = energies.sum()
    weights = energies / total if total >= 1e-6 else np.full(len(vectors), 1 / len(vectors))
    signs = np.where(vectors.sum(axis=0) >= 0, 1, -1)
    shares = (np.sign(vectors) == signs) * weights.reshape(-1, *[1] * base.ndim)
    return base + (vectors * shares).sum(axis=0) / np.maximum(shares.sum(axis=0), 1e-6)


@pytest.mark.parametrize("share", [1.0, 0.3, 0.01, 0.0])
@pytest.mark.parametrize("rms", [2.7e-4, 0.02])
def test_equals_the_formula(share: float, rms: float) -> None:
    base, experts = make_models((31, 47), 3, rms=rms)
    experts[1] = base + 2 * (experts[1] - base)
    figures: dict[str, list[float]] = {}
    merged = merge("sce", base, experts, {"select_topk": share}, figures=figures)
    doubles = [expert.double().numpy() for expert in experts]
    expected = _sce(base.double().numpy(), doubles, share)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-5, atol=1e-7)
    if share:
        is_weighed = figures["expert_weights"][1] > figures["expert_weights"][0]
        assert is_weighed == (rms == 0.02)


def test_shares_are_of_the_entries_that_differ() -> None:
    first = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    merged = merge("sce", torch.zeros(8), [first, torch.zeros(8)], {"select_topk": 0.5})
    assert merged.nonzero().view(-1).tolist() == [2, 3]
