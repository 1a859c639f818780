"""A collector of traces that speaks OTLP over HTTP, on loopback."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_ERROR = 2


@dataclass(frozen=True)
class Told:
    """A span as it came, and who told it."""

    name: str
    trace: str
    id: str
    parent: str
    begin: int
    end: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    events: list[str]
    is_error: bool


class Collector(ThreadingHTTPServer):
    """Keeps all spans that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Told] = []

    @property
    def endpoint(self) -> str:
        """What the service is told."""
        return f"http://127.0.0.1:{self.server_port}"

    def named(self, name: str, trace: str | None = None) -> list[Told]:
        """Spans of a name, as they began, of one trace or of all."""
        found = [s for s in self.spans if s.name == name and trace in (None, s.trace)]
        return sorted(found, key=lambda span: span.begin)

    def below(self, parent: Told) -> list[Told]:
        """Spans right below another, as they began."""
        found = [span for span in self.spans if span.parent == parent.id]
        return sorted(found, key=lambda span: span.begin)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector until the context ends."""
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            who = _values(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.server.spans.extend(_read(span, who) for span in scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _read(span: Any, resource: dict[str, Any]) -> Told:
    return Told(
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        begin=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_values(span.attributes),
        resource=resource,
        events=[event.name for event in span.events],
        is_error=span.status.code == _ERROR,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}
