"""Reading what a recipe merges: whole models, slices of their layers, or parts of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merging.errors import Fault
from merging.method import MergeMethod
from merging.recipe.addresses import read_model, split_adapter
from merging.recipe.calibration import read_calibration
from merging.recipe.document import escape_pointer
from merging.recipe.parameters import (
    Rule,
    check_keys,
    method_rules,
    parameter_rules,
    read_parameters,
    shorten,
)
from merging.recipe.recipe import ModelEntry, Module, Slice
from merging.selectors import ParameterValue

_MODEL_KEYS = frozenset({"model", "parameters", "calibration"})
_SOURCE_KEYS = frozenset({"model", "parameters", "layer_range"})
_SLICE_KEYS = frozenset({"sources", "base_model", "parameters"})
_MODULE_KEYS = frozenset({"models", "slices", "parameters"})
_UNSUPPORTED_MODEL = {
    "layer_range": "Layer ranges belong to 'slices': give them to their 'sources'.",
}
_UNSUPPORTED_SLICE = {
    "residual_weight": "mergekit reads 'residual_weight' and never uses it; remove the key.",
}
_WITHOUT_EFFECT = {
    "int8_mask": "The parameter 'int8_mask' only saves memory in mergekit; it has no effect here.",
}
_MAX_SLICES = 1000
_MAX_MODULES = 100


class SourceReader:
    """Reads models, slices and their parameters, collecting faults.

    Args:
        method: The recipe's method; None if it is unknown, when only the form is checked.
        faults: What is wrong is added here.
        warnings: What was accepted and has no effect is added here.

    Attributes:
        architectures: By address of a model: what its config.json is taken to name.
    """

    def __init__(
        self, method: MergeMethod | None, faults: list[Fault], warnings: list[str]
    ) -> None:
        self._faults = faults
        self._warnings = warnings
        self.architectures: dict[str, str] = {}
        self._all = method_rules(method) if method else None
        self._experts = parameter_rules(method.expert_parameters) if method else None
        self._own = parameter_rules(method.parameters) if method else {}

    def refuse(self, pointer: str, detail: str, code: str = "invalid_recipe") -> None:
        """Add a fault."""
        self._faults.append(Fault(pointer, code, detail))

    def check_keys(
        self,
        data: Mapping[str, Any],
        pointer: str,
        known: frozenset[str],
        unsupported: Mapping[str, str],
    ) -> None:
        """Refuse keys that are not known, with the reason where there is a special one."""
        for key in data:
            if key in unsupported:
                self.refuse(f"{pointer}/{key}", unsupported[key], "incompatible_options")
        others = {key: value for key, value in data.items() if key not in unsupported}
        check_keys(others, pointer, known, self.refuse)

    def address(self, value: Any, pointer: str) -> str:
        """A model's address; ``""`` if it is none."""
        address, architecture = read_model(value, pointer, self.refuse)
        model = split_adapter(address)[0]
        if not (architecture and model):
            return address
        if self.architectures.setdefault(model, architecture) != architecture:
            detail = f"{shorten(model)} is taken for a {self.architectures[model]} elsewhere."
            self.refuse(f"{pointer}/override_architecture", detail)
        return address

    def base(self, value: Any, pointer: str) -> str | None:
        """The address of a base model; None if there is none."""
        model = None if value is None else self.address(value, pointer)
        if model and split_adapter(model)[1] is not None:
            detail = (
                "Here a base model has no adapter on it ('model+adapter'): the base_model of a"
                " recipe by itself may have one. Put it there, or make the model in a document of"
                " its own (merge_method: passthrough), or list it under 'models'."
            )
            self.refuse(pointer, detail, "incompatible_options")
        return model

    def parameters(self, raw: Any, pointer: str) -> dict[str, ParameterValue]:
        """The recipe's own parameters."""
        return self._parameters(raw, pointer, self._all)

    def models(self, raw: Any, pointer: str) -> tuple[ModelEntry, ...]:
        """A list of whole models."""
        return self._entries(raw, pointer, _MODEL_KEYS, _UNSUPPORTED_MODEL)

    def slices(self, raw: Any, pointer: str) -> tuple[Slice, ...]:
        """A list of slices; none where there is no such key."""
        if raw is None:
            return ()
        if not isinstance(raw, list) or not raw:
            detail = f"'slices' is a list of slices with 'sources' each, not {shorten(raw)}."
            self.refuse(pointer, detail)
            return ()
        if len(raw) > _MAX_SLICES:
            self.refuse(pointer, f"There are at most {_MAX_SLICES} slices, not {len(raw)}.")
            return ()
        found = [self._slice(item, f"{pointer}/{number}") for number, item in enumerate(raw)]
        return tuple(one for one in found if one is not None)

    def modules(self, raw: Any, pointer: str) -> tuple[Module, ...]:
        """A mapping of modules; none where there is no such key."""
        if raw is None:
            return ()
        if not isinstance(raw, dict) or not 0 < len(raw) <= _MAX_MODULES:
            detail = (
                "'modules' is a mapping of parts of the model (vision_tower, text_decoder …) with"
                f" 'models' or 'slices' each, not {shorten(raw)}."
            )
            self.refuse(pointer, detail)
            return ()
        found = (self._module(n, one, f"{pointer}/{escape_pointer(n)}") for n, one in raw.items())
        return tuple(module for module in found if module.slices)

    def _module(self, name: str, raw: Any, pointer: str) -> Module:
        if not isinstance(raw, dict):
            detail = f"A module is a mapping with 'models' or 'slices', not {shorten(raw)}."
            self.refuse(pointer, detail)
            return Module(name, ())
        self.check_keys(raw, pointer, _MODULE_KEYS, {})
        given = [key for key in ("models", "slices") if raw.get(key) is not None]
        if len(given) != 1:
            self.refuse(pointer, "A module has 'models' or 'slices', one of the two.")
            return Module(name, ())
        parameters = self._parameters(
            raw.get("parameters"), f"{pointer}/parameters", self._of_tensors
        )
        if given == ["slices"]:
            return Module(name, self.slices(raw["slices"], f"{pointer}/slices"), parameters)
        models = self._entries(
            raw["models"], f"{pointer}/models", _MODEL_KEYS - {"calibration"}, _UNSUPPORTED_MODEL
        )
        return Module(name, (Slice(models),) if models else (), parameters)

    @property
    def _of_tensors(self) -> Mapping[str, Rule] | None:
        """Rules of parameters that may differ between parts of a model."""
        rules = self._all
        return rules and {name: rule for name, rule in rules.items() if not rule.is_recipe_wide}

    def _slice(self, raw: Any, pointer: str) -> Slice | None:
        if not isinstance(raw, dict):
            self.refuse(pointer, f"A slice is a mapping with 'sources', not {shorten(raw)}.")
            return None
        self.check_keys(raw, pointer, _SLICE_KEYS, _UNSUPPORTED_SLICE)
        base = self.base(raw.get("base_model"), f"{pointer}/base_model")
        parameters = self._parameters(
            raw.get("parameters"), f"{pointer}/parameters", self._of_tensors
        )
        sources = self._entries(raw.get("sources"), f"{pointer}/sources", _SOURCE_KEYS, {})
        lengths = [b - a for a, b in (one.layer_range for one in sources if one.layer_range)]
        if len(set(lengths)) > 1:
            detail = (
                "All sources of a slice have the same number of layers; these have"
                f" {', '.join(map(str, lengths))}."
            )
            self.refuse(f"{pointer}/sources", detail)
        return Slice(sources, base, parameters) if sources else None

    def _entries(
        self, raw: Any, pointer: str, keys: frozenset[str], unsupported: Mapping[str, str]
    ) -> tuple[ModelEntry, ...]:
        if not isinstance(raw, list) or not raw:
            name = pointer.rsplit("/", 1)[-1]
            what = "is missing" if raw is None else f"is a list of models, not {shorten(raw)}"
            self.refuse(pointer, f"The key {name!r} {what}.")
            return ()
        found = [
            self._entry(item, f"{pointer}/{number}", keys, unsupported)
            for number, item in enumerate(raw)
        ]
        return tuple(one for one in found if one is not None)

    def _entry(
        self, item: Any, pointer: str, keys: frozenset[str], unsupported: Mapping[str, str]
    ) -> ModelEntry | None:
        if not isinstance(item, dict) or "model" not in item:
            detail = f"An entry is a mapping with the key 'model', not {shorten(item)}."
            self.refuse(pointer, detail)
            if not isinstance(item, dict):
                return None
        self.check_keys(item, pointer, keys, unsupported)
        model = self.address(item["model"], f"{pointer}/model") if "model" in item else ""
        parameters = self._parameters(
            item.get("parameters"), f"{pointer}/parameters", self._experts
        )
        layers = None
        if "layer_range" in keys:
            layers = self._layers(item.get("layer_range"), f"{pointer}/layer_range")
        calibration = read_calibration(
            item.get("calibration"), f"{pointer}/calibration", self._faults
        )
        return ModelEntry(model, parameters, layers, calibration)

    def _layers(self, raw: Any, pointer: str) -> tuple[int, int] | None:
        """``[a, b]``, the layers from ``a`` up to but not with ``b``."""
        is_pair = isinstance(raw, list) and len(raw) == 2 and all(type(n) is int for n in raw)
        if is_pair and 0 <= raw[0] < raw[1]:
            return raw[0], raw[1]
        detail = (
            "'layer_range' is [a, b] with 0 ≤ a < b, the layers from a up to b - 1; not"
            f" {shorten(raw)}."
        )
        self.refuse(pointer, detail)
        return None

    def _parameters(
        self, raw: Any, pointer: str, rules: Mapping[str, Rule] | None
    ) -> dict[str, ParameterValue]:
        """The parameters of one place, which may have others in an outer place."""
        if isinstance(raw, dict):
            self._warnings += [text for name, text in _WITHOUT_EFFECT.items() if name in raw]
            raw = {name: value for name, value in raw.items() if name not in _WITHOUT_EFFECT}
        misplaced = self._own.keys() - (rules or {}).keys()
        return read_parameters(raw, pointer, rules, self._faults, misplaced=misplaced)
