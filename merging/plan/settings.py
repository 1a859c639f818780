"""Which method with which parameters each tensor gets."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

import msgspec
from pydantic import ValidationError

from merging.errors import Fault
from merging.method import MergeMethod, get_method
from merging.parameters import Parameters
from merging.plan.plan import COPY, Setting
from merging.plan.wording import SHOWN
from merging.recipe import Recipe
from merging.recipe.parameters import parameter_rules
from merging.recipe.parse import recipe_error
from merging.recipe.recipe import Level
from merging.selectors import evaluate, filters

MEAN_METHOD = "linear"
"""The method, with its default parameters, of tensors that become the experts' mean."""


class SettingTable:
    """Resolves a recipe's parameters tensor by tensor; equal results share one setting.

    Args:
        recipe: A checked recipe.
        method: Its method.
        entries: The experts' places among the models of each section of the recipe.
    """

    def __init__(
        self, recipe: Recipe, method: MergeMethod, entries: Sequence[Sequence[int]]
    ) -> None:
        self.settings: list[Setting] = []
        self._numbers: dict[str, int] = {}
        self._resolved: dict[str, int] = {}
        self._models: list[Parameters | None] = []
        self._method = method
        self._recipe = recipe
        self._shared = [section.levels for section in recipe.sections]
        self._levels: list[list[tuple[Level, ...]]] = [
            [(section.entries[place].parameters, *section.levels) for place in places]
            for section, places in zip(recipe.sections, entries, strict=True)
        ]
        given = {name for levels in self._shared for level in levels for name in level}
        self._own = tuple(n for n in parameter_rules(method.parameters) if n in given)
        self._expert_names = tuple(parameter_rules(method.expert_parameters))
        self._faults: dict[str, list[str]] = {}

    @property
    def filters(self) -> list[str]:
        """All name filters of the recipe."""
        sections = self._recipe.sections
        levels = [level for section in sections for level in section.levels]
        levels += [entry.parameters for section in sections for entry in section.entries]
        return [f for level in levels for value in level.values() for f in filters(value)]

    def parameters(self, setting: int) -> Parameters | None:
        """The validated parameters of a setting; None of a copy."""
        return self._models[setting]

    def copy(self) -> int:
        """The setting of tensors that are taken over."""
        return self._add(COPY, None, ())

    def mean(self, section: int = 0) -> int:
        """The setting of tensors that become the mean of a section's experts."""
        method = get_method(MEAN_METHOD)
        experts = (method.expert_parameters(),) * len(self._levels[section])
        return self._add(method.name, method.parameters(), experts)

    def merge(
        self,
        tensor_name: str,
        position: float,
        section: int = 0,
        source_names: Sequence[str] = (),
    ) -> int:
        """The setting of a tensor that the recipe's method merges.

        Filters look at the name of the tensor; those for an expert, at its name there.

        Args:
            tensor_name: Its name in the output.
            position: From :func:`~merging.selectors.layer_position`.
            section: Of the recipe.
            source_names: The tensor's names in the experts; the same by default.

        A fault is kept for :meth:`raise_faults`; the number is then of no use.
        """
        own = {
            name: _first(self._shared[section], name, tensor_name, position) for name in self._own
        }
        experts = [
            {name: _first(levels, name, source_name, position) for name in self._expert_names}
            for levels, source_name in zip(
                self._levels[section],
                source_names or [tensor_name] * len(self._levels[section]),
                strict=True,
            )
        ]
        key = json.dumps([own, experts])
        number = self._resolved.get(key)
        if number is None:
            try:
                number = self._add(
                    self._method.name,
                    _validate(self._method.parameters, own),
                    tuple(_validate(self._method.expert_parameters, e) for e in experts),
                )
                self._resolved[key] = number
            except ValidationError as error:
                self._keep_fault(error, tensor_name)
                return self.copy()
        return number

    def step(self, setting: int, name: str, without: Container[str] = ()) -> int:
        """The setting of a step of a method that takes several passes.

        Args:
            setting: Of the method.
            name: Of the step.
            without: Recipe-level parameters that it does not depend on.
        """
        whole = self.settings[setting]
        key = json.dumps([setting, name])
        if key not in self._numbers:
            self._numbers[key] = len(self.settings)
            own = {n: value for n, value in whole.parameters.items() if n not in without}
            self.settings.append(msgspec.structs.replace(whole, step=name, parameters=own))
            self._models.append(self._models[setting])
        return self._numbers[key]

    def raise_faults(self) -> None:
        """Raise :class:`RecipeError` if the parameters of a tensor do not go together."""
        if faults := self.faults("/parameters"):
            raise recipe_error(faults[:SHOWN])

    def faults(self, pointer: str) -> list[Fault]:
        """Parameters that do not go together for some tensors, told of a place in the recipe."""
        faults = []
        for reason, names in self._faults.items():
            where = f"tensor {names[0]!r}"
            if len(names) > 1:
                where += f" and {len(names) - 1} more"
            faults.append(Fault(pointer, "bad_parameter", f"For {where}: {reason}"))
        return faults

    def _keep_fault(self, error: ValidationError, tensor_name: str) -> None:
        for item in error.errors(include_url=False):
            name = ".".join(str(part) for part in item["loc"])
            if item["type"] == "missing":
                reason = f"the parameter {name!r} has no value: no filter matches."
            else:
                reason = f"{name}: {item['msg']}" if name else item["msg"]
            self._faults.setdefault(reason, []).append(tensor_name)

    def _add(
        self, method: str, parameters: Parameters | None, experts: Sequence[Parameters]
    ) -> int:
        setting = Setting(
            method=method,
            parameters=_dump(parameters) if parameters else {},
            expert_parameters=tuple(_dump(expert) for expert in experts),
        )
        key = json.dumps([method, setting.parameters, setting.expert_parameters], sort_keys=True)
        if key not in self._numbers:
            self._numbers[key] = len(self.settings)
            self.settings.append(setting)
            self._models.append(parameters)
        return self._numbers[key]


def mean_setting(num_experts: int) -> Setting:
    """The setting of a mean of experts, for tensors that are none of the output's."""
    method = get_method(MEAN_METHOD)
    experts = (_dump(method.expert_parameters()),) * num_experts
    return Setting(method.name, _dump(method.parameters()), experts)


def _first(levels: Sequence[Level], name: str, tensor_name: str, position: float) -> Any:
    """The value of the first level that has one for this tensor; None if none has."""
    for level in levels:
        if name in level:
            value = evaluate(level[name], tensor_name, position)
            if value is not None:
                return value
    return None


def _validate(model: type[Parameters], values: Mapping[str, Any]) -> Parameters:
    given = {name: value for name, value in values.items() if value is not None}
    return model.model_validate_json(json.dumps(given), strict=True)


def _dump(parameters: Parameters) -> dict[str, Any]:
    used_up = set(parameters.recipe_wide)  # which tensors, not what to do with them
    return parameters.model_dump(mode="json", by_alias=True, exclude=used_up)
