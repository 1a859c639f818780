"""Errors that every kind of storage words in the same way."""

from __future__ import annotations

from merging.errors import StorageError


def not_found(uri: str, what: str = "there is no such object") -> StorageError:
    """Nothing is stored at an address."""
    return StorageError(f"{uri}: {what}.", code="not_found", context={"uri": uri})


def source_changed(uri: str, version: str, found: str | None = None) -> StorageError:
    """An object is no longer the one that was planned with."""
    return StorageError(
        f"{uri} was overwritten after it was first looked at; its bytes must not be mixed with "
        "the earlier ones. Start again when nothing writes there any more.",
        code="source_changed",
        context={"uri": uri, "expected": version, "found": found},
    )


def out_of_range(uri: str, start: int, length: int) -> StorageError:
    """A read reaches past the end of an object."""
    return StorageError(
        f"{uri} ends before byte {start + length}, to which it was to be read.",
        code="out_of_range",
        context={"uri": uri, "start": start, "length": length},
    )


def too_large(uri: str, size: int, limit: int) -> StorageError:
    """An object is larger than the caller accepts."""
    return StorageError(
        f"{uri} has {size} bytes; at most {limit} are accepted here.",
        code="too_large",
        context={"uri": uri, "size": size, "limit": limit},
    )


def already_exists(uri: str) -> StorageError:
    """There is an object, and it was not to be replaced."""
    return StorageError(f"{uri} already exists.", code="already_exists", context={"uri": uri})


def size_mismatch(uri: str, size: int, written: int) -> StorageError:
    """A streamed write has another length than was announced."""
    return StorageError(
        f"{uri} was to have {size} bytes, but {written} were written; it is not published.",
        code="size_mismatch",
        context={"uri": uri, "expected": size, "written": written},
    )
