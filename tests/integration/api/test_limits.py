"""Limits of tokens and of the queue: refused with 429 and when to come again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from service.auth import Scope
from service.jobs.states import JobState
from tests.integration.api.test_problems import check_problem
from tests.support.api import RECIPE, LiveApi, live_api
from tests.support.jobs import ERROR

STREAM = {"Accept": "text/event-stream, text/plain;q=0.5"}


@pytest.fixture
def strict(tmp_path: Path, migrated_database: Path) -> Iterator[LiveApi]:
    limits = {"max_queued_jobs": 3, "max_unfinished_jobs_per_token": 2, "max_streams_per_token": 1}
    with live_api(tmp_path, migrated_database, **limits) as live:
        yield live


def submit(client: httpx.Client, name: str, key: str = "") -> httpx.Response:
    headers = {"Idempotency-Key": key} if key else {}
    body = {"recipe": RECIPE, "output_uri": f"mem://limits/{name}"}
    return client.post("/v1/jobs", json=body, headers=headers)


def test_a_token_has_a_number_of_unfinished_jobs(strict: LiveApi) -> None:
    one = strict.with_scopes(Scope.JOBS_WRITE)
    first = submit(one, "1", key="first").json()
    assert submit(one, "2").status_code == 201
    refused = submit(one, "3")
    problem = check_problem(refused, "quota_exceeded")
    assert problem["retryable"]
    assert refused.headers["retry-after"] == "30"
    assert submit(one, "1", key="first").status_code == 200  # it exists already
    assert submit(strict.admin, "4").status_code == 201
    one.post(f"/v1/jobs/{first['id']}/cancel")
    assert submit(one, "3").status_code == 201


def test_a_full_queue_takes_no_more_from_anybody(strict: LiveApi) -> None:
    failed, claim = strict.bring_to(JobState.RUNNING)
    assert claim is not None
    strict.store.transition(claim, JobState.FAILED, error=ERROR)
    for number in range(3):
        assert submit(strict.with_scopes(Scope.JOBS_WRITE, str(number)), f"q{number}").is_success
    check_problem(submit(strict.admin, "q3"), "queue_full")
    check_problem(strict.admin.post(f"/v1/jobs/{failed.id}/retry"), "queue_full")


@pytest.mark.parametrize("path", ["events", "logs?follow=true"])
def test_a_token_has_a_number_of_open_streams(strict: LiveApi, path: str) -> None:
    job = strict.submit("watched")
    address = f"/v1/jobs/{job['id']}/{path}"
    with ExitStack() as stack:
        open_one = stack.enter_context(strict.admin.stream("GET", address, headers=STREAM))
        lines = open_one.iter_lines()
        assert next(lines)
        refused = strict.admin.get(f"/v1/jobs/{job['id']}/events", headers=STREAM)
        check_problem(refused, "rate_limited")
        assert strict.admin.get(f"/v1/jobs/{job['id']}/events").status_code == 200
        other = strict.with_scopes(Scope.JOBS_READ).stream("GET", address, headers=STREAM)
        assert stack.enter_context(other).status_code == 200
        assert "mergeyard_event_streams_open 2.0" in strict.admin.get("/metrics").text
    strict.wait_until(lambda: strict.feed.num_readers == 0)
    with strict.admin.stream("GET", address, headers=STREAM) as again:
        assert again.status_code == 200


def test_a_token_that_asks_too_often_is_told_to_wait(
    tmp_path: Path, migrated_database: Path
) -> None:
    with live_api(tmp_path, migrated_database, requests_per_second=1) as api:
        answers = [api.admin.get("/v1/version") for _ in range(4)]
        assert answers[0].status_code == 200
        check_problem(answers[-1], "rate_limited")
        assert answers[-1].headers["retry-after"] == "1"
        assert api.with_scopes().get("/v1/version").status_code == 200
        assert httpx.get(f"{api.url}/healthz").status_code == 200


def test_an_address_from_which_bad_tokens_come_is_refused_for_a_while(
    tmp_path: Path, migrated_database: Path
) -> None:
    proxied = {"failed_logins_per_minute": 3, "trusted_proxies": "127.0.0.0/8"}
    with live_api(tmp_path, migrated_database, **proxied) as api:
        assert api.admin.get("/v1/version").status_code == 200
        new = api.with_scopes(Scope.JOBS_READ)
        guesser, other = ({"X-Forwarded-For": f"6.6.6.6, 10.9.8.{n}"} for n in (7, 8))
        with api.client() as stranger:
            for number, path in enumerate(("/v1/sessions", "/v1/jobs")):
                bad = guesser | {"Authorization": f"Bearer bad-{number}"}
                check_problem(stranger.post(path, headers=bad), "unauthenticated")
            assert stranger.get("/auth?code=x", headers=guesser).status_code == 401
            for path in ("/auth?code=y", "/v1/jobs"):
                refused = stranger.get(path, headers=guesser | {"Authorization": "Bearer bad-3"})
                check_problem(refused, "too_many_failures")
                assert refused.headers["retry-after"] == "60"
            check_problem(stranger.get("/v1/jobs", headers=guesser), "unauthenticated")
            assert stranger.get("/auth?code=y", headers=other).status_code == 401
        assert new.get("/v1/jobs", headers=other).status_code == 200
        assert api.admin.get("/v1/version", headers=guesser).status_code == 200
        assert new.get("/v1/jobs", headers=guesser).status_code == 200  # good a moment ago
        fresh = api.with_scopes(Scope.JOBS_READ, Scope.METRICS_READ)
        check_problem(fresh.get("/v1/jobs", headers=guesser), "too_many_failures")
