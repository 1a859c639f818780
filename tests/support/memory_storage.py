"""A whole storage in memory, for tests: the ``Storage`` protocol with versions and atomic writes.

Addresses are ``mem://folder/name``. Every object has a version that no other object ever had, so
that overwriting one mid-merge is seen as it would be on real storage. Requests are counted.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Container, Iterator
from datetime import datetime
from types import TracebackType
from typing import Self

from merging.errors import StorageError
from merging.storage import faults
from merging.storage.base import ObjectStat

SCHEME = "mem://"


class MemoryStorage:
    """Objects by normalised address.

    Attributes:
        requests: Number of calls by method name.
        bytes_read: Bytes that ranged and whole reads returned.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.bytes_read = 0
        self._objects: dict[str, tuple[bytes, str]] = {}
        self._versions: Iterator[int] = itertools.count(1)
        self._lock = threading.Lock()

    def normalise(self, uri: str) -> str:
        """See :meth:`merging.storage.base.Storage.normalise`."""
        if not uri.startswith(SCHEME):
            raise StorageError(f"{uri} does not start with {SCHEME}.", code="bad_uri")
        parts = uri.removeprefix(SCHEME).rstrip("/").split("/")
        if not all(parts) or {".", ".."} & set(parts):
            raise StorageError(f"{uri} has an empty, '.' or '..' part.", code="bad_uri")
        return SCHEME + "/".join(parts)

    def stat(self, uri: str) -> ObjectStat:
        """See :meth:`merging.storage.base.Storage.stat`."""
        data, version = self._find("stat", uri)
        return ObjectStat(self.normalise(uri), len(data), version)

    def list(self, prefix: str) -> list[ObjectStat]:
        """See :meth:`merging.storage.base.Storage.list`."""
        folder = self.normalise(prefix) + "/"
        with self._lock:
            self.requests["list"] += 1
            return [
                ObjectStat(uri, len(data), version)
                for uri, (data, version) in sorted(self._objects.items())
                if uri.startswith(folder)
            ]

    def read_into(self, uri: str, start: int, buffer: memoryview, *, version: str) -> None:
        """See :meth:`merging.storage.base.Storage.read_into`."""
        data, _ = self._find("read_into", uri, version)
        target = buffer.cast("B")
        if start < 0 or start + len(target) > len(data):
            raise faults.out_of_range(uri, start, len(target))
        target[:] = data[start : start + len(target)]
        self._count(len(target))

    def read_bytes(self, uri: str, *, limit: int, version: str | None = None) -> bytes:
        """See :meth:`merging.storage.base.Storage.read_bytes`."""
        data, _ = self._find("read_bytes", uri, version)
        if len(data) > limit:
            raise faults.too_large(uri, len(data), limit)
        self._count(len(data))
        return data

    def write_bytes(self, uri: str, data: bytes, *, if_absent: bool = False) -> ObjectStat:
        """See :meth:`merging.storage.base.Storage.write_bytes`."""
        uri = self.normalise(uri)
        with self._lock:
            self.requests["write_bytes"] += 1
            if if_absent and uri in self._objects:
                raise faults.already_exists(uri)
            version = f"v{next(self._versions)}"
            self._objects[uri] = (bytes(data), version)
        return ObjectStat(uri, len(data), version)

    def open_writer(self, uri: str, size: int) -> MemoryWriter:
        """See :meth:`merging.storage.base.Storage.open_writer`."""
        return MemoryWriter(self, self.normalise(uri), size)

    def writer_bytes(self, uri: str, size: int) -> int:
        """See :meth:`merging.storage.base.Storage.writer_bytes`."""
        return 0

    def copy(self, source: str, target: str, *, version: str) -> ObjectStat:
        """See :meth:`merging.storage.base.Storage.copy`."""
        data, _ = self._find("copy", source, version)
        return self.write_bytes(target, data)

    def delete(self, uri: str) -> None:
        """See :meth:`merging.storage.base.Storage.delete`."""
        with self._lock:
            self.requests["delete"] += 1
            self._objects.pop(self.normalise(uri), None)

    def remove_folder(self, uri: str) -> None:
        """See :meth:`merging.storage.base.Storage.remove_folder`: there are none."""

    def discard_unfinished(
        self, folder: str, names: Container[str], *, since: datetime, until: datetime
    ) -> int:
        """See :meth:`merging.storage.base.Storage.discard_unfinished`: writers keep their own."""
        return 0

    def _find(self, request: str, uri: str, version: str | None = None) -> tuple[bytes, str]:
        with self._lock:
            self.requests[request] += 1
            found = self._objects.get(self.normalise(uri))
        if found is None:
            raise faults.not_found(uri)
        if version is not None and version != found[1]:
            raise faults.source_changed(uri, version, found[1])
        return found

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.bytes_read += num_bytes


class MemoryWriter:
    """See :class:`merging.storage.base.Writer`.

    Attributes:
        buffer_bytes: Memory that it holds: the whole object, until it is visible.
    """

    def __init__(self, storage: MemoryStorage, uri: str, size: int) -> None:
        self.buffer_bytes = size
        self._storage = storage
        self._uri = uri
        self._data = bytearray()
        self._is_open = True

    def write(self, data: memoryview | bytes) -> None:
        """See :meth:`merging.storage.base.Writer.write`; copies what it is given."""
        assert self._is_open
        self._data += memoryview(data).cast("B")
        if len(self._data) > self.buffer_bytes:
            raise faults.size_mismatch(self._uri, self.buffer_bytes, len(self._data))

    def commit(self) -> ObjectStat:
        """See :meth:`merging.storage.base.Writer.commit`."""
        assert self._is_open
        if len(self._data) != self.buffer_bytes:
            raise faults.size_mismatch(self._uri, self.buffer_bytes, len(self._data))
        self._is_open = False
        return self._storage.write_bytes(self._uri, bytes(self._data))

    def abort(self) -> None:
        """See :meth:`merging.storage.base.Writer.abort`."""
        self._is_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()
