from __future__ import annotations

from typing import Any, Self

import pytest
from pydantic import Field, model_validator

from merging.errors import Fault, RecipeError
from merging.method import Cost, MergeMethod
from merging.parameters import Parameters, TouchParameters
from merging.plan.settings import SettingTable
from merging.recipe import ModelEntry, Recipe
from merging.selectors import ParameterValue, parse_value


class OwnParameters(TouchParameters):
    scale: float = Field(default=1.0, alias="lambda")


class ExpertParameters(Parameters):
    low: float
    high: float = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError("low must not be above high.")
        return self


METHOD = MergeMethod(
    name="bounded",
    title="",
    summary="",
    source="",
    merge=lambda _base, _experts, _task: None,  # type: ignore[arg-type, return-value] # never called
    cost=lambda _geometry, _parameters: Cost(0.0, 0),
    parameters=OwnParameters,
    expert_parameters=ExpertParameters,
)


def value(raw: Any) -> ParameterValue:
    faults: list[Fault] = []
    found = parse_value(raw, "", lambda leaf, _pointer: leaf, faults)
    assert not faults
    return found


def table(*models: dict[str, Any], **parameters: Any) -> SettingTable:
    recipe = Recipe(
        merge_method="bounded",
        models=tuple(ModelEntry("m", {k: value(v) for k, v in model.items()}) for model in models),
        parameters={k.rstrip("_"): value(v) for k, v in parameters.items()},
    )
    return SettingTable(recipe, METHOD, [range(len(models))])


def test_equal_parameters_share_a_setting() -> None:
    found = table({"low": 0}, low=0, lambda_=[{"filter": "mlp", "value": 2}])
    numbers = [found.merge(name, 0.5) for name in ("mlp.up", "norm", "mlp.down", "head")]
    assert numbers == [0, 1, 0, 1]
    assert [s.parameters for s in found.settings] == [{"lambda": 2.0}, {"lambda": 1.0}]
    assert found.settings[0].expert_parameters == ({"low": 0.0, "high": 1.0},)


def test_copy_and_mean_are_settings_too() -> None:
    found = table({"low": 0}, {"low": 0})
    assert [found.copy(), found.mean(), found.copy(), found.mean()] == [0, 1, 0, 1]
    assert [(s.method, len(s.expert_parameters)) for s in found.settings] == [
        ("copy", 0), ("linear", 2),
    ]  # fmt: skip
    assert {e["weight"] for e in found.settings[1].expert_parameters} == {1.0}


def test_validated_parameters_of_a_setting_are_kept() -> None:
    found = table({"low": 0}, lambda_=3)
    assert found.parameters(found.merge("w", 0.0)) == OwnParameters.model_validate({"lambda": 3.0})
    assert found.parameters(found.copy()) is None


def test_value_that_no_filter_gives_is_reported_with_the_tensors() -> None:
    found = table({"low": [{"filter": "mlp", "value": 0}]})
    for name in ("mlp.up", "norm", "head"):
        found.merge(name, 0.0)
    with pytest.raises(RecipeError) as caught:
        found.raise_faults()
    assert caught.value.code == "bad_parameter"
    assert "For tensor 'norm' and 1 more: the parameter 'low' has no value" in caught.value.detail


def test_values_that_do_not_go_together_somewhere_are_reported() -> None:
    found = table({"low": [0, 2]})
    for layer in range(5):
        found.merge(f"layers.{layer}.w", layer / 4)
    with pytest.raises(RecipeError) as caught:
        found.raise_faults()
    assert "For tensor 'layers.3.w' and 1 more: " in caught.value.detail
    assert "low must not be above high" in caught.value.detail


def test_no_faults_raise_nothing() -> None:
    found = table({"low": 0})
    found.merge("w", 0.0)
    found.raise_faults()


def test_filters_of_all_levels_are_known() -> None:
    found = table({"low": [{"filter": "a", "value": 0}]}, high=[{"filter": "b", "value": 1}])
    assert found.filters == ["b", "a"]
