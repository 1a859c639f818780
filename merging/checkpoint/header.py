"""Safetensors headers, read as untrusted input and written deterministically.

A safetensors file is an 8-byte little-endian length, a JSON object of that length, and the tensors'
bytes without gap or overlap. Everything that the header claims is checked against the size of the
file before anything is allocated by it. The rules are those of the reference library; where that
accepts what readers disagree on (a key twice, an empty name), this refuses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, Protocol

import msgspec

from merging.checkpoint.documents import decode_members, shorten
from merging.dtypes import ITEM_SIZE
from merging.errors import CheckpointError
from merging.storage.base import Storage

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference library; the largest checkpoints stay under a tenth of it."""

MAX_TENSORS = 500_000
"""In one file, or in an index; the largest checkpoints have a fifth as many."""

_FIRST_READ_BYTES = 64 << 10
"""One request fetches the header of nearly every file: 64 KiB describe about 600 tensors."""

_LENGTH_BYTES = 8
_ALIGNMENT = 8  # of the data, so that a mapped file can be viewed as any type
_METADATA = "__metadata__"
_MAX_SIZE = 2**63 - 1
_MAX_NAME_CHARACTERS = 1000
_MAX_DIMENSIONS = 64  # torch's own limit
_MIN_ENTRY_BYTES = 50  # "a":{"dtype":"U8","shape":[],"data_offsets":[0,0]}
_UNWRITTEN = "a file to be written"

_UNREAD_DTYPES = frozenset(
    {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}
)
"""Types of the format that no merge method works on: packed, scaled or complex numbers."""


class PinnedFile(Protocol):
    """A file at a known version: ``WeightFile`` and ``ObjectStat`` are."""

    @property
    def uri(self) -> str:
        """Normalised address."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    @property
    def version(self) -> str:
        """Pin of these bytes."""


_Size = Annotated[int, msgspec.Meta(ge=0, le=_MAX_SIZE)]


class _Description(msgspec.Struct, frozen=True):
    """What a header says of a tensor; offsets count from the start of the data."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=_MAX_DIMENSIONS)]
    data_offsets: tuple[_Size, _Size]


_NUM_QUOTES = 8  # of three keys and one string: any other key, or one of them again, adds some


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of one file; ``start`` and ``end`` are absolute offsets in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors in the order of their bytes, and the free-form metadata."""

    entries: tuple[HeaderEntry, ...]
    metadata: dict[str, str]


def read_header(storage: Storage, file: PinnedFile) -> Header:
    """Read and check the header of one file, in one ranged read (two if it is long).

    Raises:
        CheckpointError: ``header_invalid``, ``header_too_large`` or ``dtype_unsupported``.
        StorageError: It cannot be read, or is no longer at the version given.
    """
    first = bytearray(min(file.size, _FIRST_READ_BYTES))
    if first:
        storage.read_into(file.uri, 0, memoryview(first), version=file.version)
    data_start = _data_start(first, file)
    missing = data_start - len(first)
    if missing > 0:
        rest = bytearray(missing)
        storage.read_into(file.uri, len(first), memoryview(rest), version=file.version)
        first += rest
    return parse_header(bytes(first[_LENGTH_BYTES:data_start]), data_start, file.size, file.uri)


def parse_header(header_bytes: bytes, data_start: int, file_size: int, uri: str) -> Header:
    """Check the JSON part of a header.

    Args:
        header_bytes: The JSON, without the length in front of it.
        data_start: Absolute offset of the first byte after it.
        file_size: Length of the whole file.
        uri: The file, for messages.

    Raises:
        CheckpointError: ``header_invalid`` or ``dtype_unsupported``, naming file and tensor.
    """
    if not header_bytes.startswith(b"{"):
        _refuse(uri, f"starts with {header_bytes[:1]!r} where '{{' is expected")
    members = decode_members(
        header_bytes,
        msgspec.Raw,
        uri,
        what="header",
        code="header_invalid",
        max_members=min(len(header_bytes) // _MIN_ENTRY_BYTES + 1, MAX_TENSORS),
    )
    metadata = _checked_metadata(members.pop(_METADATA, None), uri)
    data_size = file_size - data_start
    decode = msgspec.json.Decoder(_Description).decode
    entries = []
    for name, text in members.items():
        description = _checked_description(name, text, decode, uri)
        start, end = _checked_range(name, description, data_size, uri)
        entries.append(
            HeaderEntry(
                name, description.dtype, description.shape, data_start + start, data_start + end
            )
        )
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_coverage(entries, data_start, file_size, uri)
    return Header(tuple(entries), metadata)


def encode_header(
    entries: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """The length and JSON that precede the data of a file.

    Args:
        entries: Name, dtype and shape of each tensor, in the order of their bytes.
        metadata: Strings by string. transformers wants ``{"format": "pt"}``.

    Returns:
        Bytes whose number is a multiple of 8; the same input gives the same bytes.

    Raises:
        CheckpointError: A tensor that a file cannot hold, or more than the format allows.
    """
    document: dict[str, Any] = {}
    if metadata:
        document[_METADATA] = dict(sorted(metadata.items()))
    end = 0
    for name, dtype, shape in entries:
        fault = "is there twice" if name in document else _name_fault(name)
        if fault:
            raise CheckpointError(
                f"Tensor {shorten(name)} cannot be written: it {fault}.",
                context={"tensor_name": name},
            )
        start, end = end, end + math.prod(shape) * _checked_item_size(dtype, name, _UNWRITTEN)
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        _refuse_size(_UNWRITTEN, len(text))
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _data_start(first: bytearray, file: PinnedFile) -> int:
    if first.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{file.uri} is a Git LFS pointer, not the weights. Run 'git lfs pull' where it was"
            " cloned, and copy the file again.",
            context={"uri": file.uri},
        )
    if len(first) < _LENGTH_BYTES:
        _refuse(file.uri, f"cannot be there: the file has {file.size} bytes, at least 8 are needed")
    length = int.from_bytes(first[:_LENGTH_BYTES], "little")
    if length == 0:
        _refuse(file.uri, "is empty (length 0)")
    if length > file.size - _LENGTH_BYTES:
        _refuse(
            file.uri,
            f"claims {length} bytes but the file has {file.size}: it is cut short, or not a"
            " safetensors file",
        )
    if length > MAX_HEADER_BYTES:
        _refuse_size(file.uri, length)
    return _LENGTH_BYTES + length


def _checked_metadata(text: msgspec.Raw | None, uri: str) -> dict[str, str]:
    if text is None:
        return {}
    return decode_members(
        text,
        str,
        uri,
        what=f"{_METADATA} in the header",
        code="header_invalid",
        max_members=MAX_TENSORS,
    )


def _checked_description(
    name: str, text: msgspec.Raw, decode: Callable[[msgspec.Raw], _Description], uri: str
) -> _Description:
    fault = _name_fault(name)
    if fault:
        _refuse(uri, f"names a tensor {shorten(name)}, which {fault}")
    try:
        description = decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        _refuse(uri, f"does not describe it by dtype, shape and data_offsets ({error})", name)
    if bytes(text).count(b'"') != _NUM_QUOTES:
        _refuse(uri, "gives it other fields than dtype, shape and data_offsets, each once", name)
    return description


def _checked_range(
    name: str, description: _Description, data_size: int, uri: str
) -> tuple[int, int]:
    item_size = _checked_item_size(description.dtype, name, uri)
    num_bytes = item_size
    for size in description.shape:
        num_bytes *= size
        if num_bytes > _MAX_SIZE:
            _refuse(
                uri, f"gives it shape {shorten(list(description.shape))}: over 2**63 bytes", name
            )
    start, end = description.data_offsets
    if end < start:
        _refuse(uri, f"gives it data_offsets [{start}, {end}], of which the end comes first", name)
    if end > data_size:
        _refuse(
            uri,
            f"puts its end at byte {end} of the data, but the file holds only {data_size} bytes of"
            " data: it is cut short",
            name,
        )
    if end - start != num_bytes:
        _refuse(
            uri,
            f"gives it {end - start} bytes (offsets {start} to {end}), but {description.dtype} of"
            f" shape {shorten(list(description.shape))} takes {num_bytes}",
            name,
        )
    return start, end


def _name_fault(name: str) -> str | None:
    if not name:
        return "is empty"
    if len(name) > _MAX_NAME_CHARACTERS:
        return f"has {len(name)} characters; at most {_MAX_NAME_CHARACTERS} are allowed"
    if not name.isprintable():
        return "has control or invisible characters"
    return "is reserved" if name == _METADATA else None


def _checked_item_size(dtype: str, name: str, uri: str) -> int:
    item_size = ITEM_SIZE.get(dtype)
    if item_size is not None:
        return item_size
    is_known = dtype in _UNREAD_DTYPES
    reason = "quantised or complex and not merged" if is_known else "not one of safetensors"
    raise CheckpointError(
        f"Tensor {shorten(name)} in {uri} has dtype {shorten(dtype)}, which is {reason}. Types that"
        f" are read: {', '.join(ITEM_SIZE)}. Convert the checkpoint to one of them.",
        code="dtype_unsupported",
        context={"uri": uri, "tensor_name": name},
    )


def _check_coverage(
    entries: Sequence[HeaderEntry], data_start: int, file_size: int, uri: str
) -> None:
    """Entries in order of their offsets must cover the data part exactly."""
    end = data_start
    for number, entry in enumerate(entries):
        if entry.start != end:
            before = f"tensor {shorten(entries[number - 1].name)}" if number else "the header"
            fault = (
                f"lets it overlap {before} by {end - entry.start} bytes"
                if entry.start < end
                else f"leaves a hole of {entry.start - end} bytes after {before}"
            )
            _refuse(uri, fault, entry.name)
        end = entry.end
    if end != file_size:
        _refuse(
            uri, f"describes {end} of the file's {file_size} bytes; {file_size - end} are left over"
        )


def _refuse(uri: str, reason: str, name: str | None = None) -> NoReturn:
    subject = f"Tensor {shorten(name)}: the header of {uri}" if name else f"The header of {uri}"
    raise CheckpointError(
        f"{subject} {reason}. The file is damaged: copy or save it again.",
        code="header_invalid",
        context={"uri": uri} | ({"tensor_name": name} if name else {}),
    )


def _refuse_size(uri: str, length: int) -> NoReturn:
    raise CheckpointError(
        f"The header of {uri} has {length} bytes; at most {MAX_HEADER_BYTES} are allowed. Save the"
        " checkpoint in more files.",
        code="header_too_large",
        context={"uri": uri},
    )
