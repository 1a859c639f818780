"""Event streams: nothing is lost or repeated, whenever a client comes, goes or comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from service.jobs.errors import StoreUnavailableError
from service.jobs.records import Claim, EventRecord, EventType, Progress
from service.jobs.states import JobState
from tests.integration.api.test_problems import JOB_ID, check_problem
from tests.support.api import LiveApi, read_stream

ACCEPT = {"Accept": "text/event-stream"}


@contextmanager
def stream(api: LiveApi, job_id: str, **headers: str) -> Iterator[httpx.Response]:
    with api.admin.stream(
        "GET", f"/v1/jobs/{job_id}/events", headers={**ACCEPT, **headers}
    ) as response:
        yield response


def listen(api: LiveApi, job_id: str, after: int = 0, limit: int | None = None) -> list[Any]:
    """Events of a stream until it ends, or until there are ``limit``."""
    found: list[Any] = []
    headers = {"Last-Event-ID": str(after)} if after else {}
    with stream(api, job_id, **headers) as response:
        if response.status_code == 204:
            return found
        assert response.status_code == 200
        for event in read_stream(response.iter_lines()):
            found.append(event)
            if len(found) == limit:
                break
    return found


def table(api: LiveApi, job_id: str) -> list[Any]:
    return api.admin.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["data"]


def warn(api: LiveApi, claim: Claim, count: int = 1) -> None:
    for number in range(count):
        api.store.append_event(claim, EventType.JOB_WARNING, {"number": number})


def running(api: LiveApi) -> tuple[str, Claim]:
    job, claim = api.bring_to(JobState.RUNNING)
    assert claim is not None
    return job.id, claim


def finish(api: LiveApi, claim: Claim) -> None:
    api.store.transition(claim, JobState.FAILED, error={"code": "internal", "detail": "x"})


def test_a_stream_tells_what_was_and_what_comes_until_the_job_ends(api: LiveApi) -> None:
    job_id, claim = running(api)
    found = []
    with stream(api, job_id) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert "content-encoding" not in response.headers
        for event in read_stream(response.iter_lines()):
            if not found:
                api.store.update_progress(claim, Progress(tensors_done=1, tensors_total=2))
            if event["type"] == "job.progress":
                finish(api, claim)
            found.append(event)
    assert found == table(api, job_id)
    assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
    assert found[-1]["type"] == "job.finished"


def test_the_client_is_told_when_to_come_back(api: LiveApi) -> None:
    job, _ = api.bring_to(JobState.FAILED)
    with stream(api, job.id) as response:
        first = next(response.iter_lines())
    name, _, milliseconds = first.partition(": ")
    assert name == "retry"
    assert 1500 <= int(milliseconds) <= 2500


def test_cutting_after_every_event_and_resuming_gives_the_table(api: LiveApi) -> None:
    job_id, claim = running(api)
    warn(api, claim, 5)
    finish(api, claim)
    expected = table(api, job_id)
    for cut in range(len(expected)):
        head = listen(api, job_id, limit=cut) if cut else []
        tail = listen(api, job_id, after=head[-1]["seq"] if head else 0)
        assert head + tail == expected


def test_cutting_anywhere_in_the_bytes_and_resuming_gives_the_table(api: LiveApi) -> None:
    job_id, claim = running(api)
    warn(api, claim, 2)
    finish(api, claim)
    expected = table(api, job_id)
    with stream(api, job_id) as response:
        text = response.read().decode()
    for cut in range(0, len(text), 7):
        whole = text[:cut].rpartition("\n\n")[0] + "\n\n"  # clients drop an unfinished event
        head = list(read_stream(iter(whole.split("\n"))))
        tail = listen(api, job_id, after=head[-1]["seq"] if head else 0)
        assert head + tail == expected


def test_events_written_while_clients_come_and_go_are_seen_once_by_each(api: LiveApi) -> None:
    job_id, claim = running(api)
    results: list[list[Any]] = []

    def follow(piece: int) -> None:
        """Reads some events, hangs up, and resumes, as a client on a bad line does."""
        found: list[Any] = []
        while not found or found[-1]["type"] != "job.finished":
            last = found[-1]["seq"] if found else 0
            found += listen(api, job_id, after=last, limit=piece)
        results.append(found)

    readers = [threading.Thread(target=follow, args=(piece,)) for piece in (1, 3, 1000, 1000)]
    for reader in readers:
        reader.start()
    warn(api, claim, 40)
    finish(api, claim)
    for reader in readers:
        reader.join(timeout=30)
    assert results == [table(api, job_id)] * len(readers)


def test_resuming_a_job_that_was_seen_to_its_end_is_answered_with_nothing(api: LiveApi) -> None:
    job, _ = api.bring_to(JobState.SUCCEEDED)
    last = api.store.get(job.id).event_seq
    for headers, query in (({"Last-Event-ID": str(last)}, ""), ({}, f"?after={last}")):
        response = api.admin.get(f"/v1/jobs/{job.id}/events{query}", headers={**ACCEPT, **headers})
        assert (response.status_code, response.content) == (204, b"")


def test_a_stream_goes_on_through_the_end_of_an_earlier_attempt(api: LiveApi) -> None:
    job, _ = api.bring_to(JobState.FAILED)
    api.store.retry(job.id)
    api.store.request_cancel(job.id)
    found = listen(api, job.id)
    assert [event["type"] for event in found].count("job.finished") == 2
    assert found == table(api, job.id)


def test_a_stream_of_no_job_is_a_404_before_it_begins(api: LiveApi) -> None:
    check_problem(api.admin.get(f"/v1/jobs/{JOB_ID}/events", headers=ACCEPT), "not_found")


@pytest.mark.parametrize("position", ["abc", "-1", "1.5", "١", "9" * 20, "99999"])
def test_a_position_that_cannot_be_is_refused(api: LiveApi, position: str) -> None:
    job = api.submit(f"position-{position.encode().hex()}")
    headers = {**ACCEPT, "Last-Event-ID": position.encode()}
    response = api.admin.get(f"/v1/jobs/{job['id']}/events", headers=headers)
    check_problem(response, "malformed_request")


def test_a_stream_ends_when_its_job_is_forgotten(api: LiveApi) -> None:
    job = api.submit("forgotten-while-watched")
    with stream(api, job["id"]) as response:
        events = read_stream(response.iter_lines())
        assert next(events)["type"] == "job.created"
        api.store.request_cancel(job["id"])
        api.store.delete(job["id"])
        rest = list(events)
    assert [event["seq"] for event in rest] in ([], [2, 3])


def test_a_silent_stream_is_kept_open_by_comments(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.following.HEARTBEAT_SECONDS", 0.01)
    job = api.submit("silent")
    with stream(api, job["id"]) as response:
        comments = (line for line in response.iter_lines() if line.startswith(":"))
        assert [next(comments) for _ in range(3)] == [": still here"] * 3


def test_a_stream_ends_in_good_order_when_the_store_is_away(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, claim = running(api)
    before = table(api, job_id)
    read = api.store.events

    def fail_after_the_first(job_id: str, *, after: int, limit: int) -> list[EventRecord]:
        if after:
            raise StoreUnavailableError("away")
        return read(job_id, after=after, limit=limit)

    with monkeypatch.context() as patch:
        patch.setattr("service.feed._PAGE", 2)
        patch.setattr(api.store, "events", fail_after_the_first)
        head = listen(api, job_id)
    assert head == before[:2]
    finish(api, claim)
    assert head + listen(api, job_id, after=head[-1]["seq"]) == table(api, job_id)


def test_a_stream_that_waits_outlasts_an_outage_of_the_store(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, claim = running(api)
    before, is_away = table(api, job_id), threading.Event()

    def be_away(*_: object, **__: object) -> None:
        is_away.set()
        raise StoreUnavailableError("away")

    with stream(api, job_id) as response:
        events = read_stream(response.iter_lines())
        head = [next(events) for _ in before]
        with monkeypatch.context() as patch:
            patch.setattr(api.store, "new_events", be_away)
            finish(api, claim)
            assert is_away.wait(10)
        assert head + list(events) == table(api, job_id)


def test_a_client_far_behind_reads_the_table_while_others_share_what_is_new(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.feed._PAGE", 7)
    monkeypatch.setattr("service.feed._KEPT", 3)  # so that new ones are gone before all are read
    job_id, claim = running(api)
    with stream(api, job_id) as response:
        events = read_stream(response.iter_lines())
        early = [next(events)]
        warn(api, claim, 40)
        late = listen(api, job_id, limit=30)
        finish(api, claim)
        early += events
    assert early == table(api, job_id)
    assert late == early[:30]


def test_open_streams_are_counted_and_gone_when_clients_hang_up(api: LiveApi) -> None:
    job = api.submit("counted-streams")
    feed = api.feed
    before = feed.num_readers
    with stream(api, job["id"]) as response:
        events = read_stream(response.iter_lines())
        next(events)
        assert feed.num_readers == before + 1
        metrics = api.admin.get("/metrics").text
        assert f"mergeyard_event_streams_open {before + 1}.0" in metrics
    api.wait_until(lambda: feed.num_readers == before)


def test_one_task_asks_for_all_readers_of_a_job(api: LiveApi) -> None:
    job = api.submit("shared-watch")
    with stream(api, job["id"]) as one, stream(api, job["id"]) as other:
        readers = [read_stream(response.iter_lines()) for response in (one, other)]
        for events in readers:
            next(events)
        assert api.feed.num_readers >= 2
        assert api.feed.num_watches == 1
