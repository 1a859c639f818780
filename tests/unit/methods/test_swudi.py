import numpy as np
import pytest
import torch

from tests.support import oracle
from tests.support.tensors import make_models, merge, relative_difference

# rows, columns, experts: square; fewer rows; more rows; task vectors with fewer rows than columns.
SHAPES = [(64, 64, 4), (24, 96, 8), (96, 24, 3), (32, 128, 3), (16, 128, 3)]


@pytest.mark.parametrize(("rows", "columns", "num_experts"), SHAPES)
@pytest.mark.parametrize("init", ["sum", "zero"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 1e-3)]
)
def test_equals_the_formula(
    rows: int, columns: int, num_experts: int, init: str, dtype: torch.dtype, tolerance: float
) -> None:
    base, experts = make_models((rows, columns), num_experts, dtype=dtype, base_rms=0)
    vectors = oracle.task_vectors(base, experts)
    expected = oracle.swudi_update(vectors, t=300, r=0.65, init=init)
    merged = merge("swudi", base, experts, {"init": init})
    assert relative_difference(merged, expected) < tolerance


@pytest.mark.parametrize(("t", "r"), [(1300, 0.65), (300, 0.85), (1300, 0.01), (5, 1.0)])
def test_follows_its_parameters(t: float, r: float) -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64, base_rms=0)
    expected = oracle.swudi_update(oracle.task_vectors(base, experts), t=t, r=r)
    merged = merge("swudi", base, experts, {"t": t, "r": r})
    assert relative_difference(merged, expected) < 1e-9


def test_adds_the_scaled_update_to_the_base() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64)
    update = oracle.swudi_update(oracle.task_vectors(base, experts), t=300, r=0.65)
    merged = merge("swudi", base, experts, {"scale": 0.2})
    np.testing.assert_allclose(merged.numpy(), base.numpy() + 0.2 * update, rtol=1e-9)


def test_all_directions_and_much_time_leave_no_more_than_least_interference() -> None:
    base, experts = make_models((64, 48), 3, dtype=torch.float64, base_rms=0)
    vectors = oracle.task_vectors(base, experts)
    A = sum(T.T @ T / np.sum(T**2) for T in vectors)
    B = sum(T @ T.T @ T / np.sum(T**2) for T in vectors)
    merged = merge("swudi", base, experts, {"t": 1e6, "r": 1})
    assert relative_difference(merged, B @ np.linalg.inv(A)) < 1e-9


@pytest.mark.parametrize("shape", [(64, 64), (16, 128)])
def test_an_expert_equal_to_the_base_changes_nothing(shape: tuple[int, int]) -> None:
    base, experts = make_models(shape, 3)
    with_base = merge("swudi", base, [experts[0], base, *experts[1:]])
    torch.testing.assert_close(with_base, merge("swudi", base, experts), rtol=1e-6, atol=1e-9)


def test_adapters_with_fewer_directions_than_the_filter_has_are_not_blown_up() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(64, 2, generator=generator), torch.randn(2, 80, generator=generator))
        for _ in range(3)
    ]
    experts = [B @ A for B, A in factors]
    base = torch.zeros(64, 80)
    expected = oracle.swudi_update(oracle.task_vectors(base, experts), t=300, r=0.65)
    assert relative_difference(merge("swudi", base, experts), expected) < 1e-4


def test_figures_tell_the_rank_of_the_filter_and_of_the_task_vectors() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64)
    vectors = oracle.task_vectors(base, experts)
    figures: dict[str, float] = {}
    merge("swudi", base, experts, {"r": 0.5}, figures=figures)
    assert figures["filter_rank"] == 20
    assert figures["effective_rank"] == pytest.approx(oracle.effective_rank(vectors))
    assert figures["form"] == "gram"
    assert figures["flops"] > 0


def test_the_form_through_rows_gives_the_same_figures() -> None:
    base, experts = make_models((8, 100), 3, dtype=torch.float64)
    vectors = oracle.task_vectors(base, experts)
    figures: dict[str, float] = {}
    merged = merge("swudi", base, experts, figures=figures)
    assert figures["form"] == "rows"
    assert figures["effective_rank"] == pytest.approx(oracle.effective_rank(vectors))
    assert figures["loss_before"] == pytest.approx(oracle.wudi_loss(vectors, sum(vectors)))
    update = (merged - base).numpy()
    after = oracle.wudi_loss(vectors, update)
    assert figures["loss_after"] == pytest.approx(after, rel=1e-4)
    A = sum(T.T @ T / np.sum(T**2) for T in vectors)
    assert figures["participation_ratio"] == pytest.approx(9 / np.sum(A**2))
