"""One lazily made S3 client, and the single way in which requests are sent through it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from merging.errors import StorageError
from merging.storage.address import after_scheme, bad_uri
from merging.storage.base import ObjectStat
from merging.storage.retry import RetryPolicy
from merging.storage.s3_errors import worded

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_KEY_BYTES = 1024  # S3's limit

_CONNECTIONS = 64  # as many threads can talk at once; idle ones cost nothing
_CONNECT_SECONDS = 5
_READ_SECONDS = 60  # without a single byte; copies and completions send none for long

WRITER_MARK = "mergeyard-writer"
"""Name of the user metadata that marks who wrote an object."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where something is on S3.

    Attributes:
        bucket: Name of the bucket.
        key: Key of an object, or of a folder without its slash; empty for the whole bucket.
    """

    bucket: str
    key: str

    @classmethod
    def parse(cls, uri: str) -> Location:
        """Read an ``s3://bucket/key`` address.

        Raises:
            StorageError: ``bad_uri``.
        """
        bucket, _, key = after_scheme(uri).partition("/")
        if not _BUCKET.fullmatch(bucket) or ".." in bucket:
            raise bad_uri(uri, "a bucket has 3 to 63 lower-case letters, digits, dots and hyphens.")
        key = key.rstrip("/")
        if len(key.encode()) > _KEY_BYTES:
            raise bad_uri(uri, f"a key has at most {_KEY_BYTES} bytes.")
        if key.startswith("/") or "//" in key:
            raise bad_uri(uri, "empty segments are not allowed.")
        return cls(bucket, key)

    @property
    def uri(self) -> str:
        """The canonical address."""
        return f"s3://{self.bucket}/{self.key}" if self.key else f"s3://{self.bucket}"

    @property
    def parameters(self) -> dict[str, str]:
        """The same as arguments of a request."""
        return {"Bucket": self.bucket, "Key": self.key}


class S3Connection:
    """Sends requests; every failure comes out as a storage error, after the retries.

    Endpoint, credentials, region and profile are boto3's own (environment, configuration file,
    web identity, instance role). The client is made at the first request and shared by all threads.

    Args:
        retry: How failed requests are tried again. The SDK's own retries are off: two layers would
            multiply, and only here is it known how far a body had come.
    """

    def __init__(self, retry: RetryPolicy) -> None:
        self.retry = retry
        self._lock = threading.Lock()
        self._made_client: Any = None

    def call(
        self,
        operation: str,
        at: Location,
        *,
        on_conflict: Callable[[], StorageError] | None = None,
        **parameters: Any,
    ) -> Any:
        """Send a request on an object and return the answer; tried again as the policy says.

        Args:
            operation: Name of the client's method.
            at: The object.
            on_conflict: See :func:`~merging.storage.s3_errors.worded`.
            **parameters: Further arguments of the request.
        """

        def attempt() -> Any:
            with worded(at.uri, on_conflict=on_conflict):
                return self.send(operation, **at.parameters, **parameters)

        return self.retry.run(attempt)

    def send(self, operation: str, **parameters: Any) -> Any:
        """Send one request once; errors are the SDK's."""
        return getattr(self._client(), operation)(**parameters)

    def stat(self, at: Location) -> ObjectStat:
        """Size and ETag of an object."""
        answer = self.call("head_object", at)
        return ObjectStat(uri=at.uri, size=answer["ContentLength"], version=etag_of(answer))

    def was_written_by(self, at: Location, token: str) -> bool:
        """Whether the object at an address came from the write that carries this token.

        It tells a write whose answer was lost from somebody else's.
        """
        try:
            answer = self.call("head_object", at)
        except StorageError as error:
            if error.code == "not_found":
                return False
            raise
        return bool(answer["Metadata"].get(WRITER_MARK) == token)

    def _client(self) -> Any:
        with self._lock:
            if self._made_client is None:
                self._made_client = _make_client()
            return self._made_client


def etag_of(answer: Any) -> str:
    """The ETag in an answer, in the quotes that conditions need and some servers forget."""
    etag = str(answer["ETag"])
    return etag if etag.endswith('"') else f'"{etag}"'


def _make_client() -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        signature_version="s3v4",
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        max_pool_connections=_CONNECTIONS,
        tcp_keepalive=True,
        retries={"total_max_attempts": 1},
        # Parts of objects carry no checksum that could be validated, and some servers send that
        # of the whole object with them.
        response_checksum_validation="when_required",
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except ValueError as error:
        raise StorageError(
            "The S3 client cannot be made: AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL) or AWS_REGION "
            "is malformed; write the endpoint as http://host:port.",
            code="unavailable",
        ) from error
