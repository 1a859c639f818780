"""A job's log: lines for people, whole, in parts, and as it grows."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from service.jobs.records import Claim, EventType, Progress
from service.jobs.states import JobState, ShardState
from tests.integration.api.test_problems import JOB_ID, check_problem
from tests.support.api import LiveApi
from tests.support.jobs import tiny_plan

RECEIPT = {"file_name": "model.safetensors", "bytes_read": 10, "size": 5, "seconds": {"total": 1.5}}


def working(api: LiveApi, **changes: Any) -> Claim:
    _, claim = api.bring_to(JobState.RUNNING, **changes)
    assert claim is not None
    return claim


def read(api: LiveApi, claim: Claim, part: str | None = None) -> Any:
    headers = {"Range": part} if part else {}
    return api.admin.get(f"/v1/jobs/{claim.job_id}/logs", headers=headers)


def warn(api: LiveApi, claim: Claim, text: str) -> None:
    api.store.append_event(claim, EventType.JOB_WARNING, {"code": "x", "detail": text})


def test_it_tells_what_happened_in_order_without_progress(api: LiveApi) -> None:
    _, claim = api.bring_to(JobState.RUNNING)
    assert claim is not None
    store = api.store
    store.save_plan(claim, tiny_plan(shards=2))
    store.set_phase(claim, "merging")
    store.record_shard(claim, 0, ShardState.RUNNING, attempt=1, worker="node:7", device="cuda:0")
    store.update_progress(claim, Progress(bytes_done=1))
    error = {"code": "throttled", "detail": "Slow down."}
    store.record_shard(claim, 0, ShardState.PENDING, attempt=1, error=error)
    store.record_shard(claim, 0, ShardState.RUNNING, attempt=2, worker="node:8", device="cpu")
    store.record_shard(claim, 0, ShardState.SUCCEEDED, attempt=2, receipt=RECEIPT)
    words = {"shard_index": 1, "attempt": 1, "worker": "node:8", "text": "Traceback\n  line"}
    store.append_event(claim, EventType.JOB_LOGGED, words)
    problem = {"code": "missing_tensor", "detail": "It is not there."}
    store.transition(claim, JobState.FAILED, error=problem)

    answer = read(api, claim)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    times, lines = zip(*(line.split("  ", 1) for line in answer.text.splitlines()), strict=True)
    assert all(time == "" or time.endswith("Z") for time in times)
    assert list(lines) == [
        f"submitted: linear, output {store.get(claim.job_id).output_uri}",
        "queued → planning",
        "planning → running",
        "phase merging",
        "shard 0, try 1 began on node:7, cuda:0",
        "shard 0, try 1 failed and is tried again: Slow down. [throttled]",
        "shard 0, try 2 began on node:8, cpu",
        "shard 0, try 2 is published: model.safetensors, 10 bytes read, 5 written (total 1.5 s)",
        "shard 1, try 1 says on node:8:",
        "  Traceback",
        "    line",
        "running → failed",
        "failed: It is not there. [missing_tensor]",
    ]


@pytest.mark.parametrize("part", ["0-0", "3-9", "5-", "-7", "0-99999999", "-99999999"])
def test_a_part_of_it_can_be_asked_for(api: LiveApi, part: str) -> None:
    claim = working(api)
    whole = read(api, claim).content
    start, _, end = part.partition("-")
    first = int(start) if start else max(len(whole) - int(end), 0)
    last = min(int(end), len(whole) - 1) if start and end else len(whole) - 1
    answer = read(api, claim, f"bytes={part}")
    assert answer.status_code == 206
    assert answer.content == whole[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(whole)}"


def test_what_was_read_stays_and_the_rest_can_be_fetched(api: LiveApi) -> None:
    claim = working(api)
    before = read(api, claim).content
    unsatisfied = read(api, claim, f"bytes={len(before)}-")
    check_problem(unsatisfied, "range_not_satisfiable")
    assert unsatisfied.headers["content-range"] == f"bytes */{len(before)}"
    warn(api, claim, "something new")
    rest = read(api, claim, f"bytes={len(before)}-")
    assert rest.status_code == 206
    assert read(api, claim).content == before + rest.content


@pytest.mark.parametrize("part", ["lines=1-2", "bytes=1-2,4-5", "bytes=-", "bytes=x", "bytes=5-2"])
def test_other_ranges_are_as_if_there_were_none(api: LiveApi, part: str) -> None:
    claim = working(api)
    answer = read(api, claim, part)
    if part == "bytes=5-2":
        check_problem(answer, "range_not_satisfiable")
    else:
        assert answer.status_code == 200
        assert answer.content == read(api, claim).content


def test_it_can_be_followed_to_the_end_of_the_job(api: LiveApi) -> None:
    claim = working(api)
    seen = threading.Event()

    def work() -> None:
        assert seen.wait(30)
        warn(api, claim, "while somebody reads")
        api.store.request_cancel(claim.job_id)
        api.store.transition(claim, JobState.CANCELLED)

    worker = threading.Thread(target=work)
    worker.start()
    lines = []
    with api.admin.stream("GET", f"/v1/jobs/{claim.job_id}/logs?follow=true") as answer:
        for line in answer.iter_lines():
            lines.append(line)
            seen.set()
    worker.join()
    assert any("while somebody reads" in line for line in lines)
    assert lines == read(api, claim).text.splitlines()
    assert api.feed.num_readers == 0


def test_there_is_no_log_without_a_job(api: LiveApi) -> None:
    check_problem(api.admin.get(f"/v1/jobs/{JOB_ID}/logs?follow=true"), "not_found")
