"""Parts of a model that are merged in different ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.errors import RecipeError
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.composed import write_llava, write_t5
from tests.support.merges import load_merged

State = dict[str, torch.Tensor]


def merge(folder: Path, **changes: Any) -> tuple[Plan, State]:
    """A merge of ``@0``, ``@1`` and ``@2``, which are folders."""
    storage = open_storage()
    recipe = json.loads(
        json.dumps({"merge_method": "linear", **changes}).replace("@", f"{folder}/")
    )
    plan = make_plan(parse_recipe(recipe), storage, MergeOptions(), str(folder / "merged"))
    run_plan(plan, storage)
    return plan, load_merged(folder / "merged")


def of(*numbers: int, **changes: Any) -> dict[str, Any]:
    return {
        "models": [{"model": f"@{n}", "parameters": {"weight": 2**n}} for n in numbers]
    } | changes


@pytest.fixture
def llavas(tmp_path: Path) -> list[State]:
    return [write_llava(tmp_path / str(n), seed=n) for n in range(3)]


def test_each_part_of_a_model_that_sees_is_merged_from_models_of_its_own(
    tmp_path: Path, llavas: list[State]
) -> None:
    modules = {
        "text_decoder": of(0, 1, 2),
        "vision_tower": of(1),
        "multi_modal_projector": of(0, 2, parameters={"normalize": False}),
    }
    plan, merged = merge(tmp_path, modules=modules)
    assert merged.keys() == llavas[0].keys()
    for name, found in merged.items():
        a, b, c = (state[name] for state in llavas)
        if name.startswith("vision_tower"):
            expected = b
        elif name.startswith("multi_modal_projector"):
            expected = a + 4 * c
        else:
            expected = (a + 2 * b + 4 * c) / 7
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not plan.warnings


def test_layers_of_one_part_are_cut_and_counted_in_its_config(
    tmp_path: Path, llavas: list[State]
) -> None:
    from transformers import LlavaForConditionalGeneration

    def one(model: int, *layers: int) -> dict[str, Any]:
        source = {"model": f"@{model}", "layer_range": list(layers), "parameters": {"weight": 1}}
        return {"sources": [source]}

    modules = {
        "text_decoder": {"slices": [one(0, 0, 2), one(1, 1, 2)]},
        "vision_tower": {"slices": [one(2, 1, 2)]},
        "multi_modal_projector": of(0),
    }
    _, merged = merge(tmp_path, modules=modules)
    text, vision = "language_model.model.layers", "vision_tower.encoder.layers"
    part = "mlp.up_proj.weight"
    assert torch.equal(merged[f"{text}.1.{part}"], llavas[0][f"{text}.1.{part}"])
    assert torch.equal(merged[f"{text}.2.{part}"], llavas[1][f"{text}.1.{part}"])
    assert torch.equal(merged[f"{vision}.0.mlp.fc1.bias"], llavas[2][f"{vision}.1.mlp.fc1.bias"])
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 3
    assert config["vision_config"]["num_hidden_layers"] == 1
    _, told = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]


def test_modules_that_are_not_listed_are_taken_over_with_a_warning(
    tmp_path: Path, llavas: list[State]
) -> None:
    plan, merged = merge(
        tmp_path,
        merge_method="task_arithmetic",
        base_model="@0",
        modules={"text_decoder": of(1, 2)},
    )
    for name, found in merged.items():
        assert torch.equal(found, llavas[0][name]) == (not name.startswith("language_model"))
    [warning] = plan.warnings
    assert "leave out" in warning
    assert "multi_modal_projector.linear_1" in warning


def test_modules_may_be_named_by_stacks_of_layers(tmp_path: Path, llavas: list[State]) -> None:
    modules = {
        "language_model.model.layers": of(1),
        "vision_tower.encoder.layers": of(2),
        "default": of(0),
    }
    _, merged = merge(tmp_path, modules=modules)
    for name, found in merged.items():
        is_text, is_vision = "language_model.model.layers" in name, "vision_tower.encoder" in name
        assert torch.equal(found, llavas[1 if is_text else 2 if is_vision else 0][name])


def test_encoder_and_decoder_have_modules(tmp_path: Path) -> None:
    from transformers import T5ForConditionalGeneration

    models = [write_t5(tmp_path / str(n), seed=n) for n in range(3)]
    source = {"model": "@1", "layer_range": [0, 1], "parameters": {"weight": 1}}
    modules = {
        "encoder": of(0),
        "decoder": {"slices": [{"sources": [source]}]},
        "shared": of(2),
    }
    _, merged = merge(tmp_path, modules=modules)
    for name, found in merged.items():
        number = {"encoder": 0, "decoder": 1}.get(name.split(".")[0], 2)
        assert torch.equal(found, models[number][name])
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (2, 1)
    _, told = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not told["unexpected_keys"]


def test_unknown_module_is_refused_with_those_that_there_are(
    tmp_path: Path, llavas: list[State]
) -> None:
    with pytest.raises(RecipeError) as caught:
        merge(tmp_path, modules={"text_decoder": of(0), "ears/nose": of(1)})
    [fault] = [f for f in caught.value.faults if f.pointer == "/modules/ears~1nose"]
    assert "text_decoder, multi_modal_projector, vision_tower" in fault.detail
    assert "language_model.model.layers" in fault.detail


def test_module_without_layers_has_no_slices(tmp_path: Path, llavas: list[State]) -> None:
    source = {"model": "@1", "layer_range": [0, 1], "parameters": {"weight": 1}}
    with pytest.raises(RecipeError, match="has none") as caught:
        merge(tmp_path, modules={"multi_modal_projector": {"slices": [{"sources": [source]}]}})
    pointer = "/modules/multi_modal_projector/slices/0/sources/0/layer_range"
    assert caught.value.faults[0].pointer == pointer
