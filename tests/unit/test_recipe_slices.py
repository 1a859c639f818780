from __future__ import annotations

import json
from typing import Any

import pytest

from merging.recipe import parse_recipe, validate_recipe
from merging.selectors import Gradient


def source(model: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"model": model, "layer_range": [first, last]}
    return entry | ({"parameters": parameters} if parameters else {})


def sliced(*slices: Any, method: str = "linear", **changes: Any) -> dict[str, Any]:
    return {"merge_method": method, "slices": list(slices), **changes}


def of(*sources: Any, **changes: Any) -> dict[str, Any]:
    return {"sources": list(sources), **changes}


SLERP = """
slices:
  - sources:
      - model: models/a
        layer_range: [0, 32]
      - model: models/b
        layer_range: [0, 32]
merge_method: slerp
base_model: models/a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - value: 0.5
dtype: bfloat16
"""


def test_slices_of_a_mergekit_recipe_are_read() -> None:
    recipe = parse_recipe(SLERP)
    assert recipe.models == ()
    [one] = recipe.slices
    assert [(entry.model, entry.layer_range) for entry in one.sources] == [
        ("models/a", (0, 32)), ("models/b", (0, 32)),
    ]  # fmt: skip


def test_sections_have_the_levels_of_parameters_from_the_slice_outwards() -> None:
    recipe = parse_recipe(
        sliced(
            of(source("a", 0, 2, weight=[1, 2]), source("b", 0, 2), parameters={"weight": 3}),
            of(source("c", 1, 3)),
            parameters={"weight": 4},
        )
    )
    first, second = recipe.sections
    assert (first.pointer, second.pointer) == ("/slices/0/sources", "/slices/1/sources")
    assert first.entries[0].parameters == {"weight": Gradient((1.0, 2.0))}
    assert first.levels == ({"weight": 3.0}, {"weight": 4.0})
    assert second.levels == ({}, {"weight": 4.0})


def test_base_of_a_slice_goes_before_that_of_the_recipe() -> None:
    recipe = parse_recipe(
        sliced(
            of(source("a", 0, 2), source("b", 0, 2), base_model="a"),
            of(source("c", 0, 2), source("b", 0, 2)),
            method="slerp",
            base_model="c",
        )
    )
    assert [section.base_model for section in recipe.sections] == ["a", "c"]


def test_normalised_slices_read_back_to_themselves() -> None:
    recipe = parse_recipe(SLERP)
    assert parse_recipe(recipe.normalised()) == recipe
    assert parse_recipe(json.dumps(recipe.normalised())).digest == recipe.digest


def test_default_in_a_slice_is_kept_only_where_an_outer_level_gives_another() -> None:
    def parameters(**outer: Any) -> Any:
        one = of(source("a", 0, 1), source("b", 0, 1), parameters={"weight": 1})
        return parse_recipe(sliced(one, parameters=outer)).slices[0].parameters

    assert parameters() == {}
    assert parameters(weight=2) == {"weight": 1.0}


@pytest.mark.parametrize(
    ("recipe", "pointer", "code", "text"),
    [
        (sliced(), "/slices", "invalid_recipe", "a list of slices"),
        (sliced(3), "/slices/0", "invalid_recipe", "a mapping with 'sources'"),
        (sliced({}), "/slices/0/sources", "invalid_recipe", "'sources' is missing"),
        (sliced(of()), "/slices/0/sources", "invalid_recipe", "a list of models"),
        (sliced(of("a")), "/slices/0/sources/0", "invalid_recipe", "a mapping with the key"),
        (
            sliced(of({"model": "a"})),
            "/slices/0/sources/0/layer_range",
            "invalid_recipe",
            "[a, b]",
        ),
        *(
            (
                sliced(of({"model": "a", "layer_range": layers})),
                "/slices/0/sources/0/layer_range",
                "invalid_recipe",
                "0 ≤ a < b",
            )
            for layers in ([4, 2], [2, 2], [-1, 2], [0], [0, 1.5], [True, 2], "0-4", [0, 1, 2])
        ),
        (
            sliced(of(source("a", 0, 2), source("b", 0, 3))),
            "/slices/0/sources",
            "invalid_recipe",
            "have 2, 3",
        ),
        (
            sliced(of(source("a", 0, 2), residual_weight=0.5)),
            "/slices/0/residual_weight",
            "incompatible_options",
            "never uses",
        ),
        (
            sliced(of(source("a", 0, 2), sorces=[])),
            "/slices/0/sorces",
            "invalid_recipe",
            "'sources'",
        ),
        (
            sliced(of(source("a", 0, 2), parameters={"weigth": 1})),
            "/slices/0/parameters/weigth",
            "bad_parameter",
            "'weight'",
        ),
        (
            sliced(of(source("a", 0, 2), parameters={"touch": "all"})),
            "/slices/0/parameters/touch",
            "bad_parameter",
            "the whole merge",
        ),
        (
            sliced(of(source("a", 0, 2, normalize=True))),
            "/slices/0/sources/0/parameters/normalize",
            "bad_parameter",
            "the whole merge",
        ),
        (
            sliced(of(source("a", 0, 2), source("b", 0, 2)), method="passthrough"),
            "/slices/0/sources",
            "incompatible_options",
            "at most 1",
        ),
        (
            sliced(of(source("a", 0, 2)), method="slerp"),
            "/slices/0/base_model",
            "incompatible_options",
            "needs a base model",
        ),
        (
            sliced(of(source("a", 0, 2)), method="slerp", base_model="a"),
            "/slices/0/sources",
            "incompatible_options",
            "at least 1",
        ),
    ],
)
def test_malformed_slices_are_refused_at_their_place(
    recipe: dict[str, Any], pointer: str, code: str, text: str
) -> None:
    found, faults = validate_recipe(recipe)
    assert found is None
    assert [(fault.pointer, fault.code) for fault in faults] == [(pointer, code)], faults
    assert text in faults[0].detail


def test_everything_wrong_with_slices_is_told_at_once() -> None:
    _, faults = validate_recipe(
        sliced(
            of(source("a", 3, 1), colour=1),
            of({"model": "b"}, parameters={"weight": "x"}),
            dtype="floot16",
        )
    )
    assert {fault.pointer for fault in faults} == {
        "/slices/0/sources/0/layer_range",
        "/slices/0/colour",
        "/slices/1/sources/0/layer_range",
        "/slices/1/parameters/weight",
        "/dtype",
    }
