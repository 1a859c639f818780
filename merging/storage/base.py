"""The interface to everything that holds bytes: local files and object storage.

Addresses are strings: a local path, ``file:///path`` or ``s3://bucket/key``. Retries with backoff
on throttling and transient faults live behind this interface and nowhere else; every method raises
only :class:`merging.errors.StorageError`. Implementations are safe to call from many threads.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What is known of one stored object.

    Attributes:
        uri: Its normalised address.
        size: Length in bytes.
        version: Pin of these exact bytes: the ETag, or size, mtime and inode of a local file.
    """

    uri: str
    size: int
    version: str


class Writer(Protocol):
    """A streamed write that becomes visible whole at :meth:`commit`, or not at all.

    ``buffer_bytes`` is the most host memory that the writer itself holds.

    As a context manager it aborts unless it was committed. ``write`` may be called from one
    thread at a time; it may hand the bytes to upload threads, so the caller must not change
    ``data`` until ``commit`` returns or the buffer is released (implementations that keep a
    reference beyond the call copy small pieces and document it: callers may reuse a buffer as soon
    as ``write`` returns).
    """

    buffer_bytes: int

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes."""

    def commit(self) -> ObjectStat:
        """Make the object visible and durable; returns its version."""

    def abort(self) -> None:
        """Leave no trace. Harmless after ``commit`` or a second time."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Storage(Protocol):
    """One kind of storage, or a router over several kinds."""

    def normalise(self, uri: str) -> str:
        """The canonical form of an address, without trailing slash.

        Raises:
            StorageError: ``bad_uri`` for a malformed one, ``uri_not_allowed`` outside the roots.
        """

    def stat(self, uri: str) -> ObjectStat:
        """Size and version of one object. Raises ``not_found`` or ``denied``."""

    def list(self, prefix: str) -> list[ObjectStat]:
        """All objects under a folder (recursively), sorted by address; empty if there are none."""

    def read_into(self, uri: str, start: int, buffer: memoryview, *, version: str) -> None:
        """Fill ``buffer`` with the bytes from ``start``.

        Raises:
            StorageError: ``source_changed`` if the object is no longer at ``version``.
        """

    def read_bytes(self, uri: str, *, limit: int, version: str | None = None) -> bytes:
        """A whole small object. Raises ``StorageError`` (``too_large``) above ``limit`` bytes."""

    def write_bytes(self, uri: str, data: bytes, *, if_absent: bool = False) -> ObjectStat:
        """Write a small object atomically. ``if_absent`` raises ``already_exists``."""

    def open_writer(self, uri: str, size: int) -> Writer:
        """Begin a streamed write of exactly ``size`` bytes."""

    def writer_bytes(self, uri: str, size: int) -> int:
        """Most host memory that the writer of so many bytes will hold."""

    def copy(self, source: str, target: str, *, version: str) -> ObjectStat:
        """Copy one object, server-side where both ends allow it."""

    def delete(self, uri: str) -> None:
        """Remove an object; nothing happens if it is not there."""

    def remove_folder(self, uri: str) -> None:
        """Remove a folder that holds nothing, where there are folders; never a storage root."""

    def discard_unfinished(
        self, folder: str, names: Container[str], *, since: datetime, until: datetime
    ) -> int:
        """Drop streamed writes to objects of a folder whose writers are gone for good.

        Args:
            folder: Where the objects were to be; what is in folders below it is left alone.
            names: Of the objects.
            since: Writes that began earlier are left alone, as somebody else's.
            until: Likewise those that began, or went on, later.

        Returns:
            How many there were.
        """
