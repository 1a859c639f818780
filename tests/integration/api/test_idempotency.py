"""Repeats of requests that make something: answered with what the first made."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.api.test_problems import check_problem
from tests.support.api import RECIPE, LiveApi

BODIES: dict[str, dict[str, Any]] = {
    "/v1/tokens": {"name": "ci", "scopes": ["jobs:read"]},
    "/v1/webhook-endpoints": {"url": "https://example.com/hook"},
    "/v1/plans": {"recipe": RECIPE, "output_uri": "mem://out/idempotent"},
    "/v1/jobs": {"recipe": RECIPE, "output_uri": "mem://out/idempotent"},
}


@pytest.mark.parametrize("path", BODIES)
def test_the_repeat_of_a_request_shows_what_the_first_made(api: LiveApi, path: str) -> None:
    headers = {"Idempotency-Key": f"key-of{path}"}
    first = api.admin.post(path, json=BODIES[path], headers=headers)
    again = api.admin.post(path, json=BODIES[path], headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    shown = first.json()
    if path == "/v1/tokens":  # only its hash is kept
        del shown["secret"]
    assert again.json() == shown
    other = api.admin.post(path, json=BODIES[path] | {"type": "x"}, headers=headers)
    check_problem(other, "unknown_field" if path != "/v1/jobs" else "invalid_request")
    assert api.admin.post(path, json=BODIES[path]).json()["id"] != shown["id"]


def test_a_key_is_for_one_body(api: LiveApi) -> None:
    headers = {"Idempotency-Key": "one-body"}
    for name, expected in (("a", 201), ("b", 422)):
        body = {"name": name, "scopes": ["jobs:read"]}
        answer = api.admin.post("/v1/tokens", json=body, headers=headers)
        assert answer.status_code == expected
    check_problem(answer, "idempotency_key_reused")
