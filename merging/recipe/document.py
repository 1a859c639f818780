"""From text that nobody vouches for to plain data: mappings, lists, text, numbers, booleans, null.

YAML can do far more than a recipe needs, and most of that is a trap: tags that build objects,
aliases that multiply, dates, keys that are not text, the last of two equal keys winning. All of it
is refused with a sentence, before memory or time is spent on it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode

from merging.errors import Fault, RecipeError

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML without its C library: slower, otherwise the same
    from yaml import SafeLoader  # type: ignore[assignment] # same interface, another class

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 20_000
MAX_ALIASES = 100
_MAX_INTEGER = 2**63

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)


def load_document(
    document: str | bytes | Mapping[str, Any], faults: list[Fault], *, several: bool = False
) -> dict[str, Any]:
    """Read a recipe's text (YAML, or JSON, told by its first character), or copy a mapping.

    Values that are not plain data are added to ``faults`` and become None. With ``several``, a text
    of several YAML documents becomes a mapping with these as a list under ``documents``.

    Raises:
        RecipeError: ``invalid_recipe``: it cannot be read, is no mapping, too large or too deep.
    """
    if isinstance(document, Mapping):
        data: Any = document
    else:
        text = _decode(document)
        is_json = text.lstrip().startswith("{")
        data = _load_json(text) if is_json else _load_yaml(text, several=several)
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"A recipe is a mapping with keys such as 'models' and 'merge_method'; this document"
            f" is {_describe(data)}."
        )
    plain = _PlainCopy(faults).copy(data, "", 0)
    assert isinstance(plain, dict)
    return plain


def escape_pointer(key: str) -> str:
    """A key as a part of a JSON pointer (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")


def _decode(document: str | bytes) -> str:
    try:
        raw = document.encode() if isinstance(document, str) else document
        text = raw.decode("utf-8-sig")
    except UnicodeError as error:
        raise RecipeError(f"The recipe is not UTF-8 text: {error}.") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"The recipe has {len(raw)} bytes; at most {MAX_BYTES} are read.")
    return text


def _describe(data: object) -> str:
    if isinstance(data, str):
        return f"the text {_shorten(data)} (give the recipe itself rather than a file name)"
    names = {type(None): "empty", list: "a list", bool: "a boolean", int: "a number"}
    return names.get(type(data), f"a {type(data).__name__}")


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")


def _load_json(text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(items)
        if len(mapping) < len(items):
            [(key, _)] = Counter(key for key, _ in items).most_common(1)
            raise RecipeError(f"The key {_shorten(key)} stands twice in one mapping.")
        return mapping

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError:
        return _load_yaml(text)  # YAML's flow style begins with a brace too
    except (ValueError, RecursionError):
        raise RecipeError(
            f"The recipe is nested deeper than {MAX_DEPTH} levels or holds a number that is too"
            " long."
        ) from None


def _load_yaml(text: str, *, several: bool = False) -> Any:
    try:
        _check_events(text, several=several)
        found = [item for item in yaml.load_all(text, Loader=_Loader) if item is not None]
        return {"documents": found} if len(found) > 1 else next(iter(found), None)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(f"The recipe is not valid YAML: {_explain(error)}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe is not valid YAML: {error}.") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RecipeError(f"The recipe holds a number that cannot be read: {error}.") from None


def _explain(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{error.problem or error.context}{place}"


def _check_events(text: str, *, several: bool) -> None:
    """Refuse, while it is still a stream of events, what must not be built in memory."""
    depth = nodes = aliases = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        nodes += isinstance(event, yaml.NodeEvent)
        if documents > 1 and not several:
            raise RecipeError(
                f"The text holds several YAML documents (the second begins at line {line}), where"
                " one is expected."
            )
        if depth > MAX_DEPTH:
            raise RecipeError(f"Line {line} is nested deeper than {MAX_DEPTH} levels.")
        if aliases > MAX_ALIASES or nodes > MAX_NODES:
            raise RecipeError(
                f"The recipe has more than {MAX_NODES} values or {MAX_ALIASES} aliases."
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise RecipeError(f"Line {line} has the tag {_shorten(tag)}; a recipe has no tags.")


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """YAML 1.1's rules, except that 1e-5 is a number, and 1:30 and 010 are not base 60 or 8."""
    own = ((f"{_TAG}int", _INTEGER, "-+0123456789"), (f"{_TAG}float", _FLOAT, "-+.0123456789"))
    replaced = {tag for tag, _, _ in own}
    rules = {
        first: [rule for rule in known if rule[0] not in replaced]
        for first, known in SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, pattern, firsts in own:
        for first in firsts:
            rules.setdefault(first, []).append((tag, pattern))
    return rules


class _Loader(SafeLoader):
    """The safe loader, with mappings whose keys are text, different, and written out."""

    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == f"{_TAG}merge":
                raise RecipeError(f"Line {line} has a merge key (<<); write its keys out.")
            if not isinstance(key, ScalarNode) or key.tag != f"{_TAG}str":
                shown = _shorten(key.value) if isinstance(key, ScalarNode) else "a collection"
                raise RecipeError(
                    f"The key {shown} at line {line} is not text; put it in quotes if it is meant."
                )
            if key.value in seen:
                raise RecipeError(
                    f"The key {_shorten(key.value)} stands twice (again at line {line})."
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _PlainCopy:
    """Copies data into plain dicts and lists; bounded even where aliases share or close a loop."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults
        self._nodes = 0

    def copy(self, value: Any, pointer: str, depth: int) -> Any:
        """The copy of one value; what is not plain becomes a fault and None."""
        self._nodes += 1
        if depth > MAX_DEPTH:
            raise RecipeError(
                f"The recipe is nested deeper than {MAX_DEPTH} levels.",
                faults=[
                    Fault(
                        pointer[:200], "invalid_recipe", f"Nested deeper than {MAX_DEPTH} levels."
                    )
                ],
            )
        if self._nodes > MAX_NODES:
            raise RecipeError(f"The recipe has more than {MAX_NODES} values (aliases counted out).")
        if isinstance(value, Mapping):
            return {
                self._key(key, pointer): self.copy(
                    item, f"{pointer}/{escape_pointer(str(key))}", depth + 1
                )
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.copy(v, f"{pointer}/{i}", depth + 1) for i, v in enumerate(value)]
        return self._scalar(value, pointer)

    def _key(self, key: object, pointer: str) -> str:
        if isinstance(key, str):
            return str(self._scalar(key, pointer))
        self._refuse(pointer, f"The key {key!r} is not text.")
        return ""

    def _scalar(self, value: object, pointer: str) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            if not any(map(_is_forbidden, value)):
                return str(value)
            self._refuse(pointer, "The text holds control characters or is not Unicode.")
        elif isinstance(value, int):
            if abs(value) < _MAX_INTEGER:
                return int(value)
            self._refuse(pointer, "The whole number is too large.")
        elif isinstance(value, float):
            if math.isfinite(value):
                return float(value)
            self._refuse(pointer, f"{value} is not a finite number.")
        else:
            kind = type(value).__name__
            self._refuse(pointer, f"A {kind} is not recipe data; put dates and so on in quotes.")
        return None

    def _refuse(self, pointer: str, detail: str) -> None:
        self._faults.append(Fault(pointer, "invalid_recipe", detail))


def _is_forbidden(character: str) -> bool:
    """Control characters, which databases refuse, and halves of surrogate pairs."""
    return (ord(character) < 32 and character not in "\t\n\r") or "\ud800" <= character <= "\udfff"
