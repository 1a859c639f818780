"""Following the events of a pool."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from workers.messages import PoolEvent, ShardDone, ShardFailed
from workers.pool import ShardPool

REPOSITORY = Path(__file__).parents[2]
_PATIENCE_SECONDS = 60.0


def collect(pool: ShardPool, until: Callable[[list[PoolEvent]], bool]) -> list[PoolEvent]:
    """Events of the pool until a condition on all of them holds."""
    events: list[PoolEvent] = []
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not until(events):
        assert time.monotonic() < deadline, f"still waiting after {events}"
        events += pool.poll(0.5)
    return events


def ends(events: list[PoolEvent]) -> list[ShardDone | ShardFailed]:
    """The events that end a task."""
    return [event for event in events if isinstance(event, (ShardDone, ShardFailed))]


def finish(pool: ShardPool, count: int = 1) -> list[PoolEvent]:
    """Events until ``count`` tasks have ended."""
    return collect(pool, lambda events: len(ends(events)) >= count)


def fail(pool: ShardPool) -> ShardFailed:
    """The failure in which the only task in flight ends."""
    (end,) = ends(finish(pool))
    assert isinstance(end, ShardFailed)
    return end


def has_seen(kind: type, job_id: str) -> Callable[[list[PoolEvent]], bool]:
    """A condition: an event of this kind has come from the job."""
    return lambda events: any(isinstance(e, kind) and e.job_id == job_id for e in events)


def words(log: Path) -> list[str]:
    """What the stub engine wrote, without process ids."""
    return [line.split()[0] for line in log.read_text().splitlines()]
