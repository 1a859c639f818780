"""What happens around every request, as plain ASGI (so that event streams pass unbuffered).

From the outside in: :class:`RequestContext` (request id, headers, log line, metrics, last resort),
:class:`service.dashboard.files.Dashboard`, :class:`Authentication`, :class:`BodyRules`.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from merging.errors import MergeError
from service.auth import Authenticator, Principal
from service.browser import refuse_other_sites, session_cookie
from service.client_address import client_address
from service.limits import FailedLogins, RateLimit
from service.paths import route_path, route_template
from service.problems import RequestError, problem, problem_from_error, problem_response
from service.yaml_bodies import YAML_TYPE, yaml_to_json

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_JSON_TYPE = re.compile(r"application/(json|[a-z0-9.-]+\+json)\s*(;.*)?", re.IGNORECASE)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""Sent with every answer that does not say otherwise itself."""

PROBES = frozenset({"/healthz", "/readyz"})
PUBLIC_PATHS = frozenset({*PROBES, "/auth"})
"""What can be read without a token; ``/auth`` takes the code of a one-time link instead."""

OnRequest = Callable[[str, str, int, float], None]
"""``on_request(method, route, status, seconds)``, after each answer."""


class RequestContext:
    """Gives each request an id and one log line, each answer its headers, and catches what escapes.

    Args:
        app: What to wrap.
        version: Of the server, sent with every answer.
        root_path: Prefix under which a proxy publishes us; it may have taken it off or not.
        on_request: Counts the request.
    """

    def __init__(
        self, app: ASGIApp, *, version: str, root_path: str, on_request: OnRequest
    ) -> None:
        self._app = app
        self._root_path = root_path
        self._headers = {"Mergeyard-Version": version, **_HEADERS}
        self._on_request = on_request
        self._log = structlog.get_logger("mergeyard.http")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":  # nothing here speaks it, and nothing would check a token
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        scope["root_path"] = self._root_path
        started = time.perf_counter()
        status = 0
        sent_bytes = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status, sent_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if status:  # the answer has begun: the server can only cut it off
                raise
            body = self._explain(error, scope)
            await problem_response(body)(scope, receive, send_with_headers)
        finally:
            self._note(scope, status, time.perf_counter() - started, sent_bytes)

    def _explain(self, error: Exception, scope: Scope) -> dict[str, Any]:
        request_id = scope["state"]["request_id"]
        if isinstance(error, MergeError):
            return problem_from_error(error, instance=scope["path"], request_id=request_id)
        self._log.error("request_crashed", request_id=request_id, exc_info=error)
        detail = f"The server's log says more about the request {request_id}."
        return problem("internal", detail, instance=scope["path"], request_id=request_id)

    def _note(self, scope: Scope, status: int, seconds: float, sent_bytes: int) -> None:
        self._on_request(scope["method"], route_template(scope) or "unknown", status, seconds)
        principal = scope["state"].get("principal")
        is_probe = scope["path"] in PROBES and status < 400
        write = self._log.debug if is_probe else self._log.info
        if status >= 500 or not status:
            write = self._log.warning
        write(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=status,
            duration_seconds=round(seconds, 6),
            sent_bytes=sent_bytes,
            request_id=scope["state"]["request_id"],
            token_id=principal.token_id if principal else None,
        )


class Authentication:
    """Lets nothing pass without a token or session but :data:`PUBLIC_PATHS`; notes the principal.

    Before routing and before the body is read, so that a stranger learns nothing of either.

    Args:
        app: What to wrap.
        authenticator: Knows tokens and sessions.
        rate: Bounds what a token asks for.
        failures: Bounds tries that fail.
        trusted_proxies: Networks whose word on a client's address counts.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        authenticator: Authenticator,
        rate: RateLimit,
        failures: FailedLogins,
        trusted_proxies: Sequence[str],
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._rate = rate
        self._failures = failures
        self._trusted = [ipaddress.ip_network(network) for network in trusted_proxies]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find out who asks, and pass on."""
        if scope["type"] == "http":
            scope["state"]["client_address"] = client_address(scope, self._trusted)
        if scope["type"] == "http" and route_path(scope) not in PUBLIC_PATHS:
            headers = Headers(scope=scope)
            principal = await self._authenticate(headers, scope["state"]["client_address"])
            self._rate.admit(principal.token_id)
            if principal.session is not None:
                refuse_other_sites(scope["method"], headers)
            scope["state"]["principal"] = principal
        await self._app(scope, receive, send)

    async def _authenticate(self, headers: Headers, address: str) -> Principal:
        authorization, cookie = headers.get("authorization"), session_cookie(headers)
        credential = authorization or cookie or ""
        if credential:
            self._failures.check(address, credential)
        recalled = self._authenticator.recall(authorization)
        if recalled is not None:
            return recalled
        try:
            principal = await run_in_threadpool(
                self._authenticator.authenticate, authorization, cookie
            )
        except RequestError:
            if credential:  # who sends nothing guesses nothing
                self._failures.note_failure(address)
            raise
        self._failures.note_success(credential)
        return principal


class BodyRules:
    """Refuses bodies that are too large, declared or not, or neither JSON nor YAML.

    What comes as YAML is passed on as JSON.
    """

    def __init__(self, app: ASGIApp, *, limit_bytes: int) -> None:
        self._app = app
        self._limit = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the body, as far as it can be seen, and pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self._limit:
            raise RequestError(f"{self._too_large()}.", code="body_too_large")
        has_body = declared != "0" or "transfer-encoding" in headers
        content_type = headers.get("content-type", "")
        is_yaml = YAML_TYPE.fullmatch(content_type) is not None
        if has_body and not is_yaml and not _JSON_TYPE.fullmatch(content_type):
            raise RequestError(
                "Send the body as application/json or application/yaml, not as"
                f" {content_type or 'an unnamed type'}.",
                code="unsupported_media_type",
            )
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                # An HTTPException: the framework hides anything else that reading a body raises.
                raise HTTPException(413, self._too_large())
            return message

        if has_body and is_yaml:
            await self._pass_on_as_json(scope, receive_within_limit, send)
        else:
            await self._app(scope, receive_within_limit, send)

    async def _pass_on_as_json(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
        except HTTPException as error:
            raise RequestError(f"{error.detail}.", code="body_too_large") from None
        except ClientDisconnect:
            return
        converted = await run_in_threadpool(yaml_to_json, body)
        MutableHeaders(scope=scope)["content-type"] = "application/json"
        is_read = False

        async def receive_converted() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": converted}

        await self._app(scope, receive_converted, send)

    def _too_large(self) -> str:
        return f"A request body may have {self._limit} bytes at most"
