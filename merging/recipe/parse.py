"""From a document to a :class:`Recipe`, with everything that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merging.dtypes import RECIPE_NAMES
from merging.errors import Fault, RecipeError
from merging.method import MergeMethod, get_method
from merging.recipe.addresses import address_problem, split_adapter
from merging.recipe.document import escape_pointer, load_document
from merging.recipe.parameters import (
    Rule,
    check_together,
    method_rules,
    nearest,
    parameter_rules,
    read_parameters,
    shorten,
)
from merging.recipe.recipe import ModelEntry, Recipe
from merging.recipe.sweep import read_sweep
from merging.roles import touch_filter
from merging.selectors import ParameterValue

_KEYS = frozenset(
    {"name", "models", "base_model", "merge_method", "parameters", "dtype", "out_dtype", "sweep"}
)
_MODEL_KEYS = frozenset({"model", "parameters"})

_UNSUPPORTED = {
    "slices": "Layer slices are not supported by this version: every model must have the same"
    " layers. List the models under 'models'.",
    "modules": "Separate recipes for modules are not supported by this version; use filters on"
    " tensor names in 'parameters'.",
    "tokenizer": "Building a tokenizer is not supported by this version: all models must share"
    " one vocabulary, and the base model's tokenizer files are taken. Remove the key.",
    "tokenizer_source": "Building a tokenizer is not supported by this version: all models must"
    " share one vocabulary, and the base model's tokenizer files are taken. Remove the key.",
    "chat_template": "Choosing a chat template is not supported by this version: the base model's"
    " is taken along. Remove the key.",
    "output": "Where the result goes is not part of the recipe; give it beside the recipe, when"
    " the merge is planned or submitted.",
}
_UNSUPPORTED_MODEL = {
    "layer_range": "Layer ranges belong to 'slices', which this version does not support.",
}
_WITHOUT_EFFECT = {
    "int8_mask": "The parameter 'int8_mask' only saves memory in mergekit; it has no effect here.",
}


_MAX_FAULTS = 100
"""Enough for any honest mistake; a document of nothing but faults is not answered in full."""


def parse_recipe(document: str | bytes | Mapping[str, Any]) -> Recipe:
    """Read and check a recipe: mergekit's schema of ``models``, in YAML, JSON or already parsed.

    Values of parameters are scalars, gradients over layers, or entries with filters; see
    :mod:`merging.selectors`. Nothing is read from storage.

    Raises:
        RecipeError: With one fault for each thing that is wrong, and JSON pointers to them.
    """
    recipe, faults = validate_recipe(document)
    if recipe is not None:
        return recipe
    raise recipe_error(faults)


def validate_recipe(
    document: str | bytes | Mapping[str, Any],
) -> tuple[Recipe | None, list[Fault]]:
    """The recipe, or everything that is wrong with it (a hundred faults at the most)."""
    faults: list[Fault] = []
    try:
        data = load_document(document, faults)
    except RecipeError as error:
        return None, list(error.faults) or [Fault("", error.code, error.detail)]
    is_sweep = data.get("sweep") is not None
    recipe, found = read_sweep(data, _read) if is_sweep else _read(data)
    known = {fault.pointer for fault in faults}
    faults += [fault for fault in found if fault.pointer not in known]
    return (None, faults[:_MAX_FAULTS]) if faults else (recipe, [])


def _read(data: dict[str, Any]) -> tuple[Recipe, list[Fault]]:
    """One recipe, and what is wrong with it."""
    reader = _Reader(data)
    return reader.read(), reader.faults


def recipe_error(faults: list[Fault]) -> RecipeError:
    """One error that carries all faults; its detail is a line on the first."""
    codes = {fault.code for fault in faults}
    first = f"{faults[0].pointer}: {faults[0].detail}" if faults[0].pointer else faults[0].detail
    return RecipeError(
        first if len(faults) == 1 else f"{first} ({len(faults) - 1} more in the recipe.)",
        code=codes.pop() if len(codes) == 1 else None,
        faults=faults,
    )


class _Reader:
    """Reads one document, collecting faults."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.faults: list[Fault] = []
        self._data = data
        self._warnings: list[str] = []

    def read(self) -> Recipe:
        self._check_keys(self._data, "", _KEYS, _UNSUPPORTED)
        method = self._method()
        base = self._optional_model("base_model")
        models = self._models(method)
        parameters = self._parameters(
            self._data.get("parameters"), "/parameters", method_rules(method) if method else None
        )
        if method is not None:
            parameters = _without_defaults(parameters, method_rules(method), {})
            models = [self._without_base_parameters(entry, method, base) for entry in models]
            self._check_models(method, base, models)
            self._check_parameters(method, base, models, parameters)
            models = [
                ModelEntry(
                    entry.model,
                    _without_defaults(
                        entry.parameters, parameter_rules(method.expert_parameters), parameters
                    ),
                )
                for entry in models
            ]
        return Recipe(
            name=self._text("name"),
            merge_method=method.name if method else "",
            base_model=base,
            models=tuple(models),
            parameters=parameters,
            dtype=self._dtype("dtype"),
            out_dtype=self._dtype("out_dtype"),
            warnings=tuple(dict.fromkeys(self._warnings)),
        )

    def _refuse(self, pointer: str, detail: str, code: str = "invalid_recipe") -> None:
        self.faults.append(Fault(pointer, code, detail))

    def _check_keys(
        self,
        data: dict[str, Any],
        pointer: str,
        known: frozenset[str],
        unsupported: Mapping[str, str],
    ) -> None:
        for key in data:
            if key in unsupported:
                self._refuse(f"{pointer}/{key}", unsupported[key], "incompatible_options")
            elif key not in known:
                detail = f"Unknown key {shorten(key)}.{nearest(key, known)}"
                self._refuse(f"{pointer}/{escape_pointer(key)}", detail)

    def _text(self, key: str) -> str | None:
        value = self._data.get(key)
        if value is None or isinstance(value, str):
            return value
        self._refuse(f"/{key}", f"{key!r} is a text, not {shorten(value)}.")
        return None

    def _dtype(self, key: str) -> str | None:
        value = self._text(key)
        if value is not None and value not in RECIPE_NAMES:
            detail = f"{shorten(value)} is not a float type.{nearest(value, RECIPE_NAMES)}"
            self._refuse(f"/{key}", detail)
        return value

    def _method(self) -> MergeMethod | None:
        name = self._text("merge_method")
        if name is None:
            if self._data.get("merge_method") is None:
                self._refuse("/merge_method", "The key 'merge_method' is missing.")
            return None
        try:
            return get_method(name)
        except RecipeError as error:
            self._refuse("/merge_method", error.detail, error.code)
            return None

    def _optional_model(self, key: str) -> str | None:
        value = self._data.get(key)
        model = None if value is None else self._model(value, f"/{key}")
        if model and split_adapter(model)[1] is not None:
            detail = (
                "A base model with an adapter ('model+adapter') is not supported: merge the adapter"
                " into it first, or list it under 'models' if it is an expert."
            )
            self._refuse(f"/{key}", detail, "incompatible_options")
        return model

    def _model(self, value: Any, pointer: str) -> str:
        """A model's address; ``""`` if it is none."""
        problem = address_problem(value)
        if problem is None:
            return str(value)
        self._refuse(pointer, problem)
        return ""

    def _models(self, method: MergeMethod | None) -> list[ModelEntry]:
        raw = self._data.get("models")
        if not isinstance(raw, list) or not raw:
            what = "is missing" if raw is None else f"is a list of models, not {shorten(raw)}"
            if raw is not None or not self._data.keys() & _UNSUPPORTED.keys():
                self._refuse("/models", f"The key 'models' {what}.")
            return []
        rules = parameter_rules(method.expert_parameters) if method else None
        misplaced = parameter_rules(method.parameters).keys() if method else frozenset()
        entries = []
        for index, item in enumerate(raw):
            pointer = f"/models/{index}"
            if not isinstance(item, dict) or "model" not in item:
                detail = f"An entry is a mapping with the key 'model', not {shorten(item)}."
                self._refuse(pointer, detail)
                if not isinstance(item, dict):
                    continue
            self._check_keys(item, pointer, _MODEL_KEYS, _UNSUPPORTED_MODEL)
            model = self._model(item["model"], f"{pointer}/model") if "model" in item else ""
            parameters = self._parameters(
                item.get("parameters"), f"{pointer}/parameters", rules, frozenset(misplaced)
            )
            entries.append(ModelEntry(model, parameters))
        return entries

    def _parameters(
        self,
        raw: Any,
        pointer: str,
        rules: Mapping[str, Rule] | None,
        misplaced: frozenset[str] = frozenset(),
    ) -> dict[str, ParameterValue]:
        if isinstance(raw, dict):
            self._warnings += [text for name, text in _WITHOUT_EFFECT.items() if name in raw]
            raw = {name: value for name, value in raw.items() if name not in _WITHOUT_EFFECT}
        return read_parameters(raw, pointer, rules, self.faults, misplaced=misplaced)

    def _without_base_parameters(
        self, entry: ModelEntry, method: MergeMethod, base: str | None
    ) -> ModelEntry:
        if not (_is_base(entry.model, base, method) and entry.parameters):
            return entry
        self._warnings.append(
            f"{method.name} takes no parameters for the base model; those of {base!r} under"
            " 'models' have no effect."
        )
        return ModelEntry(entry.model)

    def _check_models(
        self, method: MergeMethod, base: str | None, models: list[ModelEntry]
    ) -> None:
        """Base and number of experts, as far as addresses as they are written tell."""
        if method.needs_base:
            if base is None:
                detail = f"{method.name} needs a base model; add the key 'base_model'."
                self._refuse("/base_model", detail, "incompatible_options")
        elif (
            not method.optional_base
            and base is not None
            and not any(_is_same(entry.model, base) for entry in models)
        ):
            detail = (
                f"{method.name} uses no base model; list {shorten(base)} under 'models' if it is"
                " to be merged in, or remove 'base_model'."
            )
            self._refuse("/base_model", detail, "incompatible_options")
        experts = [entry for entry in models if not _is_base(entry.model, base, method)]
        if models and (problem := count_problem(method, len(experts))):
            self._refuse("/models", problem, "incompatible_options")

    def _check_parameters(
        self,
        method: MergeMethod,
        base: str | None,
        models: list[ModelEntry],
        parameters: Mapping[str, ParameterValue],
    ) -> None:
        """Parameters that are missing or do not go together."""
        touch = parameters.get("touch")
        if isinstance(touch, str | list):
            try:
                touch_filter(touch)
            except RecipeError as error:
                self._refuse("/parameters/touch", error.detail, error.code)
        if self.faults:
            return
        check_together(method.parameters, (parameters,), "/parameters", self.faults)
        for index, entry in enumerate(models):
            if _is_base(entry.model, base, method):
                continue
            levels = (entry.parameters, parameters)
            pointer = f"/models/{index}/parameters"
            check_together(method.expert_parameters, levels, pointer, self.faults)


def _is_base(model: str, base: str | None, method: MergeMethod) -> bool:
    """Whether an address, as it is written, is the base model, for a method that uses one."""
    return method.uses_base(is_named=base is not None) and _is_same(model, base)


def _is_same(model: str, base: str | None) -> bool:
    """Whether two addresses are the same as they are written."""
    return base is not None and model.rstrip("/") == base.rstrip("/")


def count_problem(method: MergeMethod, num_experts: int) -> str | None:
    """What is wrong with a number of experts; None if nothing is."""
    besides = " besides the base model" if method.needs_base or method.optional_base else ""
    if num_experts < method.min_experts:
        return (
            f"{method.name} merges at least {method.min_experts} models{besides}; the recipe has"
            f" {num_experts}."
        )
    if method.max_experts is not None and num_experts > method.max_experts:
        return (
            f"{method.name} merges at most {method.max_experts} models{besides}; the recipe has"
            f" {num_experts}."
        )
    return None


def _without_defaults(
    parameters: Mapping[str, ParameterValue],
    rules: Mapping[str, Rule],
    outer: Mapping[str, ParameterValue],
) -> dict[str, ParameterValue]:
    """Parameters less those that equal their default and that no outer level or preset changes."""
    has_preset = parameters.get("preset") is not None
    return {
        name: value
        for name, value in parameters.items()
        if has_preset
        or name in outer
        or name not in rules
        or rules[name].is_required
        or value != rules[name].default
    }
