import numpy as np
import pytest
import torch

from tests.support import oracle
from tests.support.tensors import make_models, merge, relative_difference

SHAPES = [(24, 40, 3), (40, 24, 4), (32, 32, 2)]
TYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)]


@pytest.mark.parametrize(("rows", "columns", "num_experts"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_equals_the_formula(
    rows: int, columns: int, num_experts: int, dtype: torch.dtype, tolerance: float
) -> None:
    base, experts = make_models((rows, columns), num_experts, dtype=dtype, base_rms=0)
    merged = merge("iso_cts", base, experts, {"scale": 1.3})
    expected = 1.3 * oracle.iso_cts(oracle.task_vectors(base, experts), 0.8)
    assert relative_difference(merged, expected) < tolerance


def test_the_rule_keeps_the_whole_of_the_task_vectors_on_average() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64, base_rms=0)
    figures: dict[str, float] = {}
    merged = merge("iso_cts", base, experts, {"scale": "calibrated"}, figures=figures).numpy()
    vectors = oracle.task_vectors(base, experts)
    shares = [np.sum(merged * T) / np.sum(T * T) for T in vectors]
    assert np.mean(shares) == pytest.approx(1)
    assert figures["scale"] == pytest.approx(1 / figures["kept"])
    assert figures["update_norm"] == pytest.approx(np.linalg.norm(merged))


def test_transposed_tensors_are_solved_as_their_transpose() -> None:
    base, experts = make_models((20, 12), 3, dtype=torch.float64)
    turned = [expert.t().contiguous() for expert in experts]
    stored = merge("iso_cts", base.t().contiguous(), turned, transposed=True)
    torch.testing.assert_close(stored.t(), merge("iso_cts", base, experts))


def test_an_expert_equal_to_the_base_takes_no_part() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64)
    without = merge("iso_cts", base, experts, {"scale": 1.0})
    with_base = merge("iso_cts", base, [experts[0], base, *experts[1:]], {"scale": 1.0})
    torch.testing.assert_close(with_base, without)


def test_with_common_directions_alone_it_is_iso_c() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64)
    merged = merge("iso_cts", base, experts, {"common_space_fraction": 1.0})
    torch.testing.assert_close(merged, merge("iso_c", base, experts))


def test_directions_beyond_the_adapters_ranks_stay_empty() -> None:
    """The sum of few adapters has all their directions: nothing is left of a task's own."""
    generator = torch.Generator().manual_seed(0)
    experts = [
        torch.randn((48, 3), generator=generator) @ torch.randn((3, 64), generator=generator)
        for _ in range(4)
    ]
    merged = merge("iso_cts", torch.zeros(48, 64), experts)
    torch.testing.assert_close(
        merged, merge("iso_c", torch.zeros(48, 64), experts), rtol=1e-3, atol=1e-3
    )
