import numpy as np
import pytest
import torch

from merging.ops.low_rank import Adapter
from tests.support import oracle
from tests.support.tensors import make_models, merge, relative_difference

SHAPES = [(24, 42, 3), (40, 24, 4), (32, 32, 2)]
TYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)]


@pytest.mark.parametrize("density", [0.001, 0.2])
@pytest.mark.parametrize(("rows", "columns", "num_experts"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_equals_the_formula(
    rows: int, columns: int, num_experts: int, density: float, dtype: torch.dtype, tolerance: float
) -> None:
    base, experts = make_models((rows, columns), num_experts, dtype=dtype, base_rms=0)
    merged = merge("dc_merge", base, experts, {"scale": 1.3, "density": density})
    expected = 1.3 * oracle.dc_merge(oracle.task_vectors(base, experts), density)
    assert relative_difference(merged, expected) < tolerance


def test_smoothed_values_lie_on_a_line_of_the_same_sum() -> None:
    base, experts = make_models((24, 42), 3, dtype=torch.float64, base_rms=0)
    settings = {"density": 0.3, "smoothing": "linear", "rho": 1.1}
    merged = merge("dc_merge", base, experts, settings)

    def smooth(values: np.ndarray) -> np.ndarray:
        line = np.linspace(min(1.1, values[0] / values[-1]), 1, len(values))
        return values.sum() * line / line.sum()

    expected = oracle.dc_merge(oracle.task_vectors(base, experts), 0.3, smooth)
    assert relative_difference(merged, expected) < 1e-9
    flat = merge("dc_merge", base, experts, {"density": 0.3, "smoothing": "average", "rho": 9.0})
    expected = oracle.dc_merge(
        oracle.task_vectors(base, experts), 0.3, lambda values: np.full_like(values, values.mean())
    )
    assert relative_difference(flat, expected) < 1e-9


def test_transposed_tensors_are_solved_as_their_transpose() -> None:
    base, experts = make_models((20, 12), 3, dtype=torch.float64)
    turned = [expert.t().contiguous() for expert in experts]
    stored = merge("dc_merge", base.t().contiguous(), turned, transposed=True)
    torch.testing.assert_close(stored.t(), merge("dc_merge", base, experts))


def test_tasks_that_share_no_direction_are_added_up() -> None:
    experts = [torch.zeros(12, 18) for _ in range(3)]
    for number, expert in enumerate(experts):
        for place in range(4):
            expert[4 * number + place, 6 * number + place] = 1.0 + place
    merged = merge("dc_merge", torch.zeros(12, 18), experts, {"density": 0.1})
    torch.testing.assert_close(merged, experts[0] + experts[1] + experts[2])


def test_directions_beyond_an_adapters_rank_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(
            torch.randn((48, 3), generator=generator), torch.randn((3, 64), generator=generator)
        )
        for _ in range(4)
    ]
    merged = merge("dc_merge", torch.zeros(48, 64), adapters, {"density": 0.5})  # type: ignore[arg-type] # it takes both
    assert torch.linalg.matrix_rank(merged.double(), rtol=1e-5) == 12
