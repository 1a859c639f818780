"""What is asked for all the time is answered past the routes, and no differently."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from service.api.answers import ShownJobs
from service.auth import Scope
from service.jobs.sql_store import SqlJobStore
from service.jobs.states import JobState
from tests.integration.api.test_problems import check_problem
from tests.support.api import LiveApi
from tests.support.jobs import new_job

BY_ROUTE = {"Accept": "application/json;q=0.9"}
"""Says the same as nothing, in a form that shortcuts leave to the routes."""

PATHS = ("/v1/jobs/{id}", "/v1/jobs/{id}/events", "/v1/jobs/{id}/shards")
LISTS = ("/v1/jobs", "/v1/jobs?limit=2", "/v1/jobs/counts")


@pytest.fixture(params=["in the event loop", "in a thread"])
def reading(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, api: LiveApi
) -> Iterator[LiveApi]:
    """The service over a store that is at hand (a file), and over one that is not."""
    is_at_hand = request.param == "in the event loop"
    monkeypatch.setattr(SqlJobStore, "is_at_hand", is_at_hand)
    return api


def same_answers(client: httpx.Client, path: str) -> httpx.Response:
    short, long = client.get(path), client.get(path, headers=BY_ROUTE)
    assert (short.status_code, short.content) == (long.status_code, long.content)
    differing = {"x-request-id", "date"}
    assert {k: v for k, v in short.headers.items() if k not in differing} == {
        k: v for k, v in long.headers.items() if k not in differing
    }
    return short


def test_answers_are_those_of_the_routes(reading: LiveApi) -> None:
    job, _ = reading.bring_to(JobState.RUNNING)
    reading.submit("another")
    for path in (*PATHS, *LISTS):
        assert same_answers(reading.admin, path.format(id=job.id)).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_a_job_that_is_none_is_not_found_either_way(reading: LiveApi, path: str) -> None:
    path = path.format(id=f"job_{'0' * 26}")
    for headers in ({}, BY_ROUTE):
        check_problem(reading.admin.get(path, headers=headers), "not_found")


@pytest.mark.parametrize("path", [*PATHS, *LISTS])
def test_the_scope_is_needed_either_way(api: LiveApi, path: str) -> None:
    client = api.with_scopes(Scope.JOBS_WRITE)
    for headers in ({}, BY_ROUTE):
        response = client.get(path.format(id=f"job_{'0' * 26}"), headers=headers)
        check_problem(response, "forbidden")


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        ("/v1/jobs?limit=0", {}, "invalid_request"),
        ("/v1/jobs?limit=101", {}, "invalid_request"),
        ("/v1/jobs?limit=5&limt=5", {}, "unknown_field"),
        ("/v1/jobs%3Flimit=5", {}, "no_such_route"),
        ("/v1/jobs/counts?of=all", {}, "unknown_field"),
        ("/v1/jobs", {"Accept": "text/csv"}, "not_acceptable"),
        ("/v1/jobs/{id}/events", {"Last-Event-ID": "x"}, "malformed_request"),
        ("/v1/jobs/{id}?after=1", {}, "unknown_field"),
    ],
)
def test_what_says_more_is_left_to_the_routes(
    api: LiveApi, path: str, headers: dict[str, str], code: str
) -> None:
    job, _ = api.bring_to(JobState.QUEUED)
    check_problem(api.admin.get(path.format(id=job.id), headers=headers), code)


def test_requests_are_counted_under_their_routes(api: LiveApi) -> None:
    job, _ = api.bring_to(JobState.QUEUED)
    labels = 'method="GET",route="/v1/jobs/{job_id}/shards",status="200"'
    counted = f"mergeyard_http_requests_total{{{labels}}} "

    def count() -> float:
        lines = api.admin.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(counted))

    before = count()
    same_answers(api.admin, f"/v1/jobs/{job.id}/shards")
    assert count() == before + 2


# -- lists


def test_a_list_shows_each_change(api: LiveApi) -> None:
    job = api.submit("changing")
    for state in ("queued", "cancelled"):
        (shown,) = api.admin.get("/v1/jobs?limit=1").json()["data"]
        assert (shown["id"], shown["state"]) == (job["id"], state)
        assert shown == {key: api.admin.get(f"/v1/jobs/{job['id']}").json()[key] for key in shown}
        api.admin.post(f"/v1/jobs/{job['id']}/cancel")


def test_a_list_goes_without_a_job_deleted_meanwhile(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, gone = api.submit("kept"), api.submit("gone")
    heads = api.store.list_heads(limit=2)
    api.admin.post(f"/v1/jobs/{gone['id']}/cancel")
    assert api.admin.delete(f"/v1/jobs/{gone['id']}").status_code == 204
    monkeypatch.setattr(api.store, "list_heads", lambda *_, **__: heads)
    shown = api.admin.get("/v1/jobs?limit=2").json()["data"]
    assert [job["id"] for job in shown] == [kept["id"]]


def test_only_jobs_that_changed_are_read_again(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = api.store, []
    get_many = store.get_many
    monkeypatch.setattr(store, "get_many", lambda ids: read.append(list(ids)) or get_many(ids))
    large, _ = store.submit(new_job(metadata={"note": "x" * 20_000}))
    small, _ = store.submit(new_job())
    shown_jobs = ShownJobs(store, str)
    for _ in range(2):
        shown_jobs.show(store.list_heads(limit=2))
    store.patch(small.id, labels={"team": "blue"})
    shown_jobs.show(store.list_heads(limit=2))
    assert read == [[small.id, large.id], [large.id], [small.id, large.id]]
