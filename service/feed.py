"""Handing a job's events to those who wait for them.

The table of events is the truth: every stream has its own position in it, nothing is queued for a
slow reader and nothing is lost by a quick restart. What is shared is the work. One task asks the
store for what is new, once for all watched jobs and clients; the newest events of a watched job are
kept, as they were read and as the text that streams send. Who wants older ones reads the table.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import cached_property
from itertools import islice

import msgspec
import structlog
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from service.jobs.errors import StoreUnavailableError
from service.jobs.records import EventRecord
from service.jobs.store import JobQueue

POLL_SECONDS = 0.3
"""How stale a stream may be; all of them together cost one small query in this time."""

_PAGE = 500
_KEPT = 200
"""Newest events of a watched job: far more than come between two looks."""


class SharedEvent:
    """An event, and its text, which is made once for all who send it."""

    def __init__(self, record: EventRecord) -> None:
        self.record = record

    @cached_property
    def sse(self) -> bytes:
        """As a server-sent event."""
        record = self.record
        data = msgspec.json.encode(record).decode()
        return format_sse_event(data_str=data, event=record.type, id=str(record.seq))


class Watch:
    """The newest events of one job; shared by all that wait for more.

    Attributes:
        is_over: No more events will come.
        reading: Held by whoever reads the table, so that others find what they were about to read.
    """

    def __init__(self) -> None:
        self.is_over = False
        self.reading = asyncio.Lock()
        self._events: deque[SharedEvent] = deque(maxlen=_KEPT)
        self._last: int | None = None
        self._changed = asyncio.Event()

    @property
    def position(self) -> int | None:
        """``seq`` of the newest event that was read; None before anybody has read any."""
        return self._last

    def after(self, position: int) -> list[SharedEvent] | None:
        """The events after a position, as far as they are known; None: some are no longer kept."""
        if self._last is None or position < self._last - len(self._events):
            return None
        known = max(self._last - position, 0)
        return list(islice(self._events, len(self._events) - known, None))

    def take(self, after: int, events: Iterable[SharedEvent]) -> None:
        """Note what the table has after a position; what is known already does not count."""
        if self._last is None:
            self._last = after
        before = self._last
        for event in events:
            if event.record.seq == self._last + 1:
                self._events.append(event)
                self._last += 1
        if self._last > before:
            self._wake()

    def end(self) -> None:
        """There will be no more news here: the job was forgotten, or the server stops."""
        self.is_over = True
        self._wake()

    async def wait(self, after: int, timeout_seconds: float) -> bool:
        """Wait for an event later than ``after``, or the end; False when the time was too short."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while (self._last or 0) <= after and not self.is_over:
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

    async def read(self, job_id: str, watch: Watch, after: int) -> list[SharedEvent]:
        """The events of a job after a position: what its watch has kept, or else from the table.

        There may be more after those that are given, but none if none are.

        Raises:
            StoreUnavailableError: They cannot be read now.
        """
        async with watch.reading:
            kept = watch.after(after)
            if kept is not None:
                return kept
            found = await run_in_threadpool(self._store.events, job_id, after=after, limit=_PAGE)
            page = [SharedEvent(event) for event in found]
            if len(page) < _PAGE:
                watch.take(after, page)
            return page

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
        positions = {
            job_id: watch.position
            for job_id, watch in watched.items()
            if watch.position is not None
        }
        try:
            found = await run_in_threadpool(self._store.new_events, positions, limit=_PAGE)
        except StoreUnavailableError as error:  # streams stay open until it is back
            self._log.warning("event_feed_waits", reason=error.detail)
            return
        for job_id, position in positions.items():
            if job_id in found:
                watched[job_id].take(position, map(SharedEvent, found[job_id]))
            else:
                watched[job_id].end()
