"""Recipes that ask for several variants of one merge."""

from __future__ import annotations

from typing import Any

import pytest

from merging.recipe import parse_recipe, validate_recipe

BASE: dict[str, Any] = {
    "merge_method": "wudi",
    "base_model": "/models/base",
    "models": [{"model": "/models/a"}, {"model": "/models/b"}],
    "parameters": {"steps": 100, "scale": 0.5},
}


def sweep(*variants: Any, **changes: Any) -> dict[str, Any]:
    return {**BASE, **changes, "sweep": list(variants)}


def test_each_variant_is_the_recipe_with_its_own_method_and_parameters() -> None:
    recipe = parse_recipe(
        sweep(
            {"name": "as-it-is"},
            {"name": "long", "parameters": {"steps": 500}},
            {"name": "filter", "merge_method": "swudi", "parameters": {"t": 100}},
        )
    )
    assert recipe.sweep is not None
    expected = [
        ("as-it-is", "wudi", {"steps": 100, "scale": 0.5}),
        ("long", "wudi", {"steps": 500, "scale": 0.5}),
        ("filter", "swudi", {"t": 100, "scale": 0.5}),
    ]
    for variant, (name, method, parameters) in zip(recipe.sweep.variants, expected, strict=True):
        alone = parse_recipe({**BASE, "merge_method": method, "parameters": parameters})
        assert variant.name == name
        assert variant.recipe == alone
        assert variant.recipe.digest == alone.digest


def test_parameters_that_a_value_equals_the_default_of_still_override() -> None:
    recipe = parse_recipe(sweep({"name": "a", "parameters": {"steps": 300}}))
    assert recipe.sweep is not None
    assert "steps" not in recipe.sweep.variants[0].recipe.parameters, "300 is the default"


def test_a_normalised_sweep_reads_back_as_the_same() -> None:
    recipe = parse_recipe(sweep({"name": "a"}, {"name": "b", "parameters": {"steps": 3}}))
    again = parse_recipe(recipe.normalised())
    assert again == recipe
    assert again.digest == recipe.digest
    assert recipe.digest != parse_recipe(BASE).digest


def test_yaml_and_null_are_read_like_everything_else() -> None:
    text = """
merge_method: swudi_a
base_model: /models/base
models: [{model: /models/a}, {model: /models/b}]
sweep:
  - name: half
    parameters: {scale: 0.5}
  - name: plain
"""
    recipe = parse_recipe(text)
    assert recipe.sweep is not None
    assert [variant.name for variant in recipe.sweep.variants] == ["half", "plain"]
    assert parse_recipe({**BASE, "sweep": None}) == parse_recipe(BASE)


def test_a_preset_is_not_taken_over_by_another_method() -> None:
    document = sweep(
        {"name": "a"},
        {"name": "b", "merge_method": "wudi_cfs"},
        parameters={"preset": "paper-vit", "touch": "linear", "rest": "mean"},
    )
    recipe = parse_recipe(document)
    assert recipe.sweep is not None
    assert "preset" not in recipe.sweep.variants[1].recipe.parameters
    assert recipe.sweep.variants[1].recipe.parameters["touch"] == "linear"


def test_variants_that_are_the_same_merge_are_told() -> None:
    recipe = parse_recipe(sweep({"name": "a"}, {"name": "b", "parameters": {"steps": 100}}))
    assert recipe.warnings == ("The variants a, b are the same merge.",)


OK = {"name": "ok"}

FAULTS: list[tuple[dict[str, Any], str, str, str]] = [
    ({**BASE, "sweep": []}, "/sweep", "invalid_recipe", "is a list of variants"),
    ({**BASE, "sweep": {"name": "a"}}, "/sweep", "invalid_recipe", "is a list of variants"),
    (sweep(*({"name": f"v{n}"} for n in range(33))), "/sweep", "invalid_recipe", "32 variants"),
    (sweep("a"), "/sweep/0", "invalid_recipe", "A variant is a mapping"),
    (sweep(OK, {"parameters": {}}), "/sweep/1/name", "invalid_recipe", "not null"),
    (sweep({"name": "../up"}), "/sweep/0/name", "invalid_recipe", "letters, digits"),
    (sweep({"name": ".hidden"}), "/sweep/0/name", "invalid_recipe", "a letter or digit first"),
    (sweep({"name": "a/b"}), "/sweep/0/name", "invalid_recipe", "letters, digits"),
    (sweep({"name": "a" * 65}), "/sweep/0/name", "invalid_recipe", "up to 64"),
    (sweep({"name": 7}), "/sweep/0/name", "invalid_recipe", "not 7"),
    (sweep(OK, {"name": "OK"}), "/sweep/1/name", "invalid_recipe", "stands twice"),
    (sweep({**OK, "method": "ties"}), "/sweep/0/method", "invalid_recipe", "'merge_method'"),
    (sweep({**OK, "parameters": [1]}), "/sweep/0/parameters", "invalid_recipe", "a mapping"),
    (
        sweep(OK, {"name": "b", "parameters": {"stps": 1}}),
        "/sweep/1/parameters/stps",
        "bad_parameter",
        "Did you mean 'steps'?",
    ),
    (
        sweep(OK, {"name": "b", "parameters": {"steps": -1}}),
        "/sweep/1/parameters/steps",
        "bad_parameter",
        "greater than or equal to 0",
    ),
    (
        sweep(OK, {"name": "b", "merge_method": "wudy"}),
        "/sweep/1/merge_method",
        "unknown_method",
        "Did you mean wudi",
    ),
    (
        sweep(OK, {"name": "b", "merge_method": "linear"}, base_model="/models/a"),
        "/sweep/1/merge_method",
        "incompatible_options",
        "differ in whether they use a base model",
    ),
    (
        sweep(OK, {"name": "b", "merge_method": "swudi_a"}, parameters={"stps": 100}),
        "/parameters/stps",
        "bad_parameter",
        "Unknown parameter",
    ),
    (
        sweep(
            {"name": "b", "parameters": {"density": 0.5}},
            merge_method="ties",
            parameters=None,
            models=[{"model": "/models/a", "parameters": {"density": 0.3}}],
        ),
        "/sweep/0/parameters/density",
        "bad_parameter",
        "no effect on /models/0",
    ),
    (sweep(OK, models=[{"model": "hf://a"}]), "/models/0/model", "invalid_recipe", "not supported"),
    ({**BASE, "swep": [OK]}, "/swep", "invalid_recipe", "Did you mean 'sweep'?"),
]


@pytest.mark.parametrize(("document", "pointer", "code", "says"), FAULTS)
def test_a_bad_sweep_is_refused(
    document: dict[str, Any], pointer: str, code: str, says: str
) -> None:
    recipe, faults = validate_recipe(document)
    assert recipe is None
    [fault] = [fault for fault in faults if fault.pointer == pointer]
    assert fault.code == code
    assert says in fault.detail


def test_everything_that_is_wrong_is_told_at_once_and_once() -> None:
    document = sweep(
        {"name": "a", "parameters": {"steps": -1}},
        {"name": "a", "parameters": {"scale": "big"}},
        {"name": "c", "merge_method": "swudi", "parameters": {"t": 0}},
        parameters={"stps": 1},
    )
    _, faults = validate_recipe(document)
    assert sorted(fault.pointer for fault in faults) == [
        "/parameters/stps",
        "/sweep/0/parameters/steps",
        "/sweep/1/name",
        "/sweep/1/parameters/scale",
        "/sweep/2/parameters/t",
    ]


def test_parameter_that_a_slice_or_its_source_has_a_value_for_cannot_be_varied() -> None:
    source = {"model": "a", "layer_range": [0, 1], "parameters": {"weight": 1}}
    one = {"sources": [source, {"model": "b", "layer_range": [0, 1]}], "parameters": {"weight": 2}}
    recipe, faults = validate_recipe(
        {
            "merge_method": "linear",
            "slices": [one],
            "sweep": [{"name": "x", "parameters": {"weight": 3}}],
        }
    )
    assert recipe is None
    assert {fault.pointer for fault in faults} == {"/sweep/0/parameters/weight"}
