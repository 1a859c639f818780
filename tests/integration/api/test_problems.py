"""Whatever is wrong with a request, the answer is a problem (RFC 9457)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from merging.errors import MergeError
from service.problems import KINDS, PROBLEM_JSON
from tests.support.api import RECIPE, LiveApi

JOB_ID = f"job_{'0' * 26}"


def check_problem(response: httpx.Response, code: str) -> dict[str, Any]:
    """Assert the shape of a problem; returns it."""
    status, title = KINDS[code]
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM_JSON
    body = response.json()
    assert body["code"] == code
    assert body["type"] == f"urn:mergeyard:problem:{code}"
    assert (body["status"], body["title"]) == (status, title)
    assert body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert isinstance(body["errors"], list)
    assert isinstance(body["retryable"], bool)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["mergeyard-version"]
    assert "Traceback" not in response.text
    return body


def fill(path: str) -> str:
    return path.format(
        job_id=JOB_ID,
        name="no-such-method",
        token_id="tok_none",
        plan_id="plan_none",
        endpoint_id=f"whe_{'0' * 26}",
        delivery_id=f"dlv_{'0' * 26}",
    )


def bodies(api: LiveApi) -> Iterator[tuple[str, str]]:
    for method, path, operation in api.operations():
        if "requestBody" in operation:
            yield method, fill(path)


def test_unknown_routes(api: LiveApi) -> None:
    for path in ("/", "/v1", "/v2/jobs", "/v1/jobs/", "/v1/nothing", "/docs"):
        check_problem(api.admin.get(path), "no_such_route")


def test_every_route_refuses_a_method_that_it_lacks(api: LiveApi) -> None:
    for path, methods in api.openapi["paths"].items():
        for method in {"put", "post"} - set(methods):
            response = api.admin.request(method, fill(path))
            problem = check_problem(response, "method_not_allowed")
            assert problem["instance"] == fill(path)
            assert response.headers["allow"] == ", ".join(sorted(map(str.upper, methods)))


def test_every_route_that_names_something_says_that_there_is_no_such_thing(api: LiveApi) -> None:
    named = [item for item in api.operations() if "{" in item[1]]
    assert len(named) > 8
    for method, path, operation in named:
        body = {} if "requestBody" in operation else None
        check_problem(api.admin.request(method, fill(path), json=body), "not_found")


@pytest.mark.parametrize("job_id", ["x", "job_UPPER", "%00", "job_" + "1" * 27, "..", "%E2%80%AE"])
def test_what_is_no_job_id_is_no_job(api: LiveApi, job_id: str) -> None:
    response = api.admin.get(f"/v1/jobs/{job_id}/shards")
    assert response.status_code == 404
    assert response.headers["content-type"] == PROBLEM_JSON


@pytest.mark.parametrize(
    "content",
    [b"{", b'{"a": }', b"\xff\xfe", b"[" * 100_000, b'{"recipe": ' + b"9" * 5000 + b"}"],
    ids=["cut", "value", "utf-8", "deep", "digits"],
)
def test_every_body_must_be_json(api: LiveApi, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    for method, path in bodies(api):
        response = api.admin.request(method, path, content=content, headers=headers)
        check_problem(response, "malformed_request")


@pytest.mark.parametrize("content_type", ["text/plain", "application/toml", "", "text/json"])
def test_every_body_must_be_called_json_or_yaml(api: LiveApi, content_type: str) -> None:
    for method, path in bodies(api):
        headers = {"Content-Type": content_type}
        response = api.admin.request(method, path, content=b"{}", headers=headers)
        check_problem(response, "unsupported_media_type")


def test_json_with_a_character_set_is_json(api: LiveApi) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    response = api.admin.post("/v1/recipes/validate", content=b'{"recipe": "a"}', headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'"text"'])
def test_a_body_must_be_an_object(api: LiveApi, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = api.admin.post("/v1/jobs", content=content, headers=headers)
    check_problem(response, "invalid_request")


def test_a_body_of_declared_size_over_the_limit_is_refused(api: LiveApi) -> None:
    content = b" " * (api.settings.body_limit_bytes + 1)
    headers = {"Content-Type": "application/json"}
    for method, path in bodies(api):
        response = api.admin.request(method, path, content=content, headers=headers)
        check_problem(response, "body_too_large")


def test_a_body_of_undeclared_size_is_read_up_to_the_limit(api: LiveApi) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(2 * api.settings.body_limit_bytes // (1 << 16)):
            yield b"[" * (1 << 16)

    headers = {"Content-Type": "application/json"}
    response = api.admin.post("/v1/plans", content=chunks(), headers=headers)
    check_problem(response, "body_too_large")


def test_unknown_fields_are_refused_with_the_nearest_name(api: LiveApi) -> None:
    body = {"recipe": RECIPE, "output_uri": "mem://out/x", "prioritty": 1, "options": {"sead": 1}}
    problem = check_problem(api.admin.post("/v1/jobs", json=body), "unknown_field")
    assert sorted(problem["errors"], key=lambda item: item["pointer"]) == [
        {
            "pointer": "/options/sead",
            "code": "unknown_field",
            "detail": "Unknown field 'sead'. Did you mean 'seed'?",
        },
        {
            "pointer": "/prioritty",
            "code": "unknown_field",
            "detail": "Unknown field 'prioritty'. Did you mean 'priority'?",
        },
    ]


def test_every_route_refuses_unknown_parameters(api: LiveApi) -> None:
    for method, path, operation in api.operations():
        if path in ("/healthz", "/readyz"):
            continue
        body = {} if "requestBody" in operation else None
        response = api.admin.request(method, fill(path), params={"limt": 1}, json=body)
        problem = check_problem(response, "unknown_field")
        assert "'limt'" in problem["detail"]


def test_an_unknown_filter_is_told_the_nearest_one(api: LiveApi) -> None:
    problem = check_problem(api.admin.get("/v1/jobs?stat=queued"), "unknown_field")
    assert problem["detail"] == "Unknown parameter 'stat'. Did you mean 'state'?"


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=many", "limit"),
        ("state=done", "0"),
        ("created_after=yesterday", "created_after"),
        ("created_after=2026-01-01T00:00:00", "created_after"),
        ("method=%00", "method"),
        ("label.a=1&label.a=2", "query"),
        ("label.a=%00", "query"),
    ],
)
def test_values_of_filters_are_checked(api: LiveApi, query: str, parameter: str) -> None:
    problem = check_problem(api.admin.get(f"/v1/jobs?{query}"), "invalid_request")
    assert [error["parameter"] for error in problem["errors"]] == [parameter]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output_uri", ""),
        ("output_uri", "mem://out/\x00"),
        ("labels", {"a": "\x00"}),
        ("labels", {"\x00": "a"}),
        ("labels", {str(i): "" for i in range(33)}),
        ("metadata", {"a": "\x00"}),
        ("priority", 1.5),
        ("deadline_seconds", -1),
        ("type", "split"),
        ("recipe", 3),
        ("options", {"threads": 0}),
    ],
)
def test_values_of_fields_are_checked(api: LiveApi, field: str, value: Any) -> None:
    body = {"recipe": RECIPE, "output_uri": "mem://out/x", field: value}
    problem = check_problem(api.admin.post("/v1/jobs", json=body), "invalid_request")
    assert all(error["pointer"].startswith(f"/{field}") for error in problem["errors"])
    assert problem["errors"]


def test_text_that_is_not_unicode_is_refused_and_can_be_quoted(api: LiveApi) -> None:
    content = rb'{"recipe": "a", "output_uri": "b", "\ud800": "\udfff"}'
    headers = {"Content-Type": "application/json"}
    response = api.admin.post("/v1/plans", content=content, headers=headers)
    assert response.status_code == 422
    assert response.headers["content-type"] == PROBLEM_JSON


def test_a_recipe_is_told_everything_that_is_wrong_with_it(api: LiveApi) -> None:
    recipe = {**RECIPE, "merge_method": "linaer", "models": [{"model": 3}]}
    body = {"recipe": recipe, "output_uri": "mem://out/x"}
    for path in ("/v1/jobs", "/v1/plans"):
        response = api.admin.post(path, json=body)
        problem = check_problem(response, "invalid_recipe")
        assert {error["pointer"] for error in problem["errors"]} >= {"/merge_method"}
        assert len(problem["errors"]) > 1


def test_an_input_that_is_not_there_is_no_404(api: LiveApi) -> None:
    recipe = {**RECIPE, "models": [{"model": "mem://models/a"}, {"model": "mem://models/zz"}]}
    response = api.admin.post("/v1/plans", json={"recipe": recipe, "output_uri": "mem://out/x"})
    problem = check_problem(response, "storage_not_found")
    assert "mem://models/zz" in problem["detail"]


def test_a_crash_shows_nothing_but_the_request_id(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(api.store, "counts", crash)
    with capture_logs() as logs:
        problem = check_problem(api.admin.get("/v1/jobs/counts"), "internal")
    assert "secret" not in str(problem)
    (crash_line,) = (line for line in logs if line["event"] == "request_crashed")
    assert "secret detail" in str(crash_line["exc_info"])
    assert crash_line["request_id"] == problem["request_id"]
    assert problem["request_id"] in problem["detail"]


@pytest.mark.parametrize("method", ["find_token", "list_heads"])
def test_an_outage_of_the_store_asks_to_come_back(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MergeError("The job database does not answer.", code="not_ready", retryable=True)

    monkeypatch.setattr(api.store, "recall_token", lambda _: None)
    monkeypatch.setattr(api.store, method, fail)
    response = api.admin.get("/v1/jobs")
    problem = check_problem(response, "not_ready")
    assert problem["retryable"] is True
    assert response.headers["retry-after"] == str(problem["retry_after_seconds"])


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [("trace-1.a_B", True), ("a" * 129, False), ("white space", False), ("semi;colon", False)],
)
def test_a_safe_request_id_is_kept(api: LiveApi, sent: str, is_kept: bool) -> None:
    response = api.admin.get("/v1/jobs/counts", headers={"X-Request-Id": sent})
    assert (response.headers["x-request-id"] == sent) is is_kept
    assert response.headers["x-request-id"]
