import math

import numpy as np
import pytest
import torch

from tests.support import oracle
from tests.support.tensors import make_models, merge, relative_difference

# rows, columns, experts: square; fewer rows; more rows; task vectors with fewer rows than columns.
SHAPES = [(64, 64, 4), (24, 96, 8), (96, 24, 3), (32, 128, 3), (16, 128, 3)]


@pytest.mark.parametrize(("rows", "columns", "num_experts"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 1e-3)]
)
def test_equals_the_formula(
    rows: int, columns: int, num_experts: int, dtype: torch.dtype, tolerance: float
) -> None:
    base, experts = make_models((rows, columns), num_experts, dtype=dtype, base_rms=0)
    expected = oracle.swudi_a_update(oracle.task_vectors(base, experts))
    assert relative_difference(merge("swudi_a", base, experts), expected) < tolerance


def test_adds_the_scaled_update_to_the_base() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64)
    update = oracle.swudi_a_update(oracle.task_vectors(base, experts))
    merged = merge("swudi_a", base, experts, {"scale": 0.5})
    np.testing.assert_allclose(merged.numpy(), base.numpy() + 0.5 * update, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_that_only_rounding_fills_are_left_alone(dtype: torch.dtype) -> None:
    """The effective rank of adapters exceeds their rank, since the floor counts in it."""
    generator = torch.Generator().manual_seed(0)
    experts = []
    for _ in range(3):
        left = torch.randn(400, 1, generator=generator, dtype=torch.float64)
        right = torch.randn(1, 400, generator=generator, dtype=torch.float64)
        experts.append((left @ right).to(dtype))
    base = torch.zeros(400, 400, dtype=dtype)
    vectors = oracle.task_vectors(base, experts)
    assert oracle.effective_rank(vectors) > 3
    figures: dict[str, float] = {}
    merged = merge("swudi_a", base, experts, figures=figures)
    A, B = (
        sum(T.T @ T / np.sum(T**2) for T in vectors),
        sum(T @ T.T @ T / np.sum(T**2) for T in vectors),
    )
    assert relative_difference(merged, B @ np.linalg.pinv(A, rcond=1e-6)) < 1e-3
    assert figures["effective_rank"] == pytest.approx(oracle.effective_rank(vectors), rel=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (16, 128)])
def test_an_expert_equal_to_the_base_changes_nothing(shape: tuple[int, int]) -> None:
    base, experts = make_models(shape, 3)
    with_base = merge("swudi_a", base, [experts[0], base, *experts[1:]])
    torch.testing.assert_close(with_base, merge("swudi_a", base, experts), rtol=1e-6, atol=1e-9)


def test_transposed_tensors_are_solved_as_their_transpose() -> None:
    base, experts = make_models((20, 12), 3)
    stored = merge(
        "swudi_a", base.t().contiguous(), [e.t().contiguous() for e in experts], transposed=True
    )
    torch.testing.assert_close(stored.t(), merge("swudi_a", base, experts), rtol=1e-5, atol=1e-8)


def test_figures_tell_the_rank() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64)
    rank = oracle.effective_rank(oracle.task_vectors(base, experts))
    figures: dict[str, float] = {}
    merge("swudi_a", base, experts, figures=figures)
    assert figures["effective_rank"] == pytest.approx(rank)
    assert figures["filter_rank"] == math.ceil(rank)


def test_unequal_task_vectors_are_warned_about() -> None:
    base, experts = make_models((24, 40), 2, base_rms=0)
    figures: dict[str, list[str]] = {}
    merge("swudi_a", base, [experts[0], 3 * experts[1]], figures=figures)
    (warning,) = figures["warnings"]
    assert "3.0 times the smallest" in warning
    figures.clear()
    merge("swudi_a", base, experts, figures=figures)
    assert "warnings" not in figures


def test_inputs_that_are_not_finite_are_an_error_that_names_the_tensor() -> None:
    from merging.errors import NumericalError

    base, experts = make_models((8, 8), 3)
    experts[1][2, 3] = torch.nan
    with pytest.raises(NumericalError, match=r"Cannot solve 'model\.w'.*finite"):
        merge("swudi_a", base, experts, tensor_name="model.w")
