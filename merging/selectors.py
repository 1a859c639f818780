"""Which value of a parameter applies to which tensor: gradients over layers, and name filters.

A value in a recipe is a scalar; a *gradient* (a list of numbers that is interpolated over the
layers); or a list of *conditions*, each with a filter on tensor names and a scalar or gradient of
its own. The meaning is mergekit's:

- The position of layer ``l`` of ``L`` is ``l / (L - 1)``; a tensor outside the layers is at 0, the
  first value of a gradient; the layer of a one-layer model is at 1, the last value.
- A filter is a substring of the tensor's name; ``*`` and no filter match every tensor. The first
  condition that matches decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from merging.errors import Fault

ANY = "*"
"""Filter that matches every tensor."""


@dataclass(frozen=True, slots=True)
class Gradient:
    """Numbers spread evenly over the layers, interpolated linearly between them."""

    values: tuple[float, ...]

    def at(self, position: float) -> float:
        """The value at a position in [0, 1]."""
        scaled = position * (len(self.values) - 1)
        index = int(scaled)
        left, right = self.values[index], self.values[min(index + 1, len(self.values) - 1)]
        fraction = scaled - index
        value = (1 - fraction) * left + fraction * right
        return min(max(value, min(left, right)), max(left, right))  # rounding stays in range


@dataclass(frozen=True, slots=True)
class Condition:
    """A value for the tensors whose names contain ``filter`` (None: all tensors)."""

    filter: str | None
    value: Any

    def matches(self, tensor_name: str) -> bool:
        """Whether it applies to the tensor."""
        return self.filter is None or self.filter in tensor_name


@dataclass(frozen=True, slots=True)
class Conditions:
    """Conditions in recipe order; the first that matches decides."""

    entries: tuple[Condition, ...]


ParameterValue = Any
"""A scalar (or another JSON value that the method takes as it is), Gradient, or Conditions."""


def layer_position(layer: int, num_layers: int) -> float:
    """Position of a layer in [0, 1]; a negative layer is outside the layers."""
    if layer < 0:
        return 0.0
    return 1.0 if num_layers <= 1 else layer / (num_layers - 1)


def parse_value(
    raw: Any, pointer: str, read: Callable[[Any, str], Any], faults: list[Fault]
) -> ParameterValue:
    """Read a value as it stands in a recipe.

    Args:
        raw: Plain data.
        pointer: Where it stands.
        read: Called with every leaf (a scalar, each number of a gradient, or another JSON value
            that a method takes as it is) and its pointer; returns what to keep of it.
        faults: What is wrong is added here.
    """
    if isinstance(raw, dict):
        return Conditions((_condition(raw, pointer, read, faults),))
    if isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        entries = []
        for index, item in enumerate(raw):
            here = f"{pointer}/{index}"
            if isinstance(item, dict):
                entries.append(_condition(item, here, read, faults))
            else:
                detail = (
                    f"{item!r} stands beside entries with filters; write it as value: {item!r}"
                    " (an entry without a filter is the default)."
                )
                faults.append(Fault(here, "bad_parameter", detail))
        return Conditions(tuple(entries))
    return _scalar_or_gradient(raw, pointer, read)


def _condition(
    raw: dict[str, Any], pointer: str, read: Callable[[Any, str], Any], faults: list[Fault]
) -> Condition:
    def refuse(where: str, detail: str) -> None:
        faults.append(Fault(where, "bad_parameter", detail))

    for key in sorted(raw.keys() - {"filter", "value"}):
        allowed = "an entry has 'value' and, unless it is the default, 'filter'"
        refuse(pointer, f"Unknown key {key!r}; {allowed}.")
    name_filter = raw.get("filter")
    if name_filter is not None and (not isinstance(name_filter, str) or not name_filter):
        refuse(
            f"{pointer}/filter",
            f"A filter is a part of tensor names or '{ANY}', not {name_filter!r}.",
        )
        name_filter = None
    value = raw.get("value")
    if "value" not in raw:
        refuse(pointer, "An entry needs a 'value'.")
    elif isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
    ):
        refuse(f"{pointer}/value", "Filters cannot be nested.")
    else:
        value = _scalar_or_gradient(value, f"{pointer}/value", read)
    return Condition(None if name_filter == ANY else name_filter, value)


def _scalar_or_gradient(raw: Any, pointer: str, read: Callable[[Any, str], Any]) -> Any:
    if isinstance(raw, list) and raw and all(type(item) in (int, float) for item in raw):
        return Gradient(tuple(read(item, f"{pointer}/{i}") for i, item in enumerate(raw)))
    return read(raw, pointer)


def evaluate(value: ParameterValue, tensor_name: str, position: float) -> Any:
    """The value for one tensor; None if no condition matches.

    Args:
        value: What the recipe says.
        tensor_name: Name that filters look at.
        position: From :func:`layer_position`.
    """
    if isinstance(value, Conditions):
        for condition in value.entries:
            if condition.matches(tensor_name):
                return evaluate(condition.value, tensor_name, position)
        return None
    return value.at(position) if isinstance(value, Gradient) else value


def is_constant(value: ParameterValue) -> bool:
    """Whether it is the same for every tensor."""
    return not isinstance(value, Gradient | Conditions)


def has_gradient(value: ParameterValue) -> bool:
    """Whether it is interpolated over layers anywhere."""
    if isinstance(value, Conditions):
        return any(has_gradient(condition.value) for condition in value.entries)
    return isinstance(value, Gradient)


def to_plain(value: ParameterValue) -> Any:
    """The value as it is written in a recipe, in the one form that :func:`parse_value` inverts."""
    if isinstance(value, Gradient):
        return list(value.values)
    if isinstance(value, Conditions):
        return [
            {"value": to_plain(c.value)} | ({"filter": c.filter} if c.filter else {})
            for c in value.entries
        ]
    return value


def filters(value: ParameterValue) -> Iterator[str]:
    """The name filters in it."""
    if isinstance(value, Conditions):
        for condition in value.entries:
            if condition.filter is not None:
                yield condition.filter
