"""Waking those who wait for a job's events.

The table of events is the truth and every stream reads it at its own position: nothing is queued
for a slow reader and nothing is lost by a quick restart. What is shared is the question whether
there is anything new: one task per watched job asks the store, however many clients wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from starlette.concurrency import run_in_threadpool

from service.jobs.errors import NotFoundError, StoreUnavailableError
from service.jobs.store import JobQueue

POLL_SECONDS = 0.3
"""How stale a stream may be; each watched job costs one small query in this time."""


class Watch:
    """What is known of one job's events; shared by all that wait for them."""

    def __init__(self) -> None:
        self.is_over = False
        self._last = 0
        self._changed = asyncio.Event()

    def note(self, last: int) -> None:
        """The newest event has this ``seq``."""
        if last > self._last:
            self._last = last
            self._wake()

    def end(self) -> None:
        """There will be no more news here: the job was forgotten, or the server stops."""
        self.is_over = True
        self._wake()

    async def wait(self, after: int, timeout_seconds: float) -> bool:
        """Wait for an event later than ``after``, or the end; False when the time was too short."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._last <= after and not self.is_over:
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class EventFeed:
    """The watches of one process. Used from the event loop only.

    Args:
        store: Asked for news.
        poll_seconds: How often.
    """

    def __init__(self, store: JobQueue, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._store = store
        self._poll_seconds = poll_seconds
        self._watches: dict[str, tuple[Watch, asyncio.Task[None]]] = {}
        self._readers: dict[str, int] = {}
        self._is_closed = False
        self._log = structlog.get_logger("mergeyard.events")

    @property
    def num_readers(self) -> int:
        """Streams that are open."""
        return sum(self._readers.values())

    @property
    def num_watches(self) -> int:
        """Jobs that are asked about."""
        return len(self._watches)

    @asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[Watch]:
        """Follow a job while the context lasts."""
        if job_id not in self._watches:
            watch = Watch()
            if self._is_closed:
                watch.end()
            self._watches[job_id] = watch, asyncio.create_task(self._ask(job_id, watch))
        self._readers[job_id] = self._readers.get(job_id, 0) + 1
        try:
            yield self._watches[job_id][0]
        finally:
            self._readers[job_id] -= 1
            if not self._readers[job_id]:
                del self._readers[job_id]
                self._watches.pop(job_id)[1].cancel()

    def close(self) -> None:
        """End all watches, those to come included: streams finish and clients go elsewhere."""
        self._is_closed = True
        for watch, _ in self._watches.values():
            watch.end()

    async def _ask(self, job_id: str, watch: Watch) -> None:
        try:
            while not watch.is_over:
                await self._ask_once(job_id, watch)
                await asyncio.sleep(self._poll_seconds)
        finally:
            watch.end()

    async def _ask_once(self, job_id: str, watch: Watch) -> None:
        try:
            watch.note(await run_in_threadpool(self._store.last_event, job_id))
        except NotFoundError:
            watch.end()
        except StoreUnavailableError as error:  # streams stay open until it is back
            self._log.warning("event_feed_waits", job_id=job_id, reason=error.detail)
