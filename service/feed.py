"""Waking those who wait for a job's events.

The table of events is the truth and every stream reads it at its own position: nothing is queued
for a slow reader and nothing is lost by a quick restart. What is shared is the question whether
there is anything new: one task asks the store, once for all watched jobs and clients that wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from starlette.concurrency import run_in_threadpool

from service.jobs.errors import StoreUnavailableError
from service.jobs.store import JobQueue

POLL_SECONDS = 0.3
"""How stale a stream may be; all of them together cost one small query in this time."""


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
        self._watches: dict[str, Watch] = {}
        self._asking: asyncio.Task[None] | None = None
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
        watch = self._watches.get(job_id)
        if watch is None:
            watch = self._watches[job_id] = Watch()
        if self._is_closed:
            watch.end()
        elif self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        self._readers[job_id] = self._readers.get(job_id, 0) + 1
        try:
            yield watch
        finally:
            self._readers[job_id] -= 1
            if not self._readers[job_id]:
                del self._readers[job_id], self._watches[job_id]
            if self._asking is not None and not self._watches:
                self._asking.cancel()
                self._asking = None

    def close(self) -> None:
        """End all watches, those to come included: streams finish and clients go elsewhere."""
        self._is_closed = True
        for watch in self._watches.values():
            watch.end()

    async def _ask(self) -> None:
        try:
            while not self._is_closed:
                await self._ask_once()
                await asyncio.sleep(self._poll_seconds)
        finally:  # also after a defect: better that clients come back than that they wait
            for watch in self._watches.values():
                watch.end()

    async def _ask_once(self) -> None:
        watched = {job_id: watch for job_id, watch in self._watches.items() if not watch.is_over}
        try:
            found = await run_in_threadpool(self._store.last_events, list(watched))
        except StoreUnavailableError as error:  # streams stay open until it is back
            self._log.warning("event_feed_waits", reason=error.detail)
            return
        for job_id, watch in watched.items():
            if job_id in found:
                watch.note(found[job_id])
            else:
                watch.end()
