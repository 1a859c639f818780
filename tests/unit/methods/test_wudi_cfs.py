import numpy as np
import pytest
import torch

from merging.errors import NumericalError
from tests.support import oracle
from tests.support.tensors import make_models, merge, relative_difference

# rows, columns, experts: square; fewer rows; more rows; singular A (experts · rows < columns).
SHAPES = [(64, 64, 4), (24, 96, 8), (96, 24, 3), (32, 128, 3)]


@pytest.mark.parametrize(("rows", "columns", "num_experts"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)]
)
def test_equals_equation_20_with_a_relative_ridge(
    rows: int, columns: int, num_experts: int, dtype: torch.dtype, tolerance: float
) -> None:
    base, experts = make_models((rows, columns), num_experts, dtype=dtype, base_rms=0)
    vectors = oracle.task_vectors(base, experts)
    omegas = [0.1 * np.sum(T**2) / columns for T in vectors]
    merged = merge("wudi_cfs", base, experts)
    assert relative_difference(merged, oracle.cfs_update(vectors, omegas)) < tolerance


@pytest.mark.parametrize(("rows", "columns", "num_experts"), SHAPES)
@pytest.mark.parametrize("omega", [1e-5, 1e-2])
def test_equals_equation_20_with_an_absolute_ridge(
    rows: int, columns: int, num_experts: int, omega: float
) -> None:
    base, experts = make_models((rows, columns), num_experts, dtype=torch.float64, base_rms=0)
    vectors = oracle.task_vectors(base, experts)
    merged = merge("wudi_cfs", base, experts, {"omega": omega})
    expected = oracle.cfs_update(vectors, [omega] * num_experts)
    assert relative_difference(merged, expected) < 1e-10


def test_adds_the_scaled_update_to_the_base() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64)
    vectors = oracle.task_vectors(base, experts)
    omegas = [0.1 * np.sum(T**2) / 40 for T in vectors]
    merged = merge("wudi_cfs", base, experts, {"scale": 0.5})
    expected = base.numpy() + 0.5 * oracle.cfs_update(vectors, omegas)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12)


def test_a_large_relative_ridge_gives_the_mean() -> None:
    base, experts = make_models((12, 20), 4, dtype=torch.float64, base_rms=0)
    merged = merge("wudi_cfs", base, experts, {"rho": 1e9})
    assert relative_difference(merged, oracle.linear(experts, [1] * 4)) < 1e-6


def test_the_result_scales_with_the_task_vectors() -> None:
    base, experts = make_models((12, 20), 4, base_rms=0)
    expected = 1e-3 * merge("wudi_cfs", base, experts).double().numpy()
    scaled = merge("wudi_cfs", base, [1e-3 * expert for expert in experts])
    assert relative_difference(scaled, expected) < 1e-4


@pytest.mark.parametrize("parameters", [{}, {"omega": 1e-5}])
def test_one_expert_is_returned(parameters: dict[str, float]) -> None:
    base, experts = make_models((16, 24), 1)
    merged = merge("wudi_cfs", base, experts, parameters)
    torch.testing.assert_close(merged, experts[0], rtol=1e-6, atol=1e-9)


def test_equal_experts_give_that_expert() -> None:
    base, experts = make_models((16, 24), 1, base_rms=0)
    merged = merge("wudi_cfs", base, experts * 3)
    assert relative_difference(merged, experts[0].double().numpy()) < 1e-5


@pytest.mark.parametrize("parameters", [{}, {"omega": 1e-5}])
def test_an_expert_equal_to_the_base_changes_nothing(parameters: dict[str, float]) -> None:
    base, experts = make_models((16, 24), 3)
    with_base = merge("wudi_cfs", base, [experts[0], base, *experts[1:]], parameters)
    assert torch.equal(with_base, merge("wudi_cfs", base, experts, parameters))


def test_experts_equal_to_the_base_give_the_base() -> None:
    base, _ = make_models((16, 24), 0, dtype=torch.bfloat16)
    assert torch.equal(merge("wudi_cfs", base, [base, base]), base.float())


def test_transposed_tensors_are_solved_as_their_transpose() -> None:
    base, experts = make_models((20, 12), 3)
    stored = merge(
        "wudi_cfs", base.t().contiguous(), [e.t().contiguous() for e in experts], transposed=True
    )
    torch.testing.assert_close(stored.t(), merge("wudi_cfs", base, experts), rtol=1e-6, atol=1e-9)


def test_figures_show_less_interference_than_the_sum_has() -> None:
    base, experts = make_models((24, 32), 3, dtype=torch.float64)
    figures: dict[str, float] = {}
    merged = merge("wudi_cfs", base, experts, figures=figures)
    vectors = oracle.task_vectors(base, experts)
    update = (merged - base).numpy()
    assert figures["loss_before"] == pytest.approx(oracle.wudi_loss(vectors, sum(vectors)))
    assert figures["loss_after"] == pytest.approx(oracle.wudi_loss(vectors, update))
    assert 0 < figures["interference_removed"] < 1


def test_a_ridge_too_small_for_a_singular_matrix_is_an_error_that_names_the_tensor() -> None:
    first, second = torch.zeros(2, 300), torch.zeros(2, 300)
    first[0, :2], second[1, :2] = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])
    with pytest.raises(NumericalError, match=r"Cannot solve 'model\.w'") as raised:
        merge(
            "wudi_cfs", torch.zeros(2, 300), [first, second], {"omega": 1e-300},
            tensor_name="model.w",
        )  # fmt: skip
    assert raised.value.code == "did_not_converge"
    assert raised.value.context["tensor_name"] == "model.w"


def test_wide_layers_are_solved_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merging.ops.ridge.MAX_DOUBLE_COLUMNS", 8)
    base, experts = make_models((24, 96), 8, base_rms=0)
    vectors = oracle.task_vectors(base, experts)
    omegas = [0.1 * np.sum(T**2) / 96 for T in vectors]
    merged = merge("wudi_cfs", base, experts)
    assert relative_difference(merged, oracle.cfs_update(vectors, omegas)) < 1e-4
