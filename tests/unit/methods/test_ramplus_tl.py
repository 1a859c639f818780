import numpy as np
import pytest
import torch

from tests.support.tensors import make_models, merge

EPSILON = 2e-4


@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (0.5, 3.0), (0.0, 1.0)])
def test_unique_entries_grow_with_what_an_expert_shares(r: float, alpha: float) -> None:
    base, experts = make_models((24, 40), 3)
    experts[1] = base + 3 * (experts[1] - base)
    figures: dict[str, list[float]] = {}
    parameters = {"r": r, "alpha": alpha, "epsilon": EPSILON}
    merged = merge("ramplus_tl", base, experts, parameters, figures=figures)
    origin = base.double().numpy()
    vectors = np.stack([expert.double().numpy() - origin for expert in experts])
    vectors[np.abs(vectors) <= EPSILON] = 0
    is_changed = vectors != 0
    counts = is_changed.sum(axis=0)
    unique = (is_changed & (counts == 1)).sum(axis=(1, 2))
    shared = (is_changed & (counts > 1)).sum(axis=(1, 2))
    factors = 1 + r * np.clip(shared / np.maximum(unique, EPSILON), 0, alpha)
    scaled = np.where(counts == 1, factors[:, None, None] * vectors, vectors)
    expected = origin + scaled.sum(axis=0) / np.maximum(counts, 1)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(figures["unique_factors"], factors)


def test_without_growth_it_is_ram() -> None:
    base, experts = make_models((24, 40), 3)
    plain = merge("ram", base, experts, {"epsilon": EPSILON})
    assert torch.equal(merge("ramplus_tl", base, experts, {"epsilon": EPSILON, "r": 0}), plain)


def test_an_expert_with_nothing_of_its_own_counts_with_the_largest_ratio() -> None:
    base = torch.zeros(4)
    first, second = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([3.0, 1.0, 1.0, 0.0])
    figures: dict[str, list[float]] = {}
    merge("ramplus_tl", base, [first, second], {"alpha": 4}, figures=figures)
    np.testing.assert_allclose(figures["unique_factors"], [1.4, 1.2])
