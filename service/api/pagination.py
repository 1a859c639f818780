"""Cursors: opaque to clients, checked when they come back.

A cursor holds the place in the list and the filters of the list, so that a page cannot be
continued with other ones.
"""

from __future__ import annotations

import binascii
import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import TypeVar

import msgspec

from service.jobs.records import JobCursor
from service.problems import RequestError

_CHECK_BYTES = 6
_LONGEST = 8192


Filters = TypeVar("Filters", bound=msgspec.Struct)


def encode_cursor(last: JobCursor, filters: msgspec.Struct) -> str:
    """The cursor of the page after ``last``, with the filters of its list."""
    payload = msgspec.json.encode((last, filters))
    return urlsafe_b64encode(_checksum(payload) + payload).decode().rstrip("=")


def decode_cursor(cursor: str, kind: type[Filters]) -> tuple[JobCursor, Filters]:
    """The place and the filters of a cursor of a list with this kind of filters.

    Raises:
        RequestError: ``bad_cursor`` if it is not one of ours, unchanged.
    """
    try:
        if len(cursor) > _LONGEST:
            raise ValueError("too long")
        data = urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
        check, payload = data[:_CHECK_BYTES], data[_CHECK_BYTES:]
        if check != _checksum(payload):
            raise ValueError("changed")
        last, filters = msgspec.json.decode(payload, type=tuple[JobCursor, msgspec.Raw])
        return last, msgspec.json.decode(filters, type=kind)
    except (ValueError, binascii.Error, msgspec.MsgspecError):
        raise RequestError(
            "The cursor is not one that this service gave; begin again without it.",
            code="bad_cursor",
        ) from None


def _checksum(payload: bytes) -> bytes:
    """Against accidents and guessing only: a cursor opens nothing that the list does not."""
    return hashlib.sha256(payload).digest()[:_CHECK_BYTES]
