"""What happens to anything, for all who follow it: asked for once, told to everybody.

One task reads the news from the store and keeps the latest; whoever follows reads them from there,
each at its own pace. Only one who is far behind reads the store itself, until it has caught up.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cached_property

import msgspec
import structlog
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from service.feed import POLL_SECONDS
from service.jobs.errors import StoreUnavailableError
from service.jobs.news import NewsItem, NewsStore
from service.problems import RequestError

HEARTBEAT_SECONDS = 15.0
"""Silence after which it is said up to where there is nothing new."""

_SECONDS_APART = 0.001
"""Between two readers that are told of the same: requests are answered in between."""

_PAGE = 500
_MOST_KEPT = 1000


class SharedNews:
    """An item of the news, and its text, which is made once for all who send it."""

    def __init__(self, item: NewsItem) -> None:
        self.item = item

    @cached_property
    def sse(self) -> bytes:
        """As a server-sent event."""
        data = msgspec.json.encode(self.item).decode()
        return format_sse_event(data_str=data, event=self.item.type, id=str(self.item.position))


class News:
    """The news of one process. Used from the event loop only.

    Args:
        store: Asked for news.
        poll_seconds: How often, while anybody follows.
    """

    def __init__(self, store: NewsStore, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._store = store
        self._poll_seconds = poll_seconds
        self._kept: list[SharedNews] = []
        self._first = 0  # what came after it, up to the last, is kept
        self._last = 0
        self._changed = asyncio.Event()
        self._asking: asyncio.Task[None] | None = None
        self._num_readers = 0
        self._is_closed = False
        self._log = structlog.get_logger("mergeyard.news")

    @property
    def num_readers(self) -> int:
        """Those who follow."""
        return self._num_readers

    def close(self) -> None:
        """End all streams, those to come included: clients go elsewhere."""
        self._is_closed = True
        self._wake()

    async def place(self, position: int | None) -> int:
        """Where to begin: at a position that was given before, or (None) with what comes now.

        Raises:
            RequestError: ``news_gone``: what came after the position is not kept any more.
            StoreUnavailableError: The store is away.
        """
        bounds = await run_in_threadpool(self._store.news_bounds)
        if position is None:
            return bounds.last
        if position and not bounds.first <= position <= bounds.last:
            raise RequestError(
                "What came after this position is not kept any more. Read what you follow again,"
                " and begin anew without a position.",
                code="news_gone",
            )
        return position

    async def follow(self, after: int) -> AsyncGenerator[tuple[Sequence[SharedNews], int]]:
        """All news after a position in order, as they come: some, and the position they reach.

        None of them in times of silence. Ends when the server stops.

        Raises:
            StoreUnavailableError: The store is away; go on later from the last position.
        """
        async with self._reading() as asking:
            while not (self._is_closed or asking.done()):
                if after >= self._last:
                    if not await self._wait():
                        yield (), after
                    continue
                found, after = await self._read(after)
                if found:
                    yield found, after

    async def _read(self, after: int) -> tuple[Sequence[SharedNews], int]:
        """Some news after a position, and the position that has been read up to with them."""
        upto = self._last
        if after >= self._first:
            start = bisect_right(self._kept, after, key=_position)
            found = self._kept[start : start + _PAGE]
        else:
            items = await run_in_threadpool(self._store.news, after, upto, _PAGE)
            found = [SharedNews(item) for item in items]
        return found, found[-1].item.position if len(found) == _PAGE else upto

    async def _wait(self) -> bool:
        """Wait for news or the end; False when it took too long."""
        try:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            return False
        spread = min(self._num_readers * _SECONDS_APART, self._poll_seconds)
        await asyncio.sleep(random.uniform(0, spread))  # noqa: S311 - spreads load
        return True

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[asyncio.Task[None]]:
        while self._asking is None or self._asking.done():
            await self._begin()
        asking = self._asking
        self._num_readers += 1
        try:
            yield asking
        finally:
            self._num_readers -= 1
            if not self._num_readers and self._asking is not None:
                self._asking.cancel()
                self._asking = None

    async def _begin(self) -> None:
        """Keep what comes from now on; what came before is read from the store."""
        bounds = await run_in_threadpool(self._store.news_bounds)
        if self._asking is None or self._asking.done():  # nobody else has begun meanwhile
            self._kept, self._first, self._last = [], bounds.last, bounds.last
            self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        try:
            while not self._is_closed:
                await asyncio.sleep(self._poll_seconds)
                await self._ask_once()
        finally:  # also after a defect: better that clients come back than that they wait
            self._wake()

    async def _ask_once(self) -> None:
        try:
            upto = (await run_in_threadpool(self._store.news_bounds)).last
            while self._last < upto:
                items = await run_in_threadpool(self._store.news, self._last, upto, _PAGE)
                self._kept.extend(map(SharedNews, items))
                self._last = items[-1].position if len(items) == _PAGE else upto
                self._wake()
        except StoreUnavailableError as error:  # streams stay open until it is back
            self._log.warning("news_wait", reason=error.detail)
        if len(self._kept) > 2 * _MOST_KEPT:
            self._first = _position(self._kept[-_MOST_KEPT - 1])
            del self._kept[:-_MOST_KEPT]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _position(news: SharedNews) -> int:
    return news.item.position
