import numpy as np
import pytest
import torch

from tests.support import oracle
from tests.support.tensors import make_models, merge

WEIGHTS = [0.75, 1.0, 0.5]
DENSITIES = [0.3, 0.9, 1.0]
GAMMAS = [0.05, 0.2, 0.5]


def _band(vector: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """What is left when entries are ordered by size and cut at both ends."""
    if density == 1:
        return vector
    count = vector.size
    kept = int(density * count)
    order = np.argsort(np.abs(vector).ravel(), kind="stable")
    bottom = max(0, count - kept - int(gamma * count))
    mask = np.zeros(count)
    mask[order[bottom : bottom + kept]] = 1
    return vector * mask.reshape(vector.shape)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_equals_the_formula(normalize: bool, rescale: bool) -> None:
    base, experts = make_models((31, 47), 3)
    merged = merge(
        "breadcrumbs",
        base,
        experts,
        {"lambda": 0.8, "normalize": normalize, "rescale": rescale},
        [
            {"weight": w, "density": d, "gamma": g}
            for w, d, g in zip(WEIGHTS, DENSITIES, GAMMAS, strict=True)
        ],
    )
    vectors = []
    for expert, density, gamma in zip(experts, DENSITIES, GAMMAS, strict=True):
        whole = (expert - base).double().numpy()
        left = _band(whole, density, gamma)
        vectors.append(left * (np.abs(whole).sum() / np.abs(left).sum() if rescale else 1))
    expected = oracle.mix(base, vectors, WEIGHTS, scale=0.8, normalize=normalize, elect=False)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.5, 0.1, slice(4, 9)),
        (0.9, 0.3, slice(0, 9)),
        (0.05, 0.1, slice(0, 0)),
        (0.5, 0.0, slice(5, 10)),
    ],
)
def test_so_many_entries_are_left_below_the_largest(
    density: float, gamma: float, kept: slice
) -> None:
    expert = torch.arange(1.0, 11.0)
    merged = merge(
        "breadcrumbs", torch.zeros(10), [expert], {}, {"density": density, "gamma": gamma}
    )
    assert merged.nonzero().view(-1).tolist() == list(range(10))[kept]


def test_of_equal_entries_the_first_ones_count_as_the_largest() -> None:
    merged = merge(
        "breadcrumbs", torch.zeros(10), [torch.ones(10)], {}, {"density": 0.5, "gamma": 0.2}
    )
    assert merged.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
