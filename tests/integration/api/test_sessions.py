"""Logging in with a browser: cookie, one-time link, and what other sites cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from service.auth import Scope
from service.browser import SESSION_COOKIE
from tests.integration.api.test_problems import check_problem
from tests.support.api import LiveApi, live_api

OURS = {"Sec-Fetch-Site": "same-origin"}


@contextmanager
def log_in(api: LiveApi, *scopes: str) -> Iterator[httpx.Client]:
    """A browser: its cookie is all that it has."""
    _, secret = api.store.create_token("person", scopes)
    with api.client() as browser:
        answer = browser.post("/v1/sessions", headers={"Authorization": f"Bearer {secret}"})
        assert answer.status_code == 201, answer.text
        assert secret not in answer.text
        yield browser


def cookie_of(answer: httpx.Response) -> str:
    return answer.headers["set-cookie"]


def test_a_token_is_exchanged_for_a_cookie_that_scripts_cannot_read(api: LiveApi) -> None:
    answer = api.admin.post("/v1/sessions")
    cookie = cookie_of(answer)
    for attribute in ("HttpOnly", "SameSite=strict", "Path=/;", "expires="):
        assert attribute in cookie
    assert "Secure" not in cookie
    assert "Domain" not in cookie
    api.admin.cookies.clear()


def test_behind_https_the_cookie_is_secure(api: LiveApi) -> None:
    answer = api.admin.post("/v1/sessions", headers={"X-Forwarded-Proto": "https"})
    assert "Secure" in cookie_of(answer)
    api.admin.cookies.clear()


def test_a_session_tells_who_asks_and_has_the_scopes_of_its_token(api: LiveApi) -> None:
    with log_in(api, Scope.JOBS_READ) as browser:
        me = browser.get("/v1/sessions/current").json()
        assert me["object"] == "session"
        assert me["id"].startswith("ses_")
        assert (me["token_name"], me["scopes"]) == ("person", ["jobs:read"])
        assert browser.get("/v1/jobs").status_code == 200
        check_problem(browser.get("/v1/tokens"), "forbidden")


def test_with_a_token_itself_there_is_no_session(api: LiveApi) -> None:
    me = api.admin.get("/v1/sessions/current").json()
    assert (me["id"], me["created_at"], me["scopes"]) == (None, None, ["admin"])
    assert api.admin.delete("/v1/sessions/current").status_code == 204
    assert api.admin.get("/v1/sessions/current").status_code == 200


def test_after_logging_out_the_cookie_is_worth_nothing(api: LiveApi) -> None:
    with log_in(api, Scope.JOBS_READ) as browser:
        secret = browser.cookies[SESSION_COOKIE]
        answer = browser.delete("/v1/sessions/current", headers=OURS)
        assert answer.status_code == 204
        assert SESSION_COOKIE not in browser.cookies
        stolen = browser.get("/v1/jobs", headers={"Cookie": f"{SESSION_COOKIE}={secret}"})
        check_problem(stolen, "unauthenticated")


def test_a_session_ends_when_its_token_is_revoked(api: LiveApi) -> None:
    with log_in(api, Scope.JOBS_READ) as browser:
        token_id = browser.get("/v1/sessions/current").json()["token_id"]
        api.admin.delete(f"/v1/tokens/{token_id}")
        check_problem(browser.get("/v1/jobs"), "unauthenticated")


def test_a_session_cannot_prolong_itself(api: LiveApi) -> None:
    with log_in(api, Scope.ADMIN) as browser:
        check_problem(browser.post("/v1/sessions", headers=OURS), "forbidden")


@pytest.mark.parametrize(
    "cookie", ["", "x", "a" * 600, "caf\u00e9", 'a"b', "a; Path=/", "=", f"x; {SESSION_COOKIE}"]
)
def test_other_cookies_are_nobody(api: LiveApi, cookie: str) -> None:
    with api.client() as stranger:
        header = f"{SESSION_COOKIE}={cookie}".encode()
        check_problem(stranger.get("/v1/jobs", headers={"Cookie": header}), "unauthenticated")


@pytest.mark.parametrize(
    ("headers", "is_ours"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Origin": "{origin}"}, True),
        ({}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "https://elsewhere.example"}, False),
        ({"Origin": "{origin}.elsewhere.example"}, False),
        ({"Origin": "http://["}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "{origin}"}, False),
        ({"Sec-Fetch-Site": "same-site", "Origin": "{origin}"}, False),
        ({"Sec-Fetch-Site": "none"}, False),
    ],
)
def test_only_our_own_pages_change_something_with_a_cookie(
    api: LiveApi, headers: dict[str, str], is_ours: bool
) -> None:
    sent = {name: value.format(origin=api.url) for name, value in headers.items()}
    with log_in(api, Scope.ADMIN) as browser:
        assert browser.get("/v1/jobs", headers=sent).status_code == 200
        answer = browser.post("/v1/tokens", json={"name": "x", "scopes": ["admin"]}, headers=sent)
    if is_ours:
        assert answer.status_code == 201
    else:
        check_problem(answer, "forbidden")


def test_a_token_goes_before_a_cookie_and_needs_no_origin(api: LiveApi) -> None:
    with log_in(api, Scope.JOBS_READ) as browser:
        headers = {"Authorization": api.admin.headers["authorization"]}
        assert browser.post("/v1/sessions", headers=headers).status_code == 201


def test_a_link_logs_in_once(api: LiveApi) -> None:
    token, _ = api.store.create_token("first", [Scope.ADMIN])
    code = api.store.create_login_code(token.id, timedelta(minutes=1))
    with api.client() as browser, api.client() as thief:
        answer = browser.get("/auth", params={"code": code})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert code not in cookie_of(answer)
        assert browser.get("/v1/tokens").status_code == 200
        refused = thief.get("/auth", params={"code": code})
        assert refused.status_code == 401
        assert "once" in refused.text
        assert "set-cookie" not in refused.headers
        check_problem(thief.get("/v1/tokens"), "unauthenticated")


def test_behind_a_prefix_cookie_and_link_stay_below_it(
    tmp_path: Path, migrated_database: Path
) -> None:
    with live_api(tmp_path, migrated_database, root_path="/mergeyard") as api:
        token, _ = api.store.create_token("first", [Scope.ADMIN])
        for path in ("/mergeyard/auth", "/auth"):
            with api.client() as browser:
                code = api.store.create_login_code(token.id, timedelta(minutes=1))
                answer = browser.get(path, params={"code": code})
            assert answer.headers["location"] == "/mergeyard/"
            assert "Path=/mergeyard;" in cookie_of(answer)
