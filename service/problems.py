"""Problem details (RFC 9457): the one shape of everything that goes wrong.

Answers of the API and the ``error`` of a failed job have the same members, so that one parser
serves both. This module holds the only table of HTTP statuses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from merging.errors import MergeError, StorageError

PROBLEM_JSON = "application/problem+json"

KINDS: dict[str, tuple[int, str]] = {
    # the request
    "malformed_request": (400, "The request cannot be read"),
    "bad_cursor": (400, "The cursor is not one of ours"),
    "unauthenticated": (401, "A valid token is needed"),
    "forbidden": (403, "The token does not allow this"),
    "not_found": (404, "There is no such thing"),
    "no_such_route": (404, "There is no such address"),
    "method_not_allowed": (405, "The address does not take this method"),
    "not_acceptable": (406, "No representation suits the request"),
    "news_gone": (410, "The events after this position are not kept any more"),
    "body_too_large": (413, "The request body is too large"),
    "unsupported_media_type": (415, "The content type is not accepted"),
    "range_not_satisfiable": (416, "There are no such bytes"),
    "invalid_request": (422, "The request is not acceptable"),
    "unknown_field": (422, "The request has an unknown field"),
    "rate_limited": (429, "The token asks for too much at once"),
    "too_many_failures": (429, "Too many tries to log in failed"),
    "queue_full": (429, "Too many jobs wait already"),
    "quota_exceeded": (429, "The token has as many jobs as it may have"),
    # jobs
    "already_terminal": (409, "The job has ended"),
    "conflict": (409, "The state of the job does not allow this"),
    "stale_lease": (409, "Another runner holds the job"),
    "job_failed": (409, "The job failed"),
    "job_cancelled": (409, "The job was cancelled"),
    "output_in_use": (409, "Another job needs what is at the output"),
    "output_changed": (409, "What is at the output is no longer what the job published"),
    "deadline_exceeded": (409, "The job was not finished in time"),
    "cancelled": (409, "The work was cancelled"),
    "etag_mismatch": (412, "The job was changed in the meantime"),
    "idempotency_key_reused": (422, "The idempotency key was used for another request"),
    # webhooks
    "address_refused": (422, "The address may not be called"),
    "endpoint_disabled": (409, "The webhook endpoint is disabled"),
    "too_many_endpoints": (409, "There are too many webhook endpoints"),
    # integrations
    "bad_integration": (422, "An integration cannot be used like this"),
    "integration_failed": (502, "An integration failed"),
    # the recipe, and what it names
    "invalid_recipe": (422, "The recipe cannot be run"),
    "unknown_method": (422, "The merge method is not known"),
    "bad_parameter": (422, "A parameter cannot be used"),
    "incompatible_options": (422, "These options do not go together"),
    "missing_tensor": (422, "A checkpoint lacks a tensor"),
    "extra_tensor": (422, "A checkpoint has a tensor that the others lack"),
    "shape_mismatch": (422, "Tensors differ in shape"),
    "dtype_unsupported": (422, "The dtype is not supported"),
    "header_invalid": (422, "A weight file is damaged"),
    "header_too_large": (422, "A weight file's header is too large"),
    "index_inconsistent": (422, "A checkpoint contradicts itself"),
    "missing_file": (422, "A checkpoint lacks a file"),
    "config_invalid": (422, "A checkpoint's config.json cannot be used"),
    "adapter_unsupported": (422, "The adapter cannot be merged"),
    "unsafe_format": (422, "The checkpoint's format is not safe to read"),
    "digest_mismatch": (422, "The bytes are not those that were expected"),
    "does_not_fit": (422, "The merge does not fit the memory budget"),
    "nothing_to_do": (422, "There is nothing to merge"),
    "plan_outdated": (409, "The merge is no longer the one that was planned"),
    "output_exists": (409, "There is a checkpoint at the output already"),
    "non_finite_input": (422, "An input holds NaN or infinity"),
    "non_finite_output": (422, "The result holds NaN or infinity"),
    "did_not_converge": (422, "A solver did not converge"),
    # storage
    "storage_not_found": (422, "A file that is needed is not there"),
    "bad_uri": (422, "The address is malformed"),
    "uri_not_allowed": (403, "The address is outside the storage roots"),
    "denied": (422, "The storage refuses access"),
    "source_changed": (409, "An input changed while it was read"),
    "too_large": (422, "A file is too large"),
    "out_of_range": (422, "A file ends before it should"),
    "size_mismatch": (500, "A file did not get the size that was announced"),
    "already_exists": (409, "The file exists already"),
    "no_space": (507, "The storage is full"),
    "throttled": (503, "The storage asks for patience"),
    "unavailable": (503, "The storage does not answer"),
    # the service
    "runner_lost": (500, "Runners died on the job again and again"),
    "device_unavailable": (500, "The device is not there"),
    "bad_setting": (500, "A setting cannot be used"),
    "worker_lost": (503, "A worker was lost"),
    "out_of_memory": (507, "A worker ran out of memory"),
    "wrong_version": (500, "A worker has another version"),
    "internal": (500, "Something went wrong on our side"),
    "not_ready": (503, "The service is not ready"),
}
"""Status and title of every code. Titles are fixed; what happened this time is the detail."""

_RETRY_AFTER_SECONDS = {
    "rate_limited": 1,
    "too_many_failures": 60,
    "queue_full": 30,
    "quota_exceeded": 30,
    "not_ready": 2,
    "throttled": 5,
    "unavailable": 5,
    "worker_lost": 5,
}


class RequestError(MergeError):
    """The API refuses a request.

    Codes: ``malformed_request``, ``bad_cursor``, ``unauthenticated``, ``forbidden``,
    ``not_found``, ``unsupported_media_type``, ``body_too_large``, ``job_failed`` …
    """

    default_code = "malformed_request"


def problem(
    code: str,
    detail: str,
    *,
    errors: tuple[Mapping[str, Any], ...] = (),
    retryable: bool = False,
    instance: str | None = None,
    request_id: str | None = None,
) -> dict[str, Any]:
    """A problem object.

    Args:
        code: One of :data:`KINDS`; another is shown as it is, with status 500.
        detail: What happened this time, and what to do.
        errors: Everything that is wrong: ``pointer`` (body) or ``parameter``, ``code``, ``detail``.
        retryable: The same request may succeed later.
        instance: The address or job that it concerns.
        request_id: Leads to the log.
    """
    status, title = KINDS.get(code, (500, KINDS["internal"][1]))
    result: dict[str, Any] = {
        "type": f"urn:mergeyard:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "retryable": retryable,
        "errors": [dict(error) for error in errors],
    }
    if instance is not None:
        result["instance"] = instance
    if request_id is not None:
        result["request_id"] = request_id
    if code in _RETRY_AFTER_SECONDS:
        result["retry_after_seconds"] = _RETRY_AFTER_SECONDS[code]
    return result


def problem_from_error(
    error: MergeError, *, instance: str | None = None, request_id: str | None = None
) -> dict[str, Any]:
    """The problem object of one of our errors; ``context`` names the file or tensor.

    A file that storage does not have is ``storage_not_found``: only the address of the request
    itself is ever ``not_found``.
    """
    is_missing_file = isinstance(error, StorageError) and error.code == "not_found"
    result = problem(
        "storage_not_found" if is_missing_file else error.code,
        error.detail,
        errors=tuple(fault.to_dict() for fault in error.faults),
        retryable=error.retryable,
        instance=instance,
        request_id=request_id,
    )
    if error.context:
        result["context"] = error.context
    return result


class ProblemResponse(JSONResponse):
    """A problem as the answer to a request.

    In ASCII: what a client sent may be quoted in it, and need not be valid Unicode.
    """

    media_type = PROBLEM_JSON

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content).encode("ascii")


def problem_response(
    body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> ProblemResponse:
    """An answer with that problem, and the headers that belong to its status."""
    all_headers = dict(headers or {})
    if "retry_after_seconds" in body:
        all_headers["Retry-After"] = str(body["retry_after_seconds"])
    if body["status"] == HTTPStatus.UNAUTHORIZED:
        all_headers["WWW-Authenticate"] = 'Bearer realm="mergeyard"'
    return ProblemResponse(body, body["status"], all_headers)
