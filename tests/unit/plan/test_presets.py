"""Published settings by name, from the recipe to the plan."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from merging.errors import RecipeError
from merging.method import all_methods
from merging.options import MergeOptions
from merging.parameters import PresetParameters
from merging.plan.plan import COPY, Plan, Setting
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from tests.support.header_checkpoints import llama_tensors, put_checkpoint
from tests.support.memory_storage import MemoryStorage

PRESETS = [
    (method.parameters, name)
    for method in all_methods().values()
    if issubclass(method.parameters, PresetParameters)
    for name in method.parameters.presets
]


@pytest.mark.parametrize(("model", "name"), PRESETS)
def test_a_preset_fills_in_what_is_not_given_and_nothing_else(
    model: type[PresetParameters], name: str
) -> None:
    defaults = model().model_dump()
    filled = model.model_validate({"preset": name}).model_dump()
    assert filled == defaults | dict(model.presets[name]) | {"preset": name}
    given = model.model_validate({"preset": name, "scale": 0.123, "rest": "mean"}).model_dump()
    assert given == filled | {"scale": 0.123, "rest": "mean"}


@pytest.mark.parametrize("model", list(dict.fromkeys(m for m, _ in PRESETS)))
def test_the_names_in_the_schema_are_those_that_exist(model: type[PresetParameters]) -> None:
    (literal, _) = get_args(model.model_fields["preset"].annotation)
    assert set(get_args(literal)) == set(model.presets)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    document = {
        "merge_method": "wudi",
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"preset": "paper"},
    }
    with pytest.raises(RecipeError) as raised:
        parse_recipe(document)
    (fault,) = raised.value.faults
    assert fault.pointer == "/parameters/preset"
    assert "paper-vit" in fault.detail


def test_a_default_that_a_preset_would_change_stays_in_the_recipe() -> None:
    document = {
        "merge_method": "wudi",
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"preset": "paper-vit", "learning_rate": "auto"},
    }
    assert parse_recipe(document).parameters == document["parameters"]


VIT = {
    "visual.conv1.weight": ("F32", (8, 3, 4, 4)),
    "visual.transformer.resblocks.0.attn.in_proj_weight": ("F32", (24, 8)),
    "visual.transformer.resblocks.0.attn.in_proj_bias": ("F32", (24,)),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": ("F32", (32, 8)),
    "visual.ln_post.weight": ("F32", (8,)),
}


def _settings(tensors: dict[str, Any], **parameters: Any) -> dict[str, Setting]:
    storage = MemoryStorage()
    for uri in ("mem://m/base", "mem://m/a", "mem://m/b"):
        put_checkpoint(storage, uri, tensors)
    document = {
        "merge_method": "wudi",
        "base_model": "mem://m/base",
        "models": [{"model": "mem://m/a"}, {"model": "mem://m/b"}],
        "parameters": parameters,
    }
    found: Plan = make_plan(parse_recipe(document), storage, MergeOptions(), "mem://m/out")
    return {
        problem.tensor_name: found.settings[problem.setting]
        for shard in found.shards
        for problem in shard.problems
    }


def test_a_plan_holds_the_values_of_a_preset_and_not_its_name() -> None:
    merged = "visual.transformer.resblocks.0.attn.in_proj_weight"
    found = _settings(VIT, preset="paper-vit")
    assert found[merged].parameters == {
        "learning_rate": 1e-5,
        "steps": 300,
        "scale": 1.0,
        "precision": "highest",
    }
    spelled_out = _settings(VIT, learning_rate=1e-5, touch="wudi-vit", rest="base")
    assert found == spelled_out


def test_a_preset_says_which_tensors_are_merged_and_what_the_others_become() -> None:
    found = _settings(VIT, preset="paper-vit")
    assert {name: setting.method for name, setting in found.items()} == {
        "visual.conv1.weight": COPY,
        "visual.transformer.resblocks.0.attn.in_proj_weight": "wudi",
        "visual.transformer.resblocks.0.attn.in_proj_bias": COPY,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": "wudi",
        "visual.ln_post.weight": COPY,
    }


def test_the_recipe_goes_before_the_preset() -> None:
    found = _settings(VIT, preset="paper-vit", rest="mean", touch=["c_fc"], steps=7)
    methods = {name: setting.method for name, setting in found.items()}
    assert methods.pop("visual.transformer.resblocks.0.mlp.c_fc.weight") == "wudi"
    assert set(methods.values()) == {"linear"}


def test_parameters_with_filters_go_before_the_preset_where_they_hold() -> None:
    steps = [{"filter": "mlp", "value": 10}]
    found = _settings(llama_tensors(), preset="paper-roberta", steps=steps)
    for name, setting in found.items():
        if setting.method == "wudi":
            assert setting.parameters["steps"] == (10 if "mlp" in name else 300)
            assert setting.parameters["learning_rate"] == 2e-5


def test_a_preset_is_one_for_the_whole_recipe() -> None:
    with pytest.raises(RecipeError) as raised:
        _settings(VIT, preset=[{"filter": "mlp", "value": "paper-vit"}])
    assert raised.value.faults[0].pointer == "/parameters/preset"
    assert "filters" in raised.value.faults[0].detail
