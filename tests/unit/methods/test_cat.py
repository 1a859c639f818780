"""CAT Merging beside the formulas of its paper in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

from merging.local_run import run_plan
from merging.method import Task, get_method
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.calibrated import calibrated_recipe, hooked_inputs, write_models
from tests.support.merges import load_merged
from tests.support.tensors import make_models

Array = NDArray[np.float64]

MEASURED = ("linear", "norm")


def step(name: str, base: torch.Tensor, inputs: Sequence[torch.Tensor], **given: Any) -> Array:
    """The update that a step finds."""
    method = get_method("cat")
    transposed = given.pop("transposed", False)
    task = Task(
        tensor_name="model.layers.0.mlp.up_proj.weight",
        parameters=method.parameters.model_validate({"scale": 1.0, **given}),
        expert_parameters=[],
        transposed=transposed,
        shape=tuple(base.shape),
    )
    flat = [tensor.reshape(-1) for tensor in inputs]
    update: Array = (method.step(name).merge(base, iter(flat), task) - base).double().numpy()
    return update


def features(seed: int, num_rows: int, width: int, *, as_rows: bool = False) -> tuple[Any, Any]:
    X = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))
    X *= torch.linspace(0.1, 2, width).roll(3 * seed)
    values = torch.cat([X, torch.zeros(2, width)]) if as_rows else X.T @ X
    return X.double().numpy(), torch.cat([values.reshape(-1), torch.tensor([float(num_rows)])])


def bases_of(T: Sequence[Array], X: Sequence[Array], tradeoff: float, count: Any) -> list[Array]:
    """For each task, directions that the others should lose."""
    H = [x.T @ x / len(x) for x in X]
    bases = []
    for i in range(len(T)):
        Q = sum(T[j] @ (H[i] - tradeoff * H[j]) @ T[j].T for j in range(len(T)) if j != i)
        values, vectors = np.linalg.eigh(Q)
        order = [n for n in np.argsort(-values) if values[n] > 1e-9 * abs(values).max()]
        bases.append(vectors[:, order[: None if count == "all" else count]])
    return bases


def linear_update(T: Sequence[Array], bases: Sequence[Array]) -> Array:
    total = np.zeros_like(T[0])
    for j, own in enumerate(T):
        left = own
        for i, basis in enumerate(bases):
            if i != j:
                left = left - basis @ (basis.T @ left)
        total += left * np.linalg.norm(own) / np.linalg.norm(left)
    return total


def norm_update(t: Sequence[Array], q: Sequence[Array], tradeoff: float, count: int) -> Array:
    """``q`` are means of squares."""
    masks = np.ones((len(t), len(t[0])))
    for i in range(len(t)):
        z = sum(t[j] ** 2 * (q[i] - tradeoff * q[j]) for j in range(len(t)) if j != i)
        for j in range(len(t)):
            if j != i:
                masks[j][np.argsort(-z)[:count]] = 0
    kept = [mask * own for mask, own in zip(masks, t, strict=True)]
    return sum(k * np.linalg.norm(o) / np.linalg.norm(k) for k, o in zip(kept, t, strict=True))


def bias_update(t: Sequence[Array], count: int) -> Array:
    kept = [own.copy() for own in t]
    for i in range(len(t)):
        z = sum(t[j] ** 2 for j in range(len(t)) if j != i)
        for j in range(len(t)):
            if j != i:
                kept[j][np.argsort(-z)[:count]] = 0
    return sum(kept)


@pytest.mark.parametrize("as_rows", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [4, "all"])
def test_linear_layers_follow_the_formula(as_rows: bool, transposed: bool, count: Any) -> None:
    base, experts = make_models((12, 20), 3, rms=0.01)
    made = [features(n, 9 + 2 * n, 20, as_rows=as_rows) for n in range(3)]
    T = [(expert - base).double().numpy() for expert in experts]
    expected = linear_update(T, bases_of(T, [X for X, _ in made], 0.5, count))
    flip = (lambda t: t.T.contiguous()) if transposed else (lambda t: t)
    mixed = [t for e, (_, s) in zip(experts, made, strict=True) for t in (flip(e), s)]
    given = {"directions": count, "tradeoff": 0.5, "transposed": transposed}
    update = step("linear", flip(base), mixed, **given)
    np.testing.assert_allclose(flip(torch.from_numpy(update)), expected, rtol=1e-3, atol=1e-6)


def test_a_task_loses_what_disturbs_another_one_and_keeps_its_size() -> None:
    """Two tasks whose inputs do not overlap; the first's update reaches into the second's."""
    base = torch.zeros(4, 6)
    disturbing = torch.zeros(4, 6)
    disturbing[0, 0], disturbing[1, 4] = 1.0, 2.0
    harmless = torch.zeros(4, 6)
    harmless[2, 4] = 1.0
    statistics = []
    for channels in ([0, 1], [4, 5]):
        gram = torch.zeros(6, 6)
        gram[channels, channels] = 7.0
        statistics.append(torch.cat([gram.reshape(-1), torch.tensor([7.0])]))
    mixed = [disturbing, statistics[0], harmless, statistics[1]]
    update = step("linear", base, mixed, directions=1)
    expected = np.zeros((4, 6))
    expected[0, 0], expected[2, 4] = np.sqrt(5), 1
    np.testing.assert_allclose(update, expected, atol=1e-6)


def test_the_other_end_of_the_spectrum_can_be_asked_for() -> None:
    base, experts = make_models((12, 20), 2, rms=0.01)
    made = [features(n, 30, 20) for n in range(2)]
    mixed = [t for e, (_, s) in zip(experts, made, strict=True) for t in (e, s)]
    T = [(expert - base).double().numpy() for expert in experts]
    H = [X.T @ X / len(X) for X, _ in made]
    bases = [
        np.linalg.eigh(T[1 - i] @ (H[i] - 0.5 * H[1 - i]) @ T[1 - i].T)[1][:, :4] for i in range(2)
    ]
    update = step("linear", base, mixed, tradeoff=0.5, eigenvalues="smallest")
    np.testing.assert_allclose(update, linear_update(T, bases), rtol=1e-3, atol=1e-6)


def test_a_share_takes_as_few_directions_as_reach_it() -> None:
    base = torch.zeros(3, 3)
    experts = [torch.zeros(3, 3), torch.diag(torch.tensor([3.0, 2.0, 1.0]))]
    gram = torch.cat([torch.eye(3).reshape(-1), torch.tensor([1.0])])
    mixed = [experts[0], gram, experts[1], gram]
    for share, kept in ((0.8, [0, 2, 1]), (0.9, [0, 0, 1])):  # λ² = 81, 16, 1
        update = step("linear", base, mixed, tradeoff=0, directions=share)
        expected = np.diag(kept) * np.sqrt(14) / np.linalg.norm(kept)
        np.testing.assert_allclose(update, expected, atol=1e-6)


def test_an_update_that_is_lost_whole_is_zero_and_not_rounding_blown_up() -> None:
    base, experts = make_models((12, 20), 2, rms=0.01)
    column, row = torch.randn(12, 1), torch.randn(1, 20)
    experts[1] = base + column @ row
    gram = features(0, 50, 20)[1]
    nothing = torch.zeros_like(gram)
    update = step("linear", base, [experts[0], gram, experts[1], nothing])
    first = (experts[0] - base).double().numpy()
    np.testing.assert_allclose(update, first, rtol=1e-4, atol=1e-8)


def test_norms_lose_channels_and_keep_their_size() -> None:
    base, experts = make_models((9,), 3, rms=0.1)
    q = [np.random.default_rng(n).uniform(0.1, 3, 9) for n in range(3)]
    statistics = [torch.tensor([*(5 * one), 5.0], dtype=torch.float32) for one in q]
    mixed = [t for pair in zip(experts, statistics, strict=True) for t in pair]
    t = [(expert - base).double().numpy() for expert in experts]
    update = step("norm", base, mixed, norm_channels=2, norm_tradeoff=0.3)
    np.testing.assert_allclose(update, norm_update(t, q, 0.3, 2), rtol=1e-4, atol=1e-7)


def test_biases_lose_entries() -> None:
    base, experts = make_models((9,), 3, rms=0.1)
    t = [(expert - base).double().numpy() for expert in experts]
    update = step("bias", base, experts, bias_channels=3)
    np.testing.assert_allclose(update, bias_update(t, 3), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_whole_model_is_merged_by_the_rules(tmp_path: Path, architecture: str) -> None:
    """Every tensor, with statistics from hooks on the whole experts."""
    paths = write_models(tmp_path / "models", architecture, 3)
    document = calibrated_recipe(paths, "cat")
    document["parameters"] = {"tradeoff": 0.5, "norm_tradeoff": 0.3}
    plan = make_plan(
        parse_recipe(document), open_storage(), MergeOptions(), str(tmp_path / "merged")
    )
    run_plan(plan, open_storage())
    merged = load_merged(tmp_path / "merged")
    base, *experts = (load_file(path / "model.safetensors") for path in paths)
    steps = {
        problem.tensor_name: plan.settings[problem.setting].step
        for shard in plan.outputs
        for problem in shard.problems
    }
    modules = {name: name.removesuffix(".weight") for name, s in steps.items() if s in MEASURED}
    rows = [hooked_inputs(path, list(modules.values())) for path in paths[1:]]
    config = transformers.AutoConfig.from_pretrained(paths[0])
    eps = getattr(config, "rms_norm_eps", None) or config.layer_norm_epsilon
    for name, start in base.items():
        T = [(expert[name] - start).double().numpy() for expert in experts]
        flip = "Conv1D" if architecture == "gpt2" and start.dim() == 2 else ""
        if steps[name] == "linear":
            X = [one[modules[name]].double().numpy() for one in rows]
            T = [t.T for t in T] if flip else T
            update = linear_update(T, bases_of(T, X, 0.5, 4))
            update = update.T if flip else update
        elif steps[name] == "norm":
            X = [one[modules[name]].double() for one in rows]
            X = [x - x.mean(-1, keepdim=True) for x in X] if architecture == "gpt2" else X
            hat = [x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in X]
            update = norm_update(T, [h.square().mean(0).numpy() for h in hat], 0.3, 4)
        else:
            update = bias_update(T, 4) if steps[name] == "bias" else sum(T)
        actual = (merged[name] - start).double().numpy()
        np.testing.assert_allclose(actual, 0.4 * update, rtol=0.02, atol=2e-4, err_msg=name)
    found = set(steps.values())
    assert found == ({"", "linear", "norm"} | ({"bias"} if architecture == "gpt2" else set()))
