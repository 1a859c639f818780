import numpy as np
import pytest
import torch

from tests.support.tensors import make_models, merge

DENSITY, EPSILON = 0.4, 0.25


def _kept(seed: int, expert: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    parameters = {"density": DENSITY, "epsilon": EPSILON}
    merged = merge("della", base, [expert], {"rescale": False}, parameters, seed=seed)
    return (merged != base).numpy()


def test_larger_entries_of_a_row_are_kept_more_often_in_equal_steps() -> None:
    base = torch.zeros(40, 64)
    expert = torch.arange(1.0, 65.0).repeat(40, 1)
    shares = np.mean([_kept(seed, expert, base) for seed in range(60)], axis=(0, 1))
    expected = np.linspace(DENSITY - EPSILON, DENSITY + EPSILON, 64)
    assert np.abs(shares - expected).max() < 5 * np.sqrt(0.25 / 2400)
    assert abs(shares.mean() - DENSITY) < 0.01


def test_equal_entries_are_kept_as_often_as_ranks_in_any_order_would_have_them() -> None:
    base = torch.zeros(40, 64)
    expert = torch.tensor([1.0] * 16 + [2.0] * 47 + [3.0]).repeat(40, 1)
    shares = np.mean([_kept(seed, expert, base) for seed in range(60)], axis=(0, 1))
    by_rank = np.linspace(DENSITY - EPSILON, DENSITY + EPSILON, 64)
    for group in (slice(0, 16), slice(16, 63), slice(63, 64)):
        assert np.abs(shares[group] - by_rank[group].mean()).max() < 5 * np.sqrt(0.25 / 2400)


@pytest.mark.parametrize("epsilon", [0.0, 0.25])
def test_a_row_of_one_entry_is_kept_with_the_density(epsilon: float) -> None:
    base, expert = torch.zeros(20_000, 1), torch.ones(20_000, 1)
    parameters = {"density": DENSITY, "epsilon": epsilon}
    merged = merge("della", base, [expert], {"rescale": False}, parameters)
    assert abs(float((merged != 0).double().mean()) - DENSITY) < 0.02


def test_ranks_are_those_of_a_row_whatever_its_size() -> None:
    base, (expert,) = make_models((40, 64), 1)
    scaled = base + (expert - base) * torch.logspace(-2, 2, 40)[:, None]
    assert abs(_kept(1, scaled, base)[0].mean() - DENSITY) < 0.35
    counts = _kept(1, scaled, base).mean(axis=1)
    assert abs(counts[:20].mean() - counts[20:].mean()) < 0.1


def test_what_is_left_has_the_norm_of_what_was_there() -> None:
    base, (expert,) = make_models((40, 64), 1)
    merged = merge("della", base, [expert], {}, {"density": DENSITY, "epsilon": EPSILON})
    norm = float((merged - base).abs().double().sum())
    assert norm == pytest.approx(float((expert - base).abs().double().sum()), rel=1e-4)


def test_probabilities_outside_of_0_and_1_are_refused() -> None:
    base, experts = make_models((4, 4), 1)
    with pytest.raises(ValueError, match=r"from -0\.05 to 0\.25, which must lie between 0 and 1"):
        merge("della", base, experts, {}, {"density": 0.1, "epsilon": 0.15})
    with pytest.raises(ValueError, match=r"from 0\.75 to 1\.05"):
        merge("della", base, experts, {}, {"density": 0.9, "epsilon": 0.15})


def test_entries_that_disagree_with_the_elected_sign_take_no_part() -> None:
    base = torch.zeros(2)
    experts = [torch.tensor([3.0, -1.0]), torch.tensor([-1.0, -1.0])]
    assert merge("della", base, experts).tolist() == [3.0, -1.0]
