"""Probes, metrics, versions, the OpenAPI document, and how the server ends."""

from __future__ import annotations

import contextlib
import gzip
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.jobs.errors import StoreUnavailableError
from service.middleware import PROBES
from service.problems import PROBLEM_JSON
from tests.integration.api.test_problems import check_problem
from tests.support.api import RECIPE, LiveApi, live_api, read_stream

DELAY_SECONDS = 30  # ended early by the second request to stop


@pytest.fixture
def own_api(tmp_path: Path, migrated_database: Path) -> Iterator[LiveApi]:
    """A service that the test may end."""
    settings = {"shutdown_delay_seconds": DELAY_SECONDS, "root_path": "/merge"}
    with live_api(tmp_path, migrated_database, **settings) as live:
        yield live


def test_a_healthy_service_is_ready(api: LiveApi) -> None:
    assert api.admin.get("/healthz").json() == {"status": "ok"}
    assert api.admin.get("/readyz").json() == {
        "status": "ready",
        "checks": [{"name": "database", "status": "ok", "is_required": True}],
    }


def test_without_its_database_the_service_is_healthy_but_not_ready(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> bool:
        raise StoreUnavailableError("db.internal does not answer.")

    monkeypatch.setattr("service.jobs.sql_store.is_current", fail)
    with api.client() as stranger:
        response = stranger.get("/readyz")
        assert stranger.get("/healthz").status_code == 200
    problem = check_problem(response, "not_ready")
    assert problem["checks"] == [{"name": "database", "status": "failed", "is_required": True}]
    assert "db.internal" not in response.text
    assert response.headers["retry-after"]


def test_metrics_count_requests_by_route_and_jobs_by_state(api: LiveApi) -> None:
    job = api.submit("metrics")
    for _ in range(2):
        api.admin.post(f"/v1/jobs/{api.submit('never-run')['id']}/cancel")
    api.admin.get(f"/v1/jobs/{job['id']}")
    api.admin.get("/v1/unknown/with/user/text")
    response = api.admin.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["mergeyard_http_requests_total", "GET", "/v1/jobs/{job_id}", "200"] >= 1
    assert samples["mergeyard_http_requests_total", "GET", "unknown", "404"] >= 1
    assert samples["mergeyard_jobs", "queued"] >= 1
    assert samples["mergeyard_jobs_submitted_total", "linear"] >= 1
    assert samples["mergeyard_jobs_finished_total", "linear", "cancelled"] >= 2
    assert ("mergeyard_build_info", "unknown", metadata.version("mergeyard")) in samples
    assert job["id"] not in response.text
    assert "user" not in response.text


def test_versions_name_the_engine(api: LiveApi) -> None:
    version = api.admin.get("/v1/version").json()
    assert version["version"] == api.admin.get("/healthz").headers["mergeyard-version"]
    assert "torch" in version["packages"]


def test_methods_come_from_their_declarations(api: LiveApi) -> None:
    methods = {item["name"]: item for item in api.admin.get("/v1/methods").json()["data"]}
    assert methods["wudi"]["parameters"]["properties"]
    assert api.admin.get("/v1/methods/wudi").json() == methods["wudi"]
    problem = check_problem(api.admin.get("/v1/methods/wudy"), "not_found")
    assert "wudi" in problem["detail"]


def test_a_recipe_is_validated_without_storage(api: LiveApi) -> None:
    before = api.storage.requests.total()
    good = api.admin.post("/v1/recipes/validate", json={"recipe": RECIPE}).json()
    bad = api.admin.post("/v1/recipes/validate", json={"recipe": "merge_method: linaer"}).json()
    assert api.storage.requests.total() == before
    assert (good["is_valid"], good["errors"], good["method"]) == (True, [], "linear")
    assert good["recipe_digest"].startswith("sha256:")
    assert bad["is_valid"] is False
    assert bad["errors"][0]["pointer"] == "/merge_method"
    assert bad["recipe"] is bad["recipe_digest"] is None


def test_a_plan_shows_what_a_job_would_do_and_writes_nothing(api: LiveApi) -> None:
    body = {"recipe": RECIPE, "output_uri": "mem://out/planned/"}
    plan = api.admin.post("/v1/plans", json=body).json()
    assert plan["object"] == "plan"
    assert plan["output_uri"] == "mem://out/planned"
    assert plan["plan_digest"].startswith("sha256:")
    assert plan["bytes_read"] > plan["bytes_written"] > 0
    assert api.storage.list("mem://out/planned") == []
    assert api.admin.post("/v1/plans", json=body).json()["plan_digest"] == plan["plan_digest"]


def test_every_operation_has_a_name_and_tells_of_problems(api: LiveApi) -> None:
    names = []
    for _, path, operation in api.operations():
        names.append(operation["operationId"])
        assert operation["description"], path
        assert list(operation["responses"]["default"]["content"]) == [PROBLEM_JSON]
        assert "422" not in operation["responses"]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+\.[a-z]+", name) for name in names)
    assert {"jobs.create", "jobs.events", "plans.create"} <= set(names)


def test_lists_say_what_they_hold(api: LiveApi) -> None:
    api.submit("shapes")
    for _, path, operation in api.operations():
        if operation["operationId"].endswith(".list"):
            page = api.admin.get(path).json()
            assert page["object"] == "list"
            assert set(page) == {"object", "data", "next_cursor", "next_url"}
            assert all(item["object"] for item in page["data"])


def test_answers_are_compressed_for_those_who_can_read_it(api: LiveApi) -> None:
    with api.admin.stream("GET", "/v1/methods", headers={"Accept-Encoding": "gzip"}) as response:
        assert response.headers["content-encoding"] == "gzip"
        raw = b"".join(response.iter_raw())
    plain = api.admin.get("/v1/methods", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert gzip.decompress(raw) == plain.content


def test_a_path_prefix_may_be_stripped_by_the_proxy_or_not(own_api: LiveApi) -> None:
    job = own_api.submit("prefixed")
    assert job["url"] == f"/merge/jobs/{job['id']}"
    for path in ("/v1/jobs", "/merge/v1/jobs"):
        page = own_api.admin.get(f"{path}?limit=1").json()
        assert [item["id"] for item in page["data"]] == [job["id"]]
    with own_api.client() as stranger:
        for path in PROBES:
            assert stranger.get(f"/merge{path}").status_code == 200
        check_problem(stranger.get("/merge/v1/jobs"), "unauthenticated")


def test_asked_to_stop_the_server_first_says_so_then_ends_streams(own_api: LiveApi) -> None:
    job = own_api.submit("watched-at-the-end")
    events: Iterator[dict[str, Any]]
    with own_api.admin.stream(
        "GET", f"/v1/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"}
    ) as response:
        events = read_stream(response.iter_lines())
        assert next(events)["type"] == "job.created"
        own_api.server.request_stop()
        problem = check_problem(own_api.admin.get("/readyz"), "not_ready")
        assert problem["checks"][-1]["name"] == "serving"
        assert own_api.admin.get("/v1/jobs").status_code == 200
        own_api.server.request_stop()
        assert list(events) == []  # the end of the stream, not an error
    own_api.wait_until(lambda: not answers(own_api.url))


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        httpx.get(f"{url}/healthz")
        return True
    return False
