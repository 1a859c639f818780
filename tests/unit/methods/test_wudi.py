import numpy as np
import pytest
import torch

from merging.method import Geometry, Task, get_method
from merging.methods.wudi import WudiParameters
from tests.support import oracle
from tests.support.tensors import RMS, make_models, merge, relative_difference

# rows, columns, experts: square; fewer rows; more rows; singular A (experts · rows < columns); and
# one of half the rank.
SHAPES = [(64, 64, 4), (24, 96, 8), (96, 24, 3), (32, 128, 3), (16, 128, 3)]

SEED = 3
"""Not every seed: where an entry's first gradient is 0 but for rounding, Adam makes a full step of
either sign of it, and float32 trajectories part by more (automatic differentiation's as well)."""


def _update(base: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    return merged.double() - base.double()


def _expected(base: torch.Tensor, experts: list[torch.Tensor], steps: int = 300) -> np.ndarray:
    vectors = oracle.task_vectors(base, experts)
    rate, epsilon = oracle.wudi_rates(vectors)
    return oracle.wudi_update(vectors, steps=steps, learning_rate=rate, epsilon=epsilon)


@pytest.mark.parametrize(("rows", "columns", "num_experts"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_follows_algorithm_1_in_float64(
    rows: int, columns: int, num_experts: int, dtype: torch.dtype
) -> None:
    # On a base of zeros the update is not rounded beside larger numbers.
    base, experts = make_models((rows, columns), num_experts, dtype=dtype, seed=SEED, base_rms=0)
    merged = merge("wudi", base, experts)
    assert merged.dtype == torch.float32
    # At half rank the loss falls to nearly 0, and the gradient to what rounding left in A and B.
    tolerance = 3e-5 if 2 * num_experts * rows < columns else 1e-5
    assert relative_difference(merged, _expected(base, experts)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adds_the_update_to_the_base(dtype: torch.dtype) -> None:
    base, experts = make_models((24, 40), 3, dtype=dtype, seed=SEED)
    expected = base.double().numpy() + _expected(base, experts)
    merged = merge("wudi", base, experts).double().numpy()
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("rows", "columns", "num_experts"), SHAPES)
def test_float64_inputs_are_solved_in_float64(rows: int, columns: int, num_experts: int) -> None:
    base, experts = make_models((rows, columns), num_experts, dtype=torch.float64)
    merged = merge("wudi", base, experts)
    assert merged.dtype == torch.float64
    assert relative_difference(_update(base, merged), _expected(base, experts)) < 1e-7


def test_a_number_as_learning_rate_gives_the_papers_trajectory() -> None:
    base, experts = make_models((48, 48), 4, dtype=torch.float64)
    expected = oracle.wudi_update(
        oracle.task_vectors(base, experts), steps=300, learning_rate=1e-5, epsilon=1e-8
    )
    merged = merge("wudi", base, experts, {"learning_rate": 1e-5})
    assert relative_difference(_update(base, merged), expected) < 1e-7


def test_auto_gives_the_papers_result_on_task_vectors_of_the_papers_size() -> None:
    base, experts = make_models((48, 48), 4, dtype=torch.float64, rms=RMS)
    figures: dict[str, object] = {}
    merge("wudi", base, experts, figures=figures)
    assert figures["learning_rate"] == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize("factor", [1e-3, 0.1, 30.0])
def test_auto_scales_with_the_task_vectors(factor: float) -> None:
    base, experts = make_models((32, 48), 4, base_rms=0)
    expected = factor * merge("wudi", base, experts).double()
    scaled = merge("wudi", base, [factor * expert for expert in experts])
    assert relative_difference(scaled, expected.numpy()) < 1e-4


def test_no_steps_give_the_sum_of_the_task_vectors() -> None:
    base, experts = make_models((8, 12), 3)
    merged = merge("wudi", base, experts, {"steps": 0})
    expected = oracle.task_arithmetic(base, experts, [1, 1, 1])
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6)


def test_scale_multiplies_the_update() -> None:
    base, experts = make_models((8, 12), 3, dtype=torch.float64)
    full = _update(base, merge("wudi", base, experts))
    part = _update(base, merge("wudi", base, experts, {"scale": 0.3}))
    torch.testing.assert_close(part, 0.3 * full, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_is_returned(dtype: torch.dtype) -> None:
    base, experts = make_models((16, 24), 1, dtype=dtype)
    merged = merge("wudi", base, experts)
    torch.testing.assert_close(merged, experts[0].float(), rtol=1e-6, atol=1e-9)


def test_equal_experts_give_that_expert_in_the_end() -> None:
    base, experts = make_models((16, 16), 1, dtype=torch.float64)
    merged = merge("wudi", base, experts * 3, {"steps": 3000})
    update, only = _update(base, merged), _update(base, experts[0])
    assert relative_difference(update @ only.t(), (only @ only.t()).numpy()) < 0.01


def test_an_expert_equal_to_the_base_changes_nothing() -> None:
    base, experts = make_models((16, 24), 3)
    assert torch.equal(
        merge("wudi", base, [experts[0], base, *experts[1:]]), merge("wudi", base, experts)
    )


def test_experts_equal_to_the_base_give_the_base() -> None:
    base, _ = make_models((16, 24), 0, dtype=torch.bfloat16)
    assert torch.equal(merge("wudi", base, [base, base]), base.float())


def test_transposed_tensors_are_solved_as_their_transpose() -> None:
    base, experts = make_models((20, 12), 3)
    stored = merge(
        "wudi", base.t().contiguous(), [e.t().contiguous() for e in experts], transposed=True
    )
    assert stored.shape == (12, 20)
    torch.testing.assert_close(stored.t(), merge("wudi", base, experts), rtol=1e-6, atol=1e-9)


def test_row_blocks_give_the_same_rows() -> None:
    base, experts = make_models((150, 32), 3)
    whole = merge("wudi", base, experts)
    for row_block in (64, 128, 1000):
        blocked = merge("wudi", base, experts, row_block=row_block)
        assert relative_difference(_update(base, blocked), _update(base, whole).numpy()) < 1e-5


def test_experts_are_not_held_while_the_next_one_is_awaited() -> None:
    import weakref

    base, experts = make_models((8, 8), 3)
    method = get_method("wudi")
    alive: list[weakref.ref[torch.Tensor]] = []

    def arrive():
        for expert in experts:
            assert not any(ref() is not None for ref in alive)
            arriving = expert.clone()
            alive.append(weakref.ref(arriving))
            yield arriving
            del arriving

    method.merge(base, arrive(), Task("w", method.parameters(), [None] * 3))
    assert len(alive) == 3


def test_figures_tell_how_much_interference_went_away() -> None:
    base, experts = make_models((24, 32), 3, dtype=torch.float64)
    figures: dict[str, float] = {}
    merged = merge("wudi", base, [*experts, base], figures=figures)
    vectors = oracle.task_vectors(base, experts)
    update = _update(base, merged).numpy()
    norms = [float(np.linalg.norm(T)) for T in vectors]
    assert figures.pop("expert_norms") == pytest.approx([*norms, 0.0])
    before, after = oracle.wudi_loss(vectors, sum(vectors)), oracle.wudi_loss(vectors, update)
    assert figures.pop("form") == "gram"
    weights = [1 / norm**2 for norm in norms]
    A = sum(w * T.T @ T for w, T in zip(weights, vectors, strict=False))
    assert figures == pytest.approx(
        {
            "flops": get_method("wudi").cost(Geometry((24, 32), 4), WudiParameters()).flops,
            "participation_ratio": np.trace(A) ** 2 / np.sum(A**2),
            "norm_spread": max(norms) / min(norms),
            "sum_norm": np.linalg.norm(sum(vectors)),
            "loss_before": before,
            "loss_after": after,
            "interference_removed": 1 - after / before,
            "update_norm": np.linalg.norm(update),
            "norm_ratio": np.linalg.norm(update) / np.linalg.norm(sum(vectors)),
            "learning_rate": oracle.wudi_rates(vectors)[0],
            "learning_rate_over_rms": 0.037,
        },
        rel=1e-6,
    )


def test_figures_of_experts_without_interference_do_not_divide_noise_by_noise() -> None:
    first, second = torch.zeros(4, 8), torch.zeros(4, 8)
    first[:, :4], second[:, 4:] = 1.0, 2.0
    figures: dict[str, object] = {}
    merged = merge("wudi", torch.zeros(4, 8), [first, second], figures=figures)
    assert "interference_removed" not in figures
    torch.testing.assert_close(merged, first + second, rtol=1e-4, atol=1e-4)


def test_task_vectors_of_any_size_neither_overflow_nor_vanish() -> None:
    base, experts = make_models((8, 12), 2, base_rms=0)
    for factor in (1e-12, 1e12):
        merged = merge("wudi", base, [expert * factor for expert in experts])
        assert torch.isfinite(merged).all()
        assert merged.abs().max() > 1e-4 * factor


@pytest.mark.parametrize(
    ("learning_rate", "says"), [(1e-7, "hardly moves"), (1e-3, "over-fitting"), (1e-5, "")]
)
def test_unusual_learning_rates_are_warned_about(learning_rate: float, says: str) -> None:
    base, experts = make_models((48, 48), 2)
    figures: dict[str, list[str]] = {}
    merge("wudi", base, experts, {"learning_rate": learning_rate}, figures=figures)
    assert bool(says) == ("warnings" in figures)
    assert not says or says in figures["warnings"][0]


def test_task_vectors_of_low_rank_are_warned_about() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = [
        torch.randn(160, 1, generator=generator) @ torch.randn(1, 160, generator=generator)
        for _ in range(2)
    ]
    figures: dict[str, list[str]] = {}
    merge("wudi", torch.zeros(160, 160), experts, {"steps": 1}, figures=figures)
    (warning,) = figures["warnings"]
    assert "about 1.0 of 160 directions" in warning
