"""Slices beside what else a recipe can ask for: adapters, and several variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from merging.errors import NumericalError
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.adapters import make_adapters
from tests.support.checkpoints import (
    make_family,
    tiny_llama_config,
    tiny_llama_state,
    write_checkpoint,
)
from tests.support.merges import load_merged, weight_bytes


def merge(recipe: dict[str, Any], output: Path) -> dict[str, Any]:
    storage = open_storage()
    plan = make_plan(parse_recipe(recipe), storage, MergeOptions(), str(output))
    return run_plan(plan, storage)


def layers_exchanged(base: Path, experts: list[Path]) -> list[dict[str, Any]]:
    """The layers 1 and 0 of a model of two layers, each merged from all models."""
    return [
        {"sources": [{"model": str(m), "layer_range": [n, n + 1]} for m in (base, *experts)]}
        for n in (1, 0)
    ]


def test_adapters_give_what_the_models_that_they_stand_for_give(tmp_path: Path) -> None:
    family = make_adapters(tmp_path / "models", dtype=torch.float32)
    shared = {
        "merge_method": "task_arithmetic",
        "base_model": str(family.base),
        "out_dtype": "float32",
        "parameters": {"weight": 0.5},
    }
    for name, experts in (("of-adapters", family.adapters), ("of-models", family.experts)):
        slices = layers_exchanged(family.base, list(experts))
        merge({**shared, "slices": slices}, tmp_path / name)
    found, expected = load_merged(tmp_path / "of-adapters"), load_merged(tmp_path / "of-models")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_variants_of_a_sweep_are_the_merges_by_themselves(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=2)
    shared = {
        "merge_method": "ties",
        "base_model": str(family.base),
        "slices": layers_exchanged(family.base, list(family.experts)),
    }
    densities = {"few": 0.2, "most": 0.8}
    sweep = [{"name": n, "parameters": {"density": d}} for n, d in densities.items()]
    merge({**shared, "sweep": sweep}, tmp_path / "sweep")
    for name, density in densities.items():
        merge({**shared, "parameters": {"density": density}}, tmp_path / name)
        assert weight_bytes(tmp_path / "sweep" / name) == weight_bytes(tmp_path / name)


def test_report_tells_the_layers_that_tensors_come_from(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=1)
    recipe = {
        "merge_method": "slerp",
        "base_model": str(family.base),
        "slices": layers_exchanged(family.base, list(family.experts)),
    }
    report = merge(recipe, tmp_path / "out")
    names = {tensor["name"]: tensor.get("source_names") for tensor in report["tensors"]}
    name = "model.layers.{}.mlp.up_proj.weight"
    assert names[name.format(0)] == [name.format(1)] * 2
    assert names["model.norm.weight"] is None


def test_value_that_is_not_finite_is_told_by_the_name_that_its_file_has(tmp_path: Path) -> None:
    state = tiny_llama_state()
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    model = write_checkpoint(tmp_path / "model", state, config=tiny_llama_config())
    source = {"model": str(model), "layer_range": [1, 2]}
    recipe = {"merge_method": "passthrough", "slices": [{"sources": [source]}]}
    with pytest.raises(NumericalError, match=r"Tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        merge(recipe, tmp_path / "out")
