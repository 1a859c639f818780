"""Traces as a collector receives them, from a client's request to the stages of a shard."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.jobs.states import JobState
from tests.support import throttled_engine
from tests.support.checkpoints import make_family
from tests.support.collector import Collector, Told, collecting
from tests.support.live_service import LiveService, live_service
from tests.support.serving import served

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01"}
STAGES = {"fetch", "solve", "write"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as server:
        yield server


@pytest.fixture
def body(tmp_path: Path) -> dict[str, Any]:
    """A merge of a tiny model into several shards."""
    family = make_family(tmp_path / "models", num_experts=2)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(family.base),
        "models": [{"model": str(expert)} for expert in family.experts],
    }
    options = {"max_shard_size": "100kB"}
    return {"recipe": recipe, "output_uri": str(tmp_path / "merged"), "options": options}


def merge(service: LiveService, body: dict[str, Any]) -> dict[str, Any]:
    """Submit within the client's trace, wait for the end; the job as it is then."""
    headers = {"Authorization": f"Bearer {service.token}", **TRACEPARENT}
    answer = httpx.post(f"{service.url}/v1/jobs", json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    with service.client() as client:
        return client.wait(answer.json()["id"])


def assert_within(span: Told, parent: Told) -> None:
    assert span.trace == parent.trace == TRACE
    assert span.parent == parent.id
    assert parent.begin <= span.begin <= span.end


def assert_tree(collector: Collector, job: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """From the client's span over request and job to every shard, its try and its stages."""
    (request,) = collector.named("POST /v1/jobs", TRACE)
    assert request.parent == CLIENT_SPAN
    (merge,) = collector.named("merge task_arithmetic", TRACE)
    assert_within(merge, request)
    assert merge.attributes["job_id"] == job["id"]
    assert merge.events[-1] == "publishing"
    tries = collector.named("shard", TRACE)
    assert len(tries) == len(shards) > 1
    assert {span.attributes["shard_index"] for span in tries} == {s["index"] for s in shards}
    for span in tries:
        assert_within(span, merge)
        assert span.end <= merge.end
        assert span.events == ["started"]
        (attempt,) = collector.below(span)
        assert attempt.name == "attempt"
        assert_within(attempt, span)
        assert_attempt(attempt, span)
        stages = collector.below(attempt)
        assert {stage.name for stage in stages} == STAGES
        for stage in stages:
            assert_within(stage, attempt)
            assert stage.end <= attempt.end
            assert stage.attributes["seconds"] <= (stage.end - stage.begin) / 1e9 + 1e-3


def assert_attempt(attempt: Told, shard: Told) -> None:
    facts = attempt.attributes
    for name in ("job_id", "shard_index", "attempt", "worker", "device", "bytes_read"):
        assert facts[name] == shard.attributes[name]
    assert facts["bytes_written"] == shard.attributes["size"]
    assert facts["tensors"] == facts["tensors_solved"] > 0
    assert facts.get("first_layer", 0) <= facts.get("last_layer", 1) <= 1
    assert attempt.resource["service.name"] == "mergeyard-worker"
    node, _, process = facts["worker"].rpartition(":")
    assert attempt.resource["host.name"] == node
    assert attempt.resource["process.pid"] == int(process)


def test_a_trace_leads_from_the_clients_request_to_the_stages_of_every_shard(
    collector: Collector, body: dict[str, Any], tmp_path: Path
) -> None:
    with live_service(tmp_path / "data", tmp_path, otlp_endpoint=collector.endpoint) as service:
        job = merge(service, body)
        with service.client() as client:
            shards = client.shards(job["id"])
    assert job["state"] == JobState.SUCCEEDED
    assert_tree(collector, job, shards)


def test_each_try_at_a_shard_is_a_span_of_its_own(
    collector: Collector, body: dict[str, Any], tmp_path: Path
) -> None:
    with live_service(
        tmp_path / "data",
        tmp_path,
        otlp_endpoint=collector.endpoint,
        engine=throttled_engine.ENGINE,
        retry_seconds=0.01,
    ) as service:
        job = merge(service, body)
    assert job["state"] == JobState.SUCCEEDED
    (index,) = [s.attributes["shard_index"] for s in collector.named("shard") if s.is_error]
    tries = [s for s in collector.named("shard", TRACE) if s.attributes["shard_index"] == index]
    assert [span.attributes["attempt"] for span in tries] == [1, 2]
    first, second = (collector.below(span)[0] for span in tries)
    assert [first.is_error, second.is_error] == [True, False]
    assert first.attributes["error.type"] == tries[0].attributes["error.type"] == "throttled"
    assert "error.type" not in second.attributes
    assert "fetch" in {span.name for span in collector.below(first)}
    assert {span.name for span in collector.below(second)} == STAGES


@pytest.mark.parametrize("is_silent", [False, True], ids=["refuses", "never answers"])
def test_a_merge_succeeds_without_its_collector(
    body: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_silent: bool
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # what closing the service waits
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if not is_silent:
            silent.close()
        endpoint = f"http://127.0.0.1:{port}"
        with live_service(tmp_path / "data", tmp_path, otlp_endpoint=endpoint) as service:
            job = merge(service, body)
    assert job["state"] == JobState.SUCCEEDED


@pytest.mark.ray
@pytest.mark.slow
def test_spans_of_ray_workers_have_come_when_their_job_has_ended(
    collector: Collector, body: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"pool": "ray", "ray_num_cpus": 2, "otlp_endpoint": collector.endpoint}
    with served(tmp_path, **settings) as service:
        job = service.client.post("/v1/jobs", json=body, headers=TRACEPARENT).json()
        list(service.client.get(f"/v1/jobs/{job['id']}/logs?follow=true", timeout=120).iter_lines())
        shards = service.client.get(f"/v1/jobs/{job['id']}/shards").json()["data"]
        attempts = collector.named("attempt", TRACE)
        assert len(attempts) == len(shards)
        assert service.process.pid not in {span.resource["process.pid"] for span in attempts}
        service.client.get("/v1/jobs", headers={"traceparent": "nonsense"})
        assert service.terminate() == 0
    assert_tree(collector, job, shards)


@pytest.mark.slow
def test_a_collector_that_is_away_costs_nothing(tmp_path: Path) -> None:
    with served(tmp_path, otlp_endpoint="http://127.0.0.1:1") as service:
        assert service.client.get("/v1/jobs").status_code == 200
        assert service.terminate() == 0
