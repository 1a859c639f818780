"""RegMean beside its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merging.method import Task, get_method
from tests.support.tensors import make_models


def merge_step(experts, statistics, *, transposed: bool = False, alpha: float = 0.9):
    method = get_method("regmean")
    task = Task(
        tensor_name="model.layers.0.mlp.up_proj.weight",
        parameters=method.parameters.model_validate({"alpha": alpha}),
        expert_parameters=[],
        transposed=transposed,
        shape=tuple(experts[0].shape),
    )
    mixed = [t.reshape(-1) for pair in zip(experts, statistics, strict=True) for t in pair]
    return method.step("linear").merge(None, iter(mixed), task), task


def features(seed: int, num_rows: int, width: int) -> tuple[np.ndarray, torch.Tensor]:
    X = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))
    count = torch.tensor([float(num_rows)])
    return X.double().numpy(), torch.cat([(X.T @ X).reshape(-1), count])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("alpha", [0.9, 0.0])
def test_linear_layers_follow_the_formula(transposed: bool, alpha: float) -> None:
    _, experts = make_models((12, 20), 3)
    made = [features(n, 9 + 5 * n, 20) for n in range(3)]
    H = [X.T @ X / len(X) for X, _ in made]
    H = [alpha * h + (1 - alpha) * np.diag(np.diag(h)) for h in H]
    W = [expert.double().numpy() for expert in experts]
    expected = sum(w @ h for w, h in zip(W, H, strict=True)) @ np.linalg.inv(sum(H))
    stored = [expert.T.contiguous() if transposed else expert for expert in experts]
    merged, task = merge_step(stored, [s for _, s in made], transposed=transposed, alpha=alpha)
    merged = merged.T if transposed else merged
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert task.figures["rows"] == [9, 14, 19]


def test_inputs_that_are_always_zero_take_the_mean() -> None:
    _, experts = make_models((4, 6), 2)
    statistics = []
    for seed in range(2):
        X = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed))
        X[:, 2] = 0
        statistics.append(torch.cat([(X.T @ X).reshape(-1), torch.tensor([30.0])]))
    merged, _ = merge_step(experts, statistics)
    mean = (experts[0] + experts[1]) / 2
    torch.testing.assert_close(merged[:, 2], mean[:, 2], rtol=1e-4, atol=1e-6)
    assert torch.isfinite(merged).all()
