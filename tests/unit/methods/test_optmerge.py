import numpy as np
import pytest
import torch

from merging.errors import NumericalError
from tests.support import oracle
from tests.support.tensors import make_models, merge, relative_difference

SHAPES = [(64, 64, 4), (24, 96, 8), (96, 24, 3), (32, 128, 3)]
RATES = {"full": 1e-5, "lora": 1e-4}


@pytest.mark.parametrize(("rows", "columns", "num_experts"), SHAPES)
@pytest.mark.parametrize("variant", ["full", "lora"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)]
)
def test_follows_the_published_optimiser(
    rows: int, columns: int, num_experts: int, variant: str, dtype: torch.dtype, tolerance: float
) -> None:
    base, experts = make_models((rows, columns), num_experts, dtype=dtype, base_rms=0)
    rate = RATES[variant]
    expected = oracle.optmerge_update(
        oracle.task_vectors(base, experts), variant=variant, steps=300, learning_rate=rate
    )
    merged = merge("optmerge", base, experts, {"variant": variant, "learning_rate": rate})
    assert relative_difference(merged, expected) < tolerance


@pytest.mark.parametrize("learning_rate", [1e-4, 0.1])
@pytest.mark.parametrize("steps", [0, 1, 20])
def test_steps_with_momentum_are_taken_all_at_once(learning_rate: float, steps: int) -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64, base_rms=0)
    expected = oracle.optmerge_update(
        oracle.task_vectors(base, experts),
        variant="lora",
        steps=steps,
        learning_rate=learning_rate,
    )
    parameters = {"variant": "lora", "steps": steps, "learning_rate": learning_rate}
    assert relative_difference(merge("optmerge", base, experts, parameters), expected) < 1e-10


def test_a_rate_that_diverges_is_an_error_that_says_what_to_do() -> None:
    base, experts = make_models((24, 40), 3)
    parameters = {"variant": "lora", "learning_rate": 1e3, "steps": 100_000}
    with pytest.raises(NumericalError, match=r"Cannot solve 'w'.*smaller learning_rate"):
        merge("optmerge", base, experts, parameters, tensor_name="w")


def test_auto_takes_the_rate_of_wudi_with_adam_and_the_published_one_without() -> None:
    base, experts = make_models((24, 40), 3)
    rate, _ = oracle.wudi_rates(oracle.task_vectors(base, experts))
    for variant, expected in (("full", rate), ("lora", 1e-4)):
        figures: dict[str, float] = {}
        merge("optmerge", base, experts, {"variant": variant}, figures=figures)
        assert figures["learning_rate"] == pytest.approx(expected)


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_an_expert_equal_to_the_base_changes_nothing(variant: str) -> None:
    base, experts = make_models((16, 24), 3)
    parameters = {"variant": variant}
    with_base = merge("optmerge", base, [experts[0], base, *experts[1:]], parameters)
    assert torch.equal(with_base, merge("optmerge", base, experts, parameters))


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_transposed_tensors_are_solved_as_their_transpose(variant: str) -> None:
    base, experts = make_models((20, 12), 3, dtype=torch.float64)
    stored = merge(
        "optmerge", base.t().contiguous(), [e.t().contiguous() for e in experts],
        {"variant": variant}, transposed=True,
    )  # fmt: skip
    expected = merge("optmerge", base, experts, {"variant": variant})
    torch.testing.assert_close(stored.t(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_figures_are_of_its_own_loss(variant: str) -> None:
    base, experts = make_models((24, 32), 3, dtype=torch.float64)
    figures: dict[str, float] = {}
    merged = merge("optmerge", base, experts, {"variant": variant}, figures=figures)
    vectors = oracle.task_vectors(base, experts)
    targets, directions = oracle.optmerge_terms(vectors, variant=variant)

    def loss(M: np.ndarray) -> float:
        terms = zip(vectors, targets, directions, strict=True)
        return sum(np.sum(((M - target) @ P.T) ** 2) / np.sum(T**2) for T, target, P in terms)

    assert figures["loss_before"] == pytest.approx(loss(sum(vectors)))
    assert figures["loss_after"] == pytest.approx(loss((merged - base).numpy()), rel=1e-6)
