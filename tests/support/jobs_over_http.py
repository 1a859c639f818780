"""Jobs as users see them: submit, follow to the end, and what must hold of each that ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from service.client import ApiError, Client

Found = TypeVar("Found")
PATIENCE_SECONDS = 240


def wait_for(condition: Callable[[], Found], what: str) -> Found:
    """Wait until a condition gives something true; that."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {PATIENCE_SECONDS} s for {what}")


def outlasting(call: Callable[[], Found]) -> Found:
    """Call again until the service answers: it, or what it stands on, may be down for a while."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return call()
        except ApiError as error:
            is_away = error.retryable or error.code == "unreachable"
            if not is_away or time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def shard_states(client: Client, job_id: str) -> list[str]:
    """State of each shard, in order."""
    return [shard["state"] for shard in shards(client, job_id)]


def shards(client: Client, job_id: str) -> list[dict[str, Any]]:
    """The shards of a job."""
    return outlasting(lambda: client.shards(job_id))


def all_events(client: Client, job_id: str) -> list[dict[str, Any]]:
    """All events of a job, from the pages."""
    events: list[dict[str, Any]] = []
    while True:
        after = events[-1]["seq"] if events else 0
        path = f"/v1/jobs/{job_id}/events?limit=1000&after={after}"
        page = outlasting(lambda path=path: client._call("GET", path))["data"]
        if not page:
            return events
        events += page


def finish(client: Client, job_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Wait for the end of a job; it and its events, which have no gaps and one ending."""

    def ended() -> dict[str, Any] | None:
        job = outlasting(lambda: client.job(job_id))
        return job if job["is_terminal"] else None

    job = wait_for(ended, f"the end of {job_id}")
    events = all_events(client, job_id)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["type"] for event in events].count("job.finished") == 1
    assert events[-1]["type"] == "job.finished"
    return job, events
