"""The samples that statistics are taken of: read and checked line by line when a merge is planned.

The worker that turns them into tokens reads the same bytes again, pinned to the same version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merging.errors import Fault, RecipeError
from merging.recipe.calibration import CalibrationSettings
from merging.storage.base import ObjectStat, Storage

MAX_DATA_BYTES = 256 << 20
"""Largest file of samples."""

_SHOWN = 10

Sample = str | list[int] | list[dict[str, Any]]
"""A text, token ids, or messages for a chat template."""


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of one expert.

    Attributes:
        settings: What the recipe says of them.
        items: The samples.
        file: Where they were read; None if they stand in the recipe.
    """

    settings: CalibrationSettings
    items: tuple[Sample, ...]
    file: ObjectStat | None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.items)

    @property
    def needs_tokenizer(self) -> bool:
        """Whether any is not in tokens yet."""
        return any(not is_tokens(item) for item in self.items)

    @property
    def length(self) -> int:
        """Most tokens that a sample can have."""
        if self.needs_tokenizer:
            return self.settings.max_length
        return max(map(len, self.items))

    @property
    def digest(self) -> str:
        """``sha256:…`` of the samples and of what decides how they become tokens."""
        told = [self.items, self.settings.max_length, self.settings.chat_template]
        canonical = json.dumps(told, separators=(",", ":"), ensure_ascii=True)
        return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def is_tokens(item: Sample) -> bool:
    """Whether a sample is token ids."""
    return not isinstance(item, str) and not isinstance(item[0], dict)


def read_samples(
    settings: CalibrationSettings, storage: Storage, pointer: str, *, vocab_size: int | None
) -> Samples:
    """The samples of one expert.

    Args:
        settings: Where they are.
        storage: To read a file.
        pointer: The ``calibration`` of the recipe that names them.
        vocab_size: Of the model; None if its config does not say.

    Raises:
        RecipeError: ``bad_parameter`` with a fault for each bad line (the first ten).
        StorageError: The file cannot be read.
    """
    if not isinstance(settings.data, str):
        lines = [(f"sample {n}", item) for n, item in enumerate(settings.data, 1)]
        return Samples(settings, _check(lines, settings, pointer, vocab_size), None)
    uri = storage.normalise(settings.data)
    if uri.endswith(".safetensors"):
        detail = f"{uri} holds tensors; only models that see images are run on such."
        fault = Fault(pointer, "bad_parameter", detail)
        raise RecipeError(detail, code="bad_parameter", faults=[fault])
    stat = storage.stat(uri)
    data = storage.read_bytes(uri, limit=MAX_DATA_BYTES, version=stat.version)
    return Samples(settings, parse_lines(data, settings, uri, pointer, vocab_size), stat)


def parse_lines(
    data: bytes,
    settings: CalibrationSettings,
    uri: str,
    pointer: str = "/calibration",
    vocab_size: int | None = None,
) -> tuple[Sample, ...]:
    """The samples of a JSON Lines file; arguments and errors as of :func:`read_samples`."""
    lines: list[tuple[str, Any]] = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        if len(lines) == settings.samples:
            break
        lines.append((f"{uri}, line {number}", _field(line, settings.field or "text")))
    return _check(lines, settings, pointer, vocab_size)


class _Bad(str):
    """In place of a sample: what is wrong with its line."""

    __slots__ = ()


def _field(line: bytes, field: str) -> Any:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return _Bad("is not JSON")
    if not isinstance(found, dict):
        return _Bad("is not a JSON object")
    if field not in found:
        known = ", ".join(map(repr, sorted(found)[:5])) or "none"
        return _Bad(f"has no field {field!r} (it has {known}); name another with 'field'")
    return found[field]


def _check(
    lines: Sequence[tuple[str, Any]],
    settings: CalibrationSettings,
    pointer: str,
    vocab_size: int | None,
) -> tuple[Sample, ...]:
    lines = lines[: settings.samples]
    faults = []
    if not lines:
        faults.append(Fault(pointer, "bad_parameter", f"{settings.data} holds no samples."))
    for place, item in lines:
        wrong = _wrong(item, settings, vocab_size)
        if wrong is not None:
            faults.append(Fault(pointer, "bad_parameter", f"{place} {wrong}."))
    if faults:
        more = f" ({len(faults) - 1} more.)" if len(faults) > 1 else ""
        raise RecipeError(faults[0].detail + more, code="bad_parameter", faults=faults[:_SHOWN])
    return tuple(item for _, item in lines)


def _wrong(item: Any, settings: CalibrationSettings, vocab_size: int | None) -> str | None:
    """What is wrong with a sample; None if nothing is."""
    if isinstance(item, _Bad):
        return str(item)
    if isinstance(item, str):
        return None if item.strip() else "is empty"
    if not isinstance(item, list):
        return "is neither a text nor a list"
    if not item:
        return "is empty"
    if settings.chat_template and all(isinstance(message, dict) for message in item):
        return None
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in item):
        return "is a list of something else than token ids"
    if len(item) > settings.max_length:
        return f"has {len(item)} tokens; max_length is {settings.max_length}"
    outside = [t for t in item if t < 0 or (vocab_size is not None and t >= vocab_size)]
    if outside:
        return f"has the token id {outside[0]}, outside of the model's {vocab_size} tokens"
    return None
