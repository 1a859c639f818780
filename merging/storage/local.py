"""Local files, addressed by path or ``file:///path``.

The version of a file is its size, modification time and inode: what changes when a file is
rewritten in place or replaced. A rewrite in place that keeps the length and falls within one tick
of the file system's clock (at most 10 ms) goes unseen.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_flags
from collections.abc import Container, Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote

from merging.errors import StorageError
from merging.storage import faults
from merging.storage.address import after_scheme, bad_uri
from merging.storage.atomic_file import AtomicFile, is_temporary, remove_orphans
from merging.storage.base import ObjectStat, Writer
from merging.storage.local_errors import worded

_WORKSPACE = ".mergeyard"
_COPY_BYTES = 64 << 20
_NOTHING_BEHIND = {errno.ENOENT, errno.ELOOP}  # a broken link, or removed since it was listed
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class LocalStorage:
    """Files of this machine. See :class:`~merging.storage.base.Storage`."""

    def normalise(self, uri: str) -> str:
        """The absolute path, without ``file://``; links are not followed.

        A relative path starts at the current folder. In a ``file://`` address percent-escapes are
        decoded; in a plain path ``%`` is itself.
        """
        path = uri
        if "://" in uri:
            path = unquote(after_scheme(uri))
            if not path.startswith("/"):
                raise bad_uri(uri, "name no host; write three slashes, as in file:///path.")
        if not path.startswith("/"):
            with worded(path, "resolve"):
                path = f"{Path.cwd()}/{path}"
        # normpath keeps two leading slashes apart from one; Linux does not.
        return "/" + os.path.normpath(path).lstrip("/")

    def resolve(self, uri: str) -> str:
        """The absolute path with links followed as far as it exists."""
        return os.path.realpath(self.normalise(uri))

    def stat(self, uri: str) -> ObjectStat:
        """See :meth:`Storage.stat`."""
        path = self.normalise(uri)
        with worded(path, "read"):
            return _object_stat(path, Path(path).stat())

    def list(self, prefix: str) -> list[ObjectStat]:
        """See :meth:`Storage.list`; links to files are listed, links to folders not followed."""
        found = []
        with worded(prefix, "list"):
            for path in _walk(self.normalise(prefix)):
                try:
                    found.append(_object_stat(path, Path(path).stat()))
                except StorageError:
                    continue  # no regular file
                except OSError as error:
                    if error.errno not in _NOTHING_BEHIND:
                        raise
        return sorted(found, key=lambda entry: entry.uri)

    def read_into(self, uri: str, start: int, buffer: memoryview, *, version: str) -> None:
        """See :meth:`Storage.read_into`."""
        path = self.normalise(uri)
        with _opened(path) as fd:
            _check_version(path, fd, version)
            _fill(path, fd, start, buffer.cast("B"))
            _check_version(path, fd, version)

    def read_bytes(self, uri: str, *, limit: int, version: str | None = None) -> bytes:
        """See :meth:`Storage.read_bytes`."""
        path = self.normalise(uri)
        with _opened(path) as fd:
            found = _object_stat(path, os.fstat(fd))
            version = version or found.version
            _check_version(path, fd, version)
            if found.size > limit:
                raise faults.too_large(path, found.size, limit)
            data = bytearray(found.size)
            _fill(path, fd, 0, memoryview(data))
            _check_version(path, fd, version)
        return bytes(data)

    def write_bytes(self, uri: str, data: bytes, *, if_absent: bool = False) -> ObjectStat:
        """See :meth:`Storage.write_bytes`."""
        with LocalWriter(self.normalise(uri), len(data)) as writer:
            writer.write(data)
            return writer.commit(replace=not if_absent)

    def open_writer(self, uri: str, size: int) -> Writer:
        """See :meth:`Storage.open_writer`."""
        return LocalWriter(self.normalise(uri), size)

    def writer_bytes(self, uri: str, size: int) -> int:  # noqa: ARG002 - the same for all
        """See :meth:`Storage.writer_bytes`."""
        return LocalWriter.buffer_bytes

    def copy(self, source: str, target: str, *, version: str) -> ObjectStat:
        """See :meth:`Storage.copy`; shares the blocks where the file system can."""
        source = self.normalise(source)
        with _opened(source) as fd:
            _check_version(source, fd, version)
            with LocalWriter(self.normalise(target), os.fstat(fd).st_size) as writer:
                writer.write_file(fd)
                _check_version(source, fd, version)
                return writer.commit()

    def delete(self, uri: str) -> None:
        """See :meth:`Storage.delete`; folders of our own workspace go when they are empty."""
        path = Path(self.normalise(uri))
        with worded(str(path), "delete"):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return
        with contextlib.suppress(OSError):  # not empty
            for folder in path.parents:
                if _WORKSPACE not in folder.parts:
                    break
                folder.rmdir()

    def remove_folder(self, uri: str) -> None:
        """See :meth:`Storage.remove_folder`."""
        with contextlib.suppress(OSError):  # not empty, not there, or no folder
            Path(self.normalise(uri)).rmdir()

    def discard_unfinished(
        self,
        folder: str,
        names: Container[str],  # noqa: ARG002 - a hidden file does not say what it was to be
        *,
        since: datetime,
        until: datetime,
    ) -> int:
        """See :meth:`Storage.discard_unfinished`; no other program makes files of these names."""
        path = Path(self.normalise(folder))
        with worded(str(path), "delete"):
            try:
                return remove_orphans(path, since=since.timestamp(), until=until.timestamp())
            except (FileNotFoundError, NotADirectoryError):
                return 0


class LocalWriter:
    """A streamed write to one file. See :class:`~merging.storage.base.Writer`.

    Attributes:
        buffer_bytes: Memory that it holds: none, bytes go straight to the file.
    """

    buffer_bytes = 0

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._size = size
        self._written = 0
        with worded(path, "write"):
            self._file = AtomicFile(Path(path))
        self._is_open = True

    def write(self, data: memoryview | bytes) -> None:
        """See :meth:`Writer.write`; ``data`` may be reused when it returns."""
        assert self._is_open
        view = memoryview(data).cast("B")
        self._count(len(view))
        with worded(self._path, "write"):
            self._file.write(view)

    def write_file(self, source_fd: int) -> None:
        """Append the whole of another open file."""
        size = os.fstat(source_fd).st_size
        self._count(size)
        with worded(self._path, "write"):
            _copy_file(source_fd, self._file.fd, size)

    def commit(self, *, replace: bool = True) -> ObjectStat:
        """See :meth:`Writer.commit`.

        Raises:
            StorageError: ``already_exists`` if there is a file and it must not be replaced.
        """
        assert self._is_open
        if self._written != self._size:
            raise faults.size_mismatch(self._path, self._size, self._written)
        with worded(self._path, "write"):
            try:
                status = self._file.publish(replace=replace)
            except FileExistsError:
                raise faults.already_exists(self._path) from None
        self._is_open = False
        return _object_stat(self._path, status)

    def abort(self) -> None:
        """See :meth:`Writer.abort`."""
        if self._is_open:
            self._is_open = False
            with worded(self._path, "delete"):
                self._file.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.abort()
        except StorageError:
            if error is None:  # else the first error says more
                raise

    def _count(self, num_bytes: int) -> None:
        self._written += num_bytes
        if self._written > self._size:
            raise faults.size_mismatch(self._path, self._size, self._written)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """A descriptor of a regular file, for reading."""
    with worded(path, "read"):
        # Without O_NONBLOCK a named pipe among the inputs would hold the reader for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            yield fd
        finally:
            os.close(fd)


def _object_stat(path: str, status: os.stat_result) -> ObjectStat:
    if not stat_flags.S_ISREG(status.st_mode):
        raise faults.not_found(path, "it is a folder or a device, not a file")
    version = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"
    return ObjectStat(uri=path, size=status.st_size, version=version)


def _check_version(path: str, fd: int, version: str) -> None:
    found = _object_stat(path, os.fstat(fd)).version
    if found != version:
        raise faults.source_changed(path, version, found)


def _fill(path: str, fd: int, start: int, buffer: memoryview) -> None:
    filled = 0
    while filled < len(buffer):
        count = os.preadv(fd, [buffer[filled:]], start + filled)
        if count == 0:
            raise faults.out_of_range(path, start, len(buffer))
        filled += count


def _copy_file(source_fd: int, target_fd: int, size: int) -> None:
    """Append ``size`` bytes of one file to another, inside the kernel."""
    done = 0
    while done < size:
        length = min(size - done, _COPY_BYTES)
        try:
            count = os.copy_file_range(source_fd, target_fd, length, offset_src=done)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            count = os.sendfile(target_fd, source_fd, done, length)
        if count == 0:
            break  # the source was cut short; the caller's version check says so
        done += count


def _walk(folder: str) -> Iterator[str]:
    """Paths of all files below a folder except our unfinished ones."""

    def fail_unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for parent, _, names in os.walk(folder, onerror=fail_unless_gone):
        for name in names:
            if not is_temporary(name):
                yield str(Path(parent) / name)
