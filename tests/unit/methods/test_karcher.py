import numpy as np
import pytest
import torch

from tests.support.tensors import make_models, merge, relative_difference


def _karcher(vectors: list[np.ndarray], iterations: int) -> np.ndarray:
    units = [v / np.linalg.norm(v) for v in vectors]
    mean = sum(units)
    mean = mean / np.linalg.norm(mean)
    for _ in range(iterations):
        cosines = [(u * mean).sum() for u in units]
        logs = [
            np.arccos(c) / np.sin(np.arccos(c)) * (u - c * mean)
            for u, c in zip(units, cosines, strict=True)
        ]
        way = sum(logs) / len(units)
        step = np.linalg.norm(way)
        if step < 1e-5:
            break
        mean = np.cos(step) * mean + np.sin(step) / step * way
        mean = mean / np.linalg.norm(mean)
    return mean * np.mean([np.linalg.norm(v) for v in vectors])


@pytest.mark.parametrize("rms", [2.7e-4, 0.02, 0.2])
@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_equals_the_formula(rms: float, iterations: int) -> None:
    _, experts = make_models((24, 40), 4, rms=rms)
    merged = merge("karcher", None, experts, {"max_iter": iterations})
    expected = _karcher([expert.double().numpy() for expert in experts], iterations)
    assert relative_difference(merged, expected) < 1e-6


def test_the_mean_of_two_is_half_way_along_their_arc() -> None:
    first, second = torch.eye(2)
    torch.testing.assert_close(
        merge("karcher", None, [first, second]), torch.full((2,), float(np.sqrt(0.5)))
    )


def test_tensors_of_zeros_have_no_say_in_the_direction() -> None:
    _, (expert,) = make_models((8, 8), 1)
    merged = merge("karcher", None, [expert, torch.zeros(8, 8)])
    torch.testing.assert_close(merged, 0.5 * expert)
    nothing = merge("karcher", None, [torch.zeros(8, 8)] * 3)
    assert torch.equal(nothing, torch.zeros(8, 8))
