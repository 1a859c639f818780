"""LOT Merging beside the formulas of its paper in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from merging.errors import RecipeError
from merging.method import Task, get_method
from merging.recipe import parse_recipe
from tests.support.tensors import make_models


def step(name: str, base: torch.Tensor, inputs: list[torch.Tensor], **given: Any) -> torch.Tensor:
    method = get_method("lot")
    transposed = given.pop("transposed", False)
    task = Task(
        tensor_name="model.layers.0.mlp.up_proj.weight",
        parameters=method.parameters.model_validate(given),
        expert_parameters=[],
        transposed=transposed,
        shape=tuple(base.shape),
    )
    return method.step(name).merge(base, iter([t.reshape(-1) for t in inputs]), task)


def features(
    seed: int, num_rows: int, width: int, *, as_rows: bool = False
) -> tuple[np.ndarray, torch.Tensor]:
    """Inputs and their statistic."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(num_rows, width, generator=generator)
    X *= torch.linspace(0.1, 2, width)
    values = torch.cat([X, torch.zeros(2, width)]) if as_rows else X.T @ X
    count = torch.tensor([float(num_rows)])
    return X.double().numpy(), torch.cat([values.reshape(-1), count])


@pytest.mark.parametrize("as_rows", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_layers_follow_the_formula(as_rows: bool, transposed: bool) -> None:
    base, experts = make_models((12, 20), 3, rms=0.01)
    made = [features(n, 9 + n, 20, as_rows=as_rows) for n in range(3)]
    H = [X.T @ X for X, _ in made]
    T = [(expert - base).double().numpy() for expert in experts]
    ridge = 1e-3 * np.trace(sum(H)) / 20
    right = sum(t @ h for t, h in zip(T, H, strict=True)) + ridge * sum(T) / 3
    expected = right @ np.linalg.inv(sum(H) + ridge * np.eye(20))
    flip = (lambda t: t.T.contiguous()) if transposed else (lambda t: t)
    mixed = [t for e, (_, s) in zip(experts, made, strict=True) for t in (flip(e), s)]
    merged = flip(step("linear", flip(base), mixed, scale=1.5, transposed=transposed))
    np.testing.assert_allclose((merged - base).numpy(), 1.5 * expected, rtol=2e-3, atol=2e-6)


def test_the_paper_s_setting_is_the_pseudo_inverse_of_float32() -> None:
    """Directions that no sample has keep the base's weights."""
    base, experts = make_models((6, 16), 2, rms=0.01)
    made = [features(n, 4, 16) for n in range(2)]
    H = [X.T @ X for X, _ in made]
    T = [(expert - base).double().numpy() for expert in experts]
    inverse = np.linalg.pinv(sum(H), rcond=16 * np.finfo(np.float32).eps, hermitian=True)
    expected = sum(t @ h for t, h in zip(T, H, strict=True)) @ inverse
    mixed = [t for e, (_, s) in zip(experts, made, strict=True) for t in (e, s)]
    merged = step("linear", base, mixed, preset="paper")
    np.testing.assert_allclose((merged - base).numpy(), expected, rtol=5e-3, atol=1e-5)
    safe = step("linear", base, mixed, solver="pinv")
    np.testing.assert_allclose((safe - base).numpy(), expected, rtol=5e-3, atol=1e-5)


def test_ridge_and_cut_off_hold_where_rows_are_as_many_as_columns() -> None:
    """The interpolation peak: in float64 without either, the update is far too large."""
    base, experts = make_models((24, 64), 2, rms=0.01)
    made = [features(n, 32, 64) for n in range(2)]
    mixed = [t for e, (_, s) in zip(experts, made, strict=True) for t in (e, s)]
    H = [X.T @ X for X, _ in made]
    T = [(expert - base).double().numpy() for expert in experts]
    bare = sum(t @ h for t, h in zip(T, H, strict=True)) @ np.linalg.inv(sum(H))
    for parameters in ({}, {"solver": "pinv"}):
        held = step("linear", base, mixed, **parameters) - base
        assert float(held.norm()) < np.linalg.norm(bare) / 2


def test_an_expert_that_saw_nothing_counts_only_in_the_mean() -> None:
    base, experts = make_models((6, 10), 2, rms=0.01)
    _, statistic = features(0, 50, 10)
    nothing = torch.zeros_like(statistic)
    merged = step("linear", base, [experts[0], statistic, experts[1], nothing])
    torch.testing.assert_close(merged, experts[0], rtol=0, atol=1e-3)
    mean = step("linear", base, [experts[0], nothing, experts[1], nothing])
    torch.testing.assert_close(mean, (experts[0] + experts[1]) / 2)


def test_norms_weigh_channels_by_the_energy_of_their_inputs() -> None:
    base, experts = make_models((5,), 2, rms=0.1)
    energies = [torch.tensor([1.0, 2, 0, 0, 4]), torch.tensor([3.0, 0, 0, 1, 4])]
    statistics = [torch.cat([q, torch.tensor([7.0])]) for q in energies]
    mixed = [experts[0], statistics[0], experts[1], statistics[1]]
    T = [(expert - base).numpy() for expert in experts]
    expected = [
        T[0][0] / 4 + 3 * T[1][0] / 4,
        T[0][1],
        (T[0][2] + T[1][2]) / 2,
        T[1][3],
        (T[0][4] + T[1][4]) / 2,
    ]
    merged = step("norm", base, mixed)
    np.testing.assert_allclose((merged - base).numpy(), expected, rtol=1e-4, atol=1e-7)


RECIPE = {
    "merge_method": "lot",
    "base_model": "base",
    "models": [{"model": "a"}, {"model": "b", "calibration": {"data": ["own"]}}],
    "calibration": {"data": "s3://data/samples.jsonl", "samples": 8},
}


def test_samples_are_part_of_the_recipe_in_its_one_form() -> None:
    recipe = parse_recipe(RECIPE)
    assert recipe.normalised()["calibration"] == RECIPE["calibration"]
    assert parse_recipe(recipe.normalised()) == recipe
    other = parse_recipe(RECIPE | {"calibration": {"data": "elsewhere"}})
    assert other.digest != recipe.digest


@pytest.mark.parametrize(
    ("change", "pointer", "words"),
    [
        ({"calibration": None}, "/models/0/calibration", "needs samples for every expert"),
        ({"calibration": {"sample": 3}}, "/calibration/sample", "Did you mean 'samples'"),
        ({"calibration": {"data": "x", "batch": 0}}, "/calibration/batch", "greater than"),
        ({"calibration": {"data": []}}, "/calibration/data", "at least 1"),
        ({"calibration": "x"}, "/calibration", "is a mapping"),
        (
            {"merge_method": "task_arithmetic"},
            "/calibration",
            "task_arithmetic looks at no samples",
        ),
    ],
)
def test_samples_that_cannot_be_meant_are_refused(
    change: dict[str, Any], pointer: str, words: str
) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(RECIPE | change)
    [fault] = [f for f in raised.value.faults if f.pointer == pointer][:1]
    assert words in fault.detail
