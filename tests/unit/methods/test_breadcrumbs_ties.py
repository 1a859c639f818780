import numpy as np
import pytest

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
        "breadcrumbs_ties",
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
    expected = oracle.mix(base, vectors, WEIGHTS, scale=0.8, normalize=normalize, elect=True)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-7)
