"""A span for each request, if an endpoint for traces is configured.

The request's place in its trace is kept with the job, so that a runner on another machine, days
later, still adds to the same trace.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from merging.errors import MergeError
from service.paths import route_template
from service.settings import ENV_PREFIX
from workers import tracing
from workers.tracing import Tracing


def open_tracing(endpoint: str, version: str) -> Tracing:
    """Traces for a collector that speaks OTLP over HTTP.

    Raises:
        MergeError: ``bad_setting``: the packages for it are not installed.
    """
    try:
        return tracing.open_tracing(endpoint, version)
    except ImportError as error:
        raise MergeError(
            f"{ENV_PREFIX}OTLP_ENDPOINT needs OpenTelemetry's exporter: pip install"
            " 'mergeyard[otel]'.",
            code="bad_setting",
        ) from error


class TracedRequests:
    """A span for each request, continuing the client's trace if it sent a ``traceparent``."""

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, StatusCode

        method = scope["method"]
        parent = Headers(scope=scope).get("traceparent")
        span = self._tracing.begin(
            method, parent, {"http.request.method": method}, kind=SpanKind.SERVER
        )
        scope["state"]["traceparent"] = self._tracing.traceparent(span)

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            route = route_template(scope)
            if route is not None:
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
            span.end()
