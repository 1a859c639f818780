"""Rows to records and back."""

from __future__ import annotations

import zlib
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa

Record = TypeVar("Record", bound=msgspec.Struct)


def to_record(row: sa.Row[Any], record: type[Record]) -> Record:
    """A row of a table whose columns are named like the record's fields."""
    columns = row._mapping.items()  # noqa: SLF001 - SQLAlchemy's public name for it
    return msgspec.convert({str(name): value for name, value in columns}, record)


def to_json(value: object) -> Any:
    """Structs, tuples and times as plain JSON."""
    return msgspec.to_builtins(value)


def pack(data: bytes) -> bytes:
    """Compress a document."""
    return zlib.compress(data, level=6)


def unpack(data: bytes) -> bytes:
    """Inverse of :func:`pack`."""
    return zlib.decompress(data)


def pack_json(value: object) -> bytes:
    """A JSON document, compressed."""
    return pack(msgspec.json.encode(value))
