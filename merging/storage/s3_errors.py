"""What S3's many refusals mean, in this project's few codes.

The messages name operations, error codes, request ids and environment variables. They never quote
the server or the SDK, whose texts may hold keys, signed addresses or account names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from merging.errors import StorageError


@dataclass(frozen=True, slots=True)
class _Meaning:
    """How one answer of the server is reported.

    Attributes:
        code: Our code.
        advice: What it means and what to do.
        retryable: Whether trying again may help.
    """

    code: str
    advice: str
    retryable: bool = False


_NO_OBJECT = _Meaning("not_found", "there is no such object")
_NO_BUCKET = _Meaning("not_found", "there is no such bucket")
_BAD_KEY = _Meaning(
    "denied",
    "the credentials were refused; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) "
    "and that AWS_ENDPOINT_URL_S3 names the server that they belong to",
)
_NOT_GRANTED = _Meaning(
    "denied",
    "these credentials may not do this; grant them the operation on this bucket and prefix "
    "(without the right to list a bucket, a missing object looks like this, too)",
)
_EXPIRED = _Meaning(
    "denied", "the session has expired; renew AWS_SESSION_TOKEN or the role that issues it"
)
_CLOCK = _Meaning("denied", "this machine's clock is wrong; set it")
_REGION = _Meaning("denied", "the bucket is in another region; set AWS_REGION to it")
_ARCHIVED = _Meaning("denied", "the object is archived; restore it first")
_PAST_END = _Meaning("out_of_range", "the object ends before the range that was asked for")
_FULL = _Meaning("no_space", "the storage is full or its quota is used up")
_TOO_LARGE = _Meaning("too_large", "the object is larger than the server accepts")
_BUSY = _Meaning("throttled", "the server asked for fewer requests", retryable=True)
_FAILED = _Meaning("unavailable", "the server failed", retryable=True)
_REFUSED = _Meaning("unavailable", "the server does not accept the request")
_NO_CREDENTIALS = _Meaning(
    "denied",
    "no S3 credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "AWS_PROFILE, or run with a role",
)
_CREDENTIALS_FAILED = _Meaning(
    "denied", "the S3 credentials could not be obtained; check AWS_PROFILE or the role"
)
_CERTIFICATE = _Meaning(
    "unavailable",
    "the server's certificate was not accepted; check AWS_ENDPOINT_URL_S3 and AWS_CA_BUNDLE",
)
_CONNECTION = _Meaning(
    "unavailable",
    "the server could not be reached or broke off; check AWS_ENDPOINT_URL_S3 if this lasts",
    retryable=True,
)
_CONFIGURATION = _Meaning(
    "unavailable",
    "the request could not be formed; check AWS_ENDPOINT_URL_S3, AWS_REGION and the AWS "
    "configuration file",
)

_MEANINGS = {
    "NoSuchKey": _NO_OBJECT,
    "NoSuchBucket": _NO_BUCKET,
    "InvalidAccessKeyId": _BAD_KEY,
    "SignatureDoesNotMatch": _BAD_KEY,
    "InvalidToken": _BAD_KEY,
    "AccessDenied": _NOT_GRANTED,
    "ExpiredToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestTimeTooSkewed": _CLOCK,
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "InvalidObjectState": _ARCHIVED,
    "InvalidRange": _PAST_END,
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
    "EntityTooLarge": _TOO_LARGE,
    "SlowDown": _BUSY,
    "SlowDownRead": _BUSY,
    "SlowDownWrite": _BUSY,
    "Throttling": _BUSY,
    "ThrottlingException": _BUSY,
    "RequestLimitExceeded": _BUSY,
    "TooManyRequests": _BUSY,
    "RequestTimeout": _FAILED,
    "InternalError": _FAILED,
    # Two conditional writes at once; the second attempt sees who won.
    "ConditionalRequestConflict": _FAILED,
    "OperationAborted": _FAILED,
}
_MEANINGS_BY_STATUS = {
    301: _REGION,
    401: _BAD_KEY,
    403: _NOT_GRANTED,
    404: _NO_OBJECT,
    416: _PAST_END,
    429: _BUSY,
    503: _BUSY,
    507: _FULL,
}


@contextlib.contextmanager
def worded(uri: str, *, on_conflict: Callable[[], StorageError] | None = None) -> Iterator[None]:
    """Turn errors of the SDK and of the connection into storage errors.

    Args:
        uri: What is being read or written.
        on_conflict: Makes the error for a condition that was not met (If-Match, If-None-Match).
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        if on_conflict is not None and _status(error.response) == 412:
            raise on_conflict() from error
        raise _from_answer(uri, error.operation_name, error.response) from error
    except (BotoCoreError, ResponseParserError, HTTPError, OSError) as error:
        raise _from_sdk(uri, error) from error


def _from_answer(uri: str, operation: str, response: Any) -> StorageError:
    """The error for an answer of the server with an error status."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = _status(response)
    meaning = _MEANINGS.get(code) or _MEANINGS_BY_STATUS.get(status)
    if meaning is None:
        meaning = _FAILED if status >= 500 else _REFUSED
    return StorageError(
        f"{uri}: {meaning.advice} (s3:{operation} was answered with {code or status}).",
        code=meaning.code,
        retryable=meaning.retryable,
        context={
            "uri": uri,
            "s3_code": code,
            "http_status": status,
            "request_id": response.get("ResponseMetadata", {}).get("RequestId"),
        },
    )


def _from_sdk(uri: str, error: Exception) -> StorageError:
    """The error for a request that got no answer, or half of one."""
    name = type(error).__name__
    meaning = _meaning_of_sdk_error(error)
    return StorageError(
        f"{uri}: {meaning.advice} ({name}).",
        code=meaning.code,
        retryable=meaning.retryable,
        context={"uri": uri, "sdk_error": name},
    )


def _meaning_of_sdk_error(error: Exception) -> _Meaning:
    from botocore import exceptions as sdk

    if isinstance(error, sdk.NoCredentialsError | sdk.PartialCredentialsError):
        return _NO_CREDENTIALS
    if isinstance(
        error, sdk.CredentialRetrievalError | sdk.TokenRetrievalError | sdk.ProfileNotFound
    ):
        return _CREDENTIALS_FAILED
    # Other TLS errors are connections that broke during the handshake.
    if isinstance(error, sdk.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return _CERTIFICATE
    from_connection = (
        sdk.ConnectionError,
        sdk.HTTPClientError,
        sdk.IncompleteReadError,
        sdk.FlexibleChecksumError,
    )
    if isinstance(error, from_connection) or not isinstance(error, sdk.BotoCoreError | ValueError):
        return _CONNECTION
    return _CONFIGURATION


def _status(response: Any) -> int:
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
