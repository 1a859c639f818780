"""Objects on S3 or any server that speaks its protocol, addressed by ``s3://bucket/key``.

The version of an object is its ETag, sent as ``If-Match`` with every read.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from merging.errors import StorageError
from merging.storage import faults
from merging.storage.address import bad_uri
from merging.storage.base import ObjectStat, Writer
from merging.storage.retry import RetryPolicy
from merging.storage.s3_connection import WRITER_MARK, Location, S3Connection, etag_of
from merging.storage.s3_errors import worded
from merging.storage.s3_writer import (
    MultipartUpload,
    S3Writer,
    abort_upload,
    num_buffers,
    part_bytes,
)

_SLICE_BYTES = 1 << 20  # the SDK buffers what one call asks for, so ask for little at a time
_COPY_LIMIT_BYTES = 5 * 10**9  # a single CopyObject takes at most 5 GB
_COPY_PART_BYTES = 512 << 20
_COPY_THREADS = 4


class S3Storage:
    """Objects on S3. See :class:`~merging.storage.base.Storage`.

    Args:
        retry: How failed requests are tried again; by default as :class:`RetryPolicy` says.
    """

    def __init__(self, retry: RetryPolicy | None = None) -> None:
        self._connection = S3Connection(retry or RetryPolicy())
        self._seen_buckets: set[str] = set()

    def normalise(self, uri: str) -> str:
        """See :meth:`Storage.normalise`. Keys are literal: ``%`` is itself."""
        return Location.parse(uri).uri

    def resolve(self, uri: str) -> str:
        """The same: S3 has no links."""
        return self.normalise(uri)

    def stat(self, uri: str) -> ObjectStat:
        """See :meth:`Storage.stat`."""
        at = _object(uri)
        try:
            return self._connection.stat(at)
        except StorageError as error:
            if error.code == "not_found":
                self._check_bucket(at)
            raise

    def list(self, prefix: str) -> list[ObjectStat]:
        """See :meth:`Storage.list`.

        Folder markers, and keys that no address can name (empty or dotted segments), are left out.
        """
        folder = Location.parse(prefix)
        parameters = {"Bucket": folder.bucket, "Prefix": f"{folder.key}/" if folder.key else ""}
        found: list[ObjectStat] = []
        while True:
            answer = self._send("list_objects_v2", folder.uri, parameters)
            for entry in answer.get("Contents", ()):
                with contextlib.suppress(StorageError):
                    at = Location.parse(f"s3://{folder.bucket}/{entry['Key']}")
                    if at.key == entry["Key"]:
                        found.append(ObjectStat(at.uri, entry["Size"], etag_of(entry)))
            if not answer.get("IsTruncated"):
                return sorted(found, key=lambda entry: entry.uri)
            parameters["ContinuationToken"] = answer["NextContinuationToken"]

    def read_into(self, uri: str, start: int, buffer: memoryview, *, version: str) -> None:
        """See :meth:`Storage.read_into`.

        A body that breaks off is taken up again where it stopped.
        """
        at = _object(uri)
        view = buffer.cast("B")
        filled = 0

        def attempt() -> None:
            nonlocal filled
            with worded(at.uri, on_conflict=lambda: faults.source_changed(at.uri, version)):
                answer = self._get_range(at, start + filled, len(view) - filled, version)
                with contextlib.closing(answer["Body"]) as body:
                    while filled < len(view):
                        filled += _read_slice(at.uri, body, view[filled:])

        if len(view):
            self._connection.retry.run(attempt)

    def read_bytes(self, uri: str, *, limit: int, version: str | None = None) -> bytes:
        """See :meth:`Storage.read_bytes`."""
        at = _object(uri)
        condition = {} if version is None else {"IfMatch": version}

        def attempt() -> bytes:
            with worded(at.uri, on_conflict=lambda: faults.source_changed(at.uri, str(version))):
                answer = self._connection.send("get_object", **at.parameters, **condition)
                with contextlib.closing(answer["Body"]) as body:
                    _check_version(at.uri, answer, version)
                    size = answer["ContentLength"]
                    if size > limit:
                        raise faults.too_large(at.uri, size, limit)
                    return bytes(body.read())

        return self._connection.retry.run(attempt)

    def write_bytes(self, uri: str, data: bytes, *, if_absent: bool = False) -> ObjectStat:
        """See :meth:`Storage.write_bytes`."""
        at = _object(uri)
        if not if_absent:
            answer = self._connection.call("put_object", at, Body=data)
            return ObjectStat(at.uri, len(data), etag_of(answer))
        token = secrets.token_hex(16)
        try:
            answer = self._connection.call(
                "put_object",
                at,
                on_conflict=lambda: faults.already_exists(at.uri),
                Body=data,
                IfNoneMatch="*",
                Metadata={WRITER_MARK: token},
            )
        except StorageError as error:
            # Written by an attempt whose answer was lost?
            if error.code == "already_exists" and self._connection.was_written_by(at, token):
                return self._connection.stat(at)
            raise
        return ObjectStat(at.uri, len(data), etag_of(answer))

    def open_writer(self, uri: str, size: int) -> Writer:
        """See :meth:`Storage.open_writer`."""
        return S3Writer(self._connection, _object(uri), size)

    def writer_bytes(self, uri: str, size: int) -> int:  # noqa: ARG002 - the same for all
        """See :meth:`Storage.writer_bytes`."""
        return num_buffers(size) * min(size, part_bytes(size))

    def copy(self, source: str, target: str, *, version: str) -> ObjectStat:
        """See :meth:`Storage.copy`; the bytes stay inside the server."""
        source_at, target_at = _object(source), _object(target)
        found = self.stat(source)
        if found.version != version:
            raise faults.source_changed(source_at.uri, version, found.version)
        if found.size > _COPY_LIMIT_BYTES:
            etag = self._copy_in_parts(source_at, target_at, found)
            return ObjectStat(target_at.uri, found.size, etag)
        answer = self._connection.call(
            "copy_object",
            target_at,
            on_conflict=lambda: faults.source_changed(source_at.uri, version),
            CopySource=source_at.parameters,
            CopySourceIfMatch=version,
        )
        return ObjectStat(target_at.uri, found.size, etag_of(answer["CopyObjectResult"]))

    def delete(self, uri: str) -> None:
        """See :meth:`Storage.delete`."""
        try:
            self._connection.call("delete_object", _object(uri))
        except StorageError as error:
            if error.code != "not_found":
                raise

    def remove_folder(self, uri: str) -> None:
        """See :meth:`Storage.remove_folder`: a folder is no more than the names of its objects."""

    def discard_unfinished(
        self, folder: str, names: Container[str], *, since: datetime, until: datetime
    ) -> int:
        """See :meth:`Storage.discard_unfinished`: aborts multipart uploads."""
        at = Location.parse(folder)
        found = [
            (Location.parse(f"s3://{at.bucket}/{upload['Key']}"), upload["UploadId"])
            for upload in self._unfinished_uploads(at)
            if upload["Key"].removeprefix(f"{at.key}/") in names
            and since <= upload["Initiated"] <= until
        ]
        for key, upload_id in found:
            abort_upload(self._connection, key, upload_id)
        return len(found)

    def _unfinished_uploads(self, folder: Location) -> Iterator[Any]:
        parameters = {"Bucket": folder.bucket, "Prefix": f"{folder.key}/" if folder.key else ""}
        while True:
            answer = self._send("list_multipart_uploads", folder.uri, parameters)
            yield from answer.get("Uploads", ())
            if not answer.get("IsTruncated"):
                return
            parameters["KeyMarker"] = answer["NextKeyMarker"]
            parameters["UploadIdMarker"] = answer["NextUploadIdMarker"]

    def _get_range(self, at: Location, start: int, length: int, version: str) -> Any:
        """Ask for a range of one version; the answer is checked to be just that."""
        answer = self._connection.send(
            "get_object",
            **at.parameters,
            Range=f"bytes={start}-{start + length - 1}",
            IfMatch=version,
        )
        try:
            _check_version(at.uri, answer, version)
            if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                raise StorageError(
                    f"{at.uri}: the server ignores ranges; use one that honours them.",
                    code="unavailable",
                    context={"uri": at.uri},
                )
            if answer["ContentLength"] != length:
                raise faults.out_of_range(at.uri, start, length)
        except StorageError:
            answer["Body"].close()
            raise
        return answer

    def _send(self, operation: str, uri: str, parameters: dict[str, str]) -> Any:
        """Ask about a bucket; tried again as the policy says."""

        def attempt() -> Any:
            with worded(uri):
                return self._connection.send(operation, **parameters)

        return self._connection.retry.run(attempt)

    def _check_bucket(self, at: Location) -> None:
        """Say so if it is the bucket that is missing, which answers to HEAD do not tell."""
        if at.bucket in self._seen_buckets:
            return
        uri = f"s3://{at.bucket}"
        try:
            with worded(uri):
                self._connection.send("head_bucket", Bucket=at.bucket)
        except StorageError as error:
            if error.code == "not_found":
                raise faults.not_found(uri, "there is no such bucket") from error
            return  # not allowed to ask; the missing object is reported
        self._seen_buckets.add(at.bucket)

    def _copy_in_parts(self, source: Location, target: Location, found: ObjectStat) -> str:
        upload = MultipartUpload(self._connection, target)
        try:
            with ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="s3-copy") as threads:
                starts = range(0, found.size, _COPY_PART_BYTES)
                copies = [
                    threads.submit(
                        upload.copy,
                        number,
                        source,
                        start,
                        min(start + _COPY_PART_BYTES, found.size),
                        found.version,
                    )
                    for number, start in enumerate(starts, 1)
                ]
                for copy in copies:
                    copy.result()
            return upload.complete()
        except BaseException:
            with contextlib.suppress(StorageError):  # the first error says more
                upload.abort()
            raise


def _object(uri: str) -> Location:
    """The location of an object, which a bucket alone is not."""
    at = Location.parse(uri)
    if not at.key:
        raise bad_uri(uri, "a key must follow the bucket.")
    return at


def _check_version(uri: str, answer: Any, version: str | None) -> None:
    """For servers that ignore If-Match."""
    found = etag_of(answer)
    if version is not None and found != version:
        raise faults.source_changed(uri, version, found)


def _read_slice(uri: str, body: Any, view: memoryview) -> int:
    count = int(body.readinto(view[:_SLICE_BYTES]))
    if count == 0:
        raise StorageError(
            f"{uri}: the connection ended in the middle of the object.",
            code="unavailable",
            retryable=True,
            context={"uri": uri},
        )
    return count
