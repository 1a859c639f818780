"""The events of everything: streams and pages, resumed, filtered, shared and bounded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

import service.api.news
import service.news
from service.api import streams
from service.auth import Scope
from service.jobs.news import NewsItem
from service.jobs.records import Claim, EventType, Progress
from service.jobs.sql_store import open_store
from service.jobs.states import JobState
from tests.integration.api.test_problems import check_problem
from tests.support.api import LiveApi, read_stream

ACCEPT = {"Accept": "text/event-stream"}


@contextmanager
def following(
    api: LiveApi, query: str = "", client: httpx.Client | None = None, **headers: str
) -> Iterator[Iterator[dict[str, Any]]]:
    client = client or api.admin
    with client.stream("GET", f"/v1/events?{query}", headers={**ACCEPT, **headers}) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()
        assert next(lines).startswith("id: ")  # where it stands, before anything happens
        yield read_stream(lines)


def take(events: Iterator[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    return [next(events) for _ in range(number)]


def running(api: LiveApi, **changes: Any) -> tuple[str, Claim]:
    job, claim = api.bring_to(JobState.RUNNING, **changes)
    assert claim is not None
    return job.id, claim


def warn(api: LiveApi, claim: Claim, count: int = 1) -> None:
    for number in range(count):
        api.store.append_event(claim, EventType.JOB_WARNING, {"number": number})


def last(api: LiveApi) -> int:
    return api.store.news_bounds().last


def test_a_stream_begins_now_and_tells_of_all_jobs_as_they_tell_of_themselves(
    api: LiveApi,
) -> None:
    (one, claim), (other, other_claim) = running(api), running(api)
    with following(api, "type=job.warning&type=job.progress") as events:
        warn(api, claim)
        api.store.update_progress(other_claim, Progress(bytes_done=1))
        found = take(events, 2)
    assert [event["job_id"] for event in found] == [one, other]
    for event in found:
        own = api.admin.get(f"/v1/jobs/{event['job_id']}/events?limit=1000").json()["data"][-1]
        assert {name: event[name] for name in own} == own
        assert event["subject"] == event["job_id"]
        assert event["state"] == "running"


def test_a_stream_is_resumed_without_gaps_or_repeats(api: LiveApi) -> None:
    _, claim = running(api)
    start = last(api)
    warn(api, claim, 3)
    with following(api, f"after={start}&type=job.warning") as events:
        first = take(events, 2)
    warn(api, claim, 3)
    resume = {"Last-Event-ID": str(first[-1]["position"])}
    with following(api, "type=job.warning", **resume) as events:
        warn(api, claim)
        rest = take(events, 5)
    assert [e["data"]["number"] for e in first + rest] == [0, 1, 2, 0, 1, 2, 0]
    assert page(api, f"after={start}&type=job.warning")[0] == first + rest


def page(api: LiveApi, query: str, client: httpx.Client | None = None) -> tuple[list[Any], Any]:
    response = (client or api.admin).get(f"/v1/events?{query}")
    assert response.status_code == 200, response.text
    return response.json()["data"], response.json()["next_url"]


def test_pages_follow_each_other_with_their_filters(api: LiveApi) -> None:
    start = last(api)
    _, claim = running(api, labels={"team": "vision"})
    running(api, labels={"team": "language"})
    warn(api, claim, 3)
    url: str | None = f"after={start}&limit=2&label.team=vision&state=running"
    found = []
    while url:
        data, url = page(api, url)
        assert len(data) <= 2
        found += data
        url = url and url.partition("?")[2]
    assert [e["type"] for e in found] == ["job.state_changed", *["job.warning"] * 3]
    assert {e["labels"]["team"] for e in found} == {"vision"}


def test_tokens_and_webhooks_are_told_of_to_those_who_may_see_them(api: LiveApi) -> None:
    reader, hooks = api.with_scopes(Scope.JOBS_READ), api.with_scopes("jobs:read", "webhooks:write")
    reader.get("/v1/jobs")
    hooks.get("/v1/jobs")
    start = last(api)
    made = api.admin.post(
        "/v1/webhook-endpoints", json={"url": "https://example.org/", "events": ["job.failed"]}
    ).json()
    assert api.admin.delete(f"/v1/webhook-endpoints/{made['id']}").status_code == 204
    api.store.create_token("someone", ["jobs:read"])
    job, claim = running(api)
    api.store.transition(claim, JobState.FAILED, error={"code": "internal", "detail": "x"})
    api.admin.delete(f"/v1/jobs/{job}")
    query = f"after={start}"
    told = {
        name: {event["type"] for event in page(api, query, client)[0]}
        for name, client in (("reader", reader), ("hooks", hooks), ("admin", api.admin))
    }
    assert told["reader"] == {"job.forgotten"}
    assert told["hooks"] == {"job.forgotten", "webhook.changed"}
    assert told["admin"] == {"job.forgotten", "webhook.changed", "token.changed"}


def test_who_was_away_for_too_long_is_told_to_begin_anew(api: LiveApi) -> None:
    _, claim = running(api)
    warn(api, claim, 2)
    old = last(api) - 1
    warn(api, claim)
    kept = last(api)
    with api.store._engine.begin() as connection:
        connection.exec_driver_sql(f"DELETE FROM news WHERE position < {kept}")
    for headers in ({}, ACCEPT):
        response = api.admin.get(f"/v1/events?after={old}", headers=headers)
        check_problem(response, "news_gone")
        response = api.admin.get(f"/v1/events?after={kept + 1000}", headers=headers)
        check_problem(response, "news_gone")
    for after in (0, kept - 1):
        told, _ = page(api, f"after={after}&type=job.warning")
        assert [event["position"] for event in told] == [kept]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("after=x", "invalid_request"),
        ("type=job.nothing", "invalid_request"),
        ("stat=running", "unknown_field"),
        ("limit=0", "invalid_request"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(api: LiveApi, query: str, code: str) -> None:
    check_problem(api.admin.get(f"/v1/events?{query}"), code)


def test_the_store_is_asked_once_for_all_who_follow(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, claim = running(api)
    read, asked = api.store.news, []

    def news(after: int, upto: int, limit: int = 1000) -> list[NewsItem]:
        asked.append(after)
        return read(after, upto, limit)

    monkeypatch.setattr(api.store, "news", news)
    num_followers, num_events = 40, 25
    start, told = threading.Barrier(num_followers + 1), []

    def follow() -> None:
        with (
            api.client(dict(api.admin.headers)) as client,
            following(api, "type=job.warning", client) as events,
        ):
            start.wait()
            told.append([event["data"]["number"] for event in take(events, num_events)])

    with ExitStack() as stack:
        threads = [threading.Thread(target=follow) for _ in range(num_followers)]
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        start.wait()
        warn(api, claim, num_events)
    assert told == [list(range(num_events))] * num_followers
    assert len(asked) <= num_events  # as often as there was something new, at most
    api.wait_until(lambda: api.server.services.news.num_readers == 0)


def test_a_stream_ends_with_its_token(api: LiveApi) -> None:
    token, secret = api.store.create_token("leaves", [Scope.JOBS_READ])
    with (
        api.client({"Authorization": f"Bearer {secret}"}) as client,
        following(api, client=client) as events,
    ):
        api.store.revoke_token(token.id)
        assert list(events) == []


def test_no_stream_lasts_for_ever_and_who_comes_back_at_once_misses_nothing(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LONGEST_SECONDS", 0.1)
    for module in (service.news, service.api.news):
        monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    _, claim = running(api)
    headers = {**ACCEPT, "Last-Event-ID": str(last(api))}
    told = []
    for _ in range(3):
        warn(api, claim)
        response = api.admin.get("/v1/events?type=job.warning", headers=headers)  # to its end
        assert response.text.endswith("retry: 100\n\n")
        lines = response.text.splitlines()
        told += [line for line in lines if line.startswith("data: ")]
        headers["Last-Event-ID"] = [line[4:] for line in lines if line.startswith("id: ")][-1]
    assert len(told) == 3


def test_a_replica_tells_of_what_another_one_did(api: LiveApi) -> None:
    """Replicas share the database and nothing else: here another store writes to it."""
    other = open_store(api.settings.effective_database_url, migrate=False)
    job, _ = running(api)
    with following(api, "type=job.updated") as events:
        other.patch(job, labels={"by": "another"})
        assert next(events)["subject"] == job
    other.close()
