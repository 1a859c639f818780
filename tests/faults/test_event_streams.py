"""Streams of events that are cut at random points: what clients saw together is the table."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.jobs.records import EventType, Progress
from service.jobs.sql_store import open_store
from service.jobs.states import JobState
from tests.support.api import LiveApi, live_api, read_stream
from tests.support.jobs import OUTPUT

NUM_CLIENTS = 8
NUM_EVENTS = 200


@pytest.fixture
def api(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApi]:
    template = tmp_path_factory.mktemp("template") / "jobs.db"
    open_store(f"sqlite:///{template}").close()
    with live_api(tmp_path, template) as api:
        yield api


def follow(api: LiveApi, job_id: str, seed: int) -> list[dict[str, Any]]:
    """Read a stream to its end in pieces: each connection is dropped after a random while."""
    chance = random.Random(seed)
    seen: list[dict[str, Any]] = []
    headers = {"Authorization": api.admin.headers["Authorization"], "Accept": "text/event-stream"}
    while True:
        if seen:
            headers["Last-Event-ID"] = str(seen[-1]["seq"])
        patience = chance.randint(0, 40)
        with (
            api.client(headers) as client,
            client.stream("GET", f"/v1/jobs/{job_id}/events") as stream,
        ):
            if stream.status_code == 204:
                return seen
            assert stream.status_code == 200
            for event in read_stream(stream.iter_lines()):
                seen.append(event)
                patience -= 1
                if patience < 0:
                    break  # in the middle of whatever is on its way


def follow_all(api: LiveApi, upto: int, seed: int) -> list[dict[str, Any]]:
    """Read the events of everything from the oldest to a position, in pieces too."""
    chance = random.Random(seed)
    seen: list[dict[str, Any]] = []
    headers = {"Authorization": api.admin.headers["Authorization"], "Accept": "text/event-stream"}
    headers["Last-Event-ID"] = "0"
    while not seen or seen[-1]["position"] < upto:
        patience = chance.randint(0, 80)
        with api.client(headers) as client, client.stream("GET", "/v1/events") as stream:
            assert stream.status_code == 200
            for event in read_stream(stream.iter_lines()):
                seen.append(event)
                patience -= 1
                if patience < 0 or event["position"] >= upto:
                    break  # in the middle of whatever is on its way
        headers["Last-Event-ID"] = str(seen[-1]["position"])
    return seen


@pytest.mark.slow
def test_streams_of_everything_cut_at_random_points_tell_each_event_once(api: LiveApi) -> None:
    """Several jobs are written at once; each client stops at an event that nothing follows."""
    claims = [claim for _ in range(4) if (claim := api.bring_to(JobState.RUNNING)[1])]
    with ThreadPoolExecutor(NUM_CLIENTS + len(claims)) as threads:

        def write(number: int) -> None:
            for turn in range(50):
                api.store.update_progress(claims[number], Progress(bytes_done=turn))

        writers = [threads.submit(write, number) for number in range(len(claims))]
        early = [threads.submit(follow_all, api, 150, seed) for seed in range(NUM_CLIENTS)]
        for writer in writers:
            writer.result()
        upto = api.store.news_bounds().last
        late = [threads.submit(follow_all, api, upto, seed) for seed in range(NUM_CLIENTS)]
        early_seen = [future.result() for future in early]
        found = [future.result() for future in late]
    table = api.admin.get("/v1/events?limit=1000").json()["data"]
    assert len(table) > 200
    assert all(seen == table for seen in found)
    assert all(seen == table[: len(seen)] for seen in early_seen)


@pytest.mark.slow
def test_streams_cut_at_random_points_together_tell_everything_once(api: LiveApi) -> None:
    job, claim = api.bring_to(JobState.PUBLISHING)
    assert claim is not None
    begin = threading.Barrier(NUM_CLIENTS + 1)

    def client(seed: int) -> list[dict[str, Any]]:
        begin.wait()
        return follow(api, job.id, seed)

    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        futures = [threads.submit(client, seed) for seed in range(NUM_CLIENTS)]
        begin.wait()
        for number in range(NUM_EVENTS):
            if number % 3:
                api.store.update_progress(claim, Progress(bytes_done=number))
            else:
                api.store.append_event(claim, EventType.JOB_WARNING, {"number": number})
        api.store.transition(claim, JobState.SUCCEEDED, output=OUTPUT)
        streams = [future.result() for future in futures]
    page = api.admin.get(f"/v1/jobs/{job.id}/events?limit=1000").json()["data"]
    assert len(page) > NUM_EVENTS
    for seen in streams:
        assert seen == page
    api.wait_until(lambda: api.feed.num_readers == 0)
