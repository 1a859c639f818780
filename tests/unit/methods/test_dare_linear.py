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
        "dare_linear",
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
        scale=0.8, normalize=normalize, rescale=rescale, elect=False,
    )  # fmt: skip
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-7)


def _kept(num_entries: int, density: float, **task: object) -> torch.Tensor:
    merged = merge(
        "dare_linear",
        torch.zeros(num_entries),
        [torch.ones(num_entries)],
        {"rescale": False},
        {"density": density},
        **task,
    )
    return merged.bool()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_share_kept_is_the_density(density: float) -> None:
    num_entries = 1_000_000
    deviation = (density * (1 - density) / num_entries) ** 0.5
    share = _kept(num_entries, density).double().mean()
    assert abs(share - density) < 5 * deviation


def test_rescaling_keeps_the_mean() -> None:
    ones = torch.ones(1_000_000)
    merged = merge("dare_linear", torch.zeros_like(ones), [ones], {}, {"density": 0.25})
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    assert abs(merged.double().mean() - 1) < 0.01


def test_masks_of_other_seeds_tensors_and_experts_are_independent() -> None:
    count = 200_000
    first = _kept(count, 0.5, seed=1, tensor_name="a")
    both = merge(
        "dare_linear", torch.zeros(count), [torch.ones(count), 2 * torch.ones(count)],
        {"rescale": False}, {"density": 0.5}, seed=1, tensor_name="a",
    )  # fmt: skip
    second_expert = both >= 2
    others = [
        _kept(count, 0.5, seed=2, tensor_name="a"),
        _kept(count, 0.5, seed=1, tensor_name="b"),
    ]
    for other in (*others, second_expert):
        assert abs((first == other).double().mean() - 0.5) < 0.01


def test_neighbouring_entries_are_independent() -> None:
    kept = _kept(200_000, 0.5)
    for distance in (1, 2, 3, 64):
        same = (kept[distance:] == kept[:-distance]).double().mean()
        assert abs(same - 0.5) < 0.01


def test_a_density_just_below_one_is_accepted() -> None:
    assert _kept(10_000, 1 - 1e-12).all()
