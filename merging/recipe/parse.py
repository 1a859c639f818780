"""From a document to a :class:`Recipe`, with everything that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from merging.dtypes import RECIPE_NAMES
from merging.errors import Fault, RecipeError
from merging.method import MergeMethod, get_method
from merging.recipe.calibration import join_calibration, read_calibration
from merging.recipe.chat_templates import AUTO, TEMPLATES, is_template
from merging.recipe.document import load_document
from merging.recipe.documents import KEY, read_adapted, read_documents
from merging.recipe.parameters import (
    Rule,
    check_together,
    method_rules,
    nearest,
    parameter_rules,
    shorten,
)
from merging.recipe.recipe import Level, ModelEntry, Recipe, Section, Slice
from merging.recipe.sources import SourceReader
from merging.recipe.sweep import read_sweep
from merging.recipe.tokenizer import read_tokenizer
from merging.roles import touch_filter
from merging.selectors import ParameterValue

_KEYS = frozenset(
    {
        "name",
        "models",
        "slices",
        "modules",
        "base_model",
        "merge_method",
        "parameters",
        "dtype",
        "out_dtype",
    }
    | {"sweep", "tokenizer", "tokenizer_source", "chat_template", "calibration"}
)

_UNSUPPORTED = {
    "output": "Where the result goes is not part of the recipe; give it beside the recipe, when"
    " the merge is planned or submitted.",
}


_MAX_FAULTS = 100
"""Enough for any honest mistake; a document of nothing but faults is not answered in full."""


def parse_recipe(document: str | bytes | Mapping[str, Any]) -> Recipe:
    """Read and check a recipe: mergekit's schema, in YAML, JSON or already parsed.

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
        data = load_document(document, faults, several=True)
    except RecipeError as error:
        return None, list(error.faults) or [Fault("", error.code, error.detail)]
    recipe: Recipe | None
    if KEY in data:
        recipe, found = read_documents(data, _read)
    else:
        is_sweep = data.get("sweep") is not None
        recipe, found = read_sweep(data, _read) if is_sweep else read_adapted(data, _read)
    known = {fault.pointer for fault in faults}
    faults += [fault for fault in found if fault.pointer not in known]
    return (None, faults[:_MAX_FAULTS]) if faults else (recipe, [])


def _read(data: dict[str, Any]) -> tuple[Recipe, list[Fault]]:
    """One recipe, and what is wrong with it."""
    return _Reader(data).read()


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
        self._data = data
        self._faults: list[Fault] = []
        self._warnings: list[str] = []

    def read(self) -> tuple[Recipe, list[Fault]]:
        data = self._data
        method = self._method()
        reader = SourceReader(method, self._faults, self._warnings)
        reader.check_keys(data, "", _KEYS, _UNSUPPORTED)
        recipe = Recipe(
            name=self._text("name"),
            merge_method=method.name if method else "",
            base_model=reader.base(data.get("base_model"), "/base_model"),
            models=self._models(reader),
            slices=reader.slices(data.get("slices"), "/slices"),
            modules=reader.modules(data.get("modules"), "/modules"),
            parameters=reader.parameters(data.get("parameters"), "/parameters"),
            dtype=self._dtype("dtype"),
            out_dtype=self._dtype("out_dtype"),
            tokenizer=read_tokenizer(data, self._faults),
            chat_template=self._chat_template(),
            calibration=read_calibration(data.get("calibration"), "/calibration", self._faults),
            architectures=reader.architectures,
        )
        if method is not None:
            recipe = self._check(recipe, method)
        return replace(recipe, warnings=tuple(dict.fromkeys(self._warnings))), self._faults

    def _refuse(self, pointer: str, detail: str, code: str = "invalid_recipe") -> None:
        self._faults.append(Fault(pointer, code, detail))

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

    def _chat_template(self) -> str | None:
        value = self._text("chat_template")
        known = {AUTO, *TEMPLATES}
        if value is not None and value not in known and not is_template(value):
            detail = (
                f"{shorten(value)} is neither a Jinja template nor the name of one."
                f"{nearest(value, known)}"
            )
            self._refuse("/chat_template", detail)
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

    def _models(self, reader: SourceReader) -> tuple[ModelEntry, ...]:
        keys = ("models", "slices", "modules")
        given = [key for key in keys if self._data.get(key) is not None]
        if len(given) > 1:
            detail = f"A recipe has one of 'models', 'slices' and 'modules', not {given}."
            self._refuse(f"/{given[1]}", detail, "incompatible_options")
        if "models" in given or not self._data.keys() & {"slices", "modules", *_UNSUPPORTED}:
            return reader.models(self._data.get("models"), "/models")
        return ()

    def _check(self, recipe: Recipe, method: MergeMethod) -> Recipe:
        """Check what belongs together, and leave out what changes nothing."""
        recipe = replace(
            recipe, parameters=_without_defaults(recipe.parameters, method_rules(method))
        )
        recipe = self._without_base_parameters(recipe, method)
        self._check_models(recipe, method)
        self._check_calibration(recipe, method)
        self._check_touch(recipe.parameters.get("touch"))
        if not self._faults:
            for section in recipe.sections:
                self._check_parameters(section, method)
        return _simplified(recipe, method)

    def _without_base_parameters(self, recipe: Recipe, method: MergeMethod) -> Recipe:
        """Leave out parameters of the base model where it is one."""

        def without(entry: ModelEntry, base: str | None) -> ModelEntry:
            if not (_is_base(entry.model, base, method) and entry.parameters):
                return entry
            self._warnings.append(
                f"{method.name} takes no parameters for the base model; those of {base!r} have no"
                " effect."
            )
            return replace(entry, parameters={})

        def change(one: Slice, _: Level) -> Slice:
            base = one.base_model or recipe.base_model
            return replace(one, sources=tuple(without(entry, base) for entry in one.sources))

        changed = _change_slices(recipe, change)
        return replace(
            changed, models=tuple(without(entry, recipe.base_model) for entry in recipe.models)
        )

    def _check_models(self, recipe: Recipe, method: MergeMethod) -> None:
        """Bases and numbers of experts, as far as addresses as they are written tell."""
        base = recipe.base_model
        sections = recipe.sections
        entries = [entry for section in sections for entry in section.entries]
        if method.needs_base:
            for section in sections:
                if section.base_model is None:
                    detail = f"{method.name} needs a base model; add the key 'base_model'."
                    self._refuse(f"{section.owner}/base_model", detail, "incompatible_options")
        elif (
            not method.optional_base
            and base is not None
            and not any(_is_same(entry.model, base) for entry in entries)
        ):
            detail = (
                f"{method.name} uses no base model; list {shorten(base)} under 'models' if it is"
                " to be merged in, or remove 'base_model'."
            )
            self._refuse("/base_model", detail, "incompatible_options")
        for section in sections:
            experts = [
                e for e in section.entries if not _is_base(e.model, section.base_model, method)
            ]
            if section.entries and (problem := count_problem(method, len(experts))):
                self._refuse(section.pointer, problem, "incompatible_options")

    def _check_calibration(self, recipe: Recipe, method: MergeMethod) -> None:
        """Every expert of a calibrated method has samples, and no other method has any."""
        own = [(f"/models/{n}/calibration", e) for n, e in enumerate(recipe.models)]
        if not method.calibrated:
            places = [("/calibration", recipe.calibration), *((p, e.calibration) for p, e in own)]
            for pointer in [pointer for pointer, given in places if given]:
                detail = f"{method.name} looks at no samples; remove 'calibration'."
                self._refuse(pointer, detail, "incompatible_options")
            return
        if recipe.slices or recipe.modules:
            detail = f"{method.name} runs whole models on samples; list these under 'models'."
            key = "slices" if recipe.slices else "modules"
            self._refuse(f"/{key}", detail, "incompatible_options")
        if self._faults:
            return
        for pointer, entry in own:
            is_base = _is_base(entry.model, recipe.base_model, method)
            if not is_base and not join_calibration(recipe.calibration, entry.calibration):
                detail = (
                    f"{method.name} needs samples for every expert: name them with 'data' under"
                    " 'calibration', here or for the whole recipe."
                )
                self._refuse(pointer, detail, "incompatible_options")

    def _check_touch(self, touch: Any) -> None:
        if isinstance(touch, str | list):
            try:
                touch_filter(touch)
            except RecipeError as error:
                self._refuse("/parameters/touch", error.detail, error.code)

    def _check_parameters(self, section: Section, method: MergeMethod) -> None:
        """Parameters that are missing or do not go together."""
        levels = section.levels
        pointer = f"{section.owner}/parameters"
        check_together(method.parameters, levels, pointer, self._faults)
        for number, entry in enumerate(section.entries):
            if not _is_base(entry.model, section.base_model, method):
                pointer = f"{section.pointer}/{number}/parameters"
                own = (entry.parameters, *levels)
                check_together(method.expert_parameters, own, pointer, self._faults)


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


def _simplified(recipe: Recipe, method: MergeMethod) -> Recipe:
    """The recipe without values that equal their default, where no other level gives another."""
    of_method, of_expert = method_rules(method), parameter_rules(method.expert_parameters)

    def without(entry: ModelEntry, *outer: Level) -> ModelEntry:
        own = _without_defaults(entry.parameters, of_expert, *outer)
        return replace(entry, parameters=own)

    def simplify(one: Slice, outer: Level) -> Slice:
        own = _without_defaults(one.parameters, of_method, outer, recipe.parameters)
        levels = (own, outer, recipe.parameters)
        sources = tuple(without(entry, *levels) for entry in one.sources)
        return replace(one, parameters=own, sources=sources)

    models = tuple(without(entry, recipe.parameters) for entry in recipe.models)
    modules = tuple(
        replace(m, parameters=_without_defaults(m.parameters, of_method, recipe.parameters))
        for m in recipe.modules
    )
    return _change_slices(replace(recipe, models=models, modules=modules), simplify)


def _change_slices(recipe: Recipe, change: Callable[[Slice, Level], Slice]) -> Recipe:
    """The recipe with other slices; ``change`` gets the parameters of a slice's module too."""
    return replace(
        recipe,
        slices=tuple(change(one, {}) for one in recipe.slices),
        modules=tuple(
            replace(m, slices=tuple(change(one, m.parameters) for one in m.slices))
            for m in recipe.modules
        ),
    )


def _without_defaults(
    parameters: Level, rules: Mapping[str, Rule], *outer: Level
) -> dict[str, ParameterValue]:
    """Parameters less those that equal their default and that no outer level or preset changes."""
    has_preset = any(level.get("preset") is not None for level in (parameters, *outer))
    return {
        name: value
        for name, value in parameters.items()
        if has_preset
        or any(name in level for level in outer)
        or name not in rules
        or rules[name].is_required
        or value != rules[name].default
    }
