import numpy as np
import pytest
import torch

from merging.ops.low_rank import Adapter
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
    merged = merge("tsv_m", base, experts, {"scale": 1.3})
    expected = 1.3 * oracle.tsv_m(oracle.task_vectors(base, experts))
    assert relative_difference(merged, expected) < tolerance


def test_the_rule_keeps_the_whole_of_the_task_vectors_on_average() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64, base_rms=0)
    figures: dict[str, float] = {}
    merged = merge("tsv_m", base, experts, {"scale": "calibrated"}, figures=figures).numpy()
    vectors = oracle.task_vectors(base, experts)
    shares = [np.sum(merged * T) / np.sum(T * T) for T in vectors]
    assert np.mean(shares) == pytest.approx(1)
    assert figures["scale"] == pytest.approx(1 / figures["kept"])
    assert figures["update_norm"] == pytest.approx(np.linalg.norm(merged))


def test_transposed_tensors_are_solved_as_their_transpose() -> None:
    base, experts = make_models((20, 12), 3, dtype=torch.float64)
    turned = [expert.t().contiguous() for expert in experts]
    stored = merge("tsv_m", base.t().contiguous(), turned, transposed=True)
    torch.testing.assert_close(stored.t(), merge("tsv_m", base, experts))


def test_an_expert_equal_to_the_base_takes_no_part() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64)
    with_base = merge("tsv_m", base, [experts[0], base, *experts[1:]], {"scale": 1.0})
    vectors = oracle.task_vectors(base, experts)
    expected = base.numpy() + oracle.tsv_m(vectors, num_tasks=4)  # each keeps a quarter
    np.testing.assert_allclose(with_base.numpy(), expected)


def test_tasks_that_share_no_direction_are_added_up() -> None:
    experts = [torch.zeros(12, 18) for _ in range(3)]
    for number, expert in enumerate(experts):
        for place in range(4):
            expert[4 * number + place, 6 * number + place] = 1.0 + place
    merged = merge("tsv_m", torch.zeros(12, 18), experts)
    torch.testing.assert_close(merged, experts[0] + experts[1] + experts[2])


def test_directions_beyond_an_adapters_rank_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(
            torch.randn((48, 3), generator=generator), torch.randn((3, 64), generator=generator)
        )
        for _ in range(4)
    ]
    vectors = [(adapter.up.double() @ adapter.down.double()).numpy() for adapter in adapters]
    merged = merge("tsv_m", torch.zeros(48, 64), adapters)  # type: ignore[arg-type] # it takes both
    expected = oracle.tsv_m(vectors, num_tasks=48 // 3)  # three triplets of each, not twelve
    assert relative_difference(merged, expected) < 1e-4
