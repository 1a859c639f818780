"""One storage over several: sends each call to the backend of the address's scheme.

To add a backend, write its file beside this one and name it in ``_BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from datetime import datetime
from typing import Protocol

from merging.storage import faults
from merging.storage.address import LOCAL, bad_uri, scheme_of
from merging.storage.base import ObjectStat, Storage, Writer
from merging.storage.local import LocalStorage
from merging.storage.roots import Roots
from merging.storage.s3 import S3Storage

_COPY_CHUNK_BYTES = 8 << 20


class Backend(Storage, Protocol):
    """A storage that the router can drive. Constructing one is cheap and connects to nothing."""

    def resolve(self, uri: str) -> str:
        """The normalised address after following links, for comparison with the roots."""


_BACKENDS: dict[str, type[Backend]] = {LOCAL: LocalStorage, "s3": S3Storage}


def open_storage(roots: Sequence[str] = ()) -> Storage:
    """All storage that this program knows, limited to ``roots``.

    Args:
        roots: Folders and ``s3://bucket/prefix`` addresses that may be used; empty allows
            everything.

    Raises:
        StorageError: ``bad_uri`` for a malformed root.
    """
    return Router(roots, {scheme: backend() for scheme, backend in _BACKENDS.items()})


class Router:
    """A :class:`~merging.storage.base.Storage` over several backends, limited to roots.

    Each call is checked when it is made, so a local link that is changed after planning is seen.
    What remains is the moment between the check and the opening of the file; only someone who can
    already write inside a root can use it.

    Args:
        roots: See :func:`open_storage`.
        backends: By scheme.
    """

    def __init__(self, roots: Sequence[str], backends: dict[str, Backend]) -> None:
        self._backends = backends
        self._roots = Roots(roots, lambda uri: self._backend(uri).resolve(uri))

    def normalise(self, uri: str) -> str:
        """See :meth:`Storage.normalise`."""
        return self._route(uri)[1]

    def stat(self, uri: str) -> ObjectStat:
        """See :meth:`Storage.stat`."""
        backend, uri = self._route(uri)
        return backend.stat(uri)

    def list(self, prefix: str) -> list[ObjectStat]:
        """See :meth:`Storage.list`; entries that link to outside the roots are left out."""
        backend, prefix = self._route(prefix)
        return [stat for stat in backend.list(prefix) if self._roots.contains(stat.uri)]

    def read_into(self, uri: str, start: int, buffer: memoryview, *, version: str) -> None:
        """See :meth:`Storage.read_into`."""
        backend, uri = self._route(uri)
        backend.read_into(uri, start, buffer, version=version)

    def read_bytes(self, uri: str, *, limit: int, version: str | None = None) -> bytes:
        """See :meth:`Storage.read_bytes`."""
        backend, uri = self._route(uri)
        return backend.read_bytes(uri, limit=limit, version=version)

    def write_bytes(self, uri: str, data: bytes, *, if_absent: bool = False) -> ObjectStat:
        """See :meth:`Storage.write_bytes`."""
        backend, uri = self._route(uri)
        return backend.write_bytes(uri, data, if_absent=if_absent)

    def open_writer(self, uri: str, size: int) -> Writer:
        """See :meth:`Storage.open_writer`."""
        backend, uri = self._route(uri)
        return backend.open_writer(uri, size)

    def writer_bytes(self, uri: str, size: int) -> int:
        """See :meth:`Storage.writer_bytes`."""
        backend, uri = self._route(uri)
        return backend.writer_bytes(uri, size)

    def copy(self, source: str, target: str, *, version: str) -> ObjectStat:
        """See :meth:`Storage.copy`; between two kinds of storage the bytes pass through here."""
        source_backend, source = self._route(source)
        target_backend, target = self._route(target)
        if source_backend is target_backend:
            return source_backend.copy(source, target, version=version)
        found = source_backend.stat(source)
        if found.version != version:
            raise faults.source_changed(source, version, found.version)
        return _stream(source_backend, found, target_backend, target)

    def delete(self, uri: str) -> None:
        """See :meth:`Storage.delete`."""
        backend, uri = self._route(uri)
        backend.delete(uri)

    def remove_folder(self, uri: str) -> None:
        """See :meth:`Storage.remove_folder`."""
        backend, folder = self._route(uri)
        if not self._roots.has(uri):
            backend.remove_folder(folder)

    def discard_unfinished(
        self, folder: str, names: Container[str], *, since: datetime, until: datetime
    ) -> int:
        """See :meth:`Storage.discard_unfinished`."""
        backend, folder = self._route(folder)
        return backend.discard_unfinished(folder, names, since=since, until=until)

    def _route(self, uri: str) -> tuple[Backend, str]:
        """The backend for an allowed address, and the address in its canonical form."""
        backend = self._backend(uri)
        normalised = backend.normalise(uri)
        self._roots.check(uri)
        return backend, normalised

    def _backend(self, uri: str) -> Backend:
        backend = self._backends.get(scheme_of(uri))
        if backend is None:
            raise bad_uri(uri, "use a local path, file:///path or s3://bucket/key.")
        return backend


def _stream(source: Storage, found: ObjectStat, target: Storage, uri: str) -> ObjectStat:
    """Copy an object piece by piece through this process."""
    buffer = memoryview(bytearray(min(found.size, _COPY_CHUNK_BYTES)))
    with target.open_writer(uri, found.size) as writer:
        for start in range(0, found.size, _COPY_CHUNK_BYTES):
            chunk = buffer[: found.size - start]
            source.read_into(found.uri, start, chunk, version=found.version)
            writer.write(chunk)
        return writer.commit()
