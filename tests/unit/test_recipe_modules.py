from __future__ import annotations

from typing import Any

import pytest

from merging.recipe import parse_recipe, validate_recipe

MODULES: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "parameters": {"weight": 0.5},
    "modules": {
        "text/decoder": {
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"weight": 1.0}}]}
            ],
            "parameters": {"lambda": 0.5},
        },
        "vision_tower": {"models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 2.0}}]},
    },
}


def test_modules_are_read_with_parameters_at_every_level() -> None:
    recipe = parse_recipe(MODULES)
    assert [(s.pointer, s.module) for s in recipe.sections] == [
        ("/modules/text~1decoder/slices/0/sources", "text/decoder"),
        ("/modules/vision_tower/models", "vision_tower"),
    ]
    assert recipe.sections[0].levels == ({}, {"lambda": 0.5}, {"weight": 0.5})
    assert recipe.normalised()["modules"] == MODULES["modules"]
    assert parse_recipe(recipe.normalised()) == recipe


@pytest.mark.parametrize(
    ("module", "pointer", "text"),
    [
        ([], "", "a mapping with 'models' or 'slices'"),
        ({}, "", "one of the two"),
        ({"models": [{"model": "a"}], "slices": []}, "", "one of the two"),
        ({"models": [{"model": "a"}], "sources": []}, "/sources", "Unknown key"),
        ({"models": [{"model": "a", "layer_range": [0, 1]}]}, "/models/0/layer_range", "'slices'"),
        ({"models": []}, "/models", "a list of models"),
        (
            {"models": [{"model": "a"}], "parameters": {"lambda": "x"}},
            "/parameters/lambda",
            "number",
        ),
        ({"models": [{"model": "base"}]}, "/models", "at least 1 models besides the base"),
    ],
)
def test_malformed_module_is_refused_by_field(module: Any, pointer: str, text: str) -> None:
    _, faults = validate_recipe({**MODULES, "modules": {"a~b": module}})
    assert any(f.pointer == f"/modules/a~0b{pointer}" and text in f.detail for f in faults), faults
