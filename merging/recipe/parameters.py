"""Checking parameter values against the models that methods declare for them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from merging.errors import Fault
from merging.method import MergeMethod
from merging.parameters import Parameters
from merging.recipe.document import escape_pointer
from merging.selectors import Conditions, ParameterValue, has_gradient, is_constant, parse_value


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value of one parameter must be.

    Attributes:
        adapter: Validates a value without its model.
        is_required: There is no default.
        default: Value when the recipe says nothing.
        takes_gradient: It is a number that may lie between two others.
        is_recipe_wide: It is the same for all tensors.
        description: Of the declaration.
    """

    adapter: TypeAdapter[Any]
    is_required: bool
    default: Any
    takes_gradient: bool
    is_recipe_wide: bool
    description: str


@functools.cache
def parameter_rules(model: type[Parameters]) -> Mapping[str, Rule]:
    """The rules of a parameter model, by the names that recipes use."""
    rules = {}
    for name, info in model.model_fields.items():
        annotation: Any = Annotated[(info.annotation, info.description, *info.metadata)]
        adapter = TypeAdapter[Any](annotation, config=ConfigDict(allow_inf_nan=False))
        schema = adapter.json_schema()
        types = {schema.get("type"), *(s.get("type") for s in schema.get("anyOf", ()))}
        rules[info.alias or name] = Rule(
            adapter=adapter,
            is_required=info.is_required(),
            default=info.get_default(call_default_factory=True, validated_data={}),
            takes_gradient="number" in types,
            is_recipe_wide=name in model.recipe_wide,
            description=info.description or "",
        )
    return rules


def method_rules(method: MergeMethod) -> Mapping[str, Rule]:
    """The rules of everything that may stand under the recipe's own ``parameters``."""
    return {**parameter_rules(method.expert_parameters), **parameter_rules(method.parameters)}


def read_parameters(
    raw: Any,
    pointer: str,
    rules: Mapping[str, Rule] | None,
    faults: list[Fault],
    *,
    misplaced: Set[str] = frozenset(),
) -> dict[str, ParameterValue]:
    """Read one ``parameters`` mapping.

    Args:
        raw: Plain data.
        pointer: Where it stands.
        rules: By name; None while the method is unknown, when only the form is checked.
        faults: What is wrong is added here.
        misplaced: Names that may stand under the recipe's own ``parameters`` only.
    """
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        faults.append(Fault(pointer, "bad_parameter", "'parameters' is a mapping of names."))
        return {}
    values = {}
    for name, value in raw.items():
        here = f"{pointer}/{escape_pointer(name)}"
        if rules is None:
            values[name] = parse_value(value, here, _as_it_is, faults)
        elif name in rules:
            values[name] = _read_value(name, value, here, rules[name], faults)
        elif name in misplaced:
            detail = (
                f"{name!r} belongs to the whole merge, not to one model; move it to the recipe's"
                " own 'parameters'."
            )
            faults.append(Fault(here, "bad_parameter", detail))
        else:
            detail = f"Unknown parameter {shorten(name)}.{nearest(name, rules)}"
            faults.append(Fault(here, "bad_parameter", detail))
    return values


def _as_it_is(leaf: Any, pointer: str) -> Any:  # noqa: ARG001 - the form of parse_value's callback
    return leaf


def _read_value(name: str, raw: Any, pointer: str, rule: Rule, faults: list[Fault]) -> Any:
    def read(leaf: Any, where: str) -> Any:
        try:
            valid = rule.adapter.validate_json(json.dumps(leaf), strict=True)
            return rule.adapter.dump_python(valid, mode="json")
        except ValidationError as error:
            detail = f"{explain(error, name)}, not {shorten(leaf)}."
            if rule.description:
                detail += f" {name}: {rule.description}"
            faults.append(Fault(where, "bad_parameter", detail))
            return leaf

    value = parse_value(raw, pointer, read, faults)
    if has_gradient(value) and not rule.takes_gradient:
        detail = (
            f"{name!r} cannot run through a list of values over the layers; give one value, or"
            " entries with filters."
        )
        faults.append(Fault(pointer, "bad_parameter", detail))
    if isinstance(value, Conditions) and rule.is_recipe_wide:
        faults.append(Fault(pointer, "bad_parameter", f"{name!r} takes no entries with filters."))
    return value


def explain(error: ValidationError, name: str) -> str:
    """What a validation asks for, as the beginning of a sentence about ``name``."""
    wishes = dict.fromkeys(_wish(item["msg"]) for item in error.errors(include_url=False))
    return f"{name} should be {' or '.join(wishes)}"


def _wish(message: str) -> str:
    wish = message.removeprefix("Input should be ").removeprefix("Value error, ")
    return wish.replace("a valid integer", "a whole number").replace("a valid ", "a ")


def shorten(value: Any) -> str:
    """A value for a message, cut if long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:80] + "…"


def check_keys(
    data: Mapping[str, Any], pointer: str, known: Set[str], refuse: Callable[[str, str], None]
) -> None:
    """Refuse keys of a mapping that nobody knows.

    Args:
        data: The mapping.
        pointer: Where it stands.
        known: The keys that there are.
        refuse: Takes a JSON pointer, and what is wrong there.
    """
    for key in data:
        if key not in known:
            detail = f"Unknown key {shorten(key)}.{nearest(key, known)}"
            refuse(f"{pointer}/{escape_pointer(key)}", detail)


def nearest(name: str, known: Mapping[str, Any] | Set[str]) -> str:
    """`` Did you mean …?`` with the nearest known names, or the known names if none is near."""
    if not known:
        return " None are known here."
    near = get_close_matches(name, known, n=2, cutoff=0.6)
    if near:
        return f" Did you mean {' or '.join(repr(n) for n in near)}?"
    return f" Known here: {', '.join(sorted(known))}."


def check_together(
    model: type[Parameters],
    levels: tuple[Mapping[str, ParameterValue], ...],
    pointer: str,
    faults: list[Fault],
) -> None:
    """Check that nothing is missing and, if all values are constant, that they go together.

    Values that vary are checked tensor by tensor when the merge is planned.

    Args:
        model: The declaration.
        levels: Parameters by name, the more specific level first.
        pointer: Where a fault is reported.
        faults: What is wrong is added here.
    """
    values: dict[str, Any] = {}
    for name, rule in parameter_rules(model).items():
        value = next((level[name] for level in levels if name in level), None)
        if value is not None:
            values[name] = value
        elif rule.is_required:
            detail = f"The parameter {name!r} is missing. {name}: {rule.description}"
            faults.append(Fault(pointer, "bad_parameter", detail))
            return
    if not all(is_constant(value) for value in values.values()):
        return
    try:
        model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            where = "/".join([pointer, *map(str, item["loc"][:1])])
            faults.append(Fault(where, "bad_parameter", item["msg"].removeprefix("Value error, ")))
