"""Who may do what: each route without a token, with a bad one, a wrong scope, the right one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from service.auth import Scope
from service.browser import SESSION_COOKIE
from service.middleware import PROBES, PUBLIC_PATHS
from tests.integration.api.test_problems import check_problem, fill
from tests.support.api import LiveApi


def test_only_the_probes_are_public(api: LiveApi) -> None:
    public = [path for _, path, operation in api.operations() if not operation["security"]]
    assert set(public) == PROBES
    assert {"/auth"} == PUBLIC_PATHS - PROBES  # a page for people, not part of the API
    with api.client() as stranger:
        for path in public:
            assert stranger.get(path).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [None, "Bearer", "Bearer wrong", "Basic YTpi", "Bearer " + "x" * 600, "wrong"],
)
def test_every_other_route_needs_a_valid_token(api: LiveApi, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    with api.client(headers) as stranger:
        for method, path, _ in api.operations():
            if path in PUBLIC_PATHS:
                continue
            response = stranger.request(method, fill(path))
            check_problem(response, "unauthenticated")
            assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("path", ["/", "/v1/nothing", "/openapi.json", "/healthz/", "//healthz"])
def test_without_a_token_nothing_is_told_of_what_exists(api: LiveApi, path: str) -> None:
    with api.client() as stranger:
        check_problem(stranger.get(path), "unauthenticated")


def test_a_body_is_not_looked_at_before_the_token(api: LiveApi) -> None:
    with api.client() as stranger:
        check_problem(stranger.post("/v1/jobs", content=b"{"), "unauthenticated")


def test_every_route_refuses_tokens_without_its_scope(api: LiveApi) -> None:
    checked = 0
    for method, path, operation in api.operations():
        scope = operation.get("x-required-scope")
        if scope is None:
            continue
        others = [other.value for other in Scope if other not in (scope, Scope.ADMIN)]
        body = {} if "requestBody" in operation else None
        response = api.with_scopes(*others).request(method, fill(path), json=body)
        problem = check_problem(response, "forbidden")
        assert scope in problem["detail"]
        checked += 1
    assert checked > 15


def test_every_route_admits_a_token_with_just_its_scope(api: LiveApi) -> None:
    for method, path, operation in api.operations():
        scope = operation.get("x-required-scope")
        client = api.with_scopes(*([scope] if scope else []))
        body = {} if "requestBody" in operation else None
        response = client.request(method, fill(path), json=body)
        assert response.status_code not in (401, 403), (method, path)


@pytest.mark.parametrize("kind", ["expired token", "revoked token", "ended session"])
def test_every_route_refuses_what_was_valid_once(api: LiveApi, kind: str) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    expires_at = past if kind == "expired token" else None
    token, secret = api.store.create_token("once", [Scope.ADMIN], expires_at=expires_at)
    headers = {"Authorization": f"Bearer {secret}"}
    if kind == "ended session":
        _, cookie = api.store.create_session(token.id, timedelta(hours=1))
        headers = {"Cookie": f"{SESSION_COOKIE}={cookie}", "Sec-Fetch-Site": "same-origin"}
    if kind != "expired token":
        api.store.revoke_token(token.id)
    with api.client(headers) as client:
        for method, path, _ in api.operations():
            if path not in PUBLIC_PATHS:
                check_problem(client.request(method, fill(path)), "unauthenticated")


def test_every_route_admits_a_session_as_it_does_its_token(api: LiveApi) -> None:
    token, _ = api.store.create_token("person", [Scope.JOBS_READ])
    _, cookie = api.store.create_session(token.id, timedelta(hours=1))
    headers = {"Cookie": f"{SESSION_COOKIE}={cookie}", "Sec-Fetch-Site": "same-origin"}
    with api.client(headers) as browser:
        for method, path, operation in api.operations():
            if path in (*PUBLIC_PATHS, "/v1/sessions", "/v1/sessions/current"):
                continue
            body = {} if "requestBody" in operation else None
            status = browser.request(method, fill(path), json=body).status_code
            is_allowed = operation.get("x-required-scope") in (None, Scope.JOBS_READ)
            assert (status == 403) != is_allowed, (method, path)
            assert status != 401


def test_any_token_may_read_the_openapi_document(api: LiveApi) -> None:
    assert api.with_scopes().get("/openapi.json").json() == api.openapi


def test_a_token_works_until_it_is_revoked(api: LiveApi) -> None:
    body = {"name": "ci", "scopes": ["jobs:read"]}
    created = api.admin.post("/v1/tokens", json=body)
    assert created.status_code == 201
    token = created.json()
    listed = {item["id"]: item for item in api.admin.get("/v1/tokens").json()["data"]}
    assert token["secret"] not in str(listed)
    assert token["secret"].startswith(listed[token["id"]]["prefix"])
    with api.client({"Authorization": f"bearer {token['secret']}"}) as client:
        assert client.get("/v1/jobs").status_code == 200
        for _ in range(2):
            revoked = api.admin.delete(f"/v1/tokens/{token['id']}")
            assert revoked.status_code == 200
            assert revoked.json()["revoked_at"]
        check_problem(client.get("/v1/jobs"), "unauthenticated")


def test_a_token_works_until_it_expires(api: LiveApi) -> None:
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    body = {"name": "old", "scopes": ["jobs:read"], "expires_at": past}
    secret = api.admin.post("/v1/tokens", json=body).json()["secret"]
    with api.client({"Authorization": f"Bearer {secret}"}) as client:
        check_problem(client.get("/v1/jobs"), "unauthenticated")


def test_a_token_has_known_scopes(api: LiveApi) -> None:
    body = {"name": "x", "scopes": ["everything"]}
    check_problem(api.admin.post("/v1/tokens", json=body), "invalid_request")


def test_the_use_of_a_token_is_noted(api: LiveApi) -> None:
    record, secret = api.store.create_token("noted", [Scope.JOBS_READ])
    assert record.last_used_at is None
    with api.client({"Authorization": f"Bearer {secret}"}) as client:
        client.get("/v1/jobs")
    listed = {item["id"]: item for item in api.admin.get("/v1/tokens").json()["data"]}
    assert listed[record.id]["last_used_at"]
