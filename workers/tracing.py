"""Traces (OpenTelemetry) as the service and its workers make them.

Nothing of OpenTelemetry is loaded before the first span.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workers.redact import redact

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, SpanKind
    from opentelemetry.util.types import AttributeValue

_SECONDS_TO_SEND = 0.5
"""Longest wait of :meth:`Tracing.flush`; a collector answers in some milliseconds."""

_SECONDS_TO_CLOSE = 3.0


class Tracing:
    """Makes spans and sends them from a thread of its own; an endpoint that is away costs nothing.

    Args:
        exporter: Where spans go.
        version: Of the service.
        service: Name of what makes the spans.
    """

    def __init__(self, exporter: SpanExporter, version: str, service: str = "mergeyard") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create(
            {
                "service.name": service,
                "service.version": version,
                "host.name": platform.node(),
                "process.pid": os.getpid(),
            }
        )
        self._provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mergeyard", version)
        self._propagator = TraceContextTextMapPropagator()
        self._sender = threading.Thread()
        self._is_prompt = True

    def begin(
        self,
        name: str,
        parent: Span | str | None,
        attributes: Mapping[str, AttributeValue],
        *,
        kind: SpanKind | None = None,
        at: int | None = None,
    ) -> Span:
        """A span that the caller ends.

        Args:
            name: What it says in a list.
            parent: A span, or the text of a ``traceparent``.
            attributes: What is known by now.
            kind: Internal by default.
            at: When it began, in nanoseconds since 1970, if not now.
        """
        from opentelemetry import trace

        context: Context | None = None
        if isinstance(parent, str):
            context = self._propagator.extract({"traceparent": parent})
        elif parent is not None:
            context = trace.set_span_in_context(parent)
        return self._tracer.start_span(
            name, context, kind or trace.SpanKind.INTERNAL, attributes=attributes, start_time=at
        )

    def traceparent(self, span: Span) -> str:
        """What a span is called in the header of that name (W3C Trace Context)."""
        from opentelemetry import trace

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, trace.set_span_in_context(span))
        return carrier["traceparent"]

    def flush(self) -> None:
        """Send what has ended by now; waits for a collector that answers, and not for another."""
        if not self._is_prompt and self._sender.is_alive():
            return
        self._sender = threading.Thread(target=self._send, name="spans", daemon=True)
        self._sender.start()
        if self._is_prompt:
            self._sender.join(_SECONDS_TO_SEND)
            self._is_prompt = not self._sender.is_alive()

    def close(self) -> None:
        """Send what is left, to a collector that takes it in a few seconds."""
        closing = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(_SECONDS_TO_CLOSE)

    def _send(self) -> None:
        begin = time.monotonic()
        self._provider.force_flush()
        self._is_prompt = time.monotonic() - begin < _SECONDS_TO_SEND


def open_tracing(endpoint: str, version: str, service: str = "mergeyard") -> Tracing:
    """Traces for a collector that speaks OTLP over HTTP.

    Raises:
        ImportError: The packages for it are not installed.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    return Tracing(exporter, version, service)


def end_span(span: Span, error: Mapping[str, Any] | None) -> None:
    """End a span, in failure if there is an error (:meth:`merging.errors.MergeError.to_dict`)."""
    from opentelemetry.trace import StatusCode

    if error is not None:
        span.set_attribute("error.type", error["code"])
        span.set_status(StatusCode.ERROR, redact(error["detail"]))
    span.end()
