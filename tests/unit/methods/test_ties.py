import numpy as np
import pytest
import torch

from tests.support import oracle
from tests.support.tensors import make_models, merge

WEIGHTS = [0.75, 1.0, 0.5]
"""Exact in binary: where a sum is 0 in float64 it is 0 in float32 too, and elects the same sign."""
DENSITIES = [0.2, 0.5, 1.0]


def _settings() -> list[dict[str, float]]:
    return [{"weight": w, "density": d} for w, d in zip(WEIGHTS, DENSITIES, strict=True)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_trim_elect_and_disjoint_mean(normalize: bool, dtype: torch.dtype) -> None:
    base, experts = make_models((61, 83), 3, dtype=dtype)
    merged = merge("ties", base, experts, {"normalize": normalize, "lambda": 0.8}, _settings())
    expected = oracle.ties(base, experts, WEIGHTS, DENSITIES, scale=0.8, normalize=normalize)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-7)


def test_equals_the_oracle_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal magnitudes are kept up to the exact count, in order, across block borders."""
    monkeypatch.setattr("merging.ops.blocks.CPU_BLOCK", 64)
    base, experts = make_models((50, 41), 3, dtype=torch.bfloat16)
    merged = merge("ties", base, experts, {}, _settings())
    expected = oracle.ties(base, experts, WEIGHTS, DENSITIES)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.25, 0.5, 0.999])
def test_keeps_exactly_the_asked_share_when_all_magnitudes_are_equal(density: float) -> None:
    base = torch.zeros(1000)
    expert = torch.where(torch.arange(1000) % 3 == 0, -1.0, 1.0)
    merged = merge("ties", base, [expert], {}, {"density": density})
    num_kept = max(1, int(density * 1000))
    assert torch.equal(merged[:num_kept], expert[:num_kept])
    assert torch.count_nonzero(merged) == num_kept


def test_at_least_one_entry_survives() -> None:
    merged = merge(
        "ties", torch.zeros(5), [torch.tensor([1.0, 2, -9, 3, 4])], {}, {"density": 0.01}
    )
    assert merged.tolist() == [0, 0, -9, 0, 0]


def test_mostly_zero_task_vectors_lose_nothing() -> None:
    expert = torch.zeros(100)
    expert[7], expert[70] = 3.0, -2.0
    assert torch.equal(merge("ties", torch.zeros(100), [expert], {}, {"density": 0.5}), expert)


def test_a_sum_of_zero_elects_the_positive_sign() -> None:
    merged = merge("ties", torch.zeros(1), [torch.tensor([2.0]), torch.tensor([-2.0])])
    assert merged.tolist() == [2.0]


def test_experts_that_do_not_move_an_entry_do_not_dilute_it() -> None:
    experts = [torch.tensor([4.0]), torch.tensor([0.0]), torch.tensor([2.0]), torch.tensor([-1.0])]
    assert merge("ties", torch.zeros(1), experts).tolist() == [3.0]


def test_a_negative_weight_turns_a_task_vector_around() -> None:
    experts = [torch.tensor([4.0]), torch.tensor([-3.0])]
    settings = [{"weight": 1.0}, {"weight": -1.0}]
    merged = merge("ties", torch.zeros(1), experts, {"normalize": False}, settings)
    assert merged.tolist() == [7.0]


def test_float64_is_kept() -> None:
    base, experts = make_models((31, 17), 3, dtype=torch.float64)
    merged = merge("ties", base, experts, {}, _settings())
    expected = oracle.ties(base, experts, WEIGHTS, DENSITIES)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-14)


def test_rescaled_task_vectors_have_the_norm_that_they_had() -> None:
    base, experts = make_models((31, 17), 1, dtype=torch.bfloat16, base_rms=0)
    merged = merge("ties", base, experts, {"rescale": True}, {"density": 0.3})
    assert int(merged.count_nonzero()) == int(0.3 * base.numel())
    np.testing.assert_allclose(merged.abs().sum(), experts[0].float().abs().sum(), rtol=1e-5)


def test_rescaling_goes_with_tensors_alone() -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        merge("ties", torch.zeros(3), [torch.ones(3)], {"rescale": True, "scope": "global"})
