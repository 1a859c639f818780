"""Following a job: all of its events from a place on, then each new one, until there are no more.

Watch first, then read the table, again whenever there is news: every event comes from the table,
so that none can fall between what is old and what is live.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.concurrency import run_in_threadpool

from service.api.deps import Services
from service.jobs.records import EventRecord, EventType

HEARTBEAT_SECONDS = 15.0
"""Silence after which it is said that there is nothing new."""

_PAGE = 500
_LAST = (EventType.JOB_FINISHED, EventType.INTEGRATION_FINISHED)
"""Integrations end after their job: one that does later is in the table for who comes then."""


async def follow_events(
    services: Services, job_id: str, after: int
) -> AsyncGenerator[EventRecord | None]:
    """Events with ``seq > after`` in order, and None in times of silence.

    Ends after ``job.finished``, when the job is forgotten, and when the server stops.

    Raises:
        StoreUnavailableError: The store is away; go on later from the last event that was given.
    """
    position, is_finished = after, False
    async with services.feed.watch(job_id) as watch:
        while True:
            page = await run_in_threadpool(
                services.store.events, job_id, after=position, limit=_PAGE
            )
            for event in page:
                yield event
                position = event.seq
                is_finished = event.type in _LAST
            if page:
                continue
            if is_finished or watch.is_over:
                return
            if not await watch.wait(position, HEARTBEAT_SECONDS):
                yield None
