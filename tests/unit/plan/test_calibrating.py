"""Calibrated singular values after a merge."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merging.errors import RecipeError
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support import oracle
from tests.support.checkpoints import Family, make_family
from tests.support.merges import load_merged, recipe, weight_bytes
from tests.support.tensors import relative_difference

LAYERS = ("self_attn", "mlp")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("models"), num_experts=3)


def merged(
    family: Family,
    output: Path,
    method: str,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    storage = open_storage()
    plan = make_plan(
        parse_recipe(recipe(family, method, **settings)),
        storage,
        MergeOptions(max_shard_size=150_000, **(options or {})),
        str(output),
    )
    report = run_plan(plan, storage)
    assert report["bytes_read"] == plan.totals.bytes_read
    assert len(report["tensors"]) == len(family.base_state)
    return load_merged(output)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("task_arithmetic", {"lambda": 0.7}),
        ("ties", {"scope": "global", "density": 0.3}),
        ("iso_c", {}),
    ],
)
def test_any_method_is_followed_by_the_formula(
    method: str, settings: dict[str, Any], family: Family, tmp_path: Path
) -> None:
    plain = merged(family, tmp_path / "plain", method, **settings)
    found = merged(family, tmp_path / "out", method, svc=0.4, **settings)
    for name, base in family.base_state.items():
        if not any(part in name for part in LAYERS):
            assert torch.equal(found[name], plain[name])
            continue
        vectors = oracle.task_vectors(base, [state[name] for state in family.expert_states])
        update = plain[name].double().numpy() - base.double().numpy()
        expected = oracle.svc(update, vectors, 0.4)
        calibrated = found[name].double().numpy() - base.double().numpy()
        assert relative_difference(calibrated, expected) < 1e-3
        assert relative_difference(calibrated, update) > 1e-2


def test_layers_of_slices_are_calibrated_by_the_experts_of_their_slice(
    family: Family, tmp_path: Path
) -> None:
    """Layers exchanged, with other experts, another base and another α in each slice."""
    base, experts = str(family.base), [str(expert) for expert in family.experts]
    states = dict(zip([base, *experts], [family.base_state, *family.expert_states], strict=True))

    def sliced(origin: str, layer: int, *others: str, **parameters: Any) -> dict[str, Any]:
        sources = [{"model": model, "layer_range": [layer, layer + 1]} for model in others]
        return {"sources": sources, "base_model": origin, "parameters": parameters}

    def plan(output: str, own: dict[str, Any], **parameters: Any) -> Plan:
        parts = [sliced(base, 1, *experts, **own), sliced(experts[0], 0, *experts[1:])]
        document: dict[str, Any] = {"merge_method": "ties", "base_model": base, "slices": parts}
        document["parameters"] = {"density": 0.5, "weight": 1, **parameters}
        return make_plan(parse_recipe(document), storage, MergeOptions(), str(tmp_path / output))

    storage = open_storage()
    run_plan(plan("plain", {}), storage)
    run_plan(plan("out", {"svc": 0.2}, svc=0.7), storage)
    plain, found = load_merged(tmp_path / "plain"), load_merged(tmp_path / "out")
    for number, (layer, origin, others, alpha) in enumerate(
        ((1, base, experts, 0.2), (0, experts[0], experts[1:], 0.7))
    ):
        for name in (n for n in plain if f"layers.{number}." in n and "_proj" in n):
            source = name.replace(f"layers.{number}.", f"layers.{layer}.")
            start = states[origin][source]
            vectors = oracle.task_vectors(start, [states[model][source] for model in others])
            update = plain[name].double().numpy() - start.double().numpy()
            calibrated = found[name].double().numpy() - start.double().numpy()
            expected = oracle.svc(update, vectors, alpha)
            assert relative_difference(calibrated, expected) < 1e-3
            assert relative_difference(calibrated, update) > 1e-2


def test_modules_are_calibrated_like_a_whole_model(family: Family, tmp_path: Path) -> None:
    whole = recipe(family, "task_arithmetic", svc=0.1)
    as_module = {**whole, "modules": {"default": {"models": whole["models"]}}, "models": None}
    shards = [
        make_plan(parse_recipe(one), open_storage(), MergeOptions(), str(tmp_path / "out")).shards
        for one in (whole, as_module)
    ]
    assert shards[0] == shards[1]
    assert any(shard.kind == "intermediate" for shard in shards[0])


def test_bytes_do_not_depend_on_how_work_is_cut(family: Family, tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"memory_budget": "2MiB"})):
        merged(family, tmp_path / str(number), "iso_c", options, svc=0.1)
    assert weight_bytes(tmp_path / "0") == weight_bytes(tmp_path / "1")


def test_a_result_in_bfloat16_is_rounded_once(family: Family, tmp_path: Path) -> None:
    exact = merged(family, tmp_path / "exact", "task_arithmetic", svc=0.1)
    storage = open_storage()
    document = recipe(family, "task_arithmetic", svc=0.1) | {"out_dtype": "bfloat16"}
    plan = make_plan(parse_recipe(document), storage, MergeOptions(), str(tmp_path / "out"))
    run_plan(plan, storage)
    for name, tensor in load_merged(tmp_path / "out").items():
        assert torch.equal(tensor, exact[name].bfloat16())


def test_identical_experts_are_counted_once(family: Family, tmp_path: Path) -> None:
    """The sum of three equal task vectors has three times each; calibrated, it has it once."""
    document = recipe(family, "task_arithmetic", svc=0.1)
    document["models"] = [document["models"][0]] * 3
    storage = open_storage()
    plan = make_plan(parse_recipe(document), storage, MergeOptions(), str(tmp_path / "out"))
    run_plan(plan, storage)
    found = load_merged(tmp_path / "out")
    for name, tensor in family.expert_states[0].items():
        if any(part in name for part in LAYERS):
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


def test_a_merge_without_a_base_model_is_refused(family: Family, tmp_path: Path) -> None:
    document = parse_recipe(recipe(family, "linear", svc=0.1))
    with pytest.raises(RecipeError, match="added to a base model") as caught:
        make_plan(document, open_storage(), MergeOptions(), str(tmp_path / "out"))
    assert caught.value.faults[0].pointer == "/parameters/svc"


def test_plans_without_it_do_not_speak_of_it(family: Family, tmp_path: Path) -> None:
    document = parse_recipe(recipe(family, "task_arithmetic"))
    plan = make_plan(document, open_storage(), MergeOptions(), str(tmp_path / "out"))
    assert all("svc" not in setting.parameters for setting in plan.settings)


def test_a_direction_without_a_response_counts_as_the_least() -> None:
    U, S, Vt = np.linalg.svd(np.random.default_rng(0).normal(size=(4, 6)), full_matrices=False)
    T = U[:, :2] @ np.diag(S[:2]) @ Vt[:2]
    D = U @ np.diag(S) @ Vt
    factors = np.array([1.0, 1.0, 1 / 0.5, 1 / 0.5])
    np.testing.assert_allclose(oracle.svc(D, [T], 0.5), U @ np.diag(S * factors) @ Vt)
