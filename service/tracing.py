"""Traces (OpenTelemetry) from a request over its job to the shards, if an endpoint is configured.

The request's place in its trace is kept with the job, so that a runner on another machine, days
later, still adds to the same trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from merging.errors import MergeError
from service.settings import ENV_PREFIX

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, SpanKind
    from opentelemetry.util.types import AttributeValue


class Tracing:
    """Makes spans and sends them from a thread of its own; an endpoint that is away costs nothing.

    Args:
        exporter: Where spans go.
        version: Of the service.
    """

    def __init__(self, exporter: SpanExporter, version: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "mergeyard", "service.version": version})
        self._provider: TracerProvider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mergeyard", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self,
        name: str,
        parent: Span | str | None,
        attributes: Mapping[str, AttributeValue],
        *,
        kind: SpanKind | None = None,
    ) -> Span:
        """A span that the caller ends; the parent is a span, or the text of a ``traceparent``."""
        from opentelemetry import trace

        context: Context | None = None
        if isinstance(parent, str):
            context = self._propagator.extract({"traceparent": parent})
        elif parent is not None:
            context = trace.set_span_in_context(parent)
        return self._tracer.start_span(
            name, context, kind or trace.SpanKind.INTERNAL, attributes=attributes
        )

    def traceparent(self, span: Span) -> str:
        """What a span is called in the header of that name (W3C Trace Context)."""
        from opentelemetry import trace

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, trace.set_span_in_context(span))
        return carrier["traceparent"]

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def open_tracing(endpoint: str, version: str) -> Tracing:
    """Traces for a collector that speaks OTLP over HTTP.

    Raises:
        MergeError: ``bad_setting``: the packages for it are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise MergeError(
            f"{ENV_PREFIX}OTLP_ENDPOINT needs OpenTelemetry's exporter: pip install"
            " 'mergeyard[otel]'.",
            code="bad_setting",
        ) from error
    return Tracing(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces"), version)


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
            route = getattr(scope.get("route"), "path", None)
            if route is not None:
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
            span.end()
