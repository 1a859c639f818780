"""Traces as a collector receives them: a small one that speaks OTLP over HTTP, on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.checkpoints import make_family
from tests.support.serving import served

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[Any] = []


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes
    }


@pytest.mark.slow
def test_a_trace_leads_from_the_clients_request_to_every_shard(
    collector: Collector, tmp_path: Path
) -> None:
    family = make_family(tmp_path / "models", num_experts=2)
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(family.base),
        "models": [{"model": str(expert)} for expert in family.experts],
    }
    body = {
        "recipe": recipe,
        "output_uri": str(tmp_path / "merged"),
        "options": {"max_shard_size": "100kB"},
    }
    with served(tmp_path, otlp_endpoint=endpoint) as service:
        headers = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01"}
        job = service.client.post("/v1/jobs", json=body, headers=headers).json()
        service.client.get(f"/v1/jobs/{job['id']}/logs?follow=true")
        shards = service.client.get(f"/v1/jobs/{job['id']}/shards").json()["data"]
        service.client.get("/v1/jobs", headers={"traceparent": "nonsense"})
        assert service.terminate() == 0

    mine = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    by_name: dict[str, list[Any]] = {}
    for span in mine:
        by_name.setdefault(span.name, []).append(span)
    (request,) = by_name["POST /v1/jobs"]
    (merge,) = by_name["merge task_arithmetic"]
    assert request.parent_span_id.hex() == CLIENT_SPAN
    assert merge.parent_span_id == request.span_id
    assert attributes(merge)["job_id"] == job["id"]
    assert [event.name for event in merge.events][-1] == "publishing"
    assert len(by_name["shard"]) == len(shards) > 1
    for span in by_name["shard"]:
        assert span.parent_span_id == merge.span_id
        assert merge.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= merge.end_time_unix_nano
        assert attributes(span)["bytes_read"] > 0
    assert {attributes(span)["shard_index"] for span in by_name["shard"]} == {
        shard["index"] for shard in shards
    }


@pytest.mark.slow
def test_a_collector_that_is_away_costs_nothing(tmp_path: Path) -> None:
    with served(tmp_path, otlp_endpoint="http://127.0.0.1:1") as service:
        assert service.client.get("/v1/jobs").status_code == 200
        assert service.terminate() == 0
