"""Sweeps: several variants of one merge in one recipe.

A recipe with the key ``sweep`` stands for as many recipes as it lists variants. Each variant is the
recipe with its own ``merge_method`` and its ``parameters`` in place of the recipe's; all read the
same models, and share what work they can.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from merging.errors import Fault, RecipeError
from merging.method import MergeMethod, get_method
from merging.recipe.document import escape_pointer
from merging.recipe.parameters import method_rules, nearest, shorten
from merging.recipe.recipe import Recipe, Sweep, Variant

MAX_VARIANTS = 32
"""Every variant has a file open while a shard is made, and memory to upload it from."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEYS = frozenset({"name", "merge_method", "parameters"})

Read = Callable[[dict[str, Any]], tuple[Recipe, list[Fault]]]
"""Reads a recipe without a sweep."""


def read_sweep(data: Mapping[str, Any], read: Read) -> tuple[Recipe | None, list[Fault]]:
    """The recipe with its variants, or what is wrong with it.

    Args:
        data: The document, whose ``sweep`` is not null.
        read: Reads the recipe of a variant.
    """
    shared = {key: value for key, value in data.items() if key != "sweep"}
    faults: list[Fault] = []
    entries = _entries(data["sweep"], faults)
    if not entries:
        return None, [*faults, *read(shared)[1]]
    methods = [_method(entry, shared) for _, entry in entries]
    variants = []
    for (index, entry), method in zip(entries, methods, strict=True):
        recipe, found = read(_document(entry, shared, method, methods))
        faults += [_relocate(fault, index, entry) for fault in found]
        faults += _without_effect(index, entry, shared)
        variants.append(Variant(str(entry.get("name")), recipe))
    faults += _other_inputs(entries, methods, is_named=data.get("base_model") is not None)
    if faults:
        first = {(fault.pointer, fault.code): fault for fault in reversed(faults)}
        return None, [fault for fault in faults if fault is first[fault.pointer, fault.code]]
    document = {key: value for key, value in sorted(data.items()) if value is not None}
    warnings = [text for variant in variants for text in variant.recipe.warnings]
    recipe = dataclasses.replace(
        variants[0].recipe,
        sweep=Sweep(document, tuple(variants)),
        warnings=tuple(dict.fromkeys([*warnings, *_equal_variants(variants)])),
    )
    return recipe, []


def _entries(raw: Any, faults: list[Fault]) -> list[tuple[int, dict[str, Any]]]:
    """Variants that are mappings, with their places."""

    def refuse(pointer: str, detail: str) -> None:
        faults.append(Fault(pointer, "invalid_recipe", detail))

    if not isinstance(raw, list) or not raw:
        refuse("/sweep", f"'sweep' is a list of variants with a 'name' each, not {shorten(raw)}.")
        return []
    if len(raw) > MAX_VARIANTS:
        refuse("/sweep", f"A sweep has {MAX_VARIANTS} variants at the most, not {len(raw)}.")
        return []
    entries = []
    names: set[str] = set()
    for index, entry in enumerate(raw):
        here = f"/sweep/{index}"
        if not isinstance(entry, dict):
            refuse(here, f"A variant is a mapping with the key 'name', not {shorten(entry)}.")
            continue
        for key in sorted(entry.keys() - _KEYS):
            detail = f"Unknown key {shorten(key)} of a variant.{nearest(key, _KEYS)}"
            refuse(f"{here}/{escape_pointer(key)}", detail)
        if problem := _name_problem(entry.get("name"), names):
            refuse(f"{here}/name", problem)
        is_mapping = isinstance(entry.get("parameters"), dict | None)
        if not is_mapping:
            refuse(f"{here}/parameters", "'parameters' is a mapping of names.")
        entries.append((index, entry if is_mapping else {**entry, "parameters": None}))
    return entries


def _name_problem(name: Any, names: set[str]) -> str | None:
    """What is wrong with a variant's name, beside those that were seen; None if nothing is."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return (
            "A variant's 'name' is the folder of its checkpoint: up to 64 letters, digits, '.', '_'"
            f" and '-', a letter or digit first; not {shorten(name)}."
        )
    if name.lower() in names:  # one folder, where file systems know no case
        return f"The name {name!r} stands twice (in any case of letters)."
    names.add(name.lower())
    return None


def _without_effect(index: int, entry: Mapping[str, Any], shared: Mapping[str, Any]) -> list[Fault]:
    """Parameters of a variant that an expert or a slice has a value of its own for."""
    faults = []
    for place, own in _own_parameters(shared):
        for name in (entry.get("parameters") or {}).keys() & own.keys():
            detail = (
                f"{name!r} would have no effect on {place}, which has a value of its own. Move that"
                " to the recipe's 'parameters'."
            )
            pointer = f"/sweep/{index}/parameters/{escape_pointer(name)}"
            faults.append(Fault(pointer, "bad_parameter", detail))
    return faults


def _own_parameters(shared: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Places with parameters that go before the recipe's, as far as they are well formed."""
    for place, model in _mappings(shared.get("models"), "/models"):
        yield place, _mapping(model.get("parameters"))
    yield from _of_slices(shared, "")
    for name, module in _mapping(shared.get("modules")).items():
        place, own = f"/modules/{escape_pointer(name)}", _mapping(module)
        yield place, _mapping(own.get("parameters"))
        for inner, model in _mappings(own.get("models"), f"{place}/models"):
            yield inner, _mapping(model.get("parameters"))
        yield from _of_slices(own, place)


def _of_slices(owner: Mapping[str, Any], pointer: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, one in _mappings(owner.get("slices"), f"{pointer}/slices"):
        yield place, _mapping(one.get("parameters"))
        for inner, source in _mappings(one.get("sources"), f"{place}/sources"):
            yield inner, _mapping(source.get("parameters"))


def _mappings(raw: Any, pointer: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, item in enumerate(raw if isinstance(raw, list) else ()):
        if isinstance(item, dict):
            yield f"{pointer}/{number}", item


def _mapping(raw: Any) -> Mapping[str, Any]:
    return raw if isinstance(raw, dict) else {}


def _method(entry: Mapping[str, Any], shared: Mapping[str, Any]) -> MergeMethod | None:
    name = entry.get("merge_method") or shared.get("merge_method")
    try:
        return get_method(name) if isinstance(name, str) else None
    except RecipeError:
        return None  # said by the reader


def _document(
    entry: Mapping[str, Any],
    shared: Mapping[str, Any],
    method: MergeMethod | None,
    methods: list[MergeMethod | None],
) -> dict[str, Any]:
    """The recipe of a variant.

    One with another method takes over those of the recipe's parameters that its method has too; a
    name that no method of the sweep has is left in place, to be refused.
    """
    document = dict(shared)
    parameters = shared.get("parameters")
    if entry.get("merge_method"):
        document["merge_method"] = entry["merge_method"]
        if isinstance(parameters, dict) and method and method.name != shared.get("merge_method"):
            own = method_rules(method).keys() - {"preset"}
            known = {name for m in (*methods, _method({}, shared)) if m for name in method_rules(m)}
            parameters = {n: v for n, v in parameters.items() if n in own or n not in known}
    if entry.get("parameters"):
        inherited = parameters if isinstance(parameters, dict) else {}
        parameters = {**inherited, **entry["parameters"]}
    document["parameters"] = parameters
    return document


def _relocate(fault: Fault, index: int, entry: Mapping[str, Any]) -> Fault:
    """A fault of a variant's recipe, told where the sweep's document has it."""
    own = {f"/parameters/{escape_pointer(name)}" for name in entry.get("parameters") or ()}
    if entry.get("merge_method"):
        own.add("/merge_method")
    place = "/".join(fault.pointer.split("/")[:3])
    if place in own:
        return dataclasses.replace(fault, pointer=f"/sweep/{index}{fault.pointer}")
    return fault


def _other_inputs(
    entries: list[tuple[int, dict[str, Any]]],
    methods: list[MergeMethod | None],
    *,
    is_named: bool,
) -> list[Fault]:
    """Methods that take the base model differently have different inputs."""
    first = methods[0]
    faults = []
    for (index, _), method in zip(entries, methods, strict=True):
        if not (first and method):
            continue
        if method.uses_base(is_named=is_named) != first.uses_base(is_named=is_named):
            detail = (
                f"{method.name} and {first.name} differ in whether they use a base model; the"
                " variants of a sweep read the same inputs. Submit them as two merges."
            )
            faults.append(Fault(f"/sweep/{index}/merge_method", "incompatible_options", detail))
    return faults


def _equal_variants(variants: list[Variant]) -> list[str]:
    names: dict[str, list[str]] = {}
    for variant in variants:
        names.setdefault(variant.recipe.digest, []).append(variant.name)
    return [
        f"The variants {', '.join(equal)} are the same merge."
        for equal in names.values()
        if len(equal) > 1
    ]
