from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from botocore import exceptions as sdk

from merging.errors import StorageError
from merging.storage.s3_errors import worded

URI = "s3://bucket/key"


def _answer(code: str, status: int, message: str = "") -> sdk.ClientError:
    response: Any = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status, "RequestId": "request-1"},
    }
    return sdk.ClientError(response, "GetObject")


def _tls_error(reason: str) -> sdk.SSLError:
    return sdk.SSLError(endpoint_url="x", error=reason)


def _worded(error: Exception) -> StorageError:
    with pytest.raises(StorageError) as caught, worded(URI):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "code", "retryable", "hint"),
    [
        (_answer("NoSuchKey", 404), "not_found", False, "no such object"),
        (_answer("404", 404), "not_found", False, "no such object"),
        (_answer("NoSuchBucket", 404), "not_found", False, "no such bucket"),
        (_answer("AccessDenied", 403), "denied", False, "GetObject"),
        (_answer("403", 403), "denied", False, "grant"),
        (_answer("InvalidAccessKeyId", 403), "denied", False, "AWS_ACCESS_KEY_ID"),
        (_answer("SignatureDoesNotMatch", 403), "denied", False, "AWS_SECRET_ACCESS_KEY"),
        (_answer("ExpiredToken", 400), "denied", False, "AWS_SESSION_TOKEN"),
        (_answer("RequestTimeTooSkewed", 403), "denied", False, "clock"),
        (_answer("PermanentRedirect", 301), "denied", False, "AWS_REGION"),
        (_answer("SlowDown", 503), "throttled", True, "fewer"),
        (_answer("Unheard", 503), "throttled", True, "fewer"),
        (_answer("Unheard", 429), "throttled", True, "fewer"),
        (_answer("InternalError", 500), "unavailable", True, "failed"),
        (_answer("Unheard", 502), "unavailable", True, "failed"),
        (_answer("RequestTimeout", 400), "unavailable", True, "failed"),
        (_answer("Unheard", 400), "unavailable", False, "Unheard"),
        (_answer("InvalidRange", 416), "out_of_range", False, "ends before"),
        (_answer("QuotaExceeded", 403), "no_space", False, "full"),
        (sdk.NoCredentialsError(), "denied", False, "AWS_ACCESS_KEY_ID"),
        (sdk.PartialCredentialsError(provider="env", cred_var="x"), "denied", False, "AWS_PROFILE"),
        (sdk.ProfileNotFound(profile="x"), "denied", False, "AWS_PROFILE"),
        (sdk.EndpointConnectionError(endpoint_url="x"), "unavailable", True, "AWS_ENDPOINT_URL_S3"),
        (sdk.ConnectTimeoutError(endpoint_url="x"), "unavailable", True, "reached"),
        (sdk.ReadTimeoutError(endpoint_url="x"), "unavailable", True, "reached"),
        (sdk.ConnectionClosedError(endpoint_url="x"), "unavailable", True, "reached"),
        (sdk.ResponseStreamingError(error="x"), "unavailable", True, "reached"),
        (ConnectionResetError(), "unavailable", True, "reached"),
        (_tls_error("CERTIFICATE_VERIFY_FAILED"), "unavailable", False, "AWS_CA_BUNDLE"),
        (_tls_error("UNEXPECTED_EOF"), "unavailable", True, "reached"),
        (sdk.DataNotFoundError(data_path="x"), "unavailable", False, "AWS_REGION"),
    ],
)  # fmt: skip
def test_each_failure_has_its_code_and_says_what_to_do(
    error: Exception, code: str, retryable: bool, hint: str
) -> None:
    found = _worded(error)

    assert (found.code, found.retryable) == (code, retryable)
    assert hint in found.detail
    assert found.detail.startswith(f"{URI}: ")


def test_texts_of_the_server_and_the_sdk_are_not_repeated() -> None:
    answered = _worded(_answer("AccessDenied", 403, message="key AKIASECRET is not welcome"))
    unanswered = _worded(sdk.EndpointConnectionError(endpoint_url="http://me:SECRET@host"))

    assert "SECRET" not in str(answered.to_dict())
    assert "SECRET" not in str(unanswered.to_dict())
    assert answered.context["request_id"] == "request-1"


def test_an_unmet_condition_becomes_the_error_that_the_caller_chose() -> None:
    chosen = StorageError("changed", code="source_changed")

    with pytest.raises(StorageError) as caught, worded(URI, on_conflict=lambda: chosen):
        raise _answer("PreconditionFailed", 412)

    assert caught.value is chosen


def test_importing_and_opening_storage_loads_no_sdk() -> None:
    program = (
        "import sys; from merging.storage.router import open_storage; "
        "open_storage(['s3://bucket/a']); "
        "sys.exit(bool({'boto3', 'botocore', 'torch'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
