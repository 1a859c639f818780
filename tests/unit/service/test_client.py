"""The client: streams without gaps whatever the connection does, and one error for all trouble."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from merging.errors import MergeError, error_from_dict
from service import client as client_module
from service.client import ApiError, Client

JOB = "/v1/jobs/job_1"
EVENTS = f"{JOB}/events"
UNAVAILABLE = {"code": "unavailable", "detail": "The job store is away.", "retryable": True}
Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_RECONNECT_SECONDS", 0)


def connect(handler: Handler) -> Client:
    return Client("http://service", "token", transport=httpx.MockTransport(handler))


def event(seq: int, kind: str = "job.progress") -> bytes:
    return f"id: {seq}\ndata: {json.dumps({'seq': seq, 'type': kind})}\n\n".encode()


class Broken(httpx.SyncByteStream):
    """A body that ends with the connection."""

    def __init__(self, *parts: bytes) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[bytes]:
        yield from self._parts
        raise httpx.ReadError("connection reset")


class Service:
    """Answers requests for the stream from a list, and all others with a job that runs."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[str | None] = []
        self.job: dict[str, Any] = {"is_terminal": False}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == JOB:
            return httpx.Response(200, json=self.job)
        if "text/event-stream" not in request.headers["accept"]:
            return httpx.Response(200, json={"data": []})
        self.asked.append(request.headers.get("Last-Event-ID"))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_broken_stream_is_taken_up_where_it_broke() -> None:
    service = Service(
        httpx.Response(200, stream=Broken(event(1), event(2), b"id: 3\nda")),
        httpx.ConnectError("refused"),
        httpx.Response(503, json=UNAVAILABLE),
        httpx.Response(200, content=event(3)),
        httpx.Response(200, content=event(4, "job.finished")),
    )
    with connect(service) as client:
        assert [event["seq"] for event in client.events("job_1")] == [1, 2, 3, 4]
    assert service.asked == [None, "2", "2", "2", "3"]


def test_a_stream_that_was_seen_to_its_end_is_over() -> None:
    service = Service(httpx.Response(204))
    service.job = {"is_terminal": True}
    with connect(service) as client:
        assert list(client.events("job_1", after=7)) == []
    assert service.asked == ["7"]


def test_a_service_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_PATIENCE_SECONDS", -1)
    service = Service(httpx.ConnectError("refused"))
    with connect(service) as client, pytest.raises(ApiError) as raised:
        list(client.events("job_1"))
    assert raised.value.code == "unreachable"
    assert "No service answers at http://service (refused)." in raised.value.detail


def test_a_stream_that_is_refused_is_not_asked_for_again() -> None:
    service = Service(httpx.Response(404, json={"code": "not_found", "detail": "There is none."}))
    with connect(service) as client, pytest.raises(ApiError, match=r"There is none\."):
        list(client.events("job_1"))
    assert len(service.asked) == 1


def test_all_events_go_on_from_the_last_position_also_where_nothing_was_told() -> None:
    service = Service(
        httpx.Response(200, stream=Broken(b"id: 5\nretry: 2\n\n", event(6), b": still\nid: 9\n\n")),
        httpx.ConnectError("refused"),
        httpx.Response(200, content=event(10)),
        httpx.Response(410, json={"code": "news_gone", "detail": "They are gone."}),
    )
    with connect(service) as client:
        events = client.all_events(after=0, type=["job.progress"])
        assert [next(events)["seq"] for _ in range(2)] == [6, 10]
        with pytest.raises(ApiError, match="They are gone"):
            next(events)
    assert service.asked == ["0", "9", "9", "10"]


def test_a_submission_always_has_a_key() -> None:
    keys = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        return httpx.Response(201, json={"id": "job_1"})

    with connect(answer) as client:
        client.submit("recipe", "out")
        client.submit("recipe", "out")
        client.submit("recipe", "out", idempotency_key="mine")
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


def test_a_problem_becomes_one_of_our_errors() -> None:
    problem = {
        "code": "invalid_recipe",
        "detail": "Two things are wrong.",
        "errors": [
            {"pointer": "/models", "code": "invalid_recipe", "detail": "No models."},
            {"parameter": "limit", "code": "invalid_request", "detail": "Too many."},
        ],
    }
    error = ApiError(problem)
    assert isinstance(error, MergeError)
    assert (error.detail, error.code) == ("Two things are wrong.", "invalid_recipe")
    assert [fault.pointer for fault in error.faults] == ["/models", "limit"]
    assert not error.retryable
    assert ApiError(UNAVAILABLE).retryable
    assert error_from_dict(error.to_dict()).faults == error.faults


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (httpx.Response(502, text="<html>"), "answered 502 without an explanation"),
        (httpx.Response(500, json=["odd"]), "answered 500 without an explanation"),
        (httpx.Response(200, text="<html>"), "is not Mergeyard: status 200"),
        (httpx.Response(302, headers={"Location": "/login"}), "is not Mergeyard: status 302"),
    ],
)
def test_what_is_not_the_service_is_told_as_such(response: httpx.Response, says: str) -> None:
    with connect(lambda _: response) as client, pytest.raises(ApiError, match=says):
        client.job("job_1")


@pytest.mark.parametrize("token", ["", "a\nb", "schlüssel"])
def test_a_token_that_cannot_be_sent_is_refused(token: str) -> None:
    with pytest.raises(ApiError, match="token"):
        Client("http://service", token)
