import numpy as np
import pytest
import torch

from tests.support.tensors import make_models, merge

EPSILON = 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unique_entries_are_kept_and_shared_ones_averaged(dtype: torch.dtype) -> None:
    base, experts = make_models((24, 40), 3, dtype=dtype)
    merged = merge("ram", base, experts, {"epsilon": EPSILON})
    origin = base.double().numpy()
    vectors = np.stack([expert.double().numpy() - origin for expert in experts])
    vectors[np.abs(vectors) <= EPSILON] = 0
    counts = (vectors != 0).sum(axis=0)
    assert set(np.unique(counts)) == {0, 1, 2, 3}
    expected = origin + vectors.sum(axis=0) / np.maximum(counts, 1)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_what_is_at_most_epsilon_counts_as_unchanged() -> None:
    base = torch.zeros(3)
    experts = [torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0.25, 0.0, 2.0])]
    merged = merge("ram", base, experts, {"epsilon": 0.25})
    assert torch.equal(merged, torch.tensor([0.5, 1.0, 2.0]))
