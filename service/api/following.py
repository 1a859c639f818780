"""Following a job: all of its events from a place on, then each new one, until there are no more.

Watch first, then read, again whenever there is news: every event comes from the table, whoever read
it there, so that none can fall between what is old and what is live.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from service.api.deps import Services
from service.feed import SharedEvent
from service.jobs.records import EventType

HEARTBEAT_SECONDS = 15.0
"""Silence after which it is said that there is nothing new."""

_LAST = (EventType.JOB_FINISHED, EventType.INTEGRATION_FINISHED)
"""Integrations end after their job: one that does later is in the table for who comes then."""


async def follow_events(
    services: Services, job_id: str, after: int
) -> AsyncGenerator[list[SharedEvent]]:
    """Events with ``seq > after`` in order, some at a time, and none of them in times of silence.

    Ends after ``job.finished``, when the job is forgotten, and when the server stops.

    Raises:
        StoreUnavailableError: The store is away; go on later from the last event that was given.
    """
    position, is_finished = after, False
    async with services.feed.watch(job_id) as watch:
        while True:
            is_over = watch.is_over
            page = await services.feed.read(job_id, watch, position)
            if page:
                yield page
                position = page[-1].record.seq
                is_finished = page[-1].record.type in _LAST
            elif is_finished or is_over:
                return
            elif not await watch.wait(position, HEARTBEAT_SECONDS):
                yield []
