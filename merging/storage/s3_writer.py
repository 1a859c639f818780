"""Streamed writes to S3: one request for a small object, a multipart upload for a large one."""

from __future__ import annotations

import math
import queue
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from merging.errors import StorageError
from merging.storage import faults
from merging.storage.base import ObjectStat
from merging.storage.s3_connection import WRITER_MARK, Location, S3Connection, etag_of

_MIN_PART_BYTES = 8 << 20
_MAX_PARTS = 10_000  # S3's limit
_UPLOAD_THREADS = 4


def part_bytes(size: int) -> int:
    """Length of the parts of an object of ``size`` bytes; the last one may be shorter."""
    return max(_MIN_PART_BYTES, math.ceil(size / _MAX_PARTS))


def num_buffers(size: int) -> int:
    """Of part length, for writing an object of ``size`` bytes: one more than upload threads."""
    return min(max(1, math.ceil(size / part_bytes(size))), _UPLOAD_THREADS + 1)


class MultipartUpload:
    """An object that is put together from numbered parts. Parts may come from many threads.

    Args:
        connection: Sends the requests.
        at: The object to be.
    """

    def __init__(self, connection: S3Connection, at: Location) -> None:
        self._connection = connection
        self._at = at
        self._token = secrets.token_hex(16)
        self._etags: dict[int, str] = {}
        answer = connection.call("create_multipart_upload", at, Metadata={WRITER_MARK: self._token})
        self._id = answer["UploadId"]

    def put(self, number: int, body: bytearray) -> None:
        """Upload the bytes of a part; parts are counted from 1."""
        answer = self._call("upload_part", PartNumber=number, Body=body)
        self._etags[number] = etag_of(answer)

    def copy(self, number: int, source: Location, start: int, stop: int, version: str) -> None:
        """Take bytes ``start`` to ``stop`` of another object as a part, inside the server."""
        answer = self._call(
            "upload_part_copy",
            on_conflict=lambda: faults.source_changed(source.uri, version),
            PartNumber=number,
            CopySource=source.parameters,
            CopySourceIfMatch=version,
            CopySourceRange=f"bytes={start}-{stop - 1}",
        )
        self._etags[number] = etag_of(answer["CopyPartResult"])

    def complete(self) -> str:
        """Make the object visible; returns its ETag."""
        parts = [
            {"PartNumber": number, "ETag": etag} for number, etag in sorted(self._etags.items())
        ]
        try:
            answer = self._call("complete_multipart_upload", MultipartUpload={"Parts": parts})
        except StorageError as error:
            # Completed by an attempt whose answer was lost?
            if _upload_is_gone(error) and self._connection.was_written_by(self._at, self._token):
                return self._connection.stat(self._at).version
            raise
        return etag_of(answer)

    def abort(self) -> None:
        """Drop all parts; nothing happens if the upload is not there any more."""
        abort_upload(self._connection, self._at, self._id)

    def _call(
        self,
        operation: str,
        *,
        on_conflict: Callable[[], StorageError] | None = None,
        **parameters: Any,
    ) -> Any:
        return self._connection.call(
            operation, self._at, on_conflict=on_conflict, UploadId=self._id, **parameters
        )


def abort_upload(connection: S3Connection, at: Location, upload_id: str) -> None:
    """Drop all parts of an upload; nothing happens if it is not there any more."""
    try:
        connection.call("abort_multipart_upload", at, UploadId=upload_id)
    except StorageError as error:
        if not _upload_is_gone(error):
            raise


class _PartThreads:
    """Uploads parts in a few threads, with a fixed number of buffers that go round.

    Args:
        upload: Where the parts go.
        size: Bytes of a buffer.
        num_buffers: How many there are.
    """

    def __init__(self, upload: MultipartUpload, size: int, num_buffers: int) -> None:
        self._upload = upload
        self._size = size
        self._num_unmade = num_buffers
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(_UPLOAD_THREADS, thread_name_prefix="s3-upload")
        self._failure: BaseException | None = None

    def take(self) -> bytearray:
        """A buffer to fill; waits while all are being uploaded."""
        if self._num_unmade:
            self._num_unmade -= 1
            return bytearray(self._size)
        buffer = self._free.get()
        self._raise_failure()
        return buffer

    def send(self, number: int, part: bytearray) -> None:
        """Start to upload a part; its buffer comes back by itself."""
        self._raise_failure()
        self._threads.submit(self._put, number, part)

    def finish(self) -> None:
        """Wait until every part is uploaded."""
        self._threads.shutdown(wait=True)
        self._raise_failure()

    def stop(self) -> None:
        """Wait for the parts that are on their way; drop the others."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _put(self, number: int, part: bytearray) -> None:
        try:
            if self._failure is None:
                self._upload.put(number, part)
        except BaseException as error:  # noqa: BLE001 - raised again in the writing thread
            self._failure = error
        finally:
            self._free.put(part)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


class S3Writer:
    """A streamed write to one object. See :class:`~merging.storage.base.Writer`.

    Attributes:
        buffer_bytes: Most memory that it holds: one part more than there are upload threads, or
            the whole of a small object.
    """

    def __init__(self, connection: S3Connection, at: Location, size: int) -> None:
        self._connection = connection
        self._at = at
        self._size = size
        self._written = 0
        self._part_size = min(size, part_bytes(size))
        self._upload: MultipartUpload | None = None
        self._threads: _PartThreads | None = None
        if size > self._part_size:
            self._upload = MultipartUpload(connection, at)
            self._threads = _PartThreads(self._upload, self._part_size, num_buffers(size))
        self.buffer_bytes = num_buffers(size) * self._part_size
        self._part: bytearray | None = None
        self._is_open = True

    def write(self, data: memoryview | bytes) -> None:
        """See :meth:`Writer.write`; ``data`` may be reused when it returns.

        Waits for the network when every part buffer is on its way.
        """
        assert self._is_open
        view = memoryview(data).cast("B")
        if self._written + len(view) > self._size:
            raise faults.size_mismatch(self._at.uri, self._size, self._written + len(view))
        while view:
            start = self._written % self._part_size
            count = min(len(view), self._part_size - start)
            if self._part is None:
                self._part = self._threads.take() if self._threads else bytearray(self._size)
            with memoryview(self._part) as part:  # assigning to a bytearray's slice copies twice
                part[start : start + count] = view[:count]
            self._written += count
            view = view[count:]
            if start + count == self._part_size or self._written == self._size:
                self._send_part(start + count)

    def commit(self) -> ObjectStat:
        """See :meth:`Writer.commit`."""
        assert self._is_open
        if self._written != self._size:
            raise faults.size_mismatch(self._at.uri, self._size, self._written)
        if self._upload is None or self._threads is None:
            answer = self._connection.call("put_object", self._at, Body=self._part or b"")
            etag = etag_of(answer)
        else:
            self._threads.finish()
            etag = self._upload.complete()
        self._is_open = False
        return ObjectStat(uri=self._at.uri, size=self._size, version=etag)

    def abort(self) -> None:
        """See :meth:`Writer.abort`."""
        if not self._is_open:
            return
        self._is_open = False
        if self._upload is not None and self._threads is not None:
            self._threads.stop()
            self._upload.abort()

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

    def _send_part(self, length: int) -> None:
        """Hand the filled part to the upload threads; the part of a small object stays."""
        if self._threads is None or self._part is None:
            return
        del self._part[length:]  # only the last part is short
        number = math.ceil(self._written / self._part_size)
        self._threads.send(number, self._part)
        self._part = None


def _upload_is_gone(error: StorageError) -> bool:
    return bool(error.context.get("s3_code") == "NoSuchUpload")
