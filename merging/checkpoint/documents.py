"""JSON from checkpoints, read as untrusted input, and untrusted values as messages show them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import msgspec

from merging.errors import CheckpointError

Value = TypeVar("Value")


class _Key(str):
    """A key of an object, of a type of its own so that decoding asks about each."""

    __slots__ = ()


def decode_members(
    data: bytes | msgspec.Raw,
    value_type: type[Value],
    uri: str,
    *,
    what: str,
    code: str,
    max_members: int,
) -> dict[str, Value]:
    """Decode a JSON object whose values all have one type, stopping at the first that has not.

    A key that comes twice is refused, because readers disagree on which of the two counts. Time
    and memory stay proportional to what is accepted, not to what a forged file could unfold to.

    Args:
        data: UTF-8 bytes.
        value_type: Type of the values; ``msgspec.Raw`` leaves them as bytes.
        uri: The file, for messages.
        what: What the object is, for messages (``header``).
        code: Code of the errors.
        max_members: Most keys that are accepted.

    Raises:
        CheckpointError: It is not UTF-8, not JSON, not an object, or has other values.
    """
    seen: set[str] = set()

    def check_key(_type: type, key: str) -> _Key:
        if key in seen:
            _refuse(f"has the key {shorten(key)} twice", what, uri, code)
        seen.add(key)
        if len(seen) > max_members:
            _refuse(f"has more than the {max_members} keys that it may have", what, uri, code)
        return _Key(key)

    decoder = msgspec.json.Decoder(dict[_Key, value_type], dec_hook=check_key)  # type: ignore[valid-type]  # a type known at run time
    try:
        str(memoryview(data), "utf-8")  # values left as bytes are not looked at otherwise
        found = decoder.decode(bytes(data))
    except UnicodeDecodeError as error:
        _refuse(f"is not UTF-8 at byte {error.start}", what, uri, code)
    except RecursionError:
        _refuse("is nested too deeply", what, uri, code)
    except msgspec.ValidationError as error:
        _refuse(f"has a value of a wrong type ({error})", what, uri, code)
    except msgspec.DecodeError as error:
        _refuse(f"is not valid JSON ({error})", what, uri, code)
    return {str(key): value for key, value in found.items()}


def parse_config(data: bytes, uri: str) -> dict[str, Any]:
    """Parse ``config.json``, as lenient as Python, which writes and reads these files.

    ``Infinity`` and ``NaN``, which JSON does not have, are kept as ``{"__float__": "Infinity"}``:
    the form in which transformers 5 writes and reads them.

    Raises:
        CheckpointError: ``config_invalid``.
    """
    what, code = "JSON", "config_invalid"
    try:
        found = json.loads(str(data, "utf-8"), parse_constant=lambda name: {"__float__": name})
    except UnicodeDecodeError as error:
        _refuse(f"is not UTF-8 at byte {error.start}", what, uri, code)
    except RecursionError:
        _refuse("is nested too deeply", what, uri, code)
    except ValueError as error:  # JSONDecodeError, or an integer of thousands of digits
        _refuse(f"is not valid JSON ({error})", what, uri, code)
    if not isinstance(found, dict):
        _refuse(f"is a {type(found).__name__} where an object is expected", what, uri, code)
    if not _is_shallow(found, _MAX_CONFIG_DEPTH):
        _refuse(f"is nested more than {_MAX_CONFIG_DEPTH} levels deep", what, uri, code)
    return found


_MAX_CONFIG_DEPTH = 64


def _is_shallow(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner)


def _refuse(reason: str, what: str, uri: str, code: str) -> NoReturn:
    raise CheckpointError(
        f"The {what} of {uri} {reason}. The file is damaged: copy or save it again.",
        code=code,
        context={"uri": uri},
    ) from None


def shorten(value: object) -> str:
    """``repr`` of an untrusted value: control characters escaped, long and deep parts left out."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxlist, brief.maxtuple = 2, 8, 8
    brief.maxstring = brief.maxother = 120
    return brief.repr(value)


def shorten_all(names: Sequence[str]) -> str:
    """The first ten of many names, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(shorten(name) for name in names[:10]) + more
