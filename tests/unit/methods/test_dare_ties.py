import numpy as np
import pytest
import torch

from tests.support import oracle
from tests.support.tensors import make_models, merge

WEIGHTS = [0.75, 1.0, 0.5]
DENSITIES = [0.2, 0.5, 1.0]
NAME = "model.layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula_under_the_documented_masks(
    normalize: bool, rescale: bool, dtype: torch.dtype
) -> None:
    base, experts = make_models((31, 47), 3, dtype=dtype)
    merged = merge(
        "dare_ties",
        base,
        experts,
        {"lambda": 0.8, "normalize": normalize, "rescale": rescale},
        [{"weight": w, "density": d} for w, d in zip(WEIGHTS, DENSITIES, strict=True)],
        seed=42,
        tensor_name=NAME,
    )
    masks = [oracle.dare_mask(42, i, NAME, base.numel(), d) for i, d in enumerate(DENSITIES)]
    expected = oracle.dare(
        base, experts, WEIGHTS, DENSITIES, masks,
        scale=0.8, normalize=normalize, rescale=rescale, elect=True,
    )  # fmt: skip
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-7)
