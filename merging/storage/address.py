"""Checks on addresses that hold for every kind of storage.

Addresses come from users' recipes: everything that could mean two things to two readers (control
characters, encoded dots and slashes, ``..``) is refused here, before any backend sees it.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from merging.errors import StorageError

LOCAL = "file"
"""Scheme of local paths, written with or without ``file://``."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCHEME_WITHOUT_SLASHES = re.compile(r"(?:file|s3):", re.IGNORECASE)
_SHOWN_CHARACTERS = 300


def bad_uri(uri: str, why: str) -> StorageError:
    """The error for a malformed address."""
    shown = _without_secrets(uri)
    return StorageError(
        f"{shown!r} is not a usable address: {why}", code="bad_uri", context={"uri": shown}
    )


def scheme_of(uri: str) -> str:
    """The scheme of an address in lower case; a plain path is ``file``.

    Raises:
        StorageError: ``bad_uri`` if it is empty, holds control characters or cannot be encoded.
    """
    if not uri:
        raise bad_uri(uri, "it is empty.")
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in uri):
        raise bad_uri(uri, "it holds control characters.")
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise bad_uri(uri, "it holds characters that UTF-8 cannot encode.") from None
    match = _SCHEME.match(uri)
    if match:
        return match.group(1).lower()
    if "://" in uri:
        raise bad_uri(uri, "what stands before :// is no scheme.")
    if _SCHEME_WITHOUT_SLASHES.match(uri):
        raise bad_uri(uri, "two slashes must follow the scheme, as in s3://bucket/key.")
    return LOCAL


def after_scheme(uri: str) -> str:
    """What follows ``scheme://``, free of query, fragment, and segments in disguise.

    Raises:
        StorageError: ``bad_uri`` for a query, a fragment, a backslash, or a segment that is, or
            decodes to, ``.`` or ``..`` or something with a slash.
    """
    rest = uri.split("://", 1)[1]
    for char, name in (("?", "a query"), ("#", "a fragment"), ("\\", "a backslash")):
        if char in rest:
            raise bad_uri(uri, f"{name} is not allowed.")
    for segment in rest.split("/"):
        if _decodes_to_a_step(segment):
            raise bad_uri(uri, "segments that mean '.', '..' or hide a slash are not allowed.")
    return rest


def _decodes_to_a_step(segment: str) -> bool:
    """Whether any round of percent-decoding leaves ``.``, ``..`` or a hidden separator."""
    decoded = segment
    while True:
        if decoded in {".", ".."} or any(char in decoded for char in "/\\\0"):
            return True
        once_more = unquote(decoded)
        if once_more == decoded:
            return False
        decoded = once_more


def _without_secrets(uri: str) -> str:
    """An address fit for messages: passwords before ``@`` and signatures after ``?`` are masked."""
    if "://" in uri:
        uri = re.sub(r"://.*@", "://***@", uri, flags=re.DOTALL)
        uri = re.sub(r"\?.*", "?***", uri, flags=re.DOTALL)
    return uri if len(uri) <= _SHOWN_CHARACTERS else uri[:_SHOWN_CHARACTERS] + "…"
